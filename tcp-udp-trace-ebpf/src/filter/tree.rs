//! The members of the process trees that a filter names.

use aya_ebpf::{bindings::BPF_ANY, macros::map, maps::HashMap};
use tcp_udp_trace_common::{
    Field, ON_DEMAND,
    filter::{self, TreeMember},
};

use super::sets::{CURRENT, NEXT, has, word};
use crate::{counters, iter_context::Step, read::read, task::leader};

/// The members, each with the generations of the filters that it belongs to. Consecutive
/// generations use different slots.
#[map]
static TREE: HashMap<TreeMember, [u16; 2]> =
    HashMap::with_max_entries(filter::MAX_TREE_MEMBERS, ON_DEMAND);

/// How many ancestors of a process are checked. The iterator usually visits parents before
/// children, so a parent is usually a member already.
const MAX_ANCESTORS: u32 = 32;

#[inline(always)]
pub(crate) fn member(pid: u32, started: u64) -> TreeMember {
    TreeMember {
        started,
        pid: pid.into(),
    }
}

/// Returns the process of a main thread.
#[inline(always)]
fn member_of_leader(leader: u64) -> TreeMember {
    member(read(leader, Field::Tgid), read(leader, Field::Started))
}

#[inline(always)]
fn slot(generation: u16) -> usize {
    usize::from(generation & 1)
}

#[inline(always)]
pub(crate) fn is_member(generation: u16, process: &TreeMember) -> bool {
    // SAFETY: the kernel keeps the memory of a removed entry until no program uses it. If another
    // process takes the entry meanwhile, this process has ended.
    let generations = unsafe { TREE.get(process) };
    generations.is_some_and(|generations| generations[slot(generation)] == generation)
}

#[inline(always)]
fn add_member(generation: u16, process: &TreeMember) {
    if let Some(generations) = TREE.get_ptr_mut(process) {
        // SAFETY: a valid pointer into the map. The write is aligned and covers a whole slot.
        unsafe { (*generations)[slot(generation)] = generation };
        return;
    }
    let generations = if slot(generation) == 0 {
        [generation, 0]
    } else {
        [0, generation]
    };
    if TREE
        .insert(process, generations, u64::from(BPF_ANY))
        .is_err()
    {
        counters::untracked_process();
    }
}

/// `sched_process_fork(parent, child)`: the child of a member becomes a member.
#[inline(always)]
pub(crate) fn process_forked(parent: u64, child: u64) {
    if leader(child) != child {
        // The child is a thread of the same process.
        return;
    }
    let parent = member_of_leader(leader(parent));
    for generation in [word(CURRENT), word(NEXT)].map(filter::generation) {
        if generation != 0 && is_member(generation, &parent) {
            add_member(generation, &member_of_leader(child));
        }
    }
}

/// `sched_process_free(task)`: the process has ended, and no lookup for it follows.
#[inline(always)]
pub(crate) fn process_freed(task: u64) {
    if leader(task) == task {
        let _ = TREE.remove(member_of_leader(task));
    }
}

/// `iter/task`: adds an existing process to the filter that is being prepared, if the process or
/// one of its ancestors is a root. Counts roots.
#[inline(always)]
pub(crate) fn add_existing(step: Step) {
    let task = step.pointer(1);
    let process = leader(task);
    if task == 0 || process != task {
        return;
    }
    let next = word(NEXT);
    let generation = filter::generation(next);
    let is_root = |process: &TreeMember| has(next, filter::ROOT, [process.pid, 0]);
    if is_root(&member_of_leader(process)) {
        step.count();
    }
    let mut ancestor = process;
    for _ in 0..MAX_ANCESTORS {
        let candidate = member_of_leader(ancestor);
        if candidate.pid == 0 {
            return;
        }
        if is_root(&candidate) || is_member(generation, &candidate) {
            add_member(generation, &member_of_leader(process));
            return;
        }
        ancestor = leader(read(ancestor, Field::RealParent));
    }
}
