//! What a consumer keeps who wants to know how much each flow has carried.

use std::{collections::BTreeMap, net::SocketAddr};

use tcp_udp_trace::{Event, EventKind, Traffic};

/// The sum over each flow: its last reports, and the newest one.
#[derive(Debug, Default)]
pub struct FlowSums {
    ended: BTreeMap<(u64, SocketAddr), Traffic>,
    newest: BTreeMap<(u64, SocketAddr), Traffic>,
}

impl FlowSums {
    /// Takes an event into account.
    pub fn add(&mut self, event: &Event) {
        let EventKind::Flow { last, .. } = event.kind else {
            return;
        };
        let flow = (event.socket.id, event.socket.remote);
        if last {
            self.newest.remove(&flow);
            plus(self.ended.entry(flow).or_default(), event.traffic);
        } else {
            self.newest.insert(flow, event.traffic);
        }
    }

    /// What each flow has carried, by the socket's id and the peer.
    #[must_use]
    pub fn sums(&self) -> BTreeMap<(u64, SocketAddr), Traffic> {
        let mut sums = self.ended.clone();
        for (&flow, &traffic) in &self.newest {
            plus(sums.entry(flow).or_default(), traffic);
        }
        sums
    }
}

fn plus(sum: &mut Traffic, traffic: Traffic) {
    sum.tx_bytes += traffic.tx_bytes;
    sum.rx_bytes += traffic.rx_bytes;
    sum.tx_packets += traffic.tx_packets;
    sum.rx_packets += traffic.rx_packets;
}
