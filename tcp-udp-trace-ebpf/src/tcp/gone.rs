//! The ends of sockets that no hook saw.
//!
//! A socket whose last change of state and whose end no hook saw stays in the map. Each round of
//! samples compares the entries with the memory of their sockets. An entry whose socket is gone in
//! two rounds in a row is reported as closed.
//!
//! The memory of a TCP socket is used only for other TCP sockets until the kernel gives the page
//! back, so it usually still has the numbers of the connection. If another life has begun at the
//! address, the numbers are lost.

use aya_ebpf::{
    helpers::generated::bpf_map_pop_elem,
    macros::map,
    maps::{Array, Queue},
};
use tcp_udp_trace_common::{
    AF_INET, AF_INET6, Field, StateChange, Tracked, filter::no_state, kind, syn,
};

use super::{
    record::{Describe as _, error, forget_syn},
    sockets,
};
use crate::{
    counters,
    emit::{self, Context, Priority},
    filter,
    read::{has, offset, read, read_at},
    sock::{Sock, Socket as _, tcp_state::CLOSE},
    stopping::is_stopping,
};

/// How many elements of the map one run checks. The verifier processes each iteration of the loop.
const STEPS: u32 = 64;

/// The result of the last run of a round.
const ALL: i32 = i32::MAX;

/// The entries that had not ended when another life began at their addresses. If it is full, they
/// are only counted.
#[map]
static REPLACED: Queue<Tracked> = Queue::with_max_entries(64, 0);

/// The entry that is being reported, and the address of the map of sockets. User space runs one
/// search at a time.
#[map]
static GONE: Array<Tracked> = Array::with_max_entries(1, 0);
#[map]
static ADDRESS: Array<u64> = Array::with_max_entries(1, 0);

/// Another life begins at the address of a socket that has not ended.
// Not inlined: it is rare, and the map's value would take stack.
#[inline(never)]
pub(super) fn replaced(sk: &u64) -> u32 {
    if let Some(tracked) = sockets::get(Sock::new(*sk)) {
        let _ = REPLACED.push(&*tracked, 0);
    }
    0
}

/// Reports at most one socket that is gone. Checks the elements of the map from this index on.
/// `round` is the number of the round, which is greater than 1. Returns how many elements were
/// checked.
#[inline(always)]
pub(crate) fn find(ctx: Context, begin: u64, round: u32) -> i32 {
    let Some(gone) = GONE.get_ptr_mut(0) else {
        return ALL;
    };
    // SAFETY: a valid pointer to the map's value, which no other program uses.
    let gone = unsafe { &mut *gone };
    if is_stopping() || !has(Field::References) || !has(Field::Locked) {
        return ALL;
    }
    let mut checked = 0;
    let mut sk = Sock::new(0);
    if !pop(gone) {
        let Some(elements) = Elements::new() else {
            return ALL;
        };
        let mut found = 0;
        while checked < STEPS && found == 0 {
            let key = elements.key(begin + u64::from(checked));
            found = u64::from(differs(Sock::new(key))) * key;
            checked += 1;
        }
        sk = Sock::new(found);
        let Some(tracked) = sockets::get(sk) else {
            return checked.cast_signed();
        };
        if !is_gone(sk, tracked) {
            return checked.cast_signed();
        }
        let is_second = tracked.gone_in + 1 == round;
        tracked.gone_in = round;
        if !is_second {
            return checked.cast_signed();
        }
        *gone = *tracked;
        if tracked.state == CLOSE {
            sockets::forget(sk, gone.room_uid);
            return checked.cast_signed();
        }
        // Another life may begin at the address at any time.
        tracked.state = CLOSE;
        tracked.syn &= !syn::HELD;
        counters::missed();
        // A socket that was never connected is another one.
        if sk.get::<u8>(Field::State) != CLOSE
            || sk.get::<u16>(Field::RemotePort) == 0
            || !is_like(sk, gone)
        {
            sk = Sock::new(0);
        }
    }
    forget_syn(gone);
    report(ctx, sk, gone);
    checked.cast_signed()
}

/// Returns whether the memory of the socket of this key differs from the entry, so that the socket
/// may be gone.
#[inline(always)]
fn differs(sk: Sock) -> bool {
    let Some(tracked) = sockets::get(sk) else {
        return false;
    };
    let (netns, _) = sk.netns();
    let state = sk.get::<u8>(Field::State) ^ tracked.state;
    // Without branches, because the verifier follows each of them in each iteration.
    let references = u64::from(sk.get::<u32>(Field::References));
    let is_unused = references.wrapping_sub(1) >> 63;
    u64::from(state) | u64::from(netns ^ tracked.netns) | is_unused != 0
}

/// Returns whether the socket of this entry is gone.
#[inline(always)]
fn is_gone(sk: Sock, tracked: &Tracked) -> bool {
    let exists = is_like(sk, tracked) && sk.get::<u32>(Field::References) != 0;
    // A hook sees a new state before the socket has it. A system call that changes the state from
    // `CLOSE` holds the lock meanwhile.
    let is_closed = tracked.state != CLOSE
        && sk.get::<u8>(Field::State) == CLOSE
        && sk.get::<u32>(Field::Locked) == 0
        && sk.get::<u8>(Field::State) == CLOSE;
    !exists || is_closed
}

/// Returns whether the memory is that of a TCP socket in the same network namespace.
#[inline(always)]
fn is_like(sk: Sock, tracked: &Tracked) -> bool {
    (sk.family() == AF_INET || sk.family() == AF_INET6)
        && sk.is_tcp()
        && sk.netns() == (tracked.netns, tracked.netns_cookie)
}

/// Reports the end of a socket. If the address is 0, its numbers are lost.
#[inline(always)]
fn report(ctx: Context, sk: Sock, tracked: &mut Tracked) {
    let from = tracked.state;
    let states = no_state(from & 0xf) | no_state(CLOSE);
    if !filter::passes_tcp(kind::STATE_CHANGE, states, sk, tracked) {
        return;
    }
    let family = if sk.0 == 0 { AF_INET } else { sk.family() };
    emit::record(
        ctx,
        kind::STATE_CHANGE,
        Priority::Final,
        |record: &mut StateChange| {
            let port = sk.connected_port();
            sk.describe(tracked, family, from, port, &mut record.socket);
            record.from = from;
            record.to = CLOSE;
            record._pad = [0; 2];
            record.error = error(sk, from);
            if sk.0 == 0 {
                record.socket.uid = tracked.room_uid;
                record.error = 0;
            }
        },
    );
}

/// Takes an entry out of [`REPLACED`].
#[inline(always)]
fn pop(to: &mut Tracked) -> bool {
    // SAFETY: the map's values are of this type.
    let error = unsafe {
        bpf_map_pop_elem(
            (&raw const REPLACED).cast_mut().cast(),
            (&raw mut *to).cast(),
        )
    };
    error == 0
}

/// The preallocated elements of the map of sockets, used and unused ones.
///
/// <https://github.com/torvalds/linux/blob/v6.12/kernel/bpf/hashtab.c>
struct Elements {
    first: u64,
    size: u64,
}

impl Elements {
    #[inline(always)]
    fn new() -> Option<Self> {
        let address = ADDRESS.get_ptr_mut(0)?;
        // SAFETY: a valid pointer to the map's value. Volatile, so that the verifier does not know
        // that the number is the address of a map.
        let map = unsafe {
            address
                .cast::<*const HashMapOfSockets>()
                .write_volatile(&raw const sockets::SOCKETS);
            address.read_volatile()
        };
        let first = read(map, Field::HashElements);
        let size = u64::from(read::<u32>(map, Field::HashElementSize));
        (first != 0 && size != 0 && has(Field::HashElementHash)).then_some(Self { first, size })
    }

    /// Returns the key of an element. The element may be unused, so the key may not be in the map.
    #[inline(always)]
    fn key(&self, index: u64) -> u64 {
        // The key follows the hash, and is aligned to 8.
        let key = u64::from(offset(Field::HashElementHash)) + 8 & !7;
        read_at(self.first + index * self.size + key)
    }
}

type HashMapOfSockets = aya_ebpf::maps::HashMap<u64, Tracked>;
