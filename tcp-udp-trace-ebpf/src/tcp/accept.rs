//! A process accepts a connection.

use tcp_udp_trace_common::{
    AF_INET, AF_INET6, Field, Tcp, Tracked, filter::no_state, kind, origin, syn,
};

use super::{record::Describe as _, sockets};
use crate::{
    emit::{self, Context, Priority},
    filter, owner,
    read::{has, read, read_at},
    sock::{
        Sock, SockCopy, Socket as _,
        tcp_state::{CLOSE, LISTEN},
    },
    stopping::{is_stopping, met},
    syscall,
};

/// `IORING_OP_ACCEPT` of `io_uring.h`.
const IORING_OP_ACCEPT: u8 = 13;
/// `IORING_FILE_INDEX_ALLOC`: the kernel chooses the slot, which is the result.
const IORING_FILE_INDEX_ALLOC: u32 = u32::MAX;
/// `IORING_CQE_F_BUFFER`: the completion belongs to a receive or a read.
const IORING_CQE_F_BUFFER: u32 = 1;
/// The bits of a slot that belong to the address of its file.
const FILE_ADDRESS: u64 = !7;

/// The current process has accepted this socket, if it is a TCP socket. For Multipath TCP, this is
/// the first subflow.
#[inline(always)]
pub(crate) fn accepted(ctx: Context, sk: Sock) {
    let sk = sk.of_tcp();
    let socket = &SockCopy::new(sk);
    let family = socket.family();
    if (family != AF_INET && family != AF_INET6) || !sk.is_tcp() || is_stopping() {
        return;
    }
    let state = socket.get::<u8>(Field::State);
    if state == CLOSE {
        // The peer reset the connection before the accept. Its end has been reported.
        return;
    }
    let tracked = if let Some(tracked) = sockets::adopt(sk, state) {
        if !is_acceptable(tracked) {
            return;
        }
        if tracked.syn() == syn::UNKNOWN {
            // The handshake is older than the tracer, but the peer started the connection.
            tracked.syn |= syn::NOT_COUNTED;
        }
        tracked
    } else {
        // There is no room to remember the socket.
        let syn = syn::NOT_COUNTED | met();
        let fresh = sockets::fresh(sk, state, syn);
        let Some(fresh) = sockets::begin_accepted(&fresh) else {
            return;
        };
        fresh
    };
    owner::set_current_once(ctx, &mut tracked.acceptor, origin::ACCEPTOR);
    // The previous owner may have been in another tree. The direction may have been unknown.
    (tracked.tree_generation, tracked.rejected_by) = (0, 0);
    if tracked.listener != 0 {
        sockets::set_user(&tracked.listener, &tracked.acceptor);
    }
    if filter::only_ends() || !filter::passes_tcp(kind::ACCEPT, no_state(state & 0xf), sk, tracked)
    {
        return;
    }
    emit::record(
        ctx,
        kind::ACCEPT,
        Priority::Lifecycle,
        |record: &mut Tcp| {
            socket.describe(
                tracked,
                // Read again, because a value kept since the beginning would take stack.
                socket.family(),
                state,
                socket.connected_port(),
                &mut record.socket,
            );
        },
    );
}

/// The current process has accepted a socket as this descriptor (negative: an error).
#[inline(always)]
pub(crate) fn accepted_descriptor(ctx: Context, fd: i64) {
    if let Some(sk) = Sock::of_descriptor(fd) {
        accepted(ctx, sk);
    }
}

/// The current process returns from a system call.
#[inline(always)]
pub(crate) fn syscall_returned(ctx: Context, regs: u64, result: i64) {
    if syscall::is_any_of(&[syscall::ACCEPT, syscall::ACCEPT4], regs) {
        accepted_descriptor(ctx, result);
    }
}

/// A request to an io_uring has completed. The current task belongs to the process that made the
/// request.
#[inline(always)]
pub(crate) fn request_completed(ctx: Context, ring: u64, request: u64, result: i32, flags: u32) {
    let (fd, slot) = if request == 0 {
        // This is one of several results of a multishot request. The kernel does not pass the
        // request.
        if flags & IORING_CQE_F_BUFFER != 0 {
            return;
        }
        (i64::from(result), i64::from(result))
    } else if read::<u8>(request, Field::IoOpcode) == IORING_OP_ACCEPT {
        match read::<u32>(request, Field::IoAcceptSlot) {
            0 => (i64::from(result), -1),
            IORING_FILE_INDEX_ALLOC => (-1, i64::from(result)),
            // The slot is counted from 1, and the result is an error or 0.
            slot => (-1, if result < 0 { -1 } else { i64::from(slot) - 1 }),
        }
    } else {
        return;
    };
    let is_it = |sk: &Sock| request != 0 || is_waiting(*sk);
    let found = Sock::of_descriptor(fd).filter(is_it);
    if let Some(sk) = found.or_else(|| socket_in(ring, slot).filter(is_it)) {
        accepted(ctx, sk);
    }
}

/// Returns whether `accept` may have returned the socket. It must not be a listener, a connection
/// that this side started, or a connection that another `accept` returned.
#[inline(always)]
fn is_acceptable(tracked: &Tracked) -> bool {
    tracked.state != LISTEN
        && !matches!(tracked.syn(), syn::COUNTED | syn::NOT_SENT)
        && tracked.acceptor.origin == origin::NONE
}

/// Returns whether the socket is the child of a listener, and no process is known to have accepted
/// it.
#[inline(always)]
fn is_waiting(sk: Sock) -> bool {
    sockets::get(sk)
        .is_some_and(|tracked| tracked.syn() == syn::NOT_COUNTED && is_acceptable(tracked))
}

/// Returns the socket in a slot of an io_uring's own table of files.
#[inline(always)]
fn socket_in(ring: u64, slot: i64) -> Option<Sock> {
    if slot < 0 || slot >= i64::from(read::<u32>(ring, Field::IoFileCount)) {
        return None;
    }
    let slot = read::<u64>(ring, Field::IoFiles) + (slot as u64) * 8;
    let file = if has(Field::IoNodeFile) {
        read::<u64>(read_at(slot), Field::IoNodeFile)
    } else {
        // Before 6.13, the slot holds the file itself.
        read_at(slot)
    };
    Sock::of_file(file & FILE_ADDRESS)
}
