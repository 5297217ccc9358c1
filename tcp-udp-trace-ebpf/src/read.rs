//! Reads of kernel memory, and of the clock.

use core::{mem::MaybeUninit, ptr};

use aya_ebpf::{
    Global,
    helpers::{
        bpf_ktime_get_boot_ns,
        generated::{bpf_get_current_task, bpf_probe_read_kernel, bpf_probe_read_user},
    },
};
use tcp_udp_trace_common::{ABSENT, FIELDS, Field, Offsets};

/// The offsets of the fields on the running kernel. User space sets them before it loads the
/// programs. So the verifier knows each offset, and drops the code for fields that this kernel
/// lacks.
#[unsafe(no_mangle)]
static OFFSETS: Offsets = [ABSENT; FIELDS.len()];

/// Not 0 if programs of all types may load the fields of the current task, and if the cgroup of a
/// socket is a pointer with a type. User space sets it.
#[unsafe(no_mangle)]
static TYPED: Global<u8> = Global::new(0);

/// An integer, or the words of a larger value. Any bytes are a valid value.
pub(crate) trait Plain: Copy {
    const ZERO: Self;
}

macro_rules! plain {
    ($($type:ty = $zero:expr,)+) => { $(impl Plain for $type { const ZERO: Self = $zero; })+ };
}

plain! {
    u8 = 0,
    u16 = 0,
    u32 = 0,
    u64 = 0,
    // An address, and a name: words rather than bytes, so that the compiler copies them as words.
    [u32; 4] = [0; 4],
    [u64; 2] = [0; 2],
    // Two addresses or ports, which are adjacent.
    [u32; 2] = [0; 2],
    [u16; 2] = [0; 2],
    // The header of UDP.
    [u16; 4] = [0; 4],
    // The fields that find the headers of a packet.
    [u64; 5] = [0; 5],
}

impl Plain for *const u8 {
    const ZERO: Self = ptr::null();
}

/// Returns whether the verifier knows the types of the current task and of a socket's cgroup.
#[inline(always)]
pub(crate) fn is_typed() -> bool {
    TYPED.load() != 0
}

/// Returns whether this kernel has `field`.
#[inline(always)]
pub(crate) fn has(field: Field) -> bool {
    offset(field) != ABSENT
}

#[inline(always)]
pub(crate) fn offset(field: Field) -> u32 {
    // SAFETY: `field` indexes FIELDS, and OFFSETS has its length. Volatile, because the compiler
    // must not use the initial value in place of the one that user space sets.
    unsafe {
        (&raw const OFFSETS)
            .cast::<u32>()
            .add(field as usize)
            .read_volatile()
    }
}

/// Reads `field` of the structure at `base`, or 0 if the kernel lacks the field or the address is
/// bad.
#[inline(always)]
pub(crate) fn read<T: Plain>(base: u64, field: Field) -> T {
    match offset(field) {
        ABSENT => T::ZERO,
        offset => read_at(base + u64::from(offset)),
    }
}

/// Reads memory at a kernel address, or 0 if the address is bad.
#[inline(always)]
pub(crate) fn read_at<T: Plain>(address: u64) -> T {
    let mut value = MaybeUninit::<T>::uninit();
    probe_read(value.as_mut_ptr(), address);
    // SAFETY: the helper has written all of it.
    unsafe { value.assume_init() }
}

/// Loads `field` of a structure whose type the verifier knows, or 0 if the kernel lacks the field
/// or the pointer is bad. A load is ten times as fast as the helper.
#[inline(always)]
pub(crate) fn load<T: Plain>(base: *const u8, field: Field) -> T {
    match offset(field) {
        ABSENT => T::ZERO,
        // SAFETY: the verifier checks that the field is in the structure, and a load through a bad
        // pointer returns 0. Volatile, because the compiler must not load another size than the
        // field's.
        offset => unsafe { base.add(offset as usize).cast::<T>().read_volatile() },
    }
}

/// Reads `field` of the structure at `base` into its destination, which saves a copy.
#[inline(always)]
pub(crate) fn read_into<T: Plain>(to: &mut T, base: u64, field: Field) {
    match offset(field) {
        ABSENT => *to = T::ZERO,
        offset => probe_read(to, base + u64::from(offset)),
    }
}

#[inline(always)]
fn probe_read<T: Plain>(to: *mut T, address: u64) {
    // SAFETY: the helper writes `size_of::<T>()` bytes to `to` whatever the address: the memory
    // there, or zeros. A `Plain` may have any bytes, and the callers' pointers are to memory for
    // one.
    unsafe { bpf_probe_read_kernel(to.cast(), size_of::<T>() as u32, address as *const _) };
}

/// Reads memory of the current process, or zeros if the address is bad.
#[inline(always)]
pub(crate) fn read_user<T: Plain>(address: u64) -> T {
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: the helper writes `size_of::<T>()` bytes whatever the address: the memory there, or
    // zeros. A `Plain` may have any bytes.
    unsafe {
        bpf_probe_read_user(
            value.as_mut_ptr().cast(),
            size_of::<T>() as u32,
            address as *const _,
        );
        value.assume_init()
    }
}

/// Returns the time on `CLOCK_BOOTTIME` in nanoseconds.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: the helper takes no argument and cannot fail.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// Returns the address of the current `task_struct`.
#[inline(always)]
pub(crate) fn current_task() -> u64 {
    // SAFETY: the helper takes no argument and cannot fail.
    unsafe { bpf_get_current_task() }
}
