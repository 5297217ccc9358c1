//! The contents of a UDP record.

use tcp_udp_trace_common::{AF_INET, Field, Peer, Traffic, Udp, UdpTracked, kind, mark};

use super::packet::is_set;
use crate::{
    datagrams::{Datagrams, Direction, flow_with},
    emit::{self, Context, Priority},
    filter,
    sock::{Sock, Socket, peer6, tcp_state::ESTABLISHED},
};

/// The totals of a socket or a flow.
#[derive(Clone, Copy)]
pub(super) struct Totals<'a> {
    pub(super) traffic: &'a Traffic,
    pub(super) approximate: bool,
    /// Whether this is the first report of them.
    pub(super) first: bool,
}

#[inline(always)]
pub(super) fn totals_of(tracked: &UdpTracked) -> Totals<'_> {
    Totals {
        traffic: &tracked.traffic,
        approximate: tracked.approximate != 0,
        first: false,
    }
}

#[inline(always)]
pub(super) fn record(
    ctx: Context,
    kind: u32,
    key: u64,
    tracked: &UdpTracked,
    at: &Datagrams,
    totals: Totals<'_>,
    amount: u64,
) -> bool {
    let priority = match kind {
        kind::CLOSE => Priority::Final,
        kind::CONNECT_FAILED_UDP => Priority::Lifecycle,
        _ => Priority::Normal,
    };
    emit::record(ctx, kind, priority, |record: &mut Udp| {
        record.key = key;
        record.id = tracked.id;
        record.born = tracked.born;
        record.cgroup = tracked.cgroup;
        record.netns_cookie = tracked.netns_cookie;
        record.traffic = *totals.traffic;
        record.amount = amount;
        record.owner = tracked.owner;
        record.user = tracked.user;
        let sk = Sock::new(tracked.sk);
        record.device = at.device.unwrap_or_else(|| sk.get(Field::Device));
        record.uid = sk.get(Field::SkUid);
        record.netns = tracked.netns;
        record.peer = at.flow.peer;
        record.local = at.local.address;
        record.local_port = at.local.port;
        record.marks = u8::from(totals.approximate) * mark::APPROXIMATE
            + u8::from(totals.first) * mark::FIRST
            + u8::from(!is_set(&at.flow.local)) * mark::HIDES_LOCAL;
        record.older = tracked.older();
        record.scope = at.flow.scope;
    })
}

/// Reports an event of the socket itself. Returns false if the event does not pass the filter, or
/// finds the buffer full.
#[inline(always)]
pub(super) fn report(
    ctx: Context,
    kind: u32,
    key: u64,
    tracked: &mut UdpTracked,
    sk: Sock,
    amount: u64,
) -> bool {
    let addresses = addresses(sk);
    filter::passes_udp(kind, tracked, &addresses)
        && record(
            ctx,
            kind,
            key,
            tracked,
            &addresses,
            totals_of(tracked),
            amount,
        )
}

/// Returns the addresses of a socket without any traffic, for records about the socket itself.
#[inline(always)]
pub(super) fn addresses(sk: impl Socket) -> Datagrams {
    // A disconnected socket still has parts of its last peer.
    let connected = sk.get::<u8>(Field::State) == ESTABLISHED;
    let port = if connected {
        u16::from_be(sk.get(Field::RemotePort))
    } else {
        0
    };
    let (local, peer) = if sk.family() == AF_INET {
        let address = if connected {
            sk.get(Field::RemoteAddr4)
        } else {
            0
        };
        let peer = Peer {
            address: [address, 0, 0, 0],
            port,
            family: AF_INET,
        };
        ([sk.get(Field::LocalAddr4), 0, 0, 0], peer)
    } else {
        let address = if connected {
            sk.get(Field::RemoteAddr6)
        } else {
            [0; 4]
        };
        let peer = peer6(address, port);
        (local6(sk, peer.family), peer)
    };
    let device = sk.get(Field::Device);
    Datagrams {
        direction: Direction::Sent,
        bytes: 0,
        packets: 0,
        flow: flow_with(peer, device, local),
        local: Peer {
            address: local,
            port: sk.bound_port(),
            family: peer.family,
        },
        other_port: 0,
        device: Some(device),
    }
}

/// Returns the local address of an IPv6 socket, for a peer of this family.
#[inline(always)]
pub(super) fn local6(sk: impl Socket, family: u16) -> [u32; 4] {
    let local = sk.get::<[u32; 4]>(Field::LocalAddr6);
    // The last word of an IPv4-mapped address, and of `::`, is the IPv4 address.
    if family == AF_INET {
        [local[3], 0, 0, 0]
    } else {
        local
    }
}
