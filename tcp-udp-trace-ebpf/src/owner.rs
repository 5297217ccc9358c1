//! The current task as the owner of a socket. Only hooks that run in the owner's own system call may ask.

use aya_ebpf::helpers::{
    bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_uid_gid,
    generated::bpf_get_current_task,
};
use tcp_udp_trace_common::{Field, Owner, origin};

use crate::sock;

/// An owner that is not known.
pub(crate) const UNKNOWN: Owner = Owner {
    pid: 0,
    tid: 0,
    uid: 0,
    origin: origin::NONE,
    _pad: [0; 3],
    comm: [0; 16],
};

/// The current process.
#[inline(always)]
pub(crate) fn current(origin: u8) -> Owner {
    let pid_tgid = bpf_get_current_pid_tgid();
    Owner {
        pid: (pid_tgid >> 32) as u32,
        tid: pid_tgid as u32,
        uid: bpf_get_current_uid_gid() as u32,
        origin,
        _pad: [0; 3],
        comm: comm(),
    }
}

/// The name of the process: its main thread's, because threads are named for what they do in it.
#[inline(always)]
fn comm() -> [u8; 16] {
    if sock::has(Field::GroupLeader) && sock::has(Field::Comm) {
        let leader = sock::read::<u64>(current_task(), Field::GroupLeader);
        sock::read(leader, Field::Comm)
    } else {
        bpf_get_current_comm().unwrap_or_default()
    }
}

/// The address of the current `task_struct`.
#[inline(always)]
pub(crate) fn current_task() -> u64 {
    // SAFETY: the helper takes nothing and cannot fail.
    unsafe { bpf_get_current_task() }
}
