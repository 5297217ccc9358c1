//! The tasks and the numbers of a process.

use tcp_udp_trace_common::Field;

use crate::read::{current_task, read};

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
