//! Counts of datagrams, and their addresses.

use tcp_udp_trace_common::{FlowKey, Peer};

/// Which way a datagram goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Sent,
    Received,
}

/// What is counted at once: a datagram, or some that were handed over together.
#[derive(Clone, Copy)]
pub(crate) struct Datagrams {
    pub(crate) direction: Direction,
    pub(crate) bytes: u64,
    pub(crate) packets: u64,
    /// The key of their flow. The socket is added where the flow is looked for.
    pub(crate) flow: FlowKey,
    /// This side, of the peer's family.
    pub(crate) local: Peer,
    /// Not 0 if the packet has not the socket's port, so NAT has changed it.
    pub(crate) other_port: u16,
    /// The interface that the socket is bound to, where that costs nothing.
    pub(crate) device: Option<u32>,
}

/// The key of the flow with this peer, of a socket that is not known yet.
#[inline(always)]
pub(crate) const fn flow_with(peer: Peer, scope: u32, local: [u32; 4]) -> FlowKey {
    FlowKey {
        socket: 0,
        peer,
        scope,
        local,
    }
}
