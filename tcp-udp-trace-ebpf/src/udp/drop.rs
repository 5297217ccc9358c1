//! Packets that the kernel frees instead of sending. The hook of the send does not know about them.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{
    Global,
    bindings::BPF_ANY,
    helpers::bpf_get_current_pid_tgid,
    macros::map,
    maps::{Array, LruHashMap},
};
use tcp_udp_trace_common::{AF_INET, Field, Flow, FlowKey, Peer, UdpTracked, approximate};

use super::{
    balancer, count, flows, nat,
    packet::{ETH_P_IP, Headers, Packet, UDP_HEADER, headers_by_fields, local_of_flow, scope},
    sockets::{add_unsent, get, key_of},
};
use crate::{
    datagrams::{Datagrams, Direction, flow_with},
    emit::Context,
    owner::is_kernel_thread,
    read::{current_task, read, read_at},
    sock::{Sock, Socket as _},
    syscall,
};

/// The reason with which the kernel frees a packet that a program at the cgroup has refused
/// (`enum skb_drop_reason`). User space sets it.
#[unsafe(no_mangle)]
static REFUSED: Global<u32> = Global::new(u32::MAX);
/// The reason with which the kernel frees a packet without stating one. User space sets it.
#[unsafe(no_mangle)]
static NOT_SPECIFIED: Global<u32> = Global::new(u32::MAX);
/// The reason with which the kernel frees a packet because the neighbor table is full. User space
/// sets it.
#[unsafe(no_mangle)]
static NO_NEIGHBOR: Global<u32> = Global::new(u32::MAX);

/// Not 0 if a hook sees the results of sends. User space sets it.
#[map]
static SEES_RESULTS: Array<u32> = Array::with_max_entries(1, 0);

/// The threads that are in a send, with a datagram that was counted and then freed.
#[map]
static DOUBTS: LruHashMap<u64, Doubt> = LruHashMap::with_max_entries(1024, 0);

/// How many entries were added to [`DOUBTS`] and not removed. If it is 0, no send need look there.
#[map]
static DOUBT_COUNT: Array<u32> = Array::with_max_entries(1, 0);

/// A datagram that was counted and then freed. Its send may succeed or fail.
#[derive(Clone, Copy)]
#[repr(C)]
struct Doubt {
    sk: u64,
    key: u64,
    flow: FlowKey,
    bytes: u64,
    packets: u64,
}

/// The initial contents of an entry. Kept in the programs' memory, because they would take too much
/// stack.
static NO_DOUBT: Doubt = Doubt {
    sk: 0,
    key: 0,
    flow: flow_with(
        Peer {
            address: [0; 4],
            port: 0,
            family: 0,
        },
        0,
        [0; 4],
    ),
    bytes: 0,
    packets: 0,
};

/// A packet that the kernel frees.
#[derive(Clone, Copy)]
struct FreedPacket(u64);

impl Packet for FreedPacket {
    const MAY_BE_TRANSLATED: bool = true;

    #[inline(always)]
    fn undo_nat(self, datagrams: &mut Datagrams) -> bool {
        nat::undo(self.0, datagrams)
    }

    #[inline(always)]
    fn undo_program(self, _sk: u64, datagrams: &mut Datagrams) -> bool {
        balancer::undo(datagrams);
        false
    }
}

/// The meaning of a freed packet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Freed {
    /// Another program at the cgroup refused the packet. It was counted, and its send fails.
    Refused,
    /// The packet is for a multicast group, and may not leave this host (`IP_MULTICAST_TTL` of 0).
    /// It was not counted, and its send succeeds.
    Kept,
    /// A later step, such as the queueing discipline, dropped the packet. It was counted, and the
    /// result of its send shows whether the caller learns about that.
    Dropped,
}

/// `kfree_skb(skb, location, reason)`: the kernel drops a packet.
#[inline(always)]
pub(crate) fn dropped(ctx: Context, skb: u64, reason: u32) {
    let Some((sk, key, tracked)) = socket_of(skb) else {
        return;
    };
    let freed = if reason == REFUSED.load() {
        tracked.is_refused = 1;
        if tracked.unsent.cast_signed() > 0 {
            add_unsent(tracked, u32::MAX);
            return;
        }
        Freed::Refused
    } else if reason == NOT_SPECIFIED.load() && stays_here(skb) {
        Freed::Kept
    } else if has_left(skb) || reason == NO_NEIGHBOR.load() {
        Freed::Dropped
    } else {
        return;
    };
    let mut datagrams = datagrams(skb, sk, tracked);
    // A packet that arrives has the port of another socket.
    if datagrams.other_port != 0 && freed != Freed::Refused {
        return;
    }
    if freed == Freed::Kept {
        count(ctx, key, tracked, &mut datagrams, FreedPacket(skb));
        return;
    }
    let flow = flows::find_counted(tracked, &mut datagrams, FreedPacket(skb));
    if freed == Freed::Refused {
        take_back(Some(tracked), flow, datagrams.bytes, datagrams.packets);
    } else if SEES_RESULTS.get(0).is_some_and(|sees| *sees != 0) && !is_fragment(skb) {
        doubt(sk.0, key, &datagrams);
    } else if is_sending() {
        mark(tracked, flow);
    }
}

/// `kfree_skb(skb, location)`: the kernel drops a packet. It may have been counted or not, and its
/// send may succeed or fail.
#[inline(always)]
pub(crate) fn dropped_for_no_reason(skb: u64) {
    let Some((sk, _, tracked)) = socket_of(skb) else {
        return;
    };
    let mut datagrams = datagrams(skb, sk, tracked);
    if datagrams.other_port == 0 && is_sending() {
        let flow = flows::find_counted(tracked, &mut datagrams, FreedPacket(skb));
        mark(tracked, flow);
    }
}

/// Returns the UDP socket of a packet, its key, and the state that is remembered of it.
#[inline(always)]
fn socket_of(skb: u64) -> Option<(Sock, u64, &'static mut UdpTracked)> {
    let sk = Sock::new(read(skb, Field::SkbSock));
    if sk.0 == 0 || !sk.is_udp() {
        return None;
    }
    let key = key_of(sk);
    Some((sk, key, get(key)?))
}

/// Subtracts datagrams that were counted for a socket and a flow, and were not sent.
#[inline(always)]
fn take_back(tracked: Option<&mut UdpTracked>, flow: Option<&mut Flow>, bytes: u64, packets: u64) {
    if let Some(tracked) = tracked {
        flows::take_back(&mut tracked.traffic, bytes, packets);
    }
    if let Some(flow) = flow {
        flows::take_back(&mut flow.traffic, bytes, packets);
    }
}

/// Marks the totals of a socket and of its flow, because a send that was counted may have failed.
#[inline(always)]
fn mark(tracked: &mut UdpTracked, flow: Option<&mut Flow>) {
    tracked.approximate |= approximate::SENDS;
    if let Some(flow) = flow {
        flow.approximate = 1;
    }
}

/// Returns the datagrams of a packet of this socket.
#[inline(always)]
fn datagrams(skb: u64, sk: Sock, tracked: &UdpTracked) -> Datagrams {
    let Headers {
        family,
        source,
        destination,
        source_port,
        destination_port,
        length,
        packets,
    } = headers_by_fields(skb);
    let peer = Peer {
        address: destination,
        port: destination_port,
        family,
    };
    let own = if family == AF_INET {
        [sk.get(Field::LocalAddr4), 0, 0, 0]
    } else {
        sk.get(Field::LocalAddr6)
    };
    let device = sk.get(Field::Device);
    let interface = || read(read(skb, Field::SkbDevice), Field::DeviceIndex);
    let scope = scope(device, &peer, &source, interface);
    Datagrams {
        direction: Direction::Sent,
        bytes: u64::from(length).saturating_sub(UDP_HEADER),
        packets,
        flow: flow_with(peer, scope, local_of_flow(tracked, &source, &own)),
        local: Peer {
            address: source,
            port: source_port,
            family,
        },
        other_port: source_port ^ sk.bound_port(),
        device: Some(device),
    }
}

/// Returns whether a packet goes only to those members of a multicast group that are on this host.
/// The kernel does not let any other packet of a socket have a time to live of 0.
#[inline(always)]
fn stays_here(skb: u64) -> bool {
    const TIME_TO_LIVE: u64 = 8;
    const DESTINATION: u64 = 16;
    let header = network_header(skb);
    read::<u16>(skb, Field::SkbProtocol) == ETH_P_IP
        && read_at::<u8>(header + TIME_TO_LIVE) == 0
        && read_at::<u8>(header + DESTINATION) & 0xf0 == 0xe0
}

/// Returns whether a packet has reached a network device, and so has passed the hook of the send.
/// The device's code sets this header ([`__dev_queue_xmit`][dev]).
///
/// [dev]: https://github.com/torvalds/linux/blob/v6.12/net/core/dev.c
#[inline(always)]
fn has_left(skb: u64) -> bool {
    const NONE: u16 = u16::MAX;
    read::<u16>(skb, Field::SkbMacHeader) != NONE
}

/// Returns whether a packet may be a part of a datagram. Only the first part of IPv4 has the
/// headers of the datagram.
#[inline(always)]
fn is_fragment(skb: u64) -> bool {
    const NEXT_HEADER: u64 = 6;
    const FRAGMENT: u8 = 44;
    const FRAGMENT_OFFSET: u64 = 6;
    const OFFSET: u16 = 0x1fff_u16.to_be();
    let header = network_header(skb);
    if read::<u16>(skb, Field::SkbProtocol) == ETH_P_IP {
        read_at::<u16>(header + FRAGMENT_OFFSET) & OFFSET != 0
    } else {
        read_at::<u8>(header + NEXT_HEADER) == FRAGMENT
    }
}

#[inline(always)]
fn network_header(skb: u64) -> u64 {
    read::<u64>(skb, Field::SkbHead) + u64::from(read::<u16>(skb, Field::SkbNetworkHeader))
}

/// Returns whether the current thread is probably in a send whose result it will learn. The end of
/// a cork (`UDP_CORK`) has no result.
#[inline(always)]
fn is_sending() -> bool {
    !is_kernel_thread(current_task()) && syscall::registers(syscall::SETSOCKOPT).is_none()
}

/// Remembers a datagram until the result of its send is known.
// Not inlined: the function has a stack frame of its own.
#[inline(never)]
fn doubt(sk: u64, key: u64, datagrams: &Datagrams) -> u32 {
    if !is_sending() {
        return 0;
    }
    let thread = bpf_get_current_pid_tgid();
    if DOUBTS.get_ptr_mut(thread).is_none() {
        if DOUBTS
            .insert(&thread, &NO_DOUBT, u64::from(BPF_ANY))
            .is_err()
        {
            return 0;
        }
        add_doubts(1);
    }
    if let Some(doubt) = DOUBTS.get_ptr_mut(thread) {
        // SAFETY: a valid pointer into the map, which is preallocated. Only this thread uses this
        // entry.
        let doubt = unsafe { &mut *doubt };
        doubt.sk = sk;
        doubt.key = key;
        doubt.flow = datagrams.flow;
        doubt.bytes = datagrams.bytes;
        doubt.packets = datagrams.packets;
    }
    0
}

#[inline(always)]
fn add_doubts(count: u32) {
    if let Some(doubts) = DOUBT_COUNT.get_ptr_mut(0) {
        // SAFETY: a pointer into a map's value. The addition is atomic, because other CPUs also add
        // to it.
        unsafe { atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(doubts, count) };
    }
}

/// `sock_send_length(sk, ret, flags)`: a send of the current thread through this `struct sock` has
/// ended. If it has failed, a datagram that it counted was not sent.
#[inline(always)]
pub(crate) fn send_returned(sk: u64, result: i32) {
    if DOUBT_COUNT.get(0).is_none_or(|count| *count == 0) {
        return;
    }
    let thread = bpf_get_current_pid_tgid();
    let Some(doubt) = DOUBTS.get_ptr_mut(thread) else {
        return;
    };
    // SAFETY: as in `doubt`.
    let doubt = unsafe { &*doubt };
    if result < 0 && doubt.sk == sk {
        let flow = flows::get_counted(&doubt.flow);
        take_back(get(doubt.key), flow, doubt.bytes, doubt.packets);
    }
    if DOUBTS.remove(thread).is_ok() {
        add_doubts(u32::MAX);
    }
}
