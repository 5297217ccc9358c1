//! UDP sockets. Datagrams are counted in maps, for each socket and each flow, and few events become
//! records.

mod balancer;
pub(crate) mod connect;
pub(crate) mod drop;
mod flows;
mod nat;
mod packet;
pub(crate) mod receive;
mod records;
pub(crate) mod send;
mod sockets;

use tcp_udp_trace_common::{Field, UdpTracked, kind};

use self::{
    flows::add,
    packet::Packet,
    records::{record, report, totals_of},
    sockets::{PER_DATAGRAM, forget, track_for_holder},
};
pub(crate) use self::{
    flows::{FLOWS, get_flow},
    sockets::{find, get, key_of, track, track_for_current_task, track_new},
};
use crate::{
    datagrams::{Datagrams, Direction},
    emit::Context,
    filter,
    read::read,
    sock::{Sock, Socket as _},
};

/// Counts datagrams of the socket and of their flow, and reports them if each datagram is reported.
#[inline(always)]
fn count(
    ctx: Context,
    key: u64,
    tracked: &mut UdpTracked,
    datagrams: &mut Datagrams,
    packet: impl Packet,
) {
    add(&mut tracked.traffic, datagrams);
    flows::count(ctx, key, tracked, datagrams, packet);
    if PER_DATAGRAM.load() != 0 {
        let kind = match datagrams.direction {
            Direction::Sent => kind::SEND,
            Direction::Received => kind::RECEIVE,
        };
        if !packet.is_refused() && filter::passes_udp(kind, tracked, datagrams) {
            record(
                ctx,
                kind,
                key,
                tracked,
                datagrams,
                totals_of(tracked),
                datagrams.bytes,
            );
        }
    }
}

/// Reports a sample of the socket. Returns false if the sample does not pass the filter, or finds
/// the buffer full.
#[inline(always)]
pub(crate) fn sample(ctx: Context, key: u64, sk: Sock, tracked: &mut UdpTracked) -> bool {
    connect::report_unseen(ctx, key, tracked, sk);
    report(ctx, kind::SAMPLE_UDP, key, tracked, sk, 0)
}

/// The last descriptor of the socket is closed.
#[inline(always)]
pub(crate) fn closed(ctx: Context, key: u64, sk: *const core::ffi::c_void) {
    // For a socket that is older than the tracer and was never used, this is its only event.
    let Some(tracked) = track_for_holder(ctx, key, sk, || true) else {
        return;
    };
    let sk = Sock::new(tracked.sk);
    connect::report_unseen(ctx, key, tracked, sk);
    report(ctx, kind::CLOSE, key, tracked, sk, drops(sk));
    forget(key);
}

/// Returns how many datagrams found the receive buffer full.
#[inline(always)]
fn drops(sk: Sock) -> u64 {
    // Since 6.18, a busy socket counts them separately for even and odd NUMA nodes.
    let counters = sk.get::<u64>(Field::DropCounters);
    if counters == 0 {
        return u64::from(sk.get::<u32>(Field::Drops));
    }
    u64::from(read::<u32>(counters, Field::Drops0))
        + u64::from(read::<u32>(counters, Field::Drops1))
}
