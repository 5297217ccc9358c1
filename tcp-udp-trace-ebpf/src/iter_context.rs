//! The context of an iterator's program.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::seq_file,
    helpers::generated::{bpf_probe_read_kernel, bpf_seq_write},
};

/// The context of an iterator's program: a structure of pointers, such as `struct bpf_iter__tcp`.
/// The first one points to the `struct bpf_iter_meta` of the iterator.
#[derive(Clone, Copy)]
pub(crate) struct Step(*mut c_void);

impl Step {
    pub(crate) const fn new(context: *mut c_void) -> Self {
        Self(context)
    }

    pub(crate) const fn context(self) -> *mut c_void {
        self.0
    }

    /// Returns a pointer of the context, without a type for the verifier. It is null in the last
    /// call, which has no object.
    #[inline(always)]
    pub(crate) fn pointer(self, index: usize) -> u64 {
        let mut pointer = 0_u64;
        // SAFETY: the helper writes 8 bytes to `pointer` whatever the address. The context has as
        // many pointers as the programs of its iterator request.
        unsafe {
            bpf_probe_read_kernel(
                ptr::from_mut(&mut pointer).cast(),
                8,
                self.0.byte_add(index * 8),
            );
        }
        pointer
    }

    /// Makes the read call return one more byte.
    #[inline(always)]
    pub(crate) fn count(self) {
        self.write(&[1]);
    }

    /// Makes the read call return these bytes as well.
    #[inline(always)]
    pub(crate) fn write<const N: usize>(self, bytes: &[u8; N]) {
        // SAFETY: the context begins with a pointer to `struct bpf_iter_meta`, which begins with a
        // pointer to the `struct seq_file`. The verifier knows both types, and refuses the program
        // if that is not so.
        unsafe {
            let meta = self.0.cast::<*const *mut seq_file>().read();
            // The helper fails only if the buffer is full. Then the kernel visits the object again,
            // and user space ignores its second record.
            bpf_seq_write(meta.read(), bytes.as_ptr().cast(), N as u32);
        }
    }
}
