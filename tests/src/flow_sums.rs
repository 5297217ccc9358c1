//! The sums that a consumer keeps to know how much each flow has carried.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use tcp_udp_trace::{Event, EventKind, Traffic};

/// The sum over each flow: its last reports, and the newest one.
#[derive(Debug, Default)]
pub struct FlowSums {
    ended: BTreeMap<(u64, SocketAddr), Traffic>,
    /// The key has the beginning as well, because a socket may have several flows with one peer,
    /// one for each local address.
    newest: BTreeMap<(u64, SocketAddr, Duration), Traffic>,
}

impl FlowSums {
    /// Adds an event.
    pub fn add(&mut self, event: &Event) {
        let EventKind::Flow { last, age, .. } = event.kind else {
            return;
        };
        let (id, peer) = (event.socket.id, event.socket.remote);
        let flow = (id, peer, event.uptime.saturating_sub(age));
        if last {
            self.newest.remove(&flow);
            plus(self.ended.entry((id, peer)).or_default(), event.traffic);
        } else {
            self.newest.insert(flow, event.traffic);
        }
    }

    /// Returns the traffic, by the socket's id and the peer.
    #[must_use]
    pub fn sums(&self) -> BTreeMap<(u64, SocketAddr), Traffic> {
        let mut sums = self.ended.clone();
        for (&(id, peer, _), &traffic) in &self.newest {
            plus(sums.entry((id, peer)).or_default(), traffic);
        }
        sums
    }
}

/// Returns the bytes sent and received by the last report of each flow, by its local address and
/// its peer.
#[must_use]
pub fn last_reports(events: &[Event]) -> BTreeMap<(SocketAddr, SocketAddr), (u64, u64)> {
    let is_last = |event: &&Event| matches!(event.kind, EventKind::Flow { last: true, .. });
    let reports = events.iter().filter(is_last).map(|event| {
        let ends = (event.socket.local, event.socket.remote);
        (ends, (event.traffic.tx_bytes, event.traffic.rx_bytes))
    });
    reports.collect()
}

fn plus(sum: &mut Traffic, traffic: Traffic) {
    sum.tx_bytes += traffic.tx_bytes;
    sum.rx_bytes += traffic.rx_bytes;
    sum.tx_packets += traffic.tx_packets;
    sum.rx_packets += traffic.rx_packets;
}
