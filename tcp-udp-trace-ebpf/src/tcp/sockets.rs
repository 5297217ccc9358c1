//! The state that the programs remember of TCP sockets.

use aya_ebpf::{
    bindings::BPF_NOEXIST,
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray},
};
use tcp_udp_trace_common::{Field, ON_DEMAND, Owner, Tracked, User, hold, syn};

use crate::{
    counters, id, owner,
    read::now,
    room,
    sock::{
        Sock, Socket,
        tcp_state::{LISTEN, SYN_SENT},
    },
    stopping::{is_stopping, met},
};

/// The sockets by address. It is not an LRU map, because those evict live sockets long before they
/// are full.
#[map]
static SOCKETS: HashMap<u64, Tracked> = HashMap::with_max_entries(65_536, ON_DEMAND);

/// The last process that accepted a connection, by the id of the listener.
#[map]
static ACCEPTING: LruHashMap<u64, User> = LruHashMap::with_max_entries(4096, 0);

/// Kept in the programs' memory, because it would take too much stack.
static NO_USER: User = User::NONE;

/// One of [`hold`]. User space sets it when the hooks are attached.
#[map]
static HOLD: Array<u32> = Array::with_max_entries(1, 0);

/// Returns the state of a socket.
///
/// The reference lives as long as the program, because the kernel keeps the memory of a removed
/// entry until no program uses it. Until then the entry may only become one of another socket.
/// Nearly every hook runs under the socket's lock, which excludes other hooks of the same socket.
/// The hooks that run without the lock (an accept seen at the exit of its system call, an iterator)
/// write only fields that no other hook writes at that time.
#[inline(always)]
pub(crate) fn get(sk: Sock) -> Option<&'static mut Tracked> {
    // SAFETY: the map returns a valid pointer or null. The documentation above covers aliasing.
    SOCKETS
        .get_ptr_mut(sk.0)
        .and_then(|tracked| unsafe { tracked.as_mut() })
}

/// Returns which listeners a later hook sees when they have a port: one of [`hold`].
#[inline(always)]
pub(crate) fn holds() -> u32 {
    match HOLD.get(0) {
        // While the programs are being detached, that hook may already be gone.
        Some(hold) if !is_stopping() => *hold,
        _ => hold::NONE,
    }
}

/// Which of the two programs on a tracepoint is running.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    /// The program that is always attached.
    First,
    /// The program that also sees the events for which the kernel skips the first.
    Second,
}

/// The state of a socket that a program is about to remember.
///
/// In a map, unlike on the stack, the verifier does not distinguish the values. So it follows the
/// code below once, and not for each way that leads there.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Beginning {
    /// Not 0 while a program uses it.
    is_used: u64,
    pub(crate) state: Tracked,
}

/// Two for each [`Program`], and one for an accept. Before Linux 6.1, a softirq that interrupts a
/// program may run the same program. Softirqs do not nest, and none accepts.
#[map]
static BEGINNINGS: PerCpuArray<Beginning> = PerCpuArray::with_max_entries(5, 0);
const OF_ACCEPT: u32 = 4;

/// Stores the state of a socket until [`Beginning::end`].
#[inline(always)]
pub(crate) fn begin(program: Program, state: &Tracked) -> Option<&'static mut Beginning> {
    let first = 2 * program as u32;
    let mut place = beginning(first)?;
    if place.is_used != 0 {
        place = beginning(first + 1)?;
    }
    // SAFETY: a valid pointer. Volatile, because a program that interrupts this one reads it.
    unsafe { (&raw mut place.is_used).write_volatile(1) };
    place.state = *state;
    Some(place)
}

/// Stores the state of an accepted socket that has no room in the map.
#[inline(always)]
pub(crate) fn begin_accepted(state: &Tracked) -> Option<&'static mut Tracked> {
    let place = beginning(OF_ACCEPT)?;
    place.state = *state;
    Some(&mut place.state)
}

#[inline(always)]
fn beginning(index: u32) -> Option<&'static mut Beginning> {
    // SAFETY: a valid pointer to this CPU's value, which only one run of a program uses.
    unsafe { BEGINNINGS.get_ptr_mut(index)?.as_mut() }
}

impl Beginning {
    /// Another run of the program may use it.
    #[inline(always)]
    pub(crate) fn end(&mut self) {
        // SAFETY: as in `begin`.
        unsafe { (&raw mut self.is_used).write_volatile(0) };
    }
}

/// Returns the state of a new life of the socket at this address.
#[inline(always)]
pub(crate) fn fresh(socket: impl Socket, state: u8, syn: u8) -> Tracked {
    let (netns, netns_cookie) = socket.netns();
    let id = id::next();
    Tracked {
        id,
        born: now(),
        cgroup: socket.cgroup(),
        netns_cookie,
        netns,
        state,
        syn,
        tree_generation: 0,
        room_uid: socket.get(Field::SkUid),
        gone_in: 0,
        handshake: 0,
        rejected_by: 0,
        reset_reason: 0,
        established: 0,
        listener: if state == LISTEN { id } else { 0 },
        creator: owner::UNKNOWN,
        acceptor: owner::UNKNOWN,
    }
}

/// Returns the state of a new life that begins as a clone of this listener.
#[inline(always)]
pub(crate) fn child_of(listener: &Tracked, state: u8, syn: u8) -> Tracked {
    Tracked {
        id: id::next(),
        born: now(),
        state,
        syn,
        tree_generation: 0,
        gone_in: 0,
        handshake: 0,
        rejected_by: 0,
        reset_reason: 0,
        established: 0,
        listener: listener.id,
        acceptor: owner::UNKNOWN,
        ..*listener
    }
}

/// Makes the process that has accepted a connection the user of the listener.
// Not inlined: the verifier would follow each path to the end of an accept.
#[inline(never)]
pub(crate) fn set_user(listener: &u64, owner: &Owner) -> u32 {
    let mut found = ACCEPTING.get_ptr_mut(listener);
    if found.is_none() {
        // Another CPU may insert the entry first.
        let _ = ACCEPTING.insert(listener, &NO_USER, u64::from(BPF_NOEXIST));
        found = ACCEPTING.get_ptr_mut(listener);
    }
    // SAFETY: a valid pointer into the map, which is preallocated. The checksum shows whether
    // another CPU wrote the entry at the same time.
    if let Some(user) = found.and_then(|user| unsafe { user.as_mut() }) {
        if user.pid() != owner.pid {
            owner::set_user_to(user, owner);
        }
    }
    0
}

/// Copies the user of a socket, if the socket is a listener.
#[inline(always)]
pub(crate) fn copy_user(tracked: &Tracked, to: &mut User) {
    let found = if tracked.listener == tracked.id {
        // SAFETY: the map is preallocated. The checksum shows whether the copy was made during a
        // write.
        unsafe { ACCEPTING.get(&tracked.listener) }
    } else {
        None
    };
    *to = *found.unwrap_or(&NO_USER);
}

/// Remembers a socket whose address is not in the map. If there is no room, counts that and returns
/// false.
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

/// Inserts a socket into the map. Returns false if there is no room, or if the socket is already
/// there.
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

/// Returns the [`Tracked::syn`] of a socket that is first seen in this state.
#[inline(always)]
pub(crate) fn met_in(state: u8) -> u8 {
    // Only a `connect` leads to this state, and the SYN is not acknowledged yet.
    let syn = u8::from(state == SYN_SENT) * syn::COUNTED;
    syn | met()
}

/// Returns the state of a socket. A socket that is older than the tracer is remembered from now on.
/// If there is no room for it, counts that and returns `None`.
#[inline(always)]
pub(crate) fn adopt(sk: Sock, state: u8) -> Option<&'static mut Tracked> {
    if let Some(tracked) = get(sk) {
        return Some(tracked);
    }
    let fresh = fresh(sk, state, met_in(state));
    if !room::is_left(fresh.room_uid) {
        return None;
    }
    // Two hooks may find the socket at the same time. The first one determines its id.
    let is_new = insert(sk, &fresh);
    let tracked = get(sk);
    if !is_new && tracked.is_none() {
        counters::untracked();
    }
    tracked
}

/// Forgets the socket, whose room is counted for this user id.
#[inline(always)]
pub(crate) fn forget(sk: Sock, room_uid: u32) {
    if SOCKETS.remove(sk.0).is_ok() {
        room::give_back(room_uid);
    }
}
