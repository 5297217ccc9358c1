//! Perf buffers, two for each CPU, for kernels without the ring buffer.
//!
//! When the reader of a perf buffer is woken is settled when it is made: the large one wakes it each time that it has filled by an eighth, the
//! small one at once. So where a record shall wake it, a bell goes into the small one. That also takes the records that would be
//! missed most when the large one is full.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{
    bindings::BPF_F_CURRENT_CPU,
    helpers::generated::bpf_perf_event_output,
    macros::map,
    maps::{PerCpuArray, PerfEventByteArray},
};

use tcp_udp_trace_common::{Udp, kind};

use super::{
    head::{Context, Priority, Record, head},
    wakeup::is_armed,
};
use crate::counters;

/// The large one of each CPU.
#[map]
static EVENTS: PerfEventByteArray = PerfEventByteArray::new(0);

/// The small one, an eighth of its size.
#[map]
static URGENT: PerfEventByteArray = PerfEventByteArray::new(0);

/// Where the records of this CPU are built: a program may interrupt another one, or preempt it, so one place is not enough. They
/// are too large for the stack.
#[map]
static SLOTS: PerCpuArray<Slot> = PerCpuArray::with_max_entries(SLOT_COUNT, 0);
const SLOT_COUNT: u32 = 4;

/// Room for the largest record.
type LargestRecord = Udp;

#[repr(C)]
struct Slot {
    claims: u64,
    space: LargestRecord,
}

impl Slot {
    /// A place that no other program has.
    #[inline(always)]
    fn claim() -> Option<*mut Self> {
        for index in 0..SLOT_COUNT {
            let slot = SLOTS.get_ptr_mut(index)?;
            // SAFETY: a valid pointer to this CPU's value. Whoever finds its own claim to be the only one has the place: later claims
            // find two. If two come at once, perhaps neither gets it.
            unsafe {
                let claims = &raw mut (*slot).claims;
                atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(claims, 1);
                if claims.read_volatile() == 1 {
                    return Some(slot);
                }
                atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(claims, u64::MAX);
            }
        }
        None
    }

    #[inline(always)]
    fn release(slot: *mut Self) {
        // SAFETY: `claim` gave the pointer.
        unsafe {
            let claims = &raw mut (*slot).claims;
            atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(claims, u64::MAX);
        }
    }
}

/// Writes a record; `fill` sets every byte but the head's. A full buffer is counted, and then this is false.
#[inline(always)]
pub(crate) fn record<R: Record>(
    ctx: Context,
    kind: u32,
    priority: Priority,
    fill: impl FnOnce(&mut R),
) -> bool {
    const {
        assert!(
            size_of::<R>() <= size_of::<LargestRecord>()
                && align_of::<R>() <= align_of::<LargestRecord>()
        )
    };
    let Some(slot) = Slot::claim() else {
        counters::lost(kind);
        return false;
    };
    // SAFETY: the room is large enough and aligned, and this program's alone; a record is integers and bytes only, so what was
    // there before is one.
    let record = unsafe { &mut *(&raw mut (*slot).space).cast::<R>() };
    fill(record);
    // Last, because user space puts the records of different CPUs in the order of their times.
    *record.head() = head(kind);
    let written = output(&EVENTS, ctx, record)
        || priority != Priority::Normal && output(&URGENT, ctx, record);
    Slot::release(slot);
    if !written {
        counters::lost(kind);
    } else if kind != kind::IMAGE && is_armed() {
        // Where there is no room for it, the reader has been woken already.
        output(&URGENT, ctx, &kind::BELL);
    }
    written
}

/// False if the buffer is full, or if this CPU has none, because it was brought up later.
#[inline(always)]
fn output<T>(buffer: &'static PerfEventByteArray, ctx: Context, data: &T) -> bool {
    // SAFETY: the context is the program's own, the map one of perf buffers, and the data whole.
    let error = unsafe {
        bpf_perf_event_output(
            ctx,
            (&raw const *buffer).cast_mut().cast(),
            BPF_F_CURRENT_CPU,
            (&raw const *data).cast_mut().cast(),
            size_of::<T>() as u64,
        )
    };
    error == 0
}

/// Whether there is no room to spare for records that could come later just as well: that cannot be told.
#[inline(always)]
pub(crate) fn is_crowded() -> bool {
    false
}
