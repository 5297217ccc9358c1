//! The context of an iterator's program.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::seq_file,
    helpers::generated::{bpf_probe_read_kernel, bpf_seq_write},
};

/// What an iterator's program is called with: a structure of pointers (`struct bpf_iter__tcp` and its like), of which the first is
/// to the `struct bpf_iter_meta` of the walk.
#[derive(Clone, Copy)]
pub(crate) struct Step(*mut c_void);

impl Step {
    pub(crate) const fn new(context: *mut c_void) -> Self {
        Self(context)
    }

    pub(crate) const fn context(self) -> *mut c_void {
        self.0
    }

    /// A pointer of the context, which the verifier shall know nothing of; null in the last call, which is for no thing.
    #[inline(always)]
    pub(crate) fn pointer(self, index: usize) -> u64 {
        let mut pointer = 0_u64;
        // SAFETY: the helper writes 8 bytes to `pointer` whatever the address; the context has as many pointers as its iterator's
        // programs ask for.
        unsafe {
            bpf_probe_read_kernel(
                ptr::from_mut(&mut pointer).cast(),
                8,
                self.0.byte_add(index * 8),
            );
        }
        pointer
    }

    /// Makes the reading call return a byte more.
    #[inline(always)]
    pub(crate) fn count(self) {
        self.write(&[1]);
    }

    /// Makes the reading call return these bytes, too.
    #[inline(always)]
    pub(crate) fn write<const N: usize>(self, bytes: &[u8; N]) {
        // SAFETY: the context begins with a pointer to `struct bpf_iter_meta`, and that with one to the `struct seq_file`. The
        // verifier knows both types, and refuses the program if it is otherwise.
        unsafe {
            let meta = self.0.cast::<*const *mut seq_file>().read();
            // It fails only if the buffer is full: then the thing is shown again, and its second record is one that
            // user space ignores.
            bpf_seq_write(meta.read(), bytes.as_ptr().cast(), N as u32);
        }
    }
}
