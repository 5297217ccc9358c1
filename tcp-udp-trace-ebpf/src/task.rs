//! The tasks and the numbers of a process.

use tcp_udp_trace_common::Field;

use aya_ebpf::helpers::generated::bpf_get_current_task_btf;

use crate::read::{Plain, current_task, is_typed, load, read};

/// The current task, or its main thread. If the verifier knows its type, its fields are loaded.
#[derive(Clone, Copy)]
pub(crate) struct Task(*const u8);

impl Task {
    #[inline(always)]
    pub(crate) fn current() -> Self {
        if is_typed() {
            // SAFETY: the helper takes no argument and cannot fail.
            Self(unsafe { bpf_get_current_task_btf() }.cast_const().cast())
        } else {
            Self(current_task() as *const u8)
        }
    }

    /// Returns the main thread.
    #[inline(always)]
    pub(crate) fn leader(self) -> Self {
        Self(self.get(Field::GroupLeader))
    }

    /// Returns the value of a field, or 0 if the kernel lacks the field.
    #[inline(always)]
    pub(crate) fn get<T: Plain>(self, field: Field) -> T {
        if is_typed() {
            load(self.0, field)
        } else {
            read(self.0 as u64, field)
        }
    }
}

/// Returns the main thread. The process has the main thread's name, because other threads are named
/// for their tasks.
#[inline(always)]
pub(crate) fn leader(task: u64) -> u64 {
    read(task, Field::GroupLeader)
}

/// Returns the address of the current process's `struct pid`, or 0 if it is not known.
#[inline(always)]
pub(crate) fn current_pid() -> u64 {
    pid(leader(current_task()))
}

/// Returns the address of a process's `struct pid`, or 0 if it is not known.
#[inline(always)]
pub(crate) fn pid(leader: u64) -> u64 {
    read(leader, Field::ThreadPid)
}

/// Returns the number of a process in its pid namespace of this level: `numbers[level].nr` of its
/// `struct pid`.
///
/// <https://elixir.bootlin.com/linux/v6.12/source/include/linux/pid.h#L50>
#[inline(always)]
pub(crate) fn number(leader: u64, level: u32) -> u32 {
    /// The size of a `struct upid`, which is a number and a pointer to its namespace.
    const EACH: u64 = 16;
    read(pid(leader) + u64::from(level) * EACH, Field::PidNumbers)
}
