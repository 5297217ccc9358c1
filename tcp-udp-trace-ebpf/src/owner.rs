//! The current task, or another one, as the owner or the user of a socket. Only hooks that run in
//! the owner's own system call may use the current task.

use core::sync::atomic::{Ordering, compiler_fence};

use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid, bpf_get_current_uid_gid, generated::bpf_get_current_cgroup_id,
};
use tcp_udp_trace_common::{ABSENT, Field, Owner, Tracked, User, origin};

use crate::{
    emit::Context,
    image,
    read::{current_task, offset, read, read_at},
    sock::{Sock, cgroup_id},
    syscall,
    task::{Task, leader},
};

/// An owner that is not known.
pub(crate) const UNKNOWN: Owner = Owner {
    pid: 0,
    tid: 0,
    uid: 0,
    origin: origin::NONE,
    exec: 0,
    comm: [0; 2],
    started: 0,
    cgroup: 0,
};

/// `PF_WQ_WORKER`: a kernel thread that does deferred work for other tasks.
///
/// <https://github.com/torvalds/linux/blob/v6.12/include/linux/sched.h>
const WORKER: u32 = 0x20;
/// `PF_KTHREAD`: a kernel thread.
const KERNEL_THREAD: u32 = 0x20_0000;

/// Returns the current process as the owner of a socket, see [`set_current_once`].
#[inline(always)]
pub(crate) fn current(ctx: Context, origin: u16) -> Owner {
    let mut owner = UNKNOWN;
    set_current_once(ctx, &mut owner, origin);
    owner
}

/// Makes the current process the owner of a socket that has none, and writes its image. A kernel
/// worker does not become an owner, because it acts on behalf of another process.
///
/// Other CPUs may read the owner meanwhile, see [`set_once`].
#[inline(always)]
pub(crate) fn set_current_once(ctx: Context, to: &mut Owner, origin: u16) {
    if Task::current().get::<u32>(Field::TaskFlags) & WORKER == 0 {
        set_current(ctx, to, origin);
    }
}

/// Does the same in a system call, where the current task is never a kernel worker.
#[inline(always)]
pub(crate) fn set_current(ctx: Context, to: &mut Owner, origin: u16) {
    let pid_tgid = bpf_get_current_pid_tgid();
    let leader = Task::current().leader();
    to.pid = (pid_tgid >> 32) as u32;
    to.tid = pid_tgid as u32;
    to.uid = bpf_get_current_uid_gid() as u32;
    to.exec = image::exec(|| leader.get(Field::ExecId));
    to.comm = leader.get(Field::Comm);
    to.started = leader.get(Field::Started);
    // SAFETY: the helper takes no argument and cannot fail.
    to.cgroup = unsafe { bpf_get_current_cgroup_id() };
    image::write_if_new(ctx, to);
    set_origin(to, origin);
}

/// Returns the process of another task as an owner. The thread is not known.
#[inline(always)]
pub(crate) fn of_task(task: u64, origin: u16) -> Owner {
    let leader = leader(task);
    let pid = read(task, Field::Tgid);
    Owner {
        pid,
        tid: pid,
        uid: read(read(task, Field::Cred), Field::CredUid),
        origin,
        exec: image::exec(|| read(leader, Field::ExecId)),
        comm: read(leader, Field::Comm),
        started: read(leader, Field::Started),
        cgroup: cgroup(task),
    }
}

/// Returns the id of a task's cgroup (v2).
#[inline(always)]
fn cgroup(task: u64) -> u64 {
    cgroup_id(read(read(task, Field::TaskCgroups), Field::CssSetCgroup))
}

/// Returns the pid of the current process, also in programs that cannot call the helper for it.
#[inline(always)]
pub(crate) fn current_tgid() -> u32 {
    Task::current().get(Field::Tgid)
}

/// Returns whether a task is a thread of the kernel itself.
#[inline(always)]
pub(crate) fn is_kernel_thread(task: u64) -> bool {
    read::<u32>(task, Field::TaskFlags) & (WORKER | KERNEL_THREAD) != 0
}

/// Makes the current process the user of a socket, unless the current task is a kernel thread. If
/// `sent_by` is not 0, the process must be sending through this `struct sock`, because the kernel
/// may be passing on another process's packet.
#[inline(always)]
pub(crate) fn set_user(user: &mut User, owner: u32, sent_by: u64) {
    let task = current_task();
    if is_kernel_thread(task) || sent_by != 0 && sending(sent_by).is_none() {
        return;
    }
    let pid = read(task, Field::Tgid);
    if pid != owner {
        let leader = leader(task);
        user.uid = read(read(task, Field::Cred), Field::CredUid);
        // Not `read`: to return zeros, it calls `memset`, which takes one more stack frame.
        let comm = offset(Field::Comm);
        if comm != ABSENT {
            user.comm = read_at(leader + u64::from(comm));
        }
        user.started = read(leader, Field::Started);
        user.cgroup = cgroup(task);
    }
    finish_user(user, User::thread(pid, read(task, Field::Tid)));
}

/// Makes the owner of one socket the user of another.
#[inline(always)]
pub(crate) fn set_user_to(user: &mut User, owner: &Owner) {
    user.uid = owner.uid;
    user.comm = owner.comm;
    user.started = owner.started;
    user.cgroup = owner.cgroup;
    finish_user(user, User::thread(owner.pid, owner.tid));
}

#[inline(always)]
fn finish_user(user: &mut User, thread: u64) {
    user.thread = thread;
    user.check = user.checksum();
}

/// Returns the registers of the current process, if it is in a send system call whose first
/// argument is a descriptor of this socket.
#[inline(always)]
pub(crate) fn sending(sk: u64) -> Option<u64> {
    let regs = syscall::registers_of_any(syscall::SENDS)?;
    let fd = syscall::arguments(regs)[0];
    let found = Sock::of_descriptor(i64::from(fd as i32))?;
    (found.0 == sk).then_some(regs)
}

/// Sets the owner of a socket that has none. Other CPUs may read the owner meanwhile, so its
/// origin, which marks it as known, is written last.
#[inline(always)]
pub(crate) fn set_once(to: &mut Owner, owner: Owner) {
    to.pid = owner.pid;
    to.tid = owner.tid;
    to.uid = owner.uid;
    to.exec = owner.exec;
    to.comm = owner.comm;
    to.started = owner.started;
    to.cgroup = owner.cgroup;
    set_origin(to, owner.origin);
}

#[inline(always)]
fn set_origin(to: &mut Owner, origin: u16) {
    // SAFETY: a valid pointer. Volatile after a fence, so that the compiler keeps the order.
    unsafe {
        compiler_fence(Ordering::Release);
        (&raw mut to.origin).write_volatile(origin);
    }
}

/// Returns the owner of a TCP socket: the acceptor if there is one, otherwise the creator.
#[inline(always)]
pub(crate) fn of_socket(tracked: &Tracked) -> &Owner {
    if tracked.acceptor.origin == origin::NONE {
        &tracked.creator
    } else {
        &tracked.acceptor
    }
}
