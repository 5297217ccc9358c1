//! From a record to the reader, and when to wake it.
//!
//! The programs are built twice: with a ring buffer, and with perf buffers for kernels that have no ring buffer.

#[cfg(feature = "perf")]
mod perf;
#[cfg(not(feature = "perf"))]
mod ring;

use core::ffi::c_void;

use aya_ebpf::{Global, helpers::bpf_ktime_get_boot_ns, macros::map, maps::Array};
use tcp_udp_trace_common::Head;

#[cfg(feature = "perf")]
pub(crate) use self::perf::{is_crowded, record};
#[cfg(not(feature = "perf"))]
pub(crate) use self::ring::{is_crowded, record};
use crate::anomaly;

/// Not 0 while the reader sleeps and wants to be woken by the next record.
#[map]
static ARMED: Array<u32> = Array::with_max_entries(1, 0);

/// An eighth of the buffer's size (of one CPU's, if each has its own) is this power of two, in bytes; user space sets it. Each time the
/// buffer has filled by that much, a record wakes the reader though it did not ask.
#[unsafe(no_mangle)]
static WAKE_SHIFT: Global<u32> = Global::new(16);

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

/// Whether a record tells the beginning or the end of something (an eighth of the room is kept for those), or could be
/// missed without giving a wrong picture for good.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weight {
    Vital,
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

/// Whether a record that fills the buffer from `before` to `after` wakes the reader: if that asked for it, or if the buffer fills up.
/// Waking is the most expensive thing that an event can do (about 1.7 of 1.9 µs when every record does it), so records gather meanwhile.
#[inline(always)]
fn wakes(before: u64, after: u64) -> bool {
    if let Some(armed) = ARMED.get_ptr_mut(0) {
        // SAFETY: a valid pointer to the map's only value. Two CPUs may both find it armed: one wake-up too many.
        unsafe {
            if armed.read_volatile() != 0 {
                armed.write_volatile(0);
                return true;
            }
        }
    }
    // Only the record that crosses the line wakes: past it, each one would. Two CPUs may cross it together and both
    // believe that the other did; the next line, or the reader's timer, makes up for that.
    after >> WAKE_SHIFT.load() != before >> WAKE_SHIFT.load()
}
