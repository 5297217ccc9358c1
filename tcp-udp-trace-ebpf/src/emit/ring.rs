//! A ring buffer, of all CPUs.

use aya_ebpf::{
    Global,
    bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    macros::map,
    maps::RingBuf,
};

use tcp_udp_trace_common::kind;

use super::{
    head::{Context, Priority, Record, head},
    wakeup::is_armed,
};
use crate::counters;

/// The records, in the order of their reservation.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(2 << 20, 0);

/// The records of [`Priority::Final`] that have found that one full. The reader puts them where they belong by their time.
#[map]
static LATE: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// An eighth of the ring's size is this power of two, in bytes; user space sets it. Each time the ring has filled by that much, a record
/// wakes the reader though it did not ask.
#[unsafe(no_mangle)]
static WAKE_SHIFT: Global<u32> = Global::new(16);

/// What the kernel puts before each record, in bytes (`BPF_RINGBUF_HDR_SZ`).
const RECORD_HEADER: u64 = 8;

/// Writes a record; `fill` sets every byte but the head's. A full ring is counted, and then this is false.
#[inline(always)]
pub(crate) fn record<R: Record>(
    _ctx: Context,
    kind: u32,
    priority: Priority,
    fill: impl Fn(&mut R),
) -> bool {
    let before = EVENTS.query(u64::from(BPF_RB_AVAIL_DATA));
    let after = before + size_of::<R>() as u64 + RECORD_HEADER;
    if priority == Priority::Normal && after >> WAKE_SHIFT.load() >= 7 {
        counters::lost(kind);
        return false;
    }
    let (entry, wake) = match EVENTS.reserve::<R>(0) {
        Some(entry) => (Some(entry), wake(kind, before, after)),
        // The reader has been woken long ago.
        None if priority == Priority::Final => (LATE.reserve(0), u64::from(BPF_RB_NO_WAKEUP)),
        None => (None, 0),
    };
    // What is written is written in one place, whichever ring it goes to: half the work for the verifier.
    let Some(mut entry) = entry else {
        counters::lost(kind);
        return false;
    };
    // SAFETY: the kernel gave `size_of::<R>()` writable bytes, aligned to 8; a record is integers and bytes
    // only, and all of it is written before it is read or submitted.
    let record = unsafe { entry.assume_init_mut() };
    *record.head() = head(kind);
    fill(record);
    entry.submit(wake);
    true
}

/// How to submit a record that fills the ring from `before` to `after`: it wakes the reader if that asked for it, or if the ring fills up.
#[inline(always)]
fn wake(kind: u32, before: u64, after: u64) -> u64 {
    // Only the record that crosses the line wakes: past it, each one would. Two CPUs may cross it together and both
    // believe that the other did; the next line, or the reader's timer, makes up for that.
    // An image is followed by the record of a socket, which wakes the reader for both.
    if kind != kind::IMAGE && is_armed()
        || after >> WAKE_SHIFT.load() != before >> WAKE_SHIFT.load()
    {
        u64::from(BPF_RB_FORCE_WAKEUP)
    } else {
        u64::from(BPF_RB_NO_WAKEUP)
    }
}

/// How many eighths of the ring are filled.
#[inline(always)]
pub(crate) fn fill() -> u32 {
    (EVENTS.query(u64::from(BPF_RB_AVAIL_DATA)) >> WAKE_SHIFT.load()) as u32
}

/// Whether the ring has no room to spare for records that could come later just as well.
#[inline(always)]
pub(crate) fn is_crowded() -> bool {
    fill() != 0
}
