//! The process trees of a filter.

use aya_ebpf::{bindings::BPF_ANY, macros::map, maps::HashMap};
use tcp_udp_trace_common::{
    Field,
    filter::{self, Kin},
};

use super::sets::{CURRENT, NEXT, has, word};
use crate::{counters, iter_context::Step, owner::leader, read::read};

/// The processes of a filter's trees, and the filters' generations: of two that follow each other, each has its place.
#[map]
static KIN: HashMap<Kin, [u16; 2]> = HashMap::with_max_entries(filter::MAX_KIN, 0);

/// How many ancestors of a process are looked at; the walk visits parents before children, mostly.
const MAX_ANCESTORS: u32 = 32;

#[inline(always)]
pub(crate) fn kin_of(pid: u32, started: u64) -> Kin {
    Kin {
        started,
        pid: pid.into(),
    }
}

/// The process of a main thread.
#[inline(always)]
fn kin_of_leader(leader: u64) -> Kin {
    kin_of(read(leader, Field::Tgid), read(leader, Field::Started))
}

#[inline(always)]
fn place(generation: u16) -> usize {
    usize::from(generation & 1)
}

#[inline(always)]
pub(crate) fn is_kin(generation: u16, process: &Kin) -> bool {
    // SAFETY: the map is preallocated, so its memory stays; if another process moves in meanwhile, this one has ended.
    let generations = unsafe { KIN.get(process) };
    generations.is_some_and(|generations| generations[place(generation)] == generation)
}

#[inline(always)]
fn adopt(generation: u16, process: &Kin) {
    if let Some(generations) = KIN.get_ptr_mut(process) {
        // SAFETY: a valid pointer into the map; an aligned write of a whole place.
        unsafe { (*generations)[place(generation)] = generation };
        return;
    }
    let generations = if place(generation) == 0 {
        [generation, 0]
    } else {
        [0, generation]
    };
    if KIN
        .insert(process, generations, u64::from(BPF_ANY))
        .is_err()
    {
        counters::untracked_kin();
    }
}

/// `sched_process_fork(parent, child)`: the child of a member is one.
#[inline(always)]
pub(crate) fn forked(parent: u64, child: u64) {
    if leader(child) != child {
        // A thread of the same process.
        return;
    }
    let parent = kin_of_leader(leader(parent));
    for generation in [word(CURRENT), word(NEXT)].map(filter::generation) {
        if generation != 0 && is_kin(generation, &parent) {
            adopt(generation, &kin_of_leader(child));
        }
    }
}

/// `sched_process_free(task)`: it has ended, and nobody will ask for it any more.
#[inline(always)]
pub(crate) fn freed(task: u64) {
    if leader(task) == task {
        let _ = KIN.remove(kin_of_leader(task));
    }
}

/// `iter/task`: a task that is there when a filter is being prepared. It is a member if a root is among its ancestors, or itself; roots
/// are counted.
#[inline(always)]
pub(crate) fn task(step: Step) {
    let task = step.pointer(1);
    let process = leader(task);
    if task == 0 || process != task {
        return;
    }
    let next = word(NEXT);
    let generation = filter::generation(next);
    let is_root = |process: &Kin| has(next, filter::ROOT, [process.pid, 0]);
    if is_root(&kin_of_leader(process)) {
        step.count();
    }
    let mut ancestor = process;
    for _ in 0..MAX_ANCESTORS {
        let kin = kin_of_leader(ancestor);
        if kin.pid == 0 {
            return;
        }
        if is_root(&kin) || is_kin(generation, &kin) {
            adopt(generation, &kin_of_leader(process));
            return;
        }
        ancestor = leader(read(ancestor, Field::RealParent));
    }
}
