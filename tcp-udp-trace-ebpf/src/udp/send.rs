//! A process sends datagrams.

use aya_ebpf::{
    EbpfContext as _, helpers::generated::bpf_get_socket_cookie, programs::SkBuffContext,
};
use tcp_udp_trace_common::{AF_INET, AF_INET6, Field, Peer};

use super::{
    balancer, count, nat,
    packet::{ETH_P_IP, IPPROTO_UDP, Packet, UDP_HEADER, local_of_flow, scope},
    sockets::{add_unsent, set_user, track},
};
use crate::{
    datagrams::{Datagrams, Direction, flow_with},
    owner,
    read::{current_task, read},
};

/// `skb->protocol` of IPv6, network byte order.
const ETH_P_IPV6: u16 = 0x86dd_u16.to_be();
/// How many extension headers of IPv6 may precede the UDP header.
const MAX_EXTENSIONS: u32 = 4;

#[repr(C)]
struct Ipv4Header {
    version_and_length: u8,
    _service: u8,
    _length_id_fragment: [u16; 3],
    _ttl: u8,
    protocol: u8,
    _checksum: u16,
    source: u32,
    destination: u32,
}

#[repr(C)]
struct Ipv6Header {
    _version: u32,
    _length: u16,
    next: u8,
    _hops: u8,
    source: [u32; 4],
    destination: [u32; 4],
}

#[repr(C)]
struct UdpHeader {
    source: u16,
    destination: u16,
    length: u16,
    _checksum: u16,
}

/// The headers of a packet without options or extensions in between.
#[repr(C)]
struct Headers<Ip> {
    ip: Ip,
    udp: UdpHeader,
}

/// A packet leaves a socket. It has passed netfilter, so netfilter has not refused it. It is not
/// segmented yet, so it is one datagram, or one batch of datagrams of equal size.
#[inline(always)]
pub(crate) fn sent(ctx: &SkBuffContext) {
    // SAFETY: the verifier knows the context, and translates each access into one to the kernel's
    // skb.
    let (protocol, segments, sk) = unsafe {
        let skb = &*ctx.skb.skb;
        (skb.protocol as u16, skb.gso_segs, skb.__bindgen_anon_2.sk)
    };
    // The usual form of the headers takes one load.
    let (source, destination, family, udp) = match protocol {
        ETH_P_IP => {
            let Ok(Headers { ip, mut udp }) = ctx.load::<Headers<Ipv4Header>>(0) else {
                return;
            };
            if ip.protocol != IPPROTO_UDP {
                return;
            }
            let length = usize::from(ip.version_and_length & 0xf) * 4;
            if length != size_of::<Ipv4Header>() {
                let Ok(behind) = ctx.load(length) else { return };
                udp = behind;
            }
            let (source, destination) = ([ip.source, 0, 0, 0], [ip.destination, 0, 0, 0]);
            (source, destination, AF_INET, udp)
        }
        ETH_P_IPV6 => {
            let Ok(Headers { ip, mut udp }) = ctx.load::<Headers<Ipv6Header>>(0) else {
                return;
            };
            if ip.next != IPPROTO_UDP {
                let Some(Ok(behind)) = skip_extensions(ctx, ip.next).map(|at| ctx.load(at)) else {
                    return;
                };
                udp = behind;
            }
            (ip.source, ip.destination, AF_INET6, udp)
        }
        _ => return,
    };
    if sk.is_null() {
        return;
    }
    // SAFETY: the context is an skb with a socket.
    let key = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let Some(tracked) = track(key, sk.cast()) else {
        return;
    };
    let packet = SentPacket(ctx);
    if tracked.is_refused != 0 && packet.is_refused() {
        // The packet is not counted at all, so that no reader sees it before the kernel frees it.
        add_unsent(tracked, 1);
        return;
    }
    let sent_by = tracked.sk;
    set_user(tracked, owner::current_tgid(), sent_by);
    let peer = Peer {
        address: destination,
        port: u16::from_be(udp.destination),
        family,
    };
    // SAFETY: as above, and it is not null. Volatile, because the verifier refuses a single load of
    // two words.
    let (own_port, own, device) = unsafe {
        let own = if family == AF_INET {
            [(*sk).src_ip4, 0, 0, 0]
        } else {
            let words = (&raw const (*sk).src_ip6).cast::<u32>();
            core::array::from_fn(|index| words.add(index).read_volatile())
        };
        // The kernel shows this port in host byte order.
        let port = (&raw const (*sk).src_port).read_volatile();
        (port as u16, own, (*sk).bound_dev_if)
    };
    let source_port = u16::from_be(udp.source);
    // SAFETY: the verifier knows the context.
    let interface = || unsafe { (*ctx.skb.skb).ifindex };
    let scope = scope(device, &peer, &source, interface);
    let mut datagrams = Datagrams {
        direction: Direction::Sent,
        bytes: u64::from(u16::from_be(udp.length)).saturating_sub(UDP_HEADER),
        packets: if segments > 1 { segments.into() } else { 1 },
        flow: flow_with(peer, scope, local_of_flow(tracked, &source, &own)),
        local: Peer {
            address: source,
            port: source_port,
            family,
        },
        other_port: source_port ^ own_port,
        device: Some(device),
    };
    count(ctx.as_ptr(), key, tracked, &mut datagrams, packet);
}

/// A packet in a program at the cgroup.
#[derive(Clone, Copy)]
struct SentPacket<'a>(&'a SkBuffContext);

impl Packet for SentPacket<'_> {
    const MAY_BE_TRANSLATED: bool = true;

    #[inline(always)]
    fn undo_nat(self, datagrams: &mut Datagrams) -> bool {
        nat::undo(self.0.as_ptr() as u64, datagrams)
    }

    #[inline(always)]
    fn undo_program(self, sk: u64, datagrams: &mut Datagrams) -> bool {
        balancer::undo_of_send(sk, datagrams)
    }

    /// The kernel runs the programs of a cgroup before those of its parent.
    #[inline(always)]
    fn is_refused(self) -> bool {
        let run = read::<u64>(current_task(), Field::BpfContext);
        run != 0 && read::<u32>(run, Field::CgroupResult) != 0
    }
}

/// Returns the offset of the UDP header behind the IPv6 header and its extensions.
#[inline(always)]
fn skip_extensions(ctx: &SkBuffContext, mut next: u8) -> Option<usize> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const DESTINATION: u8 = 60;
    let mut offset = size_of::<Ipv6Header>();
    for _ in 0..MAX_EXTENSIONS {
        match next {
            IPPROTO_UDP => return Some(offset),
            HOP_BY_HOP | ROUTING | DESTINATION => {
                let [following, length] = ctx.load::<[u8; 2]>(offset).ok()?;
                next = following;
                offset += (usize::from(length) + 1) * 8;
            }
            _ => return None,
        }
    }
    None
}
