//! A ring buffer that all CPUs share.

use aya_ebpf::{
    Global,
    bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::generated::bpf_ringbuf_submit,
    macros::map,
    maps::RingBuf,
};

use tcp_udp_trace_common::{End, Head, StateChange, Summary, kind};

use super::{
    head::{Context, Priority, Record, head},
    wakeup::is_armed,
};
use crate::counters;

/// The ring, with the records in the order of their reservation.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(2 << 20, 0);

/// The second ring, for records of [`Priority::Final`] that find the first one full. The reader
/// inserts them by their times.
#[map]
static LATE: RingBuf = RingBuf::with_byte_size(1 << 20, 0);

/// The binary logarithm of an eighth of the ring's size in bytes. User space sets it. Each time
/// that another eighth is full, a record wakes the reader even if the reader is not armed.
#[unsafe(no_mangle)]
static WAKE_SHIFT: Global<u32> = Global::new(16);

/// The size of the header that the kernel puts before each record, in bytes (`BPF_RINGBUF_HDR_SZ`).
///
/// <https://github.com/torvalds/linux/blob/v6.12/include/uapi/linux/bpf.h>
const RECORD_HEADER: u64 = 8;

/// Writes a record. `fill` sets every byte except those of the head. If the ring is full, counts
/// that and returns false.
#[inline(always)]
pub(crate) fn record<R: Record>(
    _ctx: Context,
    kind: u32,
    priority: Priority,
    fill: impl Fn(&mut R),
) -> bool {
    write(kind, priority, size_of::<R>(), reserve::<R>, fill)
}

/// Writes the record of a state change. At the end of a connection, it has a summary.
#[inline(always)]
pub(crate) fn state_change(
    _ctx: Context,
    priority: Priority,
    ends: bool,
    summarize: impl Fn(&mut Summary),
    fill: impl Fn(&mut StateChange),
) -> bool {
    let size = if ends {
        size_of::<End>()
    } else {
        size_of::<StateChange>()
    };
    let reserve = |ring: &RingBuf| {
        if !ends {
            return reserve::<StateChange>(ring);
        }
        let end = reserve::<End>(ring)?;
        // The verifier knows here that the memory is large enough for a summary, and does not
        // later.
        //
        // SAFETY: the kernel gave the memory of an `End`, which consists of integers.
        summarize(unsafe { &mut (*end).summary });
        Some(end.cast())
    };
    write(kind::STATE_CHANGE, priority, size, reserve, fill)
}

/// Returns the memory for a record, or `None` if the ring is full.
#[inline(always)]
fn reserve<R: 'static>(ring: &RingBuf) -> Option<*mut R> {
    ring.reserve::<R>(0).map(|mut entry| entry.as_mut_ptr())
}

/// Writes a record of this size, which begins with an `R`.
#[inline(always)]
fn write<R: Record>(
    kind: u32,
    priority: Priority,
    size: usize,
    reserve: impl Fn(&RingBuf) -> Option<*mut R>,
    fill: impl Fn(&mut R),
) -> bool {
    let before = EVENTS.query(u64::from(BPF_RB_AVAIL_DATA));
    let after = before + size as u64 + RECORD_HEADER;
    if priority == Priority::Normal && after >> WAKE_SHIFT.load() >= 7 {
        counters::lost(kind);
        return false;
    }
    let (entry, wake) = match reserve(&EVENTS) {
        Some(entry) => (Some(entry), wake(kind, before, after)),
        // A full ring has already woken the reader.
        None if priority == Priority::Final => (reserve(&LATE), u64::from(BPF_RB_NO_WAKEUP)),
        None => (None, 0),
    };
    // Both rings share the code that fills the record, which halves the verifier's work.
    let Some(entry) = entry else {
        counters::lost(kind);
        return false;
    };
    // SAFETY: the kernel gave at least `size_of::<R>()` writable bytes, aligned to 8. A record
    // consists of integers and bytes, beginning with its head, and all of them are written before
    // the record is read or submitted.
    unsafe {
        entry.cast::<Head>().write(head(kind));
        fill(&mut *entry);
    }
    // SAFETY: the pointer comes from a reservation, which is submitted once.
    unsafe { bpf_ringbuf_submit(entry.cast(), wake) };
    true
}

/// Returns the flags of the submission of a record that fills the ring from `before` to `after`.
/// The record wakes the reader if the reader is armed, or if the record crosses into another
/// eighth.
#[inline(always)]
fn wake(kind: u32, before: u64, after: u64) -> u64 {
    // Only the record that crosses into another eighth wakes the reader, because otherwise every
    // later record would. If two CPUs cross together, both may leave the wake-up to the other. The
    // next eighth or the reader's timer then wakes the reader. An image is followed by the record
    // of a socket, which wakes the reader for both.
    if kind != kind::IMAGE && is_armed()
        || after >> WAKE_SHIFT.load() != before >> WAKE_SHIFT.load()
    {
        u64::from(BPF_RB_FORCE_WAKEUP)
    } else {
        u64::from(BPF_RB_NO_WAKEUP)
    }
}

/// Returns how many eighths of the ring are full.
#[inline(always)]
pub(crate) fn fill() -> u32 {
    (EVENTS.query(u64::from(BPF_RB_AVAIL_DATA)) >> WAKE_SHIFT.load()) as u32
}

/// Returns whether the ring has no room to spare for records that could as well be written later.
#[inline(always)]
pub(crate) fn is_crowded() -> bool {
    fill() != 0
}
