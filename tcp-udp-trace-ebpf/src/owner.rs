//! A task as the owner of a socket. Only hooks that run in the owner's own system call may ask for the current one.

use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid, bpf_get_current_uid_gid, generated::bpf_get_current_task,
};
use core::sync::atomic::{Ordering, compiler_fence};
use tcp_udp_trace_common::{Field, Owner, origin};

use crate::{emit::Context, image, sock::read};

/// An owner that is not known.
pub(crate) const UNKNOWN: Owner = Owner {
    pid: 0,
    tid: 0,
    uid: 0,
    origin: origin::NONE,
    exec: 0,
    comm: [0; 2],
    started: 0,
};

/// `PF_WQ_WORKER`: a thread of the kernel that does what others have left to it.
const WORKER: u32 = 0x20;

/// The current process as the owner of a socket; none if it is a worker of the kernel, which works
/// on behalf of some process. Writes what it runs, if that is wanted and new.
#[inline(always)]
pub(crate) fn current(ctx: Context, origin: u16) -> Owner {
    let pid_tgid = bpf_get_current_pid_tgid();
    let task = current_task();
    if read::<u32>(task, Field::TaskFlags) & WORKER != 0 {
        return UNKNOWN;
    }
    let leader = leader(task);
    let owner = Owner {
        pid: (pid_tgid >> 32) as u32,
        tid: pid_tgid as u32,
        uid: bpf_get_current_uid_gid() as u32,
        origin,
        exec: image::exec(leader),
        comm: read(leader, Field::Comm),
        started: read(leader, Field::Started),
    };
    image::note(ctx, &owner);
    owner
}

/// The process of another task. Which of its threads, is not known.
#[inline(always)]
pub(crate) fn of_task(task: u64, origin: u16) -> Owner {
    let leader = leader(task);
    let pid = read(task, Field::Tgid);
    Owner {
        pid,
        tid: pid,
        uid: read(read(task, Field::Cred), Field::CredUid),
        origin,
        exec: image::exec(leader),
        comm: read(leader, Field::Comm),
        started: read(leader, Field::Started),
    }
}

/// Lets somebody be the owner of what nobody owned. Others may read it meanwhile: its origin, which tells that it is known, comes last.
#[inline(always)]
pub(crate) fn settle(place: &mut Owner, owner: Owner) {
    place.pid = owner.pid;
    place.tid = owner.tid;
    place.uid = owner.uid;
    place.exec = owner.exec;
    place.comm = owner.comm;
    place.started = owner.started;
    // SAFETY: a valid pointer. Volatile after a fence, for the compiler to keep the order.
    unsafe {
        compiler_fence(Ordering::Release);
        (&raw mut place.origin).write_volatile(owner.origin);
    }
}

/// The main thread: the process has its name, because threads are named for what they do in it.
#[inline(always)]
pub(crate) fn leader(task: u64) -> u64 {
    read(task, Field::GroupLeader)
}

/// The address of the current process's `struct pid`; 0 where it is not known.
#[inline(always)]
pub(crate) fn current_pid() -> u64 {
    read(leader(current_task()), Field::ThreadPid)
}

/// The number of a process in its pid namespace of this level: of its `struct pid`, `numbers[level].nr`.
///
/// <https://elixir.bootlin.com/linux/v6.12/source/include/linux/pid.h#L50>
#[inline(always)]
pub(crate) fn number(leader: u64, level: u32) -> u32 {
    /// The size of a `struct upid`: a number, and a pointer to its namespace.
    const EACH: u64 = 16;
    let pid = read::<u64>(leader, Field::ThreadPid);
    read(pid + u64::from(level) * EACH, Field::PidNumbers)
}

/// The address of the current `task_struct`.
#[inline(always)]
pub(crate) fn current_task() -> u64 {
    // SAFETY: the helper takes nothing and cannot fail.
    unsafe { bpf_get_current_task() }
}
