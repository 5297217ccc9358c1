//! Ids of sockets.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{Global, helpers::bpf_get_smp_processor_id, macros::map, maps::PerCpuArray};

/// The last ticket drawn on each CPU.
#[map]
static LAST_IDS: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// How often a draw may be interrupted by another one before it gives up. One interruption is rare, and
/// each further one needs another level of interrupts or another preempting task.
const MAX_ATTEMPTS: u32 = 8;

/// How many CPUs this machine may have; set by user space.
#[unsafe(no_mangle)]
static CPUS: Global<u64> = Global::new(1);

/// A number that no other call gets.
///
/// Linux 5.10 can add to memory atomically, but not say what the sum was. So: read, add one, read again. If the
/// counter moved by exactly one, that one was ours and the sum is ours alone; if it moved by more, another
/// program ran in between on this CPU (nested, or after preemption), and the draw is repeated.
#[inline(always)]
pub(crate) fn next() -> u64 {
    let Some(counter) = LAST_IDS.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: the helper takes nothing and cannot fail.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    for _ in 0..MAX_ATTEMPTS {
        // SAFETY: `counter` points to this CPU's value, which lives as long as the map.
        let (before, after) = unsafe {
            let before = counter.read_volatile();
            atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, 1);
            (before, counter.read_volatile())
        };
        if after == before + 1 {
            // Interleaves the CPUs' tickets: no two CPUs share one.
            return before * CPUS.load() + u64::from(cpu) + 1;
        }
    }
    0
}
