//! System calls by number, and their arguments.

use aya_ebpf::Global;
use tcp_udp_trace_common::{ABSENT, Field};

use crate::{
    arch::is_aarch64,
    read::{current_task, offset, read, read_at, read_user},
};

/// The distance in bytes from the beginning of a task's kernel stack to its saved user registers
/// (`struct pt_regs`), or 0 if it is not known.
#[unsafe(no_mangle)]
static REGISTERS: Global<u64> = Global::new(0);

/// A system call, by its number on each architecture.
#[derive(Clone, Copy)]
pub(crate) struct Syscall {
    x86_64: u32,
    /// The numbers are those of `asm-generic/unistd.h`.
    aarch64: u32,
}

pub(crate) const ACCEPT: Syscall = Syscall::new(43, 202);
pub(crate) const ACCEPT4: Syscall = Syscall::new(288, 242);
pub(crate) const CONNECT: Syscall = Syscall::new(42, 203);
pub(crate) const LISTEN: Syscall = Syscall::new(50, 201);
pub(crate) const SETSOCKOPT: Syscall = Syscall::new(54, 208);
const SENDTO: Syscall = Syscall::new(44, 206);
const SENDMSG: Syscall = Syscall::new(46, 211);
const SENDMMSG: Syscall = Syscall::new(307, 269);
/// `write`, `writev`, and the calls above.
pub(crate) const SENDS: &[Syscall] = &[
    Syscall::new(1, 64),
    Syscall::new(20, 66),
    SENDTO,
    SENDMSG,
    SENDMMSG,
];

impl Syscall {
    const fn new(x86_64: u32, aarch64: u32) -> Self {
        Self { x86_64, aarch64 }
    }

    #[inline(always)]
    fn number(self) -> u32 {
        if is_aarch64() {
            self.aarch64
        } else {
            self.x86_64
        }
    }
}

/// Returns whether a task with these registers (`struct pt_regs`) is in any of these system calls.
#[inline(always)]
pub(crate) fn is_any_of(calls: &[Syscall], regs: u64) -> bool {
    let number = read::<u32>(regs, Field::SyscallNumber);
    calls.iter().any(|call| call.number() == number)
}

/// Returns the registers of the current task, if the task is in this system call. The number of the
/// call proves that the registers are at the expected address.
#[inline(always)]
pub(crate) fn registers(of: Syscall) -> Option<u64> {
    registers_of_any(&[of])
}

/// Returns the same for any of these system calls.
#[inline(always)]
pub(crate) fn registers_of_any(of: &[Syscall]) -> Option<u64> {
    /// An x86-64 kernel that is built with FRED leaves some bytes above the registers unused
    /// (`TOP_OF_KERNEL_STACK_PADDING`).
    ///
    /// <https://elixir.bootlin.com/linux/v6.12/source/arch/x86/include/asm/thread_info.h#L36>
    const PADDING: u64 = 16;
    if REGISTERS.load() == 0 {
        return None;
    }
    let top = read::<u64>(current_task(), Field::TaskStack) + REGISTERS.load();
    if is_any_of(of, top) {
        return Some(top);
    }
    let padded = top - PADDING;
    (!is_aarch64() && is_any_of(of, padded)).then_some(padded)
}

/// Returns the address in user memory of the destination that a send system call with these
/// registers was given. Returns 0 if there is none, or there may be several.
#[inline(always)]
pub(crate) fn destination(regs: u64) -> u64 {
    if is_any_of(&[SENDTO], regs) {
        return match offset(Field::SyscallFifth) {
            ABSENT => 0,
            offset if is_aarch64() => read_at(regs + u64::from(offset) + 4 * 8),
            offset => read_at(regs + u64::from(offset)),
        };
    }
    let [_, messages, count] = arguments(regs);
    if is_any_of(&[SENDMSG], regs) || is_any_of(&[SENDMMSG], regs) && count as u32 == 1 {
        // The first field of a `struct msghdr`, and of a `struct mmsghdr`.
        return read_user(messages);
    }
    0
}

/// Returns the first three arguments of the system call that a task with these registers is in.
#[inline(always)]
pub(crate) fn arguments(regs: u64) -> [u64; 3] {
    let argument = |field, within| match offset(field) {
        ABSENT => 0,
        offset => read_at(regs + u64::from(offset) + within),
    };
    // On aarch64, the field is the array of registers.
    let within = |index: u64| if is_aarch64() { index * 8 } else { 0 };
    [
        argument(Field::SyscallFirst, 0),
        argument(Field::SyscallSecond, within(1)),
        argument(Field::SyscallThird, within(2)),
    ]
}
