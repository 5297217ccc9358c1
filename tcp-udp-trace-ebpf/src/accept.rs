//! A process accepts a connection.

use tcp_udp_trace_common::{AF_INET, AF_INET6, Field, Tcp, filter::no_state, kind, origin, syn};

use crate::{
    emit::{self, Context, Weight},
    filter, owner,
    sock::{Copied, Sock, Socket as _, read, read_at},
    syscall, track,
};

const TCP_CLOSE: u8 = 7;

/// `IORING_OP_ACCEPT` of `io_uring.h`.
const IORING_OP_ACCEPT: u8 = 13;

/// The current process has accepted this socket, if it is one of TCP.
#[inline(always)]
pub(crate) fn accepted(ctx: Context, sk: Sock) {
    let socket = &Copied::new(sk);
    let family = socket.family();
    if (family != AF_INET && family != AF_INET6) || !sk.is_tcp() || track::is_stopping() {
        return;
    }
    let state = socket.get::<u8>(Field::State);
    if state == TCP_CLOSE {
        // The peer reset it while it waited: its life is over, and its end was reported.
        return;
    }
    let owner = owner::current(ctx, origin::ACCEPTOR);
    let mut fresh;
    let tracked = if let Some(tracked) = track::adopt(sk, state) {
        if tracked.syn() == syn::UNKNOWN {
            // Its handshake is older than the tracer, but it is one that this side has not begun.
            tracked.syn |= syn::NOT_COUNTED;
        }
        owner::settle(&mut tracked.acceptor, owner);
        // The one before may have been of another tree.
        tracked.kin = 0;
        tracked
    } else {
        // There is no room to remember it.
        fresh = track::fresh(sk, state, syn::NOT_COUNTED | track::met(), owner);
        &mut fresh
    };
    if !filter::wants_tcp(kind::ACCEPT, no_state(state & 0xf), sk, tracked) {
        return;
    }
    emit::record(ctx, kind::ACCEPT, Weight::Vital, |record: &mut Tcp| {
        socket.describe(
            tracked,
            family,
            state,
            socket.connected_port(),
            &mut record.socket,
        );
    });
}

/// The current process has accepted a socket as this descriptor (negative: an error).
#[inline(always)]
pub(crate) fn accepted_as(ctx: Context, fd: i64) {
    if let Some(sk) = socket_of(fd) {
        accepted(ctx, sk);
    }
}

/// The current process returns from a system call.
#[inline(always)]
pub(crate) fn returned(ctx: Context, regs: u64, result: i64) {
    if matches!(syscall::number(regs), syscall::ACCEPT | syscall::ACCEPT4) {
        accepted_as(ctx, result);
    }
}

/// The current process's io_uring has finished a request.
#[inline(always)]
pub(crate) fn completed(ctx: Context, request: u64, result: i32) {
    if read::<u8>(request, Field::IoOpcode) == IORING_OP_ACCEPT {
        accepted_as(ctx, i64::from(result));
    }
}

/// The socket behind a descriptor of the current process.
#[inline(always)]
fn socket_of(fd: i64) -> Option<Sock> {
    let files = read::<u64>(owner::current_task(), Field::Files);
    let table = read::<u64>(files, Field::FdTable);
    if fd < 0 || fd >= i64::from(read::<u32>(table, Field::FdCount)) {
        return None;
    }
    let array = read::<u64>(table, Field::FdArray);
    Sock::of_file(read_at(array + (fd as u64) * 8))
}
