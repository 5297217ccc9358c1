//! The ends of sockets that no hook saw.
//!
//! A socket whose last change of state and whose end no hook saw stays in the map. Now and then, a
//! search compares the entries with the memory of their sockets. An entry whose socket is gone in
//! two searches in a row is reported as closed.
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
    AF_INET, AF_INET6, Field, StateChange, Summary, Tracked, filter::no_state, kind, syn,
};

use super::{
    record::{Describe as _, Summarize as _, error, forget_syn},
    sockets,
};
use crate::{
    counters,
    emit::{self, Context, Priority},
    filter,
    read::has,
    sock::{
        Sock, Socket as _,
        tcp_state::{CLOSE, LISTEN},
    },
    stopping::is_stopping,
};

/// The entries that had not ended when another life began at their addresses. If it is full, they
/// are only counted.
#[map]
static REPLACED: Queue<Tracked> = Queue::with_max_entries(64, 0);

/// The entry that is being reported. User space runs one search at a time.
#[map]
static GONE: Array<Tracked> = Array::with_max_entries(1, 0);

/// Another life begins at the address of a socket that has not ended.
// Not inlined: it is rare, and the map's value would take stack.
#[inline(never)]
pub(super) fn replaced(sk: &u64) -> u32 {
    if let Some(tracked) = sockets::get(Sock::new(*sk)) {
        let _ = REPLACED.push(&*tracked, 0);
    }
    0
}

/// Reports one of the entries that another life has replaced. Returns 0 if there is none.
#[inline(always)]
pub(crate) fn report_replaced(ctx: Context) -> i32 {
    if is_stopping() {
        return 0;
    }
    let Some(gone) = gone() else { return 0 };
    if !pop(gone) {
        return 0;
    }
    report(ctx, Sock::new(0), gone);
    1
}

/// Reports the socket at this address if it is gone for the second search in a row. `search` is the
/// number of the search, which is greater than 1.
#[inline(always)]
pub(crate) fn check(ctx: Context, sk: Sock, search: u32) {
    if is_stopping() || !has(Field::References) || !has(Field::Locked) {
        return;
    }
    let (Some(gone), Some(tracked)) = (gone(), sockets::get(sk)) else {
        return;
    };
    if !is_gone(sk, tracked) {
        return;
    }
    let is_second = tracked.gone_in + 1 == search;
    tracked.gone_in = search;
    if !is_second {
        return;
    }
    *gone = *tracked;
    if tracked.state == CLOSE {
        sockets::forget(sk, gone.room_uid);
        return;
    }
    // Another life may begin at the address at any time.
    tracked.state = CLOSE;
    tracked.syn &= !syn::HELD;
    counters::missed();
    // A socket that was never connected is another one.
    let is_same = sk.get::<u8>(Field::State) == CLOSE
        && sk.get::<u16>(Field::RemotePort) != 0
        && is_like(sk, gone);
    report(ctx, if is_same { sk } else { Sock::new(0) }, gone);
}

#[inline(always)]
fn gone() -> Option<&'static mut Tracked> {
    // SAFETY: a valid pointer to the map's value, which no other program uses.
    GONE.get_ptr_mut(0).map(|gone| unsafe { &mut *gone })
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
    forget_syn(tracked);
    let from = tracked.state;
    if !filter::passes_tcp(kind::STATE_CHANGE, no_state(CLOSE), sk, tracked) {
        return;
    }
    let family = if sk.0 == 0 { AF_INET } else { sk.family() };
    emit::state_change(
        ctx,
        Priority::Final,
        from != LISTEN,
        |summary: &mut Summary| sk.summarize(Summary::MISSED, tracked, summary),
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
