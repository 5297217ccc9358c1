//! Packets that the kernel frees instead of sending. The hook of the send does not know about them.

use aya_ebpf::Global;
use tcp_udp_trace_common::{AF_INET, Field, Peer};

use super::{
    count, flows, nat,
    packet::{ETH_P_IP, Headers, Packet, UDP_HEADER, headers_by_fields, local_of_flow, scope},
    sockets::{add_unsent, get, key_of},
};
use crate::{
    datagrams::{Datagrams, Direction, flow_with},
    emit::Context,
    read::{read, read_at},
    sock::{Sock, Socket as _},
};

/// The reason with which the kernel frees a packet that a program at the cgroup has refused
/// (`enum skb_drop_reason`). User space sets it.
#[unsafe(no_mangle)]
static REFUSED: Global<u32> = Global::new(u32::MAX);
/// The reason with which the kernel frees a packet without stating one. User space sets it.
#[unsafe(no_mangle)]
static NOT_SPECIFIED: Global<u32> = Global::new(u32::MAX);

/// A packet that the kernel frees.
#[derive(Clone, Copy)]
struct FreedPacket(u64);

impl Packet for FreedPacket {
    const MAY_BE_TRANSLATED: bool = true;

    #[inline(always)]
    fn undo_nat(self, datagrams: &mut Datagrams) -> bool {
        nat::undo(self.0, datagrams)
    }
}

/// `kfree_skb(skb, location, reason)`: the kernel drops a packet.
///
/// Two kinds of packets matter. A packet that another program at the cgroup refused was counted by
/// our program, and its send call fails. A packet for a multicast group that may not leave this
/// host (`IP_MULTICAST_TTL` of 0) has not reached our program, and its send call succeeds.
#[inline(always)]
pub(crate) fn dropped(ctx: Context, skb: u64, reason: u32) {
    let is_refused = reason == REFUSED.load();
    if !is_refused && reason != NOT_SPECIFIED.load() {
        return;
    }
    let sk = Sock::new(read(skb, Field::SkbSock));
    if sk.0 == 0 || !sk.is_udp() {
        return;
    }
    let key = key_of(sk);
    let Some(tracked) = get(key) else { return };
    if is_refused {
        tracked.is_refused = 1;
        if tracked.unsent.cast_signed() > 0 {
            add_unsent(tracked, u32::MAX);
            return;
        }
    } else if !stays_here(skb) {
        return;
    }
    let Headers {
        family,
        source,
        destination,
        source_port,
        destination_port,
        length,
        packets,
    } = headers_by_fields(skb);
    // A packet that arrives has the port of another socket.
    if source_port != sk.bound_port() && !is_refused {
        return;
    }
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
    let bytes = u64::from(length).saturating_sub(UDP_HEADER);
    let device = sk.get(Field::Device);
    let interface = || read(read(skb, Field::SkbDevice), Field::DeviceIndex);
    let scope = scope(device, &peer, &source, interface);
    let mut datagrams = Datagrams {
        direction: Direction::Sent,
        bytes,
        packets,
        flow: flow_with(peer, scope, local_of_flow(&source, &own)),
        local: Peer {
            address: source,
            port: source_port,
            family,
        },
        other_port: source_port ^ sk.bound_port(),
        device: Some(device),
    };
    if is_refused {
        datagrams.bytes = bytes.wrapping_neg();
        datagrams.packets = packets.wrapping_neg();
        flows::add(&mut tracked.traffic, &datagrams);
        flows::take_back(tracked, &mut datagrams, FreedPacket(skb));
    } else {
        count(ctx, key, tracked, &mut datagrams, FreedPacket(skb));
    }
}

/// Returns whether a packet goes only to those members of a multicast group that are on this host.
/// The kernel does not let any other packet of a socket have a time to live of 0.
#[inline(always)]
fn stays_here(skb: u64) -> bool {
    const TIME_TO_LIVE: u64 = 8;
    const DESTINATION: u64 = 16;
    let head = read::<u64>(skb, Field::SkbHead);
    let header = head + u64::from(read::<u16>(skb, Field::SkbNetworkHeader));
    read::<u16>(skb, Field::SkbProtocol) == ETH_P_IP
        && read_at::<u8>(header + TIME_TO_LIVE) == 0
        && read_at::<u8>(header + DESTINATION) & 0xf0 == 0xe0
}
