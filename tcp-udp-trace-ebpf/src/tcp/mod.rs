//! TCP sockets: state changes and other events.

pub(crate) mod accept;
pub(crate) mod gone;
mod record;
mod sockets;

use aya_ebpf::Global;
use tcp_udp_trace_common::{
    AF_INET, AF_INET6, Anomaly, Field, Owner, StateChange, Summary, Tcp, Tracked, filter::no_state,
    hold, kind, origin, retransmission, syn,
};

use self::record::{Describe as _, EADDRNOTAVAIL, Summarize as _, error, is_repaired};
pub(crate) use self::{record::is_v4, sockets::Program};
use crate::{
    connect::{self, Connect},
    counters,
    emit::{self, Context, Priority},
    filter, owner,
    read::{offset, read},
    sock::{
        Sock, Socket,
        tcp_state::{
            CLOSE, ESTABLISHED, LISTEN, NEW_SYN_RECV, SYN_RECV, SYN_SENT, TIME_WAIT, is_connected,
        },
    },
    stopping::is_stopping,
    syscall,
};

/// States of a `struct socket`. In the first, a `connect` has begun and has not returned its result
/// yet. In the second, it has succeeded.
///
/// <https://github.com/torvalds/linux/blob/v6.12/include/uapi/linux/net.h>
const SS_CONNECTING: u32 = 2;
const SS_CONNECTED: u32 = 3;

/// The socket changes from one state to another.
#[inline(always)]
pub(crate) fn state_changed(
    ctx: Context,
    program: Program,
    sk: Sock,
    socket: impl Socket,
    from: i32,
    to: i32,
) {
    let (from, to) = (from as u8, to as u8);
    if filter::only_ends() && is_connected(from) && to != CLOSE {
        // Neither reported nor remembered.
        return;
    }
    let tracked = sockets::get(sk);
    if from == to || tracked.as_ref().is_some_and(|tracked| tracked.state == to) {
        // The state did not change, or the other program has reported the change.
        return;
    }
    if !socket.is_tcp() {
        return;
    }
    // No `Option`: the verifier refuses a copy of the value that `None` leaves undefined.
    let (last_state, room_uid) = tracked
        .as_ref()
        .map_or((0, 0), |tracked| (tracked.state, tracked.room_uid));
    let family = socket.family();
    if family != AF_INET && family != AF_INET6 {
        if program == Program::First {
            counters::unknown_family();
        }
        return;
    }
    let socket_state = if to == CLOSE {
        socket.socket_state()
    } else {
        0
    };
    let mut listener = None;
    let syn = match (from, to) {
        (CLOSE, SYN_SENT) if is_repaired(socket) => syn::NOT_SENT,
        (CLOSE, SYN_SENT) => syn::COUNTED,
        (CLOSE, LISTEN) => syn::NOT_COUNTED | (u8::from(is_to_be_held(socket)) * syn::HELD),
        (LISTEN, SYN_RECV) => {
            listener = listener_of(sk, socket);
            syn::NOT_COUNTED
        }
        _ => {
            // A socket that is not tracked is older than the tracer.
            let tracked = match tracked {
                Some(tracked) => Some(tracked),
                None => sockets::adopt(sk, from),
            };
            if let Some(tracked) = tracked {
                // The other program counts the change that it reports after a held one.
                if tracked.state != from && !tracked.is_held() && !is_unseen(tracked.state, from) {
                    counters::missed();
                }
                let change = if tracked.is_held() {
                    // This program reports that the socket began to listen. The other program finds
                    // the old state, and reports this change.
                    tracked.syn &= !syn::HELD;
                    (CLOSE, LISTEN)
                } else {
                    tracked.state = to;
                    (from, to)
                };
                if matches!(from, SYN_SENT | SYN_RECV) && is_connected(to) {
                    socket.establish(tracked);
                }
                if from == SYN_RECV && to == ESTABLISHED {
                    if let Some(owner) = owner_of_connection(sk, socket) {
                        tracked.creator = owner;
                    }
                }
                if to == CLOSE {
                    // A socket without an open descriptor has neither of these states.
                    let is_unreturned = from != LISTEN && !matches!(socket_state, 0 | SS_CONNECTED);
                    tracked.set_unreturned(is_unreturned);
                }
                report(ctx, sk, socket, tracked, change, socket_state);
                return;
            }
            sockets::met_in(from)
        }
    };
    let begun = match listener {
        Some(listener) => sockets::begin(program, &sockets::child_of(listener, to, syn)),
        None => sockets::begin(program, &sockets::fresh(socket, to, syn)),
    };
    let Some(beginning) = begun else { return };
    let tracked = &mut beginning.state;
    if from == CLOSE && matches!(to, SYN_SENT | LISTEN) {
        match owner_of_connection(sk, socket) {
            Some(owner) => tracked.creator = owner,
            None => owner::set_current_once(ctx, &mut tracked.creator, origin::CREATOR),
        }
    }
    // If there is no room to remember the socket, only the first program reports, because otherwise
    // both would.
    let begins = from == CLOSE || to == SYN_RECV;
    if begins && last_state != 0 {
        if last_state != CLOSE {
            // No hook saw the close and the end of the previous socket at this address.
            counters::missed();
            gone::replaced(&sk.0);
        }
        sockets::forget(sk, room_uid);
    }
    let is_remembered = begins && sockets::remember(sk, tracked);
    let is_held = is_remembered && tracked.is_held();
    if !is_held && (is_remembered || program == Program::First) {
        let change = (from, to);
        report(ctx, sk, socket, tracked, change, socket_state);
    }
    beginning.end();
}

/// Returns whether the programs have skipped the changes that lead from one state to the other.
#[inline(always)]
fn is_unseen(from: u8, to: u8) -> bool {
    filter::only_ends() && is_connected(from) && is_connected(to)
}

/// Returns whether a socket begins to listen without a port, and a later hook sees the port.
///
/// The kernel chooses the port after the state change (`inet_csk_listen_start`).
///
/// <https://elixir.bootlin.com/linux/v6.12/source/net/ipv4/inet_connection_sock.c>
#[inline(always)]
fn is_to_be_held(socket: impl Socket) -> bool {
    socket.bound_port() == 0
        && match sockets::holds() {
            hold::ALL => true,
            hold::OF_SYSTEM_CALL => syscall::registers(syscall::LISTEN).is_some(),
            _ => false,
        }
}

/// A listener has got its port.
#[inline(always)]
pub(crate) fn listener_has_port(ctx: Context, sk: Sock) {
    if let Some(tracked) = sockets::get(sk) {
        if tracked.state == LISTEN && tracked.is_held() && !is_stopping() {
            tracked.syn &= !syn::HELD;
            report(ctx, sk, sk, tracked, (CLOSE, LISTEN), 0);
        }
    }
}

/// The current process's `listen` has returned.
#[inline(always)]
pub(crate) fn listen_returned(ctx: Context) {
    if let Some(regs) = syscall::registers(syscall::LISTEN) {
        let [fd, _, _] = syscall::arguments(regs);
        if let Some(sk) = Sock::of_descriptor(i64::from(fd as i32)) {
            listener_has_port(ctx, sk.of_tcp());
        }
    }
}

/// The current process's `connect` has returned this result.
#[inline(always)]
pub(crate) fn connect_returned(ctx: Context, result: i64) {
    let Some(errno) = connect::errno(result) else {
        return;
    };
    let Some(connect) = syscall::registers(syscall::CONNECT).and_then(Connect::new) else {
        return;
    };
    let sk = connect.sk;
    let family = sk.family();
    if sk.get::<u8>(Field::State) != CLOSE
        || (family != AF_INET && family != AF_INET6)
        || !sk.is_tcp()
        || is_stopping()
        || has_changed(sk, errno)
    {
        return;
    }
    // The socket is not remembered. If it connects later, that is another life.
    let mut tracked = sockets::fresh(sk, CLOSE, syn::COUNTED);
    owner::set_current(ctx, &mut tracked.creator, origin::CREATOR);
    let ends = connect.ends();
    if !filter::passes_connect(sk, &mut tracked, &ends) {
        return;
    }
    let (local, remote) = ends;
    emit::record(
        ctx,
        kind::CONNECT_FAILED_TCP,
        Priority::Lifecycle,
        |record: &mut Tcp| {
            let socket = &mut record.socket;
            // The two ends may have different families. They are written below.
            sk.describe(&tracked, AF_INET, CLOSE, local.port, socket);
            socket.family = AF_INET6;
            socket.local = connect::mapped(&local);
            socket.remote = connect::mapped(&remote);
            socket.remote_port = remote.port;
            socket.error = errno;
            // The kernel's counts belong to an earlier connection of the socket.
            (socket.tx_bytes, socket.rx_bytes) = (0, 0);
            (socket.tx_packets, socket.rx_packets) = (0, 0);
        },
    );
}

/// Returns whether the `connect` that returned this errno for a closed socket has changed the
/// socket's state, or has returned the reason of an earlier change. That change has been reported.
#[inline(always)]
fn has_changed(sk: Sock, errno: u32) -> bool {
    let Some(tracked) = sockets::get(sk) else {
        // A socket that never tried to connect has no sequence number. A socket that found no port
        // has none either, but it is remembered, unless there was no room.
        return sk.get::<u32>(Field::WriteSeq) != 0
            || errno == EADDRNOTAVAIL && counters::has_missed();
    };
    if tracked.state != CLOSE {
        // No program saw its close, which is reported with its end.
        return true;
    }
    // The call that returns the result of a `connect` resets this state.
    sk.socket_state() != SS_CONNECTING && tracked.set_unreturned(false)
}

/// Returns the state of a live socket, which is remembered from now on at the latest.
#[inline(always)]
pub(crate) fn live_socket(sk: Sock) -> Option<&'static mut Tracked> {
    let state = sk.get::<u8>(Field::State);
    // `TIME_WAIT` and `NEW_SYN_RECV` are not full sockets. A read through a null pointer returns
    // family 0.
    let is_alive = !matches!(state, TIME_WAIT | NEW_SYN_RECV | CLOSE);
    let family = sk.family();
    if is_alive && !is_stopping() && (family == AF_INET || family == AF_INET6) && sk.is_tcp() {
        sockets::adopt(sk, state)
    } else {
        None
    }
}

/// Reports a sample of the socket. Returns false if the sample does not pass the filter, or finds
/// the buffer full.
#[inline(always)]
pub(crate) fn sample(ctx: Context, sk: Sock, tracked: &mut Tracked) -> bool {
    let state = sk.get(Field::State);
    filter::passes_tcp(kind::SAMPLE_TCP, no_state(state & 0xf), sk, tracked)
        && emit::record(
            ctx,
            kind::SAMPLE_TCP,
            Priority::Normal,
            |record: &mut Tcp| {
                let port = sk.connected_port();
                sk.describe(tracked, sk.family(), state, port, &mut record.socket);
                if state == LISTEN {
                    record.socket.error = sk.get(Field::Drops);
                }
            },
        )
}

/// Reports an event that does not change the socket's state. A closed socket is tracked until the
/// kernel frees it, because a reset is sent after the close.
#[inline(always)]
pub(crate) fn report_event(ctx: Context, kind: u32, sk: Sock, details: Details) {
    let tracked = match sockets::get(sk) {
        Some(tracked) => Some(tracked),
        None => live_socket(sk),
    };
    let Some(tracked) = tracked else { return };
    if details.ends {
        tracked.reset_reason = details.what as u16;
    }
    let state = tracked.state;
    if filter::passes_tcp(kind, no_state(state & 0xf), sk, tracked) {
        emit::record(ctx, kind, Priority::Normal, |record: &mut Anomaly| {
            let port = sk.connected_port();
            let socket = &mut record.socket;
            sk.describe(tracked, sk.family(), state, port, socket);
            if details.request != 0 {
                Sock::new(details.request).describe_peer(socket);
            }
            if details.segment != 0 {
                record::describe_ends(details.segment, socket);
            }
            record.what = details.what;
            record.packets = details.packets;
            record.bytes = details.bytes;
            record._pad = 0;
        });
    }
}

/// The details of such an event.
#[derive(Clone, Copy, Default)]
pub(crate) struct Details {
    what: u32,
    packets: u32,
    bytes: u32,
    /// The address of the `struct request_sock`, if the event is of a connection that a listener
    /// has not got yet.
    request: u64,
    /// The address of the `struct sk_buff` of a segment for a listener, whose ends are those of the
    /// event.
    segment: u64,
    /// Whether it is a reset with which the kernel ends the connection.
    ends: bool,
}

/// The kernel has retransmitted what is in this buffer.
#[inline(always)]
pub(crate) fn retransmitted(ctx: Context, sk: Sock, skb: u64) {
    let what = match sk.get::<u8>(Field::State) {
        SYN_SENT => retransmission::SYN,
        SYN_RECV => retransmission::SYN_ACK,
        _ if CA_STATE.load() == 0 => retransmission::UNKNOWN,
        _ => match sk.get::<u8>(Field::CaState) & CA_STATE.load() {
            CA_LOSS => retransmission::TIMEOUT,
            CA_RECOVERY => retransmission::FAST,
            _ => retransmission::PROBE,
        },
    };
    let control = skb + u64::from(offset(Field::SkbControl));
    let details = Details {
        what,
        packets: read::<u16>(control, Field::Segments).into(),
        bytes: read(skb, Field::SkbLen),
        ..Details::default()
    };
    report_event(ctx, kind::RETRANSMIT, sk, details);
}

/// The kernel has sent another SYN-ACK for this `struct request_sock`.
#[inline(always)]
pub(crate) fn syn_ack_retransmitted(ctx: Context, sk: Sock, request: u64) {
    let details = Details {
        what: retransmission::SYN_ACK,
        packets: 1,
        request,
        ..Details::default()
    };
    report_event(ctx, kind::RETRANSMIT, sk, details);
}

/// The kernel has sent or received a reset. The reason is one of the kernel's `enum
/// sk_rst_reason`, plus 1. 0 stands for none. If `ends`, the kernel closes the socket next, or has
/// closed it.
#[inline(always)]
pub(crate) fn reset(ctx: Context, kind: u32, sk: Sock, reason: u32, ends: bool) {
    let details = Details {
        what: reason,
        ends,
        ..Details::default()
    };
    report_event(ctx, kind, sk, details);
}

/// A segment of a handshake has come for a listener. The kernel drops it, and counts it in
/// `ListenOverflows`, if the queue of connections that wait to be accepted is full.
// Not inlined: three programs have it.
#[inline(never)]
pub(crate) fn connection_requested(ctx: Context, sk: Sock, segment: u64) {
    if sk.get::<u32>(Field::AcceptQueue) > sk.get::<u32>(Field::AcceptQueueLimit) {
        let details = Details {
            segment,
            ..Details::default()
        };
        report_event(ctx, kind::LISTEN_OVERFLOW, sk, details);
    }
}

/// The bits of [`Field::CaState`] in its byte, 0 if they are not known. User space sets them.
#[unsafe(no_mangle)]
static CA_STATE: Global<u8> = Global::new(0);

/// States of congestion control.
///
/// <https://github.com/torvalds/linux/blob/v6.12/include/uapi/linux/tcp.h>
const CA_RECOVERY: u8 = 3;
const CA_LOSS: u8 = 4;

/// Returns the listener of a child. The child has the listener's owner until a process accepts it.
#[inline(always)]
fn listener_of(sk: Sock, child: impl Socket) -> Option<&'static Tracked> {
    let listener = child.listener().filter(|listener| listener.0 != sk.0)?;
    let found = sockets::get(listener)?;
    // This proves that the address is a listener's, and that the listener has the child's port.
    (found.state == LISTEN && listener.bound_port() == child.bound_port()).then_some(found)
}

/// Returns the owner of the Multipath TCP connection that a subflow joins, which is the owner of
/// its first subflow, or `None` if it is not such a subflow.
///
/// A kernel worker starts subflows, and no process accepts those that the peer starts.
#[inline(always)]
fn owner_of_connection(sk: Sock, socket: impl Socket) -> Option<Owner> {
    let context = socket.get::<u64>(Field::UlpData);
    // Other protocols store data there as well, but theirs does not point back to the socket.
    if context == 0 || read::<u64>(context, Field::SubflowSock) != sk.0 {
        return None;
    }
    let first = Sock::new(read(read(context, Field::SubflowOf), Field::MptcpFirst));
    if first.0 == sk.0 {
        return None;
    }
    sockets::get(first).map(|tracked| *owner::of_socket(tracked))
}

/// Reports a state change. At the end of a connection, the `struct socket` has this state.
#[inline(always)]
fn report(
    ctx: Context,
    sk: Sock,
    socket: impl Socket,
    tracked: &mut Tracked,
    (from, to): (u8, u8),
    socket_state: u32,
) {
    let ends = to == CLOSE && from != LISTEN;
    if filter::only_ends() && !ends {
        return;
    }
    let states = no_state(to & 0xf);
    if !filter::passes_tcp(kind::STATE_CHANGE, states, sk, tracked) {
        return;
    }
    let is_lifecycle = |state| matches!(state, CLOSE | LISTEN | ESTABLISHED);
    let priority = if to == CLOSE {
        Priority::Final
    } else if is_lifecycle(from) || is_lifecycle(to) {
        Priority::Lifecycle
    } else {
        Priority::Normal
    };
    emit::state_change(
        ctx,
        priority,
        ends,
        |summary: &mut Summary| socket.summarize(socket_state, tracked, summary),
        |record: &mut StateChange| {
            let port = if from == CLOSE {
                socket.bound_port()
            } else {
                socket.connected_port()
            };
            // Read again, because a value kept since the beginning would take stack.
            let family = socket.family();
            socket.describe(tracked, family, from, port, &mut record.socket);
            record.from = from;
            record.to = to;
            record._pad = [0; 2];
            record.error = if to == CLOSE { error(socket, from) } else { 0 };
        },
    );
}

/// The kernel frees the socket.
#[inline(always)]
pub(crate) fn destroyed(ctx: Context, sk: Sock) {
    if let Some(tracked) = sockets::get(sk) {
        if tracked.state != CLOSE && !is_stopping() {
            // Neither program saw its close.
            counters::missed();
            let change = (tracked.state, CLOSE);
            record::forget_syn(tracked);
            report(ctx, sk, sk, tracked, change, Summary::MISSED);
        }
        sockets::forget(sk, tracked.room_uid);
    }
}
