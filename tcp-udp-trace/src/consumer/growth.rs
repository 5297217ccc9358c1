//! The differences between the totals of events.

use std::time::Duration;

use super::bounded::{Bounded, Key};
use crate::{
    config::{DEFAULT_MAX_FLOWS, DEFAULT_MAX_SOCKETS},
    event::{Event, EventKind, Protocol, Traffic},
};

/// Turns the totals of events into increments: what an event adds to the traffic that was known of
/// its TCP socket or its UDP flow.
///
/// Add every event of a tracer, from its start. The sum of the increments is then the traffic since
/// the start:
///
/// - **TCP.** The first event of a connection that began after the tracer's start adds the whole
///   total, so an event that was lost before it is made up for. The first event of a connection
///   that may be older ([`Socket::older`](crate::Socket::older)) adds nothing, because a part of
///   its total is older than the tracer.
/// - **UDP.** The reports of flows ([`EventKind::Flow`]) add to [`traffic`](Increment::traffic).
///   A flow that starts again at zero adds to what its earlier lives have added. The other events
///   carry the totals of a socket, and would count the same datagrams again. Only the close of a
///   socket adds what no report has shown ([`outside_flows`](Increment::outside_flows)).
///
/// Nothing is counted twice. What is missing after a [`Lost`](EventKind::Lost) comes with the next
/// event of the same socket or flow. If the last report of a flow is lost, its datagrams are
/// `outside_flows`.
///
/// Ids belong to one tracer, so two tracers of the same protocol need a `Growth` each. One `Growth`
/// can serve a [`TcpTracer`](crate::TcpTracer) and a [`UdpTracer`](crate::UdpTracer).
///
/// # Memory
///
/// It remembers each TCP socket, UDP socket and UDP flow until its end, at most
/// [`DEFAULT_CAPACITY`](Self::DEFAULT_CAPACITY) or the given number of them, with up to 500 bytes
/// each. Beyond that, it forgets the one whose events are the longest ago
/// ([`forgotten`](Self::forgotten)). The traffic of a forgotten one up to its next event is not
/// counted.
///
/// # Examples
///
/// ```no_run
/// use tcp_udp_trace::{TcpTracer, consumer::Growth};
///
/// # async fn run() -> Result<(), tcp_udp_trace::Error> {
/// let mut tcp = TcpTracer::builder().start().await?;
/// let (mut growth, mut sent) = (Growth::new(), 0);
/// while let Some(event) = tcp.next().await {
///     sent += growth.add(&event).traffic.tx_bytes;
///     println!("{sent} bytes sent by all sockets so far");
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Growth {
    known: Bounded<Known>,
    forgotten: u64,
    /// The latest beginning of a socket, and of a flow, that was forgotten. One that began later
    /// and is unknown is new.
    forgotten_born: [Option<Duration>; 2],
}

/// The growth that an event adds to the traffic that was known before it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Increment {
    /// The traffic that the event adds to its TCP socket or its UDP flow.
    pub traffic: Traffic,
    /// UDP, when a socket is closed: its datagrams that no report of its flows has shown. Their
    /// peers are unknown. Zero in all other events.
    ///
    /// The reports were lost, or the datagrams were assigned to no flow
    /// ([`Stats::unassigned`](crate::Stats::unassigned)), or a [`Filter`](crate::Filter) rejects
    /// their flow. To sum up the traffic of a process, add them, unless a filter selects by peer.
    pub outside_flows: Traffic,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    /// The total of a TCP socket or a flow, or the sum of what the flows of a UDP socket have
    /// added.
    traffic: Traffic,
    born: Duration,
    is_flow: bool,
}

impl Default for Growth {
    fn default() -> Self {
        Self::new()
    }
}

impl Growth {
    /// How many sockets and flows [`new`](Self::new) remembers: as many as the tracers do by
    /// default.
    pub const DEFAULT_CAPACITY: usize =
        2 * DEFAULT_MAX_SOCKETS as usize + DEFAULT_MAX_FLOWS as usize;

    /// Makes an empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::with_capacity(Self::DEFAULT_CAPACITY)
    }

    /// Makes an empty set that remembers this many sockets and flows, at least one.
    ///
    /// A tracer with other settings than the defaults needs `max_sockets`, and a UDP tracer
    /// `max_flows` in addition.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            known: Bounded::new(capacity),
            forgotten: 0,
            forgotten_born: [None; 2],
        }
    }

    /// Adds an event, and returns what it adds.
    pub fn add(&mut self, event: &Event) -> Increment {
        let mut increment = Increment::default();
        match (event.socket.protocol, &event.kind) {
            // Their traffic is zero, or that of no socket.
            (_, EventKind::Lost { .. } | EventKind::ConnectFailed { .. }) => {}
            (Protocol::Tcp, _) => increment.traffic = self.tcp(event),
            (Protocol::Udp, &EventKind::Flow { age, last, .. }) => {
                increment.traffic = self.flow(event, age, last);
            }
            (Protocol::Udp, EventKind::Close { .. }) => {
                increment.outside_flows = self.close(event);
            }
            (Protocol::Udp, _) => {}
        }
        increment
    }

    /// Returns how often a socket or a flow was forgotten before its end, because there was no
    /// room.
    #[must_use]
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }

    fn tcp(&mut self, event: &Event) -> Traffic {
        let (key, total) = (Key::of_socket(event), event.traffic);
        let born = event.uptime.saturating_sub(event.socket.age);
        let before = match self.known.get(key) {
            Some(known) => known.traffic,
            // The reset may follow the end of its socket.
            None if matches!(event.kind, EventKind::Reset { .. }) => return Traffic::default(),
            None if event.socket.older == Some(false) && self.is_new(born, false) => {
                Traffic::default()
            }
            None => total,
        };
        let added = since_tcp(total, before);
        if event.is_end() {
            self.known.remove(key);
        } else {
            self.remember(key, plus_tcp(before, added), born, false);
        }
        added
    }

    fn flow(&mut self, event: &Event, age: Duration, last: bool) -> Traffic {
        let (key, total) = (Key::of_flow(event, age), event.traffic);
        let born = event.uptime.saturating_sub(age);
        let before = match self.known.get(key) {
            Some(known) => known.traffic,
            None if self.is_new(born, true) => Traffic::default(),
            None => total,
        };
        let added = since(total, before);
        if last {
            self.known.remove(key);
        } else {
            self.remember(key, plus(before, added), born, true);
        }
        let socket = Key::of_socket(event);
        let born = event.uptime.saturating_sub(event.socket.age);
        match self.known.get(socket) {
            Some(known) => self.remember(socket, plus(known.traffic, added), born, false),
            None if self.is_new(born, false) => self.remember(socket, added, born, false),
            // The sum of its flows is unknown.
            None => {}
        }
        added
    }

    fn close(&mut self, event: &Event) -> Traffic {
        let socket = Key::of_socket(event);
        let born = event.uptime.saturating_sub(event.socket.age);
        // Flows whose last report was lost.
        while let Some(flow) = self.known.a_flow_of(socket) {
            self.known.remove(flow);
        }
        match self.known.remove(socket) {
            Some(known) => since(event.traffic, known.traffic),
            None if self.is_new(born, false) => event.traffic,
            None => Traffic::default(),
        }
    }

    /// Returns whether an unknown socket or flow that began then was never known.
    fn is_new(&self, born: Duration, is_flow: bool) -> bool {
        self.forgotten_born[usize::from(is_flow)].is_none_or(|forgotten| born > forgotten)
    }

    fn remember(&mut self, key: Key, traffic: Traffic, born: Duration, is_flow: bool) {
        let known = Known {
            traffic,
            born,
            is_flow,
        };
        if let Some((_, evicted)) = self.known.insert(key, known) {
            self.forgotten += 1;
            let latest = &mut self.forgotten_born[usize::from(evicted.is_flow)];
            *latest = (*latest).max(Some(evicted.born));
        }
    }
}

/// Applies `f` to the counters of both.
fn zip(
    one: Traffic,
    two: Traffic,
    bytes: fn(u64, u64) -> u64,
    packets: fn(u64, u64) -> u64,
) -> Traffic {
    Traffic {
        tx_bytes: bytes(one.tx_bytes, two.tx_bytes),
        rx_bytes: bytes(one.rx_bytes, two.rx_bytes),
        tx_packets: packets(one.tx_packets, two.tx_packets),
        rx_packets: packets(one.rx_packets, two.rx_packets),
    }
}

fn since(total: Traffic, before: Traffic) -> Traffic {
    zip(total, before, u64::saturating_sub, u64::saturating_sub)
}

fn plus(before: Traffic, added: Traffic) -> Traffic {
    zip(before, added, u64::saturating_add, u64::saturating_add)
}

/// The kernel counts the segments of a TCP socket modulo 2³².
fn since_tcp(total: Traffic, before: Traffic) -> Traffic {
    /// Two CPUs may report totals in another order than they read them. They differ by less.
    const BACK: u32 = 1 << 16;
    zip(total, before, u64::saturating_sub, |total, before| {
        let added = (total as u32).wrapping_sub(before as u32);
        let is_older = added > u32::MAX - BACK && before > 0;
        u64::from(if is_older { 0 } else { added })
    })
}

fn plus_tcp(before: Traffic, added: Traffic) -> Traffic {
    zip(before, added, u64::saturating_add, |before, added| {
        u64::from((before as u32).wrapping_add(added as u32))
    })
}

#[cfg(test)]
mod tests;
