//! Whether the programs are being detached.

use aya_ebpf::{macros::map, maps::Array};
use tcp_udp_trace_common::older;

use crate::counters;

/// Not 0 while the programs are being detached, one after the other. An entry may then belong to a
/// socket whose end, and whose successor's beginning at the same address, no program has seen.
#[map]
static STOPPING: Array<u32> = Array::with_max_entries(1, 0);

/// Returns whether the memory of sockets is no longer reliable. Transitions do not depend on this,
/// because each is compared with the remembered state.
#[inline(always)]
pub(crate) fn is_stopping() -> bool {
    STOPPING.get(0).is_none_or(|stopping| *stopping != 0)
}

/// Returns whether a socket that is found after its beginning is older than the programs: one of
/// [`older`], shifted to its position in the remembered state.
#[inline(always)]
pub(crate) fn met() -> u8 {
    // While the programs are being detached, the program that sees beginnings may already be gone.
    let older = if is_stopping() || counters::has_missed() {
        older::UNKNOWN
    } else {
        older::YES
    };
    older << older::SHIFT
}
