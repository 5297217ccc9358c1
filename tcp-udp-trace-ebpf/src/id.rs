//! Unique ids of sockets.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{Global, helpers::bpf_get_smp_processor_id, macros::map, maps::PerCpuArray};

/// How many ids each CPU has drawn.
#[map]
static LAST_IDS: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// How often another draw may interrupt a draw before it gives up. One interruption is rare. Each
/// further one needs another level of interrupts or another preempting task.
const MAX_ATTEMPTS: u32 = 8;

/// The number of possible CPUs of this machine. User space sets it.
#[unsafe(no_mangle)]
static CPUS: Global<u64> = Global::new(1);

/// Returns an id that no other call returns, or 0 if it gives up.
///
/// Linux 5.10 can add to memory atomically, but cannot return the sum. So the program reads the
/// counter, adds one and reads it again. If the counter moved by exactly one, the sum is unique. If
/// it moved by more, another program ran in between on this CPU (nested, or after preemption), and
/// the draw is repeated.
#[inline(always)]
pub(crate) fn next() -> u64 {
    let Some(counter) = LAST_IDS.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: the helper takes no argument and cannot fail.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    for _ in 0..MAX_ATTEMPTS {
        // SAFETY: `counter` points to this CPU's value, which lives as long as the map.
        let (before, after) = unsafe {
            let before = counter.read_volatile();
            atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, 1);
            (before, counter.read_volatile())
        };
        if after == before + 1 {
            // The ids of the CPUs are interleaved, so no two CPUs share one.
            return before * CPUS.load() + u64::from(cpu) + 1;
        }
    }
    0
}
