//! What went wrong: counted where it happens, and told to user space's log now and then.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{macros::map, maps::Array};
#[cfg(not(feature = "perf"))]
use aya_log_ebpf::warn;
use tcp_udp_trace_common::{Counters, kind};

/// The counts, and the counts that the log has been told.
#[map]
static COUNTERS: Array<Counters> = Array::with_max_entries(2, 0);
const COUNTED: u32 = 0;
#[cfg(not(feature = "perf"))]
const LOGGED: u32 = 1;

/// How many records the ring has refused so far.
#[inline(always)]
pub(crate) fn lost_so_far() -> u32 {
    COUNTERS
        .get(COUNTED)
        .map_or(0, |counters| counters.lost as u32)
}

/// Whether sockets or state changes have escaped: then the beginning of any socket may have.
#[inline(always)]
pub(crate) fn has_missed() -> bool {
    COUNTERS
        .get(COUNTED)
        .is_none_or(|counters| counters.untracked | counters.missed != 0)
}

/// A record of this kind found the ring full.
#[inline(always)]
pub(crate) fn lost(kind: u32) {
    if kind == kind::IMAGE {
        return count(|counters| &raw mut counters.lost_pieces);
    }
    count(|counters| &raw mut counters.lost);
    count(|counters| &raw mut counters.lost_of[kind as usize % kind::COUNT]);
}

/// The map of sockets is full.
#[inline(always)]
pub(crate) fn untracked() {
    count(|counters| &raw mut counters.untracked);
}

/// No hook saw a state change.
#[inline(always)]
pub(crate) fn missed() {
    count(|counters| &raw mut counters.missed);
}

/// A TCP socket of a family that is neither IPv4 nor IPv6.
#[inline(always)]
pub(crate) fn unknown_family() {
    count(|counters| &raw mut counters.unknown_family);
}

/// The map of a filter's processes is full.
#[inline(always)]
pub(crate) fn untracked_process() {
    count(|counters| &raw mut counters.untracked_processes);
}

/// A datagram was counted for no flow.
#[inline(always)]
pub(crate) fn unassigned() {
    count(|counters| &raw mut counters.unassigned);
}

#[inline(always)]
fn count(which: impl FnOnce(&mut Counters) -> *mut u64) {
    if let Some(counters) = COUNTERS.get_ptr_mut(COUNTED) {
        // SAFETY: a valid pointer to the map's value; the addition is atomic, because other CPUs count too.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(which(&mut *counters), 1) };
    }
}

/// Logs the counts, if one has doubled since they were last told. Only where the reader asks: the verifier takes as long for logging as for
/// all that a hook does.
#[cfg(not(feature = "perf"))]
#[inline(always)]
pub(crate) fn log() {
    let (Some(now), Some(logged)) = (COUNTERS.get_ptr_mut(COUNTED), COUNTERS.get_ptr_mut(LOGGED))
    else {
        return;
    };
    // SAFETY: valid pointers to different values of the map; only the reader's question comes here, which it asks one at a time.
    let (now, logged) = unsafe { (&*now, &mut *logged) };
    if now.untracked > 2 * logged.untracked
        || now.missed > 2 * logged.missed
        || now.unknown_family > 2 * logged.unknown_family
    {
        (logged.untracked, logged.missed) = (now.untracked, now.missed);
        logged.unknown_family = now.unknown_family;
        let escaped = now.untracked + now.missed + now.unknown_family;
        warn!(
            &(),
            "{} sockets and state changes have escaped so far: TracerHandle::stats tells which",
            escaped
        );
    }
}

/// The log is a ring buffer: without one, the counts must do.
#[cfg(feature = "perf")]
pub(crate) const fn log() {}
