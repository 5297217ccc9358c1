//! The current task as the owner of a socket. Only hooks that run in the owner's own system call may ask.

use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid, bpf_get_current_uid_gid, generated::bpf_get_current_task,
};
use tcp_udp_trace_common::{Field, Owner, origin};

use crate::sock;

/// An owner that is not known.
pub(crate) const UNKNOWN: Owner = Owner {
    pid: 0,
    tid: 0,
    uid: 0,
    origin: origin::NONE,
    comm: [0; 2],
};

/// The current process.
#[inline(always)]
pub(crate) fn current(origin: u32) -> Owner {
    let pid_tgid = bpf_get_current_pid_tgid();
    Owner {
        pid: (pid_tgid >> 32) as u32,
        tid: pid_tgid as u32,
        uid: bpf_get_current_uid_gid() as u32,
        origin,
        comm: comm(),
    }
}

/// The name of the process: its main thread's, because threads are named for what they do in it.
#[inline(always)]
fn comm() -> [u64; 2] {
    let leader = sock::read::<u64>(current_task(), Field::GroupLeader);
    sock::read(leader, Field::Comm)
}

/// The address of the current `task_struct`.
#[inline(always)]
pub(crate) fn current_task() -> u64 {
    // SAFETY: the helper takes nothing and cannot fail.
    unsafe { bpf_get_current_task() }
}
