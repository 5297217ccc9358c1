//! What is shown: rates and totals of processes and flows.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
    net::SocketAddr,
};

use crate::growth::Growth;
use tcp_udp_trace::{Comm, Event, Protocol};

/// How many seconds are remembered for the curves.
const HISTORY: usize = 120;
/// How many seconds something without traffic stays.
const PATIENCE: u32 = 60;

/// Bytes sent, and bytes received.
pub(crate) type Bytes = [u64; 2];

/// How much something has carried.
#[derive(Debug, Default)]
pub(crate) struct Load {
    pub(crate) total: Bytes,
    /// A second, over the last few.
    pub(crate) rate: Bytes,
    since_tick: Bytes,
    idle: u32,
}

impl Load {
    fn add(&mut self, bytes: Bytes) {
        for (index, bytes) in bytes.into_iter().enumerate() {
            self.total[index] += bytes;
            self.since_tick[index] += bytes;
        }
    }

    fn tick(&mut self) {
        self.idle = match self.since_tick {
            [0, 0] => self.idle + 1,
            _ => 0,
        };
        // A sample may come just before or after the second is over; half of what was before evens that out.
        for (rate, bytes) in self.rate.iter_mut().zip(&self.since_tick) {
            *rate = (*rate + bytes) / 2;
        }
        self.since_tick = [0, 0];
    }

    /// By what the tables are sorted.
    pub(crate) fn both(&self) -> Bytes {
        [self.rate.iter().sum(), self.total.iter().sum()]
    }
}

/// A process, as far as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Owner {
    pub(crate) pid: u32,
    pub(crate) comm: Comm,
}

/// A connection, or what a UDP socket exchanges with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Flow {
    pub(crate) owner: Option<Owner>,
    pub(crate) protocol: Protocol,
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
}

/// Everything that is shown.
#[derive(Debug, Default)]
pub(crate) struct Board {
    pub(crate) all: Load,
    /// The bytes of each second, the latest last.
    pub(crate) history: [VecDeque<u64>; 2],
    processes: HashMap<Option<Owner>, Load>,
    flows: HashMap<Flow, Load>,
    growth: Growth,
}

impl Board {
    /// Takes in what an event tells.
    pub(crate) fn count(&mut self, event: &Event) {
        let (tx, rx) = self.growth.of(event);
        if (tx, rx) == (0, 0) {
            return;
        }
        let bytes = [tx, rx];
        let owner = event.process.as_ref().map(|process| Owner {
            pid: process.pid,
            comm: process.comm,
        });
        let socket = &event.socket;
        let flow = Flow {
            owner,
            protocol: socket.protocol,
            local: socket.local,
            remote: socket.remote,
        };
        self.all.add(bytes);
        self.processes.entry(owner).or_default().add(bytes);
        self.flows.entry(flow).or_default().add(bytes);
    }

    /// A second is over.
    pub(crate) fn tick(&mut self) {
        for (history, bytes) in self.history.iter_mut().zip(self.all.since_tick) {
            history.push_back(bytes);
            history.drain(..history.len().saturating_sub(HISTORY));
        }
        self.all.tick();
        tick(&mut self.processes);
        tick(&mut self.flows);
    }

    /// The processes, the busiest first.
    pub(crate) fn processes(&self) -> Vec<(&Option<Owner>, &Load)> {
        busiest(&self.processes)
    }

    /// The flows, the busiest first.
    pub(crate) fn flows(&self) -> Vec<(&Flow, &Load)> {
        busiest(&self.flows)
    }
}

fn tick<K: Eq + Hash>(loads: &mut HashMap<K, Load>) {
    loads.values_mut().for_each(Load::tick);
    loads.retain(|_, load| load.idle < PATIENCE);
}

fn busiest<K>(loads: &HashMap<K, Load>) -> Vec<(&K, &Load)> {
    let mut loads: Vec<_> = loads.iter().collect();
    loads.sort_by_key(|(_, load)| std::cmp::Reverse(load.both()));
    loads
}
