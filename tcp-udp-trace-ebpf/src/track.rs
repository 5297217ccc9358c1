//! What the programs remember of a socket between two hooks.

use aya_ebpf::{
    Global,
    bindings::BPF_NOEXIST,
    helpers::{bpf_get_smp_processor_id, bpf_ktime_get_boot_ns},
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray},
};
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use tcp_udp_trace_common::{Field, Owner, Tracked, User, hold, older, origin, syn};

use crate::{
    anomaly, owner, room,
    sock::{Sock, Socket},
    tcp::LISTEN,
};

/// The sockets by address. Preallocated: a map that allocates makes Linux 5.10 warn under a raw tracepoint.
/// Not LRU: that evicts live sockets long before it is full.
#[map]
static SOCKETS: HashMap<u64, Tracked> = HashMap::with_max_entries(65_536, 0);

/// Of listeners, by their ids, the last process that accepted a connection.
#[map]
static ACCEPTING: LruHashMap<u64, User> = LruHashMap::with_max_entries(4096, 0);

/// In the programs' memory: on the stack it would take too much.
static NO_USER: User = User::NONE;

/// Not 0 while the programs are being detached, one after the other: then what is remembered may be of a socket whose end, and another
/// one's beginning at that address, no program has seen.
#[map]
static STOPPING: Array<u32> = Array::with_max_entries(1, 0);

/// One of [`hold`]; set by user space when the hooks are attached.
#[map]
static HOLD: Array<u32> = Array::with_max_entries(1, 0);

/// The last ticket drawn on each CPU.
#[map]
static TICKETS: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// How often a draw may be interrupted by another one before it gives up. One interruption is rare, and
/// each further one needs another level of interrupts or another preempting task.
const MAX_DRAWS: u32 = 8;

/// How many CPUs this machine may have; set by user space.
#[unsafe(no_mangle)]
static CPUS: Global<u64> = Global::new(1);

/// What is known of a socket.
///
/// The reference lives as long as the program: the map is preallocated, so its memory stays, and the
/// socket's lock, which nearly every hook runs under, keeps other hooks of the same socket away. Those that run without it (an
/// accept seen at its system call's exit, a walk) write only what no other one writes at that time.
#[inline(always)]
pub(crate) fn get(sk: Sock) -> Option<&'static mut Tracked> {
    // SAFETY: the map gives a valid pointer or null; for aliasing see above.
    SOCKETS
        .get_ptr_mut(sk.0)
        .and_then(|tracked| unsafe { tracked.as_mut() })
}

/// Whether what is remembered is not to be relied on any more. Transitions need not ask: each is compared with the state remembered.
#[inline(always)]
pub(crate) fn is_stopping() -> bool {
    STOPPING.get(0).is_none_or(|stopping| *stopping != 0)
}

/// One of [`hold`]: which listeners a later hook sees when they have a port.
#[inline(always)]
pub(crate) fn holds() -> u32 {
    match HOLD.get(0) {
        // While the programs are being detached, that hook may be gone already.
        Some(hold) if !is_stopping() => *hold,
        _ => hold::NONE,
    }
}

/// Whether a socket that the programs meet now, and not at its beginning, is older than they are: one of
/// [`older`], where it belongs in what is remembered.
#[inline(always)]
pub(crate) fn met() -> u8 {
    // While the programs are being detached, the one that sees beginnings may be gone already.
    let older = if is_stopping() || anomaly::has_missed() {
        older::UNKNOWN
    } else {
        older::YES
    };
    older << older::SHIFT
}

/// A new life of the socket at this address.
#[inline(always)]
pub(crate) fn fresh(sk: Sock, socket: impl Socket, state: u8, syn: u8, creator: Owner) -> Tracked {
    let (netns, netns_cookie) = socket.netns();
    let id = ticket();
    Tracked {
        id,
        // SAFETY: the helper takes nothing and cannot fail.
        born: unsafe { bpf_ktime_get_boot_ns() },
        cgroup: sk.cgroup(),
        netns_cookie,
        netns,
        state,
        syn,
        kin: 0,
        room_uid: socket.get(Field::SkUid),
        _pad: 0,
        listener: if state == LISTEN { id } else { 0 },
        creator,
        acceptor: owner::UNKNOWN,
    }
}

/// A new life that begins as a clone of this listener.
#[inline(always)]
pub(crate) fn child_of(listener: &Tracked, state: u8, syn: u8) -> Tracked {
    Tracked {
        id: ticket(),
        // SAFETY: the helper takes nothing and cannot fail.
        born: unsafe { bpf_ktime_get_boot_ns() },
        state,
        syn,
        kin: 0,
        listener: listener.id,
        acceptor: owner::UNKNOWN,
        ..*listener
    }
}

/// Whose the socket is.
#[inline(always)]
pub(crate) fn owner(tracked: &Tracked) -> &Owner {
    if tracked.acceptor.origin == origin::NONE {
        &tracked.creator
    } else {
        &tracked.acceptor
    }
}

/// Makes the process that has accepted a connection the user of its listener.
// Not inlined: the verifier would follow each way to the end of an accept.
#[inline(never)]
pub(crate) fn set_user(listener: &u64, owner: &Owner) -> u32 {
    let mut found = ACCEPTING.get_ptr_mut(listener);
    if found.is_none() {
        // Another CPU may be first.
        let _ = ACCEPTING.insert(listener, &NO_USER, u64::from(BPF_NOEXIST));
        found = ACCEPTING.get_ptr_mut(listener);
    }
    // SAFETY: a valid pointer into the map, which is preallocated. Whether another CPU writes to it at the
    // same time, shows in its checksum.
    if let Some(user) = found.and_then(|user| unsafe { user.as_mut() }) {
        if user.pid() != owner.pid {
            owner::set_user_to(user, owner);
        }
    }
    0
}

/// Copies who uses the socket, if it is a listener.
#[inline(always)]
pub(crate) fn copy_user(tracked: &Tracked, to: &mut User) {
    let found = if tracked.listener == tracked.id {
        // SAFETY: the map is preallocated; for a copy made during a write see above.
        unsafe { ACCEPTING.get(&tracked.listener) }
    } else {
        None
    };
    *to = *found.unwrap_or(&NO_USER);
}

/// Remembers a socket whose address is not in the map. False if there is no room, which is counted.
#[inline(always)]
pub(crate) fn remember(sk: Sock, tracked: &Tracked) -> bool {
    if !room::is_left(tracked.room_uid) {
        return false;
    }
    let remembered = insert(sk, tracked);
    if !remembered {
        anomaly::untracked();
    }
    remembered
}

/// Puts a socket into the map; false if there is no room, or it is there.
#[inline(always)]
fn insert(sk: Sock, tracked: &Tracked) -> bool {
    let is_new = SOCKETS
        .insert(sk.0, tracked, u64::from(BPF_NOEXIST))
        .is_ok();
    if is_new {
        room::take(tracked.room_uid);
    }
    is_new
}

/// What is known of a socket in this state; one that is older than the tracer is remembered from now on, unless there is no room,
/// which is counted.
#[inline(always)]
pub(crate) fn adopt(sk: Sock, state: u8) -> Option<&'static mut Tracked> {
    if let Some(tracked) = get(sk) {
        return Some(tracked);
    }
    let fresh = fresh(sk, sk, state, syn::UNKNOWN | met(), owner::UNKNOWN);
    if !room::is_left(fresh.room_uid) {
        return None;
    }
    // Two hooks may find it at the same time: the first makes its name.
    let is_new = insert(sk, &fresh);
    let tracked = get(sk);
    if !is_new && tracked.is_none() {
        anomaly::untracked();
    }
    tracked
}

/// Forgets the socket, whose room is counted for this user.
#[inline(always)]
pub(crate) fn end(sk: Sock, room_uid: u32) {
    if SOCKETS.remove(sk.0).is_ok() {
        room::give_back(room_uid);
    }
}

/// A number that no other call gets.
///
/// Linux 5.10 can add to memory atomically, but not say what the sum was. So: read, add one, read again. If the
/// counter moved by exactly one, that one was ours and the sum is ours alone; if it moved by more, another
/// program ran in between on this CPU (nested, or after preemption), and the draw is repeated.
#[inline(always)]
pub(crate) fn ticket() -> u64 {
    let Some(counter) = TICKETS.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: the helper takes nothing and cannot fail.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    for _ in 0..MAX_DRAWS {
        // SAFETY: `counter` points to this CPU's value, which lives as long as the map.
        let (before, after) = unsafe {
            let before = counter.read_volatile();
            atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, 1);
            (before, counter.read_volatile())
        };
        if after == before + 1 {
            // Interleaves the CPUs' tickets: no two CPUs share one.
            return before * CPUS.load() + u64::from(cpu) + 1;
        }
    }
    0
}
