//! The architecture of the running kernel. Only the numbers of system calls and the registers of
//! arguments depend on it.

use core::{arch::asm, ffi::c_void};

use aya_ebpf::Global;

/// Whether the kernel is one for aarch64, else for x86-64. User space sets it before it loads the
/// programs. So the verifier drops the code of the other architecture.
#[unsafe(no_mangle)]
static AARCH64: Global<u8> = Global::new(0);

#[inline(always)]
pub(crate) fn is_aarch64() -> bool {
    AARCH64.load() != 0
}

/// Defines a function that reads one register from the context of a kprobe (`struct pt_regs`) at
/// its offset on each architecture.
///
/// The verifier accepts only a constant offset. The compiler would merge two loads into one with a
/// variable offset, but not two pieces of assembly.
macro_rules! register {
    ($($(#[$doc:meta])* $name:ident: $x86_64:literal, $aarch64:literal;)+) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub(crate) fn $name(ctx: *const c_void) -> u64 {
            let value: u64;
            if is_aarch64() {
                // SAFETY: the context of a kprobe has this register.
                unsafe {
                    asm!("{} = *(u64 *)({} + {})", out(reg) value, in(reg) ctx, const $aarch64);
                }
            } else {
                // SAFETY: the same.
                unsafe {
                    asm!("{} = *(u64 *)({} + {})", out(reg) value, in(reg) ctx, const $x86_64);
                }
            }
            value
        }
    )+};
}

register! {
    /// Returns the first argument of a probed function.
    first_argument: 112, 0;
    /// Returns the second argument.
    second_argument: 104, 8;
    /// Returns the third argument.
    third_argument: 96, 16;
    /// Returns the fourth argument.
    fourth_argument: 88, 24;
}
