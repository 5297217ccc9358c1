//! System calls by number, and their arguments. The numbers and the registers depend on the
//! architecture.

use aya_ebpf::Global;
use tcp_udp_trace_common::{ABSENT, Field};

use crate::read::{current_task, offset, read, read_at};

/// The distance in bytes from the beginning of a task's kernel stack to its saved user registers
/// (`struct pt_regs`), or 0 if it is not known.
#[unsafe(no_mangle)]
static REGISTERS: Global<u64> = Global::new(0);

#[cfg(not(bpf_target_arch = "aarch64"))]
mod arch {
    pub(crate) type Number = u64;
    /// A kernel that is built with FRED leaves some bytes above the registers unused
    /// (`TOP_OF_KERNEL_STACK_PADDING`).
    ///
    /// <https://elixir.bootlin.com/linux/v6.12/source/arch/x86/include/asm/thread_info.h#L36>
    pub(super) const PADDINGS: [u64; 2] = [0, 16];
    pub(super) const SECOND: u64 = 0;
    pub(super) const THIRD: u64 = 0;
    pub(crate) const CONNECT: Number = 42;
    pub(crate) const ACCEPT: Number = 43;
    pub(crate) const LISTEN: Number = 50;
    pub(crate) const ACCEPT4: Number = 288;
    /// `write`, `writev`, `sendto`, `sendmsg`, `sendmmsg`.
    pub(crate) const SENDS: &[Number] = &[1, 20, 44, 46, 307];
}

/// The numbers are those of `asm-generic/unistd.h`.
#[cfg(bpf_target_arch = "aarch64")]
mod arch {
    pub(crate) type Number = u32;
    pub(super) const PADDINGS: [u64; 2] = [0, 0];
    /// The offset in the array of registers.
    pub(super) const SECOND: u64 = 8;
    pub(super) const THIRD: u64 = 16;
    pub(crate) const CONNECT: Number = 203;
    pub(crate) const ACCEPT: Number = 202;
    pub(crate) const LISTEN: Number = 201;
    pub(crate) const ACCEPT4: Number = 242;
    /// `write`, `writev`, `sendto`, `sendmsg`, `sendmmsg`.
    pub(crate) const SENDS: &[Number] = &[64, 66, 206, 211, 269];
}

pub(crate) use arch::{ACCEPT, ACCEPT4, CONNECT, LISTEN, SENDS};

/// Returns the number of the system call that a task with these registers (`struct pt_regs`) is in.
#[inline(always)]
pub(crate) fn number(regs: u64) -> arch::Number {
    read(regs, Field::SyscallNumber)
}

/// Returns the registers of the current task, if the task is in the system call of this number. The
/// number proves that the registers are at the expected address.
#[inline(always)]
pub(crate) fn registers(of: arch::Number) -> Option<u64> {
    registers_of_any(&[of])
}

/// Returns the same for a system call of any of these numbers.
#[inline(always)]
pub(crate) fn registers_of_any(of: &[arch::Number]) -> Option<u64> {
    if REGISTERS.load() == 0 {
        return None;
    }
    let stack = read::<u64>(current_task(), Field::TaskStack);
    let [first, second] = arch::PADDINGS.map(|padding| stack + REGISTERS.load() - padding);
    if of.contains(&number(first)) {
        return Some(first);
    }
    (second != first && of.contains(&number(second))).then_some(second)
}

/// Returns the first three arguments of the system call that a task with these registers is in.
#[inline(always)]
pub(crate) fn arguments(regs: u64) -> [u64; 3] {
    let argument = |field, within| match offset(field) {
        ABSENT => 0,
        offset => read_at(regs + u64::from(offset) + within),
    };
    [
        argument(Field::SyscallFirst, 0),
        argument(Field::SyscallSecond, arch::SECOND),
        argument(Field::SyscallThird, arch::THIRD),
    ]
}
