//! A process receives datagrams.
//!
//! If the kernel has kprobes, the hook is the function that hands a datagram over, with its
//! headers. Without kprobes, the events come from the result of the receive and from the peer that
//! the kernel returned.

use core::{
    intrinsics::{AtomicOrdering, atomic_xadd},
    ptr,
};

use aya_ebpf::{
    bindings::BPF_ANY, helpers::bpf_get_current_pid_tgid, macros::map, maps::LruHashMap,
};
use tcp_udp_trace_common::{Field, Peer, UdpTracked, approximate};

use super::{
    count,
    packet::{Headers, Packet, bound_address, headers, scope},
    records::{addresses, local6},
    sockets::{key_of, track_for_current_task},
};
use crate::{
    datagrams::{Datagrams, Direction, flow_with},
    emit::Context,
    read::{read, read_at},
    sock::{IPPROTO_UDP, Sock, SockCopy, Socket as _},
};

/// The threads that receive, with the peer of their receive.
#[map]
static RECEIVING: LruHashMap<u64, PendingReceive> = LruHashMap::with_max_entries(4096, 0);

#[derive(Clone, Copy)]
#[repr(C)]
struct PendingReceive {
    peer: Peer,
    /// The interface of a link-local address.
    scope: u32,
    /// Not 0 until the receive has ended. The entry stays, because to create one takes ten times as
    /// long as to find it.
    is_receiving: u32,
}

/// A received packet has the addresses that the socket knows.
#[derive(Clone, Copy)]
struct Received;

impl Packet for Received {
    const MAY_BE_TRANSLATED: bool = false;
}

/// Bit of `sk_shutdown`.
const RCV_SHUTDOWN: u8 = 1;
/// Bit of `udp_sock.udp_flags`, since 6.7.
const UDP_FLAGS_GRO_ENABLED: u64 = 1 << 3;
const MSG_PEEK: i32 = 2;
const MSG_ERRQUEUE: i32 = 0x2000;

/// `skb_consume_udp(sk, skb, len)`: the socket gave a datagram to the application, or showed it for
/// a peek.
///
/// <https://github.com/torvalds/linux/blob/v6.12/net/ipv4/udp.c>
#[inline(always)]
pub(crate) fn consumed(ctx: Context, sk: Sock, skb: u64, len: i32) {
    // The kernel marks a peek by a negative length. For an empty datagram that is no mark, but a
    // datagram that is only peeked at stays in its queue.
    let peeked = len < 0 || len == 0 && read::<u64>(skb, Field::SkbNext) != 0;
    if peeked {
        return;
    }
    // Before the rest: the verifier follows this code once for each path that leads here.
    let key = key_of(sk);
    let address = ptr::without_provenance(sk.0 as usize);
    let Some(tracked) = track_for_current_task(ctx, key, address, || sk.is_udp()) else {
        return;
    };
    let Headers {
        family,
        source,
        destination: local,
        source_port: port,
        destination_port: local_port,
        packets,
        ..
    } = headers(skb);
    let peer = Peer {
        address: source,
        port,
        family,
    };
    let interface = || read(skb, Field::SkbInterface);
    let scope = scope(sk.get(Field::Device), &peer, &local, interface);
    let mut datagrams = Datagrams {
        direction: Direction::Received,
        bytes: len as u64,
        packets,
        flow: flow_with(peer, scope, local),
        local: Peer {
            address: local,
            port: local_port,
            family,
        },
        other_port: 0,
        device: None,
    };
    count(ctx, key, tracked, &mut datagrams, Received);
}

/// The current thread receives from this peer (`user_ip`, `user_port` of the hook). The address
/// that the kernel fills in has the interface of a link-local address.
#[inline(always)]
pub(crate) fn receiving(hook: Context, peer: Peer) {
    /// The offset in a `struct sockaddr_in6`.
    const SCOPE_ID: u64 = 24;
    let thread = bpf_get_current_pid_tgid();
    let scope = scope(0, &peer, &[0; 4], || {
        let address = read::<u64>(hook as u64, Field::SockAddrUser);
        read_at(address + SCOPE_ID)
    });
    let from = PendingReceive {
        peer,
        scope,
        is_receiving: 1,
    };
    match RECEIVING.get_ptr_mut(thread) {
        // SAFETY: a valid pointer into the map, which is preallocated. Only this thread uses this
        // entry.
        Some(entry) => unsafe { *entry = from },
        None => drop(RECEIVING.insert(thread, from, u64::from(BPF_ANY))),
    }
}

/// Ends the receive of the current thread. Returns whether the kernel returned a peer in this
/// receive, and the thread's entry if it has one.
#[inline(always)]
fn end_of_receive() -> (bool, Option<&'static PendingReceive>) {
    let from = RECEIVING.get_ptr_mut(bpf_get_current_pid_tgid());
    // SAFETY: a valid pointer into the map, which is preallocated. Only this thread uses this
    // entry.
    let from = from.and_then(|from| unsafe { from.as_mut() });
    match from {
        Some(from) => {
            let is_receiving = from.is_receiving != 0;
            from.is_receiving = 0;
            (is_receiving, Some(from))
        }
        None => (false, None),
    }
}

/// `sock_recv_length(sk, protocol, ret, flags)`: a receive of the current thread has ended.
#[inline(always)]
pub(crate) fn received(ctx: Context, sk: Sock, protocol: u16, result: i32, flags: i32) {
    if protocol != IPPROTO_UDP {
        return;
    }
    let (has_peer, from) = end_of_receive();
    // After a shutdown, a receive returns 0 without a datagram.
    let shut = result == 0 && sk.get::<u8>(Field::Shutdown) & RCV_SHUTDOWN != 0;
    if result < 0 || flags & (MSG_PEEK | MSG_ERRQUEUE) != 0 || shut {
        return;
    }
    // Before the rest, as above.
    let key = key_of(sk);
    let address = ptr::without_provenance(sk.0 as usize);
    let Some(tracked) = track_for_current_task(ctx, key, address, || true) else {
        return;
    };
    // The copy ends with the block, because the code below needs its room on the stack.
    let mut datagrams = {
        let socket = &SockCopy::new(sk);
        // If the caller passed no address to fill in, the kernel has not returned the peer. A
        // connected socket has only one peer.
        let mut datagrams = addresses(socket);
        datagrams.direction = Direction::Received;
        datagrams.bytes = result as u64;
        datagrams.packets = 1;
        if let Some(PendingReceive { peer, scope, .. }) = from.filter(|_| has_peer) {
            if peer.family != datagrams.flow.peer.family {
                datagrams.local.address = local6(socket, peer.family);
                datagrams.local.family = peer.family;
            }
            datagrams.flow.peer = *peer;
            if datagrams.flow.scope == 0 {
                datagrams.flow.scope = *scope;
            }
        }
        datagrams.flow.local = bound_address(tracked, &datagrams.local.address);
        datagrams
    };
    if sk.get::<u64>(Field::UdpFlags) & UDP_FLAGS_GRO_ENABLED != 0 {
        tracked.approximate |= approximate::READS;
    }
    if tracked.strangers.cast_signed() > 0 {
        take_stranger(tracked);
        if !has_peer {
            let peer = &mut datagrams.flow.peer;
            (peer.address, peer.port) = ([0; 4], 0);
        }
    }
    count(ctx, key, tracked, &mut datagrams, Received);
}

/// Subtracts a received datagram that may have arrived before the socket was connected.
#[inline(always)]
fn take_stranger(tracked: &mut UdpTracked) {
    // SAFETY: a pointer into a map's value. The addition is atomic, because several threads may
    // receive at once.
    unsafe {
        atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(&raw mut tracked.strangers, u32::MAX);
    }
}
