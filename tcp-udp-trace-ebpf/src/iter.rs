//! The steps of iterators. The kernel runs these programs once for each object when user space
//! reads the iterator.

use core::ptr;

use tcp_udp_trace_common::{Field, Owner, filter, origin};

use crate::{
    emit,
    iter_context::Step,
    owner,
    read::read,
    sock::Sock,
    task::{self, leader},
    tcp,
    udp::{self, key_of},
};

/// Continues with the next object.
pub(crate) const CONTINUE: i32 = 0;
/// Pauses the iterator: the read call returns, and the next one begins with the same object.
const PAUSE: i32 = 1;

/// `iter/task_file`: makes the process the owner of a TCP socket that it has open, if the owner is
/// not known.
#[inline(always)]
pub(crate) fn file_of_tcp(step: Step) -> i32 {
    if let Some(tracked) = Sock::of_file(step.pointer(3)).and_then(tcp::live_socket) {
        belongs_to(&mut tracked.creator, step.pointer(1));
    }
    CONTINUE
}

/// `iter/task_file`: the same for a UDP socket.
#[inline(always)]
pub(crate) fn file_of_udp(step: Step) -> i32 {
    let Some(sk) = Sock::of_file(step.pointer(3)) else {
        return CONTINUE;
    };
    if !sk.is_udp() {
        return CONTINUE;
    }
    if let Some(tracked) = udp::track(key_of(sk), ptr::without_provenance(sk.0 as usize)) {
        belongs_to(&mut tracked.owner, step.pointer(1));
    }
    CONTINUE
}

/// Makes this task's process the owner, if the owner is not known.
#[inline(always)]
fn belongs_to(owner: &mut Owner, task: u64) {
    if owner.origin == origin::NONE {
        owner::set_once(owner, owner::of_task(task, origin::SNAPSHOT));
    }
}

/// `iter/tcp`: samples a TCP socket of the reader's network namespace.
///
/// The kernel holds the socket's lock, so no close precedes the sample. Before 5.15 the kernel
/// holds the lock of the hash bucket, which the socket cannot leave meanwhile.
#[inline(always)]
pub(crate) fn tcp_socket(step: Step) -> i32 {
    let sk = Sock::new(step.pointer(1));
    let Some(tracked) = tcp::live_socket(sk) else {
        return CONTINUE;
    };
    if emit::is_crowded() {
        return PAUSE;
    }
    if tcp::sample(step.context(), sk, tracked) {
        step.count();
    }
    CONTINUE
}

/// `iter/udp`: samples a bound UDP socket of the reader's network namespace.
#[inline(always)]
pub(crate) fn udp_socket(step: Step) -> i32 {
    let sk = Sock::new(step.pointer(1));
    if sk.0 == 0 {
        return CONTINUE;
    }
    let key = key_of(sk);
    // A socket that is not tracked is being closed, or belongs to the kernel.
    let Some(tracked) = udp::find(key, sk) else {
        return CONTINUE;
    };
    if emit::is_crowded() {
        return PAUSE;
    }
    if udp::sample(step.context(), key, sk, tracked) {
        step.count();
    }
    CONTINUE
}

/// `iter/task`: writes the pids of each process that is in the reader's pid namespace.
#[inline(always)]
pub(crate) fn pids(step: Step) -> i32 {
    let task = step.pointer(1);
    if task == 0 || leader(task) != task {
        return CONTINUE;
    }
    let level = read(task::current_pid(), Field::PidLevel);
    let (here, initial) = (task::number(task, level), read(task, Field::Tgid));
    step.write(&filter::numbers(here, initial));
    CONTINUE
}
