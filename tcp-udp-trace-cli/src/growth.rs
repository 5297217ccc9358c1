//! Converts the totals of events into increments.

use std::{net::SocketAddr, num::NonZeroUsize};

use lru::LruCache;
use tcp_udp_trace::{DEFAULT_MAX_FLOWS, DEFAULT_MAX_SOCKETS, Event, EventKind, Protocol, Traffic};

/// A TCP socket, or a UDP flow.
type Key = (Protocol, u64, SocketAddr);

/// Turns the totals of events into increments for counters. Bytes from before the tracer started
/// are not counted.
///
/// The number of tracked sockets and flows is the tracers' default.
#[derive(Debug)]
pub(crate) struct Growth {
    known: LruCache<Key, Traffic>,
}

impl Default for Growth {
    fn default() -> Self {
        let capacity = DEFAULT_MAX_SOCKETS + DEFAULT_MAX_FLOWS;
        Self {
            known: LruCache::new(NonZeroUsize::new(capacity as usize).unwrap_or(NonZeroUsize::MIN)),
        }
    }
}

impl Growth {
    /// Returns the bytes sent and received since the last event of the same socket or flow.
    pub(crate) fn of(&mut self, event: &Event) -> (u64, u64) {
        let (socket, total) = (&event.socket, event.traffic);
        let key = (socket.protocol, socket.id, socket.remote);
        let before = match (socket.protocol, &event.kind) {
            (_, EventKind::Lost { .. } | EventKind::ConnectFailed { .. }) => return (0, 0),
            // The first event of a socket has no bytes yet, unless the socket is older than the
            // tracer.
            (Protocol::Tcp, _) => self.known.put(key, total).unwrap_or(total),
            // Flows are counted from their first datagram that the tracer saw.
            (_, EventKind::Flow { .. }) => self.known.put(key, total).unwrap_or_default(),
            // Other events of a UDP socket carry the totals of all its flows.
            _ => return (0, 0),
        };
        let is_last = matches!(event.kind, EventKind::Flow { last: true, .. });
        if event.is_end() || is_last {
            self.known.pop(&key);
        }
        // A smaller total: the flow's last report was lost, and the flow has started again.
        let since = |total: u64, before| total.checked_sub(before).unwrap_or(total);
        (
            since(total.tx_bytes, before.tx_bytes),
            since(total.rx_bytes, before.rx_bytes),
        )
    }
}
