//! What went wrong: counted always, and told to user space's log when it has happened 1, 2, 4, 8 … times.

use aya_ebpf::{macros::map, maps::Array};
use aya_log_ebpf::warn;
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use tcp_udp_trace_common::Counters;

#[map]
static COUNTERS: Array<Counters> = Array::with_max_entries(1, 0);

/// How many records the ring has refused so far.
#[inline(always)]
pub(crate) fn lost_so_far() -> u32 {
    COUNTERS.get(0).map_or(0, |counters| counters.lost as u32)
}

/// A record found the ring full.
#[inline(always)]
pub(crate) fn lost() {
    // Not logged from here: user space puts it into the stream.
    count(|counters| &raw mut counters.lost);
}

/// The map of sockets is full.
#[inline(never)]
pub(crate) fn untracked() {
    if let Some(n) = count(|counters| &raw mut counters.untracked) {
        warn!(
            &(),
            "the map of sockets is full ({} times so far): raise max_sockets", n
        );
    }
}

/// No hook saw a state change.
#[inline(never)]
pub(crate) fn missed() {
    if let Some(n) = count(|counters| &raw mut counters.missed) {
        warn!(
            &(),
            "the kernel kept a state change from every hook ({} times so far)", n
        );
    }
}

/// A TCP socket of a family that is neither IPv4 nor IPv6.
#[inline(never)]
pub(crate) fn unknown_family() {
    if let Some(n) = count(|counters| &raw mut counters.unknown_family) {
        warn!(
            &(),
            "a TCP socket is neither IPv4 nor IPv6 ({} times so far)", n
        );
    }
}

/// Counts, and gives the count when it is worth a line of log.
#[inline(always)]
fn count(which: impl FnOnce(&mut Counters) -> *mut u64) -> Option<u64> {
    let counters = COUNTERS.get_ptr_mut(0)?;
    // SAFETY: `counters` is valid as long as the map; the addition is atomic, because other CPUs count too.
    let n = unsafe {
        let counter = which(&mut *counters);
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, 1);
        counter.read_volatile()
    };
    n.is_power_of_two().then_some(n)
}
