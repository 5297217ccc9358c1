//! From a record to the ring, and when to wake the reader.

use aya_ebpf::{
    Global,
    bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::bpf_ktime_get_boot_ns,
    macros::map,
    maps::{Array, RingBuf},
};
use tcp_udp_trace_common::Head;

use crate::anomaly;

/// The records, in the order of their reservation.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(2 << 20, 0);

/// Not 0 while the reader sleeps and wants to be woken by the next record.
#[map]
static ARMED: Array<u32> = Array::with_max_entries(1, 0);

/// An eighth of the ring's size is this power of two, in bytes; user space sets it. Each time the ring has filled by that much, a record
/// wakes the reader though it did not ask.
#[unsafe(no_mangle)]
static WAKE_SHIFT: Global<u32> = Global::new(16);

/// What the kernel puts before each record, in bytes (`BPF_RINGBUF_HDR_SZ`).
const RECORD_HEADER: u64 = 8;

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

/// Whether a record tells the beginning or the end of something (the last eighth of the ring is kept for those), or could be
/// missed without giving a wrong picture for good.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weight {
    Vital,
    Other,
}

/// Writes a record; `fill` sets every byte but the head's. A full ring is counted, and then this is false.
#[inline(always)]
pub(crate) fn record<R: Record>(kind: u32, weight: Weight, fill: impl FnOnce(&mut R)) -> bool {
    let before = EVENTS.query(u64::from(BPF_RB_AVAIL_DATA));
    let after = before + size_of::<R>() as u64 + RECORD_HEADER;
    if weight == Weight::Other && after >> WAKE_SHIFT.load() >= 7 {
        anomaly::lost(kind);
        return false;
    }
    let Some(mut entry) = EVENTS.reserve::<R>(0) else {
        anomaly::lost(kind);
        return false;
    };
    // SAFETY: the kernel gave `size_of::<R>()` writable bytes, aligned to 8; a record is integers and bytes
    // only, and all of it is written before it is read or submitted.
    let record = unsafe { entry.assume_init_mut() };
    *record.head() = Head {
        kind,
        lost: anomaly::lost_so_far(),
        // SAFETY: the helper takes nothing and cannot fail.
        time: unsafe { bpf_ktime_get_boot_ns() },
    };
    fill(record);
    entry.submit(wake(before, after));
    true
}

/// Whether the ring has no room to spare for records that could come later just as well.
#[inline(always)]
pub(crate) fn is_crowded() -> bool {
    EVENTS.query(u64::from(BPF_RB_AVAIL_DATA)) >> WAKE_SHIFT.load() != 0
}

/// Lets the next record wake the reader.
#[inline(always)]
pub(crate) fn arm() {
    if let Some(armed) = ARMED.get_ptr_mut(0) {
        // SAFETY: a valid pointer to the map's only value.
        unsafe { armed.write_volatile(1) };
    }
}

/// How to submit a record that fills the ring from `before` to `after`: it wakes the reader if that asked for it, or if the ring fills up. Waking is the most expensive thing that an event
/// can do (about 1.7 of 1.9 µs when every record does it), so records gather meanwhile.
#[inline(always)]
fn wake(before: u64, after: u64) -> u64 {
    if let Some(armed) = ARMED.get_ptr_mut(0) {
        // SAFETY: a valid pointer to the map's only value. Two CPUs may both find it armed: one wake-up too many.
        unsafe {
            if armed.read_volatile() != 0 {
                armed.write_volatile(0);
                return u64::from(BPF_RB_FORCE_WAKEUP);
            }
        }
    }
    // Only the record that crosses the line wakes: past it, each one would. Two CPUs may cross it together and both
    // believe that the other did; the next line, or the reader's timer, makes up for that.
    if after >> WAKE_SHIFT.load() == before >> WAKE_SHIFT.load() {
        u64::from(BPF_RB_NO_WAKEUP)
    } else {
        u64::from(BPF_RB_FORCE_WAKEUP)
    }
}
