//! Iterators: programs that user space lets the kernel run once for each thing that there is.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::seq_file,
    helpers::generated::{bpf_probe_read_kernel, bpf_seq_write},
};
use tcp_udp_trace_common::{Owner, origin};

use crate::{
    emit, owner,
    sock::Sock,
    tcp,
    udp::{self, key_of},
};

/// What an iterator's program is called with: a structure of pointers (`struct bpf_iter__tcp` and its like), of which the first is
/// to the `struct bpf_iter_meta` of the walk.
#[derive(Clone, Copy)]
pub(crate) struct Step(*mut c_void);

/// The walk goes on to the next thing.
pub(crate) const NEXT: i32 = 0;
/// The walk pauses: the reading call returns, and the next one begins with the same thing.
const AGAIN: i32 = 1;

impl Step {
    pub(crate) const fn new(context: *mut c_void) -> Self {
        Self(context)
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

/// `iter/task_file`: a file that a process has open. If it is a TCP socket that nobody is known to own, it is this process's.
#[inline(always)]
pub(crate) fn file_of_tcp(step: Step) -> i32 {
    if let Some(tracked) = Sock::of_file(step.pointer(3)).and_then(tcp::known) {
        belongs_to(&mut tracked.creator, step.pointer(1));
    }
    NEXT
}

/// The same for UDP.
#[inline(always)]
pub(crate) fn file_of_udp(step: Step) -> i32 {
    let Some(sk) = Sock::of_file(step.pointer(3)) else {
        return NEXT;
    };
    if !sk.is_udp() {
        return NEXT;
    }
    if let Some(tracked) = udp::seen(key_of(sk), ptr::without_provenance(sk.0 as usize)) {
        belongs_to(&mut tracked.owner, step.pointer(1));
    }
    NEXT
}

/// If nobody is known to own the socket, it is this task's, which has it open.
#[inline(always)]
fn belongs_to(owner: &mut Owner, task: u64) {
    if owner.origin == origin::NONE {
        owner::settle(owner, owner::of_task(task, origin::SNAPSHOT));
    }
}

/// `iter/tcp`: a TCP socket of the reader's network namespace. The kernel holds its lock (before 5.15 that of its hash bucket, which
/// it cannot leave meanwhile): no close comes before this.
#[inline(always)]
pub(crate) fn tcp_socket(step: Step) -> i32 {
    let sk = Sock::new(step.pointer(1));
    let Some(tracked) = tcp::known(sk) else {
        return NEXT;
    };
    if emit::is_crowded() {
        return AGAIN;
    }
    if tcp::sample(step.0, sk, tracked) {
        step.count();
    }
    NEXT
}

/// `iter/udp`: a bound UDP socket of the reader's network namespace.
#[inline(always)]
pub(crate) fn udp_socket(step: Step) -> i32 {
    let sk = Sock::new(step.pointer(1));
    if sk.0 == 0 {
        return NEXT;
    }
    let key = key_of(sk);
    // One that is not known is being closed, or is the kernel's own.
    let Some(tracked) = udp::known(key, sk) else {
        return NEXT;
    };
    if emit::is_crowded() {
        return AGAIN;
    }
    if udp::sample(step.0, key, sk, tracked) {
        step.count();
    }
    NEXT
}
