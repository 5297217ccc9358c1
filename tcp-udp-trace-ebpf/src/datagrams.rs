//! Counts of datagrams, and their addresses.

use tcp_udp_trace_common::{FlowKey, Peer};

/// The direction of a datagram.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Sent,
    Received,
}

/// A datagram, or several that were passed on together and are counted together.
#[derive(Clone, Copy)]
pub(crate) struct Datagrams {
    pub(crate) direction: Direction,
    pub(crate) bytes: u64,
    pub(crate) packets: u64,
    /// The key of their flow. Its socket is set where the flow is looked up.
    pub(crate) flow: FlowKey,
    /// The local end, of the peer's family.
    pub(crate) local: Peer,
    /// Not 0 if the packet's source port is not the socket's port, because NAT has changed it.
    pub(crate) other_port: u16,
    /// The interface that the socket is bound to, if reading it costs nothing.
    pub(crate) device: Option<u32>,
}

/// Returns the key of the flow with this peer. The socket is not set yet.
#[inline(always)]
pub(crate) const fn flow_with(peer: Peer, scope: u32, local: [u32; 4]) -> FlowKey {
    FlowKey {
        socket: 0,
        peer,
        scope,
        local,
    }
}
