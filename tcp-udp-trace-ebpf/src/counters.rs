//! Counters of anomalies. User space reads them, and the programs log them from time to time.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{macros::map, maps::Array};
#[cfg(not(feature = "perf"))]
use aya_log_ebpf::warn;
use tcp_udp_trace_common::{Counters, kind};

/// The counters, and their values when they were last logged.
#[map]
static COUNTERS: Array<Counters> = Array::with_max_entries(2, 0);
const COUNTED: u32 = 0;
#[cfg(not(feature = "perf"))]
const LOGGED: u32 = 1;

/// Returns how many records the buffer has refused so far.
#[inline(always)]
pub(crate) fn lost_so_far() -> u32 {
    COUNTERS
        .get(COUNTED)
        .map_or(0, |counters| counters.lost as u32)
}

/// Returns whether sockets or state changes have been missed. If so, the beginning of any socket
/// may have been missed.
#[inline(always)]
pub(crate) fn has_missed() -> bool {
    COUNTERS
        .get(COUNTED)
        .is_none_or(|counters| counters.untracked | counters.missed != 0)
}

/// Counts a record of this kind that found the buffer full.
#[inline(always)]
pub(crate) fn lost(kind: u32) {
    if kind == kind::IMAGE {
        return count(|counters| &raw mut counters.lost_pieces);
    }
    count(|counters| &raw mut counters.lost);
    count(|counters| &raw mut counters.lost_of[kind as usize % kind::COUNT]);
}

/// Counts a socket that found no room in its map.
#[inline(always)]
pub(crate) fn untracked() {
    count(|counters| &raw mut counters.untracked);
}

/// Counts a state change that no hook saw.
#[inline(always)]
pub(crate) fn missed() {
    count(|counters| &raw mut counters.missed);
}

/// Counts a TCP socket whose family is neither IPv4 nor IPv6.
#[inline(always)]
pub(crate) fn unknown_family() {
    count(|counters| &raw mut counters.unknown_family);
}

/// Counts a process that found no room in the map of tree members.
#[inline(always)]
pub(crate) fn untracked_process() {
    count(|counters| &raw mut counters.untracked_processes);
}

/// Counts a datagram that could not be added to a flow.
#[inline(always)]
pub(crate) fn unassigned() {
    count(|counters| &raw mut counters.unassigned);
}

#[inline(always)]
fn count(which: impl FnOnce(&mut Counters) -> *mut u64) {
    if let Some(counters) = COUNTERS.get_ptr_mut(COUNTED) {
        // SAFETY: a valid pointer to the map's value. The addition is atomic, because other CPUs
        // also count.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(which(&mut *counters), 1) };
    }
}

/// Logs the counters if one has doubled since they were last logged. Only `arm_wakeup` calls it,
/// because the verifier takes as long for logging as for all the work of a hook.
#[cfg(not(feature = "perf"))]
#[inline(always)]
pub(crate) fn log() {
    let (Some(now), Some(logged)) = (COUNTERS.get_ptr_mut(COUNTED), COUNTERS.get_ptr_mut(LOGGED))
    else {
        return;
    };
    // SAFETY: valid pointers to different values of the map. Only `arm_wakeup` uses the second one,
    // and user space runs that program once at a time.
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
            "{} sockets and state changes were missed so far, see TracerHandle::stats", escaped
        );
    }
}

/// The log needs a ring buffer, so without ring buffers there are only the counters.
#[cfg(feature = "perf")]
pub(crate) const fn log() {}
