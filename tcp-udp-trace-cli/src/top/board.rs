//! The data on the screen: rates and totals of processes and flows.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
    net::SocketAddr,
};

use tcp_udp_trace::{Comm, Event, Protocol, Traffic, consumer::Growth};

/// The seconds that the curves keep.
const HISTORY: usize = 120;
/// The seconds after which a process or flow without traffic is removed.
const PATIENCE: u32 = 60;

/// Bytes sent, and bytes received.
pub(crate) type Bytes = [u64; 2];

/// The traffic of a process, of a flow, or of the machine.
#[derive(Debug, Default)]
pub(crate) struct Load {
    pub(crate) total: Bytes,
    /// Bytes per second, averaged over the last few seconds.
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
        // A sample can come shortly before or after the end of a second. The mean of the previous
        // rate and the last second evens that out.
        for (rate, bytes) in self.rate.iter_mut().zip(&self.since_tick) {
            *rate = (*rate + bytes) / 2;
        }
        self.since_tick = [0, 0];
    }

    /// Returns the rate and the total of both directions. The tables are sorted by these.
    pub(crate) fn both(&self) -> Bytes {
        [self.rate.iter().sum(), self.total.iter().sum()]
    }
}

/// A process that owns sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Owner {
    pub(crate) pid: u32,
    pub(crate) comm: Comm,
}

/// A TCP connection, or the datagrams between a UDP socket and one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Flow {
    pub(crate) owner: Option<Owner>,
    pub(crate) protocol: Protocol,
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
}

/// All data on the screen.
#[derive(Debug, Default)]
pub(crate) struct Board {
    pub(crate) all: Load,
    /// The bytes sent and received in each second, the latest last.
    pub(crate) history: [VecDeque<u64>; 2],
    processes: HashMap<Option<Owner>, Load>,
    flows: HashMap<Flow, Load>,
    growth: Growth,
}

impl Board {
    /// Adds the bytes of an event.
    pub(crate) fn count(&mut self, event: &Event) {
        let Traffic {
            tx_bytes, rx_bytes, ..
        } = self.growth.add(event).traffic;
        let bytes = [tx_bytes, rx_bytes];
        if bytes == [0, 0] {
            return;
        }
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

    /// Ends a second: updates the history and the rates, and removes idle processes and flows.
    pub(crate) fn tick(&mut self) {
        for (history, bytes) in self.history.iter_mut().zip(self.all.since_tick) {
            history.push_back(bytes);
            history.drain(..history.len().saturating_sub(HISTORY));
        }
        self.all.tick();
        tick(&mut self.processes);
        tick(&mut self.flows);
    }

    /// Returns the processes, the busiest first.
    pub(crate) fn processes(&self) -> Vec<(&Option<Owner>, &Load)> {
        busiest(&self.processes)
    }

    /// Returns the flows, the busiest first.
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
