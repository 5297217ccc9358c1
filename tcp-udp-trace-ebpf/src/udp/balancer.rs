//! The peer that an application gave to a send, where another program at the cgroup has replaced it
//! (`BPF_CGROUP_UDP4_SENDMSG` and `6`), as a socket load balancer does.

use aya_ebpf::{bindings::BPF_ANY, macros::map, maps::LruHashMap};
use tcp_udp_trace_common::{FlowKey, Peer};

use super::packet::is_set;
use crate::{connect::Connect, datagrams::Datagrams, owner, syscall};

/// The peer that was given last, by the flow with the peer that replaced it.
#[map]
static GIVEN: LruHashMap<FlowKey, Peer> = LruHashMap::with_max_entries(4096, 0);

/// [`check`] found no address that the application gave to this send.
const UNKNOWN: u32 = 0;
/// The application gave the peer of the flow.
const SAME: u32 = 1;
/// The application gave another peer, which [`undo`] restores.
const OTHER: u32 = 2;

/// Compares the peer of the flow with the address that the current system call gives, which sends
/// through this `struct sock`.
// Not inlined: the function has a stack frame of its own.
#[inline(never)]
fn check(sk: u64, flow: &FlowKey) -> u32 {
    let Some(regs) = owner::sending(sk) else {
        return UNKNOWN;
    };
    let Some(given) = Connect::address(syscall::destination(regs)) else {
        return UNKNOWN;
    };
    // The kernel itself replaces the unspecified address.
    if given.family != flow.peer.family || !is_set(&given.address) {
        return UNKNOWN;
    }
    if given == flow.peer {
        return SAME;
    }
    match GIVEN.insert(flow, given, u64::from(BPF_ANY)) {
        Ok(()) => OTHER,
        Err(_) => UNKNOWN,
    }
}

/// Gives datagrams that the current system call may be sending the peer that the application gave,
/// if another one replaced that. Returns whether this send has another one.
#[inline(always)]
pub(super) fn undo_of_send(sk: u64, datagrams: &mut Datagrams) -> bool {
    let result = check(sk, &datagrams.flow);
    if result != SAME {
        undo(datagrams);
    }
    result == OTHER
}

/// Gives datagrams the peer that the application last gave, if another one replaced that.
#[inline(always)]
pub(super) fn undo(datagrams: &mut Datagrams) {
    // SAFETY: the map is preallocated, so its memory stays.
    if let Some(given) = unsafe { GIVEN.get(&datagrams.flow) } {
        datagrams.flow.peer = *given;
    }
}
