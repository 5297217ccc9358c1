//! Iterators: programs that user space lets the kernel run once for each thing that there is.

use core::ptr;

use tcp_udp_trace_common::{Field, Owner, filter, origin};

use crate::{
    emit,
    iter_context::Step,
    owner::{self, leader},
    read::read,
    sock::Sock,
    tcp,
    udp::{self, key_of},
};

/// The walk goes on to the next thing.
pub(crate) const CONTINUE: i32 = 0;
/// The walk pauses: the reading call returns, and the next one begins with the same thing.
const PAUSE: i32 = 1;

/// `iter/task_file`: a file that a process has open. If it is a TCP socket that nobody is known to own, it is this process's.
#[inline(always)]
pub(crate) fn file_of_tcp(step: Step) -> i32 {
    if let Some(tracked) = Sock::of_file(step.pointer(3)).and_then(tcp::live_socket) {
        belongs_to(&mut tracked.creator, step.pointer(1));
    }
    CONTINUE
}

/// The same for UDP.
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

/// If nobody is known to own the socket, it is this task's, which has it open.
#[inline(always)]
fn belongs_to(owner: &mut Owner, task: u64) {
    if owner.origin == origin::NONE {
        owner::set_once(owner, owner::of_task(task, origin::SNAPSHOT));
    }
}

/// `iter/tcp`: a TCP socket of the reader's network namespace. The kernel holds its lock (before 5.15 that of its hash bucket, which
/// it cannot leave meanwhile): no close comes before this.
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

/// `iter/udp`: a bound UDP socket of the reader's network namespace.
#[inline(always)]
pub(crate) fn udp_socket(step: Step) -> i32 {
    let sk = Sock::new(step.pointer(1));
    if sk.0 == 0 {
        return CONTINUE;
    }
    let key = key_of(sk);
    // One that is not known is being closed, or is the kernel's own.
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

/// `iter/task`: writes the numbers of each process that the reader's pid namespace has.
#[inline(always)]
pub(crate) fn pids(step: Step) -> i32 {
    let task = step.pointer(1);
    if task == 0 || leader(task) != task {
        return CONTINUE;
    }
    let level = read(owner::current_pid(), Field::PidLevel);
    let (here, initial) = (owner::number(task, level), read(task, Field::Tgid));
    step.write(&filter::numbers(here, initial));
    CONTINUE
}
