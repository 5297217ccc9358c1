//! What the programs remember of a socket between two hooks.

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    helpers::bpf_ktime_get_boot_ns,
    macros::map,
    maps::{Array, HashMap, LruHashMap},
};
use tcp_udp_trace_common::{Field, Owner, Tracked, User, hold, origin, syn};

use crate::{
    counters, id, owner, room,
    sock::{Sock, Socket as _, tcp_state::LISTEN},
    stopping::{is_stopping, met},
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

/// One of [`hold`]; set by user space when the hooks are attached.
#[map]
static HOLD: Array<u32> = Array::with_max_entries(1, 0);

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

/// One of [`hold`]: which listeners a later hook sees when they have a port.
#[inline(always)]
pub(crate) fn holds() -> u32 {
    match HOLD.get(0) {
        // While the programs are being detached, that hook may be gone already.
        Some(hold) if !is_stopping() => *hold,
        _ => hold::NONE,
    }
}

/// A new life of the socket at this address.
#[inline(always)]
pub(crate) fn fresh(sk: Sock, state: u8, syn: u8, creator: Owner) -> Tracked {
    let (netns, netns_cookie) = sk.netns();
    let id = id::next();
    Tracked {
        id,
        // SAFETY: the helper takes nothing and cannot fail.
        born: unsafe { bpf_ktime_get_boot_ns() },
        cgroup: sk.cgroup(),
        netns_cookie,
        netns,
        state,
        syn,
        tree_generation: 0,
        room_uid: sk.get(Field::SkUid),
        _pad: 0,
        listener: if state == LISTEN { id } else { 0 },
        creator,
        acceptor: owner::UNKNOWN,
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

/// Copies who uses the socket, if it is a listener or waits to be accepted.
#[inline(always)]
pub(crate) fn copy_user(tracked: &Tracked, to: &mut User) {
    let found = if tracked.listener != 0 && tracked.acceptor.origin == origin::NONE {
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
        counters::untracked();
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
    let fresh = fresh(sk, state, syn::UNKNOWN | met(), owner::UNKNOWN);
    if !room::is_left(fresh.room_uid) {
        return None;
    }
    // Two hooks may find it at the same time: the first makes its name.
    let is_new = insert(sk, &fresh);
    let tracked = get(sk);
    if !is_new && tracked.is_none() {
        counters::untracked();
    }
    tracked
}

/// Forgets the socket, if it is known.
#[inline(always)]
pub(crate) fn forget(sk: Sock) {
    let Some(user) = get(sk).map(|tracked| tracked.room_uid) else {
        return;
    };
    if SOCKETS.remove(sk.0).is_ok() {
        room::give_back(user);
    }
}
