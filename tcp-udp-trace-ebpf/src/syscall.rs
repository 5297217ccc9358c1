//! System calls by number, where no tracepoint of theirs can be used. The numbers, and how the kernel keeps the current one, are the
//! architecture's own.

use tcp_udp_trace_common::Field;

use crate::sock::read;

#[cfg(not(bpf_target_arch = "aarch64"))]
mod arch {
    pub(crate) type Number = u64;
    pub(crate) const CONNECT: Number = 42;
    pub(crate) const ACCEPT: Number = 43;
    pub(crate) const ACCEPT4: Number = 288;
}

/// As in `asm-generic/unistd.h`.
#[cfg(bpf_target_arch = "aarch64")]
mod arch {
    pub(crate) type Number = u32;
    pub(crate) const CONNECT: Number = 203;
    pub(crate) const ACCEPT: Number = 202;
    pub(crate) const ACCEPT4: Number = 242;
}

pub(crate) use arch::{ACCEPT, ACCEPT4, CONNECT};

/// The number of the system call that a task with these registers (`struct pt_regs`) is in.
#[inline(always)]
pub(crate) fn number(regs: u64) -> arch::Number {
    read(regs, Field::SyscallNumber)
}
