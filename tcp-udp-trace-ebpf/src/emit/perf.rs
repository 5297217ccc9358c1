//! Perf buffers, two for each CPU, for kernels that have no ring buffer.
//!
//! The fill level at which a perf buffer wakes the reader is fixed when the buffer is created. The
//! large buffer wakes the reader each time that another eighth of it is full, and the small one at
//! every record. To wake the reader for one record, the program writes a bell into the small
//! buffer. The small buffer also takes the lifecycle records that find the large one full.

use core::{
    ffi::c_void,
    intrinsics::{AtomicOrdering, atomic_xadd},
};

use aya_ebpf::{
    bindings::BPF_F_CURRENT_CPU,
    helpers::generated::bpf_perf_event_output,
    macros::map,
    maps::{PerCpuArray, PerfEventByteArray},
};

use tcp_udp_trace_common::{End, Head, StateChange, Summary, kind};

use super::{
    head::{Context, Priority, Record, head},
    wakeup::is_armed,
};
use crate::counters;

/// The large buffer of each CPU.
#[map]
static EVENTS: PerfEventByteArray = PerfEventByteArray::new(0);

/// The small buffer of each CPU, an eighth of the large one's size.
#[map]
static URGENT: PerfEventByteArray = PerfEventByteArray::new(0);

/// The slots in which the records of this CPU are built. A program may interrupt or preempt another
/// one, so one slot is not enough. Records are too large for the stack.
#[map]
static SLOTS: PerCpuArray<Slot> = PerCpuArray::with_max_entries(SLOT_COUNT, 0);
const SLOT_COUNT: u32 = 4;

/// The largest record, which is the size of a slot.
type LargestRecord = End;

#[repr(C)]
struct Slot {
    claims: u64,
    space: LargestRecord,
}

impl Slot {
    /// Claims a slot that no other program uses.
    #[inline(always)]
    fn claim() -> Option<*mut Self> {
        for index in 0..SLOT_COUNT {
            let slot = SLOTS.get_ptr_mut(index)?;
            // SAFETY: a valid pointer to this CPU's value. A program that finds its own claim to be
            // the only one has the slot, because later claims count two. If two claims come at
            // once, both may fail.
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
        // SAFETY: the pointer comes from `claim`.
        unsafe {
            let claims = &raw mut (*slot).claims;
            atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(claims, u64::MAX);
        }
    }
}

/// Writes a record. `fill` sets every byte except those of the head. If the buffer is full, counts
/// that and returns false.
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
    // SAFETY: the slot is large enough, aligned, and used by this program only. A record consists
    // of integers and bytes, so the old contents are a valid record.
    fill(unsafe { &mut *(&raw mut (*slot).space).cast::<R>() });
    output_slot(ctx, slot, kind, priority, size_of::<R>())
}

/// Writes the record of a state change. At the end of a connection, it has a summary.
#[inline(always)]
pub(crate) fn state_change(
    ctx: Context,
    priority: Priority,
    ends: bool,
    summarize: impl FnOnce(&mut Summary),
    fill: impl FnOnce(&mut StateChange),
) -> bool {
    let Some(slot) = Slot::claim() else {
        counters::lost(kind::STATE_CHANGE);
        return false;
    };
    // SAFETY: as in `record`.
    let End { change, summary } = unsafe { &mut (*slot).space };
    if ends {
        summarize(summary);
    }
    fill(change);
    let size = if ends {
        size_of::<End>()
    } else {
        size_of::<StateChange>()
    };
    output_slot(ctx, slot, kind::STATE_CHANGE, priority, size)
}

/// Completes the record of this size in the slot, writes it, and releases the slot.
#[inline(always)]
fn output_slot(ctx: Context, slot: *mut Slot, kind: u32, priority: Priority, size: usize) -> bool {
    // SAFETY: the slot is used by this program only.
    let space = unsafe { &raw mut (*slot).space };
    // The time is taken last, because user space sorts the records of different CPUs by their
    // times.
    //
    // SAFETY: every record begins with its head.
    unsafe { space.cast::<Head>().write(head(kind)) };
    let data = space.cast();
    let written = output(&EVENTS, ctx, data, size)
        || priority != Priority::Normal && output(&URGENT, ctx, data, size);
    Slot::release(slot);
    if !written {
        counters::lost(kind);
    } else if kind != kind::IMAGE && is_armed() {
        // If the bell finds the small buffer full, the reader has already been woken.
        let mut bell = kind::BELL;
        output(&URGENT, ctx, (&raw mut bell).cast(), size_of::<u32>());
    }
    written
}

/// Returns false if the buffer is full, or if this CPU has none because it came online later.
#[inline(always)]
fn output(buffer: &PerfEventByteArray, ctx: Context, data: *mut c_void, size: usize) -> bool {
    // SAFETY: the context is the program's own, the map is one of perf buffers, and the data is
    // complete.
    let error = unsafe {
        bpf_perf_event_output(
            ctx,
            (&raw const *buffer).cast_mut().cast(),
            BPF_F_CURRENT_CPU,
            data,
            size as u64,
        )
    };
    error == 0
}

/// Returns false, because no helper returns the fill level of a perf buffer.
#[inline(always)]
pub(crate) fn is_crowded() -> bool {
    false
}
