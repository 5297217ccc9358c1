//! The UDP sockets that the programs track.

use core::{
    intrinsics::{AtomicOrdering, atomic_xadd},
    ptr,
};

use aya_ebpf::{
    Global,
    bindings::BPF_NOEXIST,
    helpers::{bpf_get_current_pid_tgid, generated::bpf_jiffies64},
    macros::map,
    maps::HashMap,
};
use tcp_udp_trace_common::{Field, ON_DEMAND, Owner, Traffic, UdpTracked, User, older, origin};

use crate::{
    counters,
    emit::Context,
    id, owner,
    read::now,
    room,
    sock::{Sock, Socket as _, tcp_state::ESTABLISHED},
    stopping::met,
};

/// `sk_type` of a socket that is not a raw socket.
const SOCK_DGRAM: u16 = 2;

/// Not 0 if each datagram is reported. User space sets it.
#[unsafe(no_mangle)]
pub(super) static PER_DATAGRAM: Global<u8> = Global::new(0);

/// The sockets by cookie, which the kernel never reuses.
#[map]
static UDP_SOCKETS: HashMap<u64, UdpTracked> = HashMap::with_max_entries(65_536, ON_DEMAND);

/// Returns the state of the socket of this key.
#[inline(always)]
pub(crate) fn get(key: u64) -> Option<&'static mut UdpTracked> {
    // SAFETY: the kernel keeps the memory of a removed entry until no program uses it. Other CPUs
    // write to the same entry. They add to the totals atomically, and the other fields are written
    // once or have the same value whichever CPU writes them.
    UDP_SOCKETS
        .get_ptr_mut(key)
        .and_then(|tracked| unsafe { tracked.as_mut() })
}

/// Starts to track the socket of this key. The verifier may have a type for the pointer `sk`. The
/// pointer is stored, which drops the type, and not used in computations.
///
/// The entry is built under a key that no other program knows, so an entry that is found under its
/// final key is complete.
#[inline(always)]
pub(crate) fn track_new(
    key: u64,
    sk: *const core::ffi::c_void,
    owner: Owner,
) -> Option<&'static mut UdpTracked> {
    let id = id::next();
    let draft = DRAFT | id;
    if UDP_SOCKETS
        .insert(draft, &NOTHING_KNOWN, u64::from(BPF_NOEXIST))
        .is_err()
    {
        counters::untracked();
        return None;
    }
    let tracked = get(draft)?;
    tracked.id = id;
    tracked.born = now();
    tracked.owner = owner;
    tracked.user.thread = User::thread(owner.pid, owner.tid);
    // SAFETY: a valid pointer into the map. Volatile, so that the compiler does not keep the typed
    // pointer.
    let sk = unsafe {
        (&raw mut tracked.sk)
            .cast::<*const core::ffi::c_void>()
            .write_volatile(sk);
        Sock::new((&raw const tracked.sk).read_volatile())
    };
    // A raw socket, which makes its UDP headers itself, is not tracked.
    if sk.get::<u16>(Field::SockType) == SOCK_DGRAM {
        tracked.cgroup = sk.cgroup();
        (tracked.netns, tracked.netns_cookie) = sk.netns();
        let is_old = owner.origin != origin::CREATOR;
        if is_old && sk.get::<u8>(Field::State) == ESTABLISHED {
            tracked.strangers = queued(sk);
        }
        let old = if key == sk.0 { None } else { get(sk.0) };
        let moves = old.is_some();
        if let Some(old) = old {
            // The socket has got its cookie. Its entry moves from its address to its cookie.
            tracked.id = old.id;
            tracked.born = old.born;
            tracked.approximate = old.approximate;
            tracked.flows = old.flows;
            tracked.unassigned = old.unassigned;
            tracked.connects = old.connects;
            tracked.translated = old.translated;
            tracked.is_refused = old.is_refused;
            tracked.unsent = old.unsent;
            tracked.strangers = old.strangers;
            tracked.tree_generation = old.tree_generation;
            tracked.traffic = old.traffic;
            if old.owner.origin != origin::NONE {
                tracked.owner = old.owner;
                tracked.user = old.user;
            }
        } else if owner.origin != origin::CREATOR {
            tracked.flows = if sk.has_file() {
                met()
            } else {
                // No hook sees the creation of the kernel's own sockets.
                older::UNKNOWN << older::SHIFT
            };
        }
        tracked.room_uid = sk.get(Field::SkUid);
        let complete: &UdpTracked = tracked;
        if moves || room::is_left(complete.room_uid) {
            let is_ours = UDP_SOCKETS
                .insert(key, complete, u64::from(BPF_NOEXIST))
                .is_ok();
            if is_ours {
                room::take(complete.room_uid);
                if key != sk.0 {
                    forget(sk.0);
                }
            } else if get(key).is_none() {
                // Another CPU has not inserted the socket either.
                counters::untracked();
            }
        }
    }
    let _ = UDP_SOCKETS.remove(draft);
    get(key)
}

/// The initial contents of an entry. Kept in the programs' memory, because they would take too much
/// stack.
static NOTHING_KNOWN: UdpTracked = UdpTracked {
    sk: 0,
    id: 0,
    born: 0,
    cgroup: 0,
    netns_cookie: 0,
    netns: 0,
    approximate: 0,
    flows: 0,
    tree_generation: 0,
    unassigned: 0,
    connects: 0,
    translated: 0,
    is_refused: 0,
    unsent: 0,
    strangers: 0,
    room_uid: 0,
    owner: owner::UNKNOWN,
    user: User::NONE,
    user_tick: 0,
    user_changes: 0,
    traffic: Traffic {
        tx_bytes: 0,
        rx_bytes: 0,
        tx_packets: 0,
        rx_packets: 0,
    },
};

/// Stops tracking the socket of this key, if it is tracked.
#[inline(always)]
pub(super) fn forget(key: u64) {
    let Some(user) = get(key).map(|tracked| tracked.room_uid) else {
        return;
    };
    if UDP_SOCKETS.remove(key).is_ok() {
        room::give_back(user);
    }
}

/// Marks the key of an entry that is not complete yet. The other bits are the id.
const DRAFT: u64 = 1 << 62;

/// Returns the key of a socket, where no helper returns its cookie.
#[inline(always)]
pub(crate) fn key_of(sk: Sock) -> u64 {
    key(sk, sk.get(Field::Cookie))
}

#[inline(always)]
fn key(sk: Sock, cookie: u64) -> u64 {
    if cookie == 0 { sk.0 } else { cookie }
}

/// Returns the socket, tracked from now on at the latest if `is_udp`. The current process uses it.
#[inline(always)]
pub(crate) fn track_for_current_task(
    ctx: Context,
    key: u64,
    sk: *const core::ffi::c_void,
    is_udp: impl FnOnce() -> bool,
) -> Option<&'static mut UdpTracked> {
    let tracked = track_for_holder(ctx, key, sk, is_udp)?;
    set_user(tracked, (bpf_get_current_pid_tgid() >> 32) as u32, 0);
    Some(tracked)
}

/// How often the user of a socket may change in one tick of the kernel's clock (1 to 10 ms), unless
/// each datagram is reported. To read the fields of a process takes longer than to count a
/// datagram.
const MAX_USER_CHANGES: u32 = 8;

/// Makes the current process, which has this pid, the user of the socket, see [`owner::set_user`].
#[inline(always)]
pub(super) fn set_user(tracked: &mut UdpTracked, pid: u32, sent_by: u64) {
    if tracked.user.pid() != pid {
        change_user(tracked, sent_by);
    }
}

/// Does the same if the user is another process than before.
// Not inlined: the function has a stack frame of its own, and the verifier follows fewer paths
// through the programs that call it.
#[inline(never)]
fn change_user(tracked: &mut UdpTracked, sent_by: u64) -> u32 {
    if tracked.owner.pid == 0 {
        return 0;
    }
    // SAFETY: the helper takes no argument and cannot fail.
    let tick = unsafe { bpf_jiffies64() } as u32;
    if tracked.user_tick != tick {
        tracked.user_tick = tick;
        tracked.user_changes = 0;
    }
    tracked.user_changes += 1;
    if tracked.user_changes <= MAX_USER_CHANGES || PER_DATAGRAM.load() != 0 {
        owner::set_user(&mut tracked.user, tracked.owner.pid, sent_by);
    }
    0
}

/// Returns the socket, tracked from now on at the latest if `is_udp`. The current process has it
/// open.
///
/// Only sockets of UDP are tracked, so the protocol of most sockets need not be read.
#[inline(always)]
pub(super) fn track_for_holder(
    ctx: Context,
    key: u64,
    sk: *const core::ffi::c_void,
    is_udp: impl FnOnce() -> bool,
) -> Option<&'static mut UdpTracked> {
    let Some(tracked) = get(key) else {
        if !is_udp() {
            return None;
        }
        return track_new(key, sk, owner::current(ctx, origin::USER));
    };
    if tracked.owner.origin == origin::NONE {
        owner::set_current_once(ctx, &mut tracked.owner, origin::USER);
    }
    Some(tracked)
}

/// Returns the socket, tracked from now on at the latest. The current process may have no relation
/// to it.
#[inline(always)]
pub(crate) fn track(key: u64, sk: *const core::ffi::c_void) -> Option<&'static mut UdpTracked> {
    match get(key) {
        Some(tracked) => Some(tracked),
        None => track_new(key, sk, owner::UNKNOWN),
    }
}

/// Returns the socket if it is tracked, by its cookie or by its address. It may just have got its
/// cookie.
#[inline(always)]
pub(crate) fn find(key: u64, sk: Sock) -> Option<&'static mut UdpTracked> {
    if let Some(tracked) = get(key) {
        return Some(tracked);
    }
    get(sk.0)?;
    track_new(key, ptr::without_provenance(sk.0 as usize), owner::UNKNOWN)
}

/// Adds to the packets that were found to be refused and are not freed yet, or subtracts by
/// wrapping.
#[inline(always)]
pub(super) fn add_unsent(tracked: &mut UdpTracked, packets: u32) {
    // SAFETY: a pointer into a map's value. The addition is atomic, because other CPUs also add to
    // it.
    unsafe {
        atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(&raw mut tracked.unsent, packets)
    };
}

/// Returns how many datagrams wait to be received, or a larger number.
#[inline(always)]
pub(super) fn queued(sk: Sock) -> u32 {
    // The kernel moves datagrams from the first queue to the second. In this order, a datagram that
    // moves meanwhile is counted twice, and none is missed.
    let waiting = sk.get::<u32>(Field::ReceiveQueued);
    waiting.wrapping_add(sk.get(Field::ReaderQueued))
}
