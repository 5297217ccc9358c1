//! From a record to the reader, and when to wake it.
//!
//! The programs are built twice: with a ring buffer, and with perf buffers for kernels that have no ring buffer.

#[cfg(feature = "perf")]
mod perf;
#[cfg(not(feature = "perf"))]
mod ring;

use core::ffi::c_void;

use aya_ebpf::{helpers::bpf_ktime_get_boot_ns, macros::map, maps::Array};
use tcp_udp_trace_common::Head;

#[cfg(feature = "perf")]
pub(crate) use self::perf::{is_crowded, record};
#[cfg(not(feature = "perf"))]
pub(crate) use self::ring::{fill, is_crowded, record};
use crate::anomaly;

/// Not 0 while the reader sleeps and wants to be woken by the next record.
#[map]
static ARMED: Array<u32> = Array::with_max_entries(1, 0);

/// What a program was called with. The kernel wants to see it from one that writes into a perf buffer.
pub(crate) type Context = *mut c_void;

/// Something that begins with a [`Head`].
pub(crate) trait Record: 'static {
    fn head(&mut self) -> &mut Head;
}

impl Record for tcp_udp_trace_common::StateChange {
    fn head(&mut self) -> &mut Head {
        &mut self.head
    }
}

impl Record for tcp_udp_trace_common::Udp {
    fn head(&mut self) -> &mut Head {
        &mut self.head
    }
}

impl Record for tcp_udp_trace_common::Tcp {
    fn head(&mut self) -> &mut Head {
        &mut self.head
    }
}

impl Record for tcp_udp_trace_common::Image {
    fn head(&mut self) -> &mut Head {
        &mut self.head
    }
}

/// What it would mean to miss a record.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weight {
    /// It tells the end of a socket, and the final numbers: nothing could make up for it.
    Last,
    /// It tells another beginning or end. An eighth of the room is kept for these and those above.
    Vital,
    /// The picture would soon be right again.
    Other,
}

/// The head of a record that is written now.
#[inline(always)]
fn head(kind: u32) -> Head {
    Head {
        kind,
        lost: anomaly::lost_so_far(),
        // SAFETY: the helper takes nothing and cannot fail.
        time: unsafe { bpf_ktime_get_boot_ns() },
    }
}

/// Lets the next record wake the reader.
#[inline(always)]
pub(crate) fn arm() {
    if let Some(armed) = ARMED.get_ptr_mut(0) {
        // SAFETY: a valid pointer to the map's only value.
        unsafe { armed.write_volatile(1) };
    }
}

/// Whether the reader has asked to be woken, and nobody has done it yet. Waking is the most expensive thing that an event can do
/// (about 1.7 of 1.9 µs when every record does it), so records gather meanwhile.
#[inline(always)]
fn is_armed() -> bool {
    let Some(armed) = ARMED.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: a valid pointer to the map's only value. Two CPUs may both find it armed: one wake-up too many.
    unsafe {
        let is_armed = armed.read_volatile() != 0;
        if is_armed {
            armed.write_volatile(0);
        }
        is_armed
    }
}
