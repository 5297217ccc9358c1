//! Whether the programs are being detached.

use aya_ebpf::{macros::map, maps::Array};
use tcp_udp_trace_common::older;

use crate::counters;

/// Not 0 while the programs are being detached, one after the other: then what is remembered may be of a socket whose end, and another
/// one's beginning at that address, no program has seen.
#[map]
static STOPPING: Array<u32> = Array::with_max_entries(1, 0);

/// Whether what is remembered is not to be relied on any more. Transitions need not ask: each is compared with the state remembered.
#[inline(always)]
pub(crate) fn is_stopping() -> bool {
    STOPPING.get(0).is_none_or(|stopping| *stopping != 0)
}

/// Whether a socket that the programs meet now, and not at its beginning, is older than they are: one of
/// [`older`], where it belongs in what is remembered.
#[inline(always)]
pub(crate) fn met() -> u8 {
    // While the programs are being detached, the one that sees beginnings may be gone already.
    let older = if is_stopping() || counters::has_missed() {
        older::UNKNOWN
    } else {
        older::YES
    };
    older << older::SHIFT
}
