//! Which events are wanted: decided before a record is made, so what is not wanted takes no room in the ring.

use core::{
    intrinsics::{AtomicOrdering, atomic_xadd},
    ptr,
};

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_NO_PREALLOC},
    helpers::bpf_get_current_pid_tgid,
    macros::map,
    maps::{Array, HashMap, LpmTrie, PerCpuArray, lpm_trie::Key},
    programs::RawTracePointContext,
};
use tcp_udp_trace_common::{
    AF_INET, Field, Owner, Peer, Tracked, UdpTracked,
    filter::{self, Kin, Network, Value, op, standing},
    kind, origin,
};

use crate::{
    anomaly, netns,
    owner::{self, leader},
    sock::{Sock, Socket as _, read},
    tcp, track,
    udp::Datagrams,
    walk::Step,
};

/// The filter's word, and one that is being prepared: of that, only the generation counts.
#[map]
static FILTER: Array<u64> = Array::with_max_entries(2, 0);
const CURRENT: u32 = 0;
const NEXT: u32 = 1;

/// The sets.
#[map]
static WANTED: HashMap<Value, u8> = HashMap::with_max_entries(2 * filter::MAX_VALUES, 0);

/// The networks.
#[map]
static NETWORKS: LpmTrie<[u32; 5], u8> =
    LpmTrie::with_max_entries(2 * filter::MAX_VALUES, BPF_F_NO_PREALLOC);

/// The processes of a filter's trees, and the filters' generations: of two that follow each other, each has its place.
#[map]
static KIN: HashMap<Kin, [u16; 2]> = HashMap::with_max_entries(filter::MAX_KIN, 0);

/// How many events of each kind were not wanted.
#[map]
static REJECTED: PerCpuArray<u64> = PerCpuArray::with_max_entries(kind::COUNT as u32, 0);

/// How many ancestors of a process are looked at; the walk visits parents before children, mostly.
const MAX_ANCESTORS: u32 = 32;

#[inline(always)]
fn word(of: u32) -> u64 {
    FILTER.get(of).copied().unwrap_or(0)
}

#[inline(always)]
fn current() -> u64 {
    word(CURRENT)
}

/// Whether an event of TCP is wanted; `states` has the bits of the states it is about.
#[inline(always)]
pub(crate) fn wants_tcp(kind: u32, states: u64, sk: Sock, tracked: &mut Tracked) -> bool {
    decide(kind, |word| {
        states & !word != 0 && is_tcp_wanted(word, sk.0, tracked)
    })
}

/// Whether a `connect` between these ends (local, remote) that failed is wanted. Its socket is
/// closed.
#[inline(always)]
pub(crate) fn wants_connect(sk: Sock, tracked: &mut Tracked, ends: &(Peer, Peer)) -> bool {
    decide(kind::CONNECT_FAILED_TCP, |word| {
        filter::no_state(tcp::CLOSE) & !word != 0 && is_connect_wanted(word, sk.0, tracked, ends)
    })
}

/// Whether an event of UDP is wanted.
#[inline(always)]
pub(crate) fn wants_udp(kind: u32, tracked: &mut UdpTracked, at: &Datagrams) -> bool {
    kind == kind::CLOSE && tracked.has_flows()
        || decide(kind, |word| is_udp_wanted(word, tracked, at))
}

/// Whether an event is wanted; counts it if it is not.
///
/// The filter may change meanwhile, and the sets of the one before be emptied: a "no" counts only if it is still there. Otherwise the event is
/// wanted: to ask the new one would be twice the work for the verifier, at each start.
#[inline(always)]
fn decide(kind: u32, is_wanted: impl FnOnce(u64) -> bool) -> bool {
    let word = current();
    if word == 0 || word & filter::no_kind(kind) == 0 && is_wanted(word) {
        return true;
    }
    current() != word || count(kind)
}

#[inline(always)]
fn count(kind: u32) -> bool {
    if let Some(count) = REJECTED.get_ptr_mut(kind) {
        // SAFETY: a valid pointer to this CPU's value; atomic, because another program may interrupt this one.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(count, 1) };
    }
    false
}

// Not inlined: it stands in the program once, and without a filter the verifier's work is all that it costs.
#[inline(never)]
fn is_tcp_wanted(word: u64, sk: u64, tracked: &mut Tracked) -> bool {
    let sk = Sock::new(sk);
    if !is_socket_wanted(word, sk, tracked) {
        return false;
    }
    if word & (filter::NO_IPV4 | filter::NO_IPV6 | filter::PORTS | filter::LOCAL | filter::REMOTE)
        == 0
    {
        return true;
    }
    let (local, remote) = sk.ends();
    are_ends_wanted(word, &local, &remote)
}

#[inline(never)]
fn is_connect_wanted(word: u64, sk: u64, tracked: &mut Tracked, ends: &(Peer, Peer)) -> bool {
    is_socket_wanted(word, Sock::new(sk), tracked) && are_ends_wanted(word, &ends.0, &ends.1)
}

/// Whether a socket of TCP is wanted, whatever its ends are.
#[inline(always)]
fn is_socket_wanted(word: u64, sk: Sock, tracked: &mut Tracked) -> bool {
    let cgroup = tracked.cgroup;
    let netns = [tracked.netns.into(), tracked.netns_cookie];
    let owner: *const Owner = track::owner(tracked);
    // SAFETY: it is in `tracked`, apart from what is written to here.
    let owner = unsafe { &*owner };
    is_owner_wanted(word, owner, &mut tracked.kin) && is_place_wanted(word, sk, cgroup, netns)
}

#[inline(never)]
fn is_udp_wanted(word: u64, tracked: &mut UdpTracked, at: &Datagrams) -> bool {
    let UdpTracked {
        sk,
        cgroup,
        netns_cookie,
        netns,
        owner,
        kin,
        ..
    } = tracked;
    // Put together late: what is kept from before would take too much of the stack.
    is_owner_wanted(word, owner, kin)
        && is_place_wanted(
            word,
            Sock::new(*sk),
            *cgroup,
            [(*netns).into(), *netns_cookie],
        )
        && are_ends_wanted(word, &at.local, &at.flow.peer)
}

#[inline(always)]
fn is_owner_wanted(word: u64, owner: &Owner, kin: &mut u16) -> bool {
    let pid = [u64::from(owner.pid), 0];
    if word & filter::NOT_OWN != 0 && has(word, filter::OWN, pid) {
        return false;
    }
    if word & filter::PROCESS != 0 && !has(word, filter::PID, pid) {
        let generation = filter::generation(word);
        if *kin != generation {
            if owner.origin == origin::NONE
                || !is_kin(generation, &kin_of(owner.pid, owner.started))
            {
                return false;
            }
            *kin = generation;
        }
    }
    word & filter::COMMS == 0 || has(word, filter::COMM, name(owner.comm))
}

/// A name without what stands behind its end: the kernel leaves the end of a longer one there.
#[inline(always)]
fn name([first, second]: [u64; 2]) -> [u64; 2] {
    const EACH: u64 = 0x0101_0101_0101_0101;
    // The highest bit of the first byte that is 0, and perhaps of some behind it.
    let zeros = |word: u64| word.wrapping_sub(EACH) & !word & (EACH << 7);
    // What is before that byte; without one, all.
    let before_zero = |word: u64| {
        let zeros = zeros(word);
        word & ((zeros & zeros.wrapping_neg()) >> 7).wrapping_sub(1)
    };
    let [first, second] = [first, second].map(u64::from_le);
    let rest = if zeros(first) == 0 {
        before_zero(second)
    } else {
        0
    };
    [before_zero(first), rest].map(u64::to_le)
}

#[inline(always)]
fn is_place_wanted(word: u64, sk: Sock, cgroup: u64, netns: [u64; 2]) -> bool {
    let one_of = |bit, set, value| word & bit == 0 || has(word, set, value);
    one_of(filter::NAMESPACES, filter::NETNS, netns)
        && one_of(filter::CGROUPS, filter::CGROUP, [cgroup, 0])
        && (word & filter::UIDS == 0
            || has(
                word,
                filter::UID,
                [u64::from(sk.get::<u32>(Field::SkUid)), 0],
            ))
}

#[inline(always)]
fn are_ends_wanted(word: u64, local: &Peer, remote: &Peer) -> bool {
    let unwanted = if local.family == AF_INET {
        filter::NO_IPV4
    } else {
        filter::NO_IPV6
    };
    if word & unwanted != 0 {
        return false;
    }
    let port = |end: &Peer| has(word, filter::PORT, [u64::from(end.port), 0]);
    if word & filter::PORTS != 0 && !port(local) && !port(remote) {
        return false;
    }
    (word & filter::LOCAL == 0 || is_in_network(word, 0, local))
        && (word & filter::REMOTE == 0 || is_in_network(word, 1, remote))
}

#[inline(always)]
fn has(word: u64, set: u16, value: [u64; 2]) -> bool {
    let value = Value::new(filter::generation(word), set, value);
    WANTED.get_ptr(value).is_some()
}

#[inline(always)]
fn is_in_network(word: u64, side: u8, end: &Peer) -> bool {
    let [a, b, c, d] = end.address.map(u64::from);
    let generation = filter::generation(word);
    let address = Network::new(
        generation,
        side,
        end.family,
        128,
        [a | b << 32, c | d << 32],
    );
    NETWORKS.get(key(&address)).is_some()
}

#[inline(always)]
fn key(network: &Network) -> &Key<[u32; 5]> {
    const { assert!(size_of::<Network>() == size_of::<Key<[u32; 5]>>()) };
    // SAFETY: both are plain integers, of one size, and the latter needs no alignment. A network begins with what it calls the length.
    unsafe { &*ptr::from_ref(network).cast() }
}

// ---- trees of processes ------------------------------------------------------------------------------------------

#[inline(always)]
fn kin_of(pid: u32, started: u64) -> Kin {
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
fn is_kin(generation: u16, process: &Kin) -> bool {
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
        anomaly::untracked_kin();
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

/// `iter/task`: writes the numbers of each process that the reader's pid namespace has.
#[inline(always)]
pub(crate) fn numbers(step: Step) {
    let task = step.pointer(1);
    if task == 0 || leader(task) != task {
        return;
    }
    let level = read(owner::current_pid(), Field::PidLevel);
    let (here, initial) = (owner::number(task, level), read(task, Field::Tgid));
    step.write(&filter::numbers(here, initial));
}

// ---- user space ----------------------------------------------------------------------------------------------------

/// User space changes the filter, or asks about it; see [`op`]. A negative answer is an error, like the kernel's.
#[inline(always)]
pub(crate) fn asked(ctx: &RawTracePointContext) -> i32 {
    let operation = ctx.arg::<u64>(0);
    let (a, b, c) = (ctx.arg::<u64>(1), ctx.arg::<u64>(2), ctx.arg::<u64>(3));
    let value = Value {
        value: [a, b],
        tag: c,
    };
    let network = Network {
        head: a,
        address: [b, c],
    };
    match operation {
        op::SWITCH => set(CURRENT, a),
        op::PREPARE => set(NEXT, a),
        op::ADD => result(WANTED.insert(value, 0, u64::from(BPF_ANY))),
        op::REMOVE => result(WANTED.remove(value)),
        op::CALLER => (bpf_get_current_pid_tgid() >> 32) as i32,
        op::LEVEL => match owner::current_pid() {
            0 => -1,
            pid => read::<u32>(pid, Field::PidLevel) as i32,
        },
        op::ADD_NETWORK => result(NETWORKS.insert(key(&network), 0, u64::from(BPF_ANY))),
        op::REMOVE_NETWORK => result(NETWORKS.remove(key(&network))),
        op::STANDING => {
            let word = word(CURRENT);
            let is_kin = is_kin(filter::generation(word), &kin_of(a as u32, b));
            let is_own = has(word, filter::OWN, [a, 0]);
            i32::from(is_kin) * standing::KIN + i32::from(is_own) * standing::OWN
        }
        op::FIND_NETNS | op::GO_ON => netns::find(operation == op::FIND_NETNS, a),
        op::NETNS_COOKIE => netns::cookie(a),
        _ => -1,
    }
}

#[inline(always)]
fn set(which: u32, word: u64) -> i32 {
    let Some(place) = FILTER.get_ptr_mut(which) else {
        return -1;
    };
    // SAFETY: a valid pointer to the map's value; an aligned word is written as a whole.
    unsafe { place.write_volatile(word) };
    0
}

#[inline(always)]
fn result(result: Result<(), i32>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(error) => error,
    }
}
