//! The packet of a datagram.

use aya_ebpf::{macros::map, maps::Array};
use tcp_udp_trace_common::{AF_INET, AF_INET6, Field, Peer, UdpTracked, connects};

use crate::{
    datagrams::Datagrams,
    read::{Plain, offset, read, read_at},
};

/// All ones if the receive hook does not see the local address of a datagram. User space sets it.
#[map]
static HIDES_LOCAL: Array<u32> = Array::with_max_entries(1, 0);

pub(super) const IPPROTO_UDP: u8 = 17;

/// The size of a UDP header.
pub(super) const UDP_HEADER: u64 = 8;

/// `skb->protocol` of IPv4, network byte order.
pub(super) const ETH_P_IP: u16 = 0x0800_u16.to_be();

/// The packet of some datagrams.
pub(super) trait Packet: Copy {
    /// Whether the packet's addresses may differ from those that the socket knows.
    const MAY_BE_TRANSLATED: bool;

    /// Restores the addresses that the packet had when the socket sent it. Returns false if
    /// netfilter has not translated them.
    #[inline(always)]
    fn undo_nat(self, _datagrams: &mut Datagrams) -> bool {
        false
    }

    /// Restores the peer that the application gave to this `struct sock`. Returns true if another
    /// program at the cgroup has just replaced the peer.
    #[inline(always)]
    fn undo_program(self, _sk: u64, _datagrams: &mut Datagrams) -> bool {
        false
    }

    /// Returns whether another program at the cgroup has refused the packet, as far as is known
    /// yet.
    #[inline(always)]
    fn is_refused(self) -> bool {
        false
    }
}

/// The headers of a packet.
#[derive(Clone, Copy)]
pub(super) struct Headers {
    pub(super) family: u16,
    pub(super) source: [u32; 4],
    pub(super) destination: [u32; 4],
    pub(super) source_port: u16,
    pub(super) destination_port: u16,
    /// The length in the UDP header, which includes the header itself.
    pub(super) length: u16,
    /// How many datagrams the packet contains.
    pub(super) packets: u64,
}

/// Reads the headers of a packet that is received.
#[inline(always)]
pub(super) fn headers(skb: u64) -> Headers {
    headers_of(&SkbCopy::new(skb))
}

/// Reads the headers of a packet field by field. The verifier of 7.2 fails on the copy in the
/// program for dropped packets (`EFAULT`).
#[inline(always)]
pub(super) fn headers_by_fields(skb: u64) -> Headers {
    headers_of(&Skb(skb))
}

#[inline(always)]
fn headers_of(skb: &impl Fields) -> Headers {
    let head = skb.get::<u64>(Field::SkbHead);
    let network = skb.get::<u16>(Field::SkbNetworkHeader);
    let transport = skb.get::<u16>(Field::SkbTransportHeader);
    let v4 = skb.get::<u16>(Field::SkbProtocol) == ETH_P_IP;
    let [source_port, destination_port, length, _] =
        read_at::<[u16; 4]>(head + u64::from(transport));
    let network = head + u64::from(network);
    let (source, destination) = if v4 {
        let [source, destination] = read_at::<[u32; 2]>(network + 12);
        ([source, 0, 0, 0], [destination, 0, 0, 0])
    } else {
        (read_at(network + 8), read_at(network + 24))
    };
    let shared = head + u64::from(skb.get::<u32>(Field::SkbEnd));
    let segments = read::<u16>(shared, Field::SkbSegments);
    Headers {
        family: if v4 { AF_INET } else { AF_INET6 },
        source,
        destination,
        source_port: u16::from_be(source_port),
        destination_port: u16::from_be(destination_port),
        length: u16::from_be(length),
        packets: if segments > 1 { segments.into() } else { 1 },
    }
}

/// The fields of a `struct sk_buff`.
trait Fields {
    fn get<T: Plain>(&self, field: Field) -> T;
}

/// The address of a `struct sk_buff`.
struct Skb(u64);

impl Fields for Skb {
    #[inline(always)]
    fn get<T: Plain>(&self, field: Field) -> T {
        read(self.0, field)
    }
}

/// A copy of the fields of a `struct sk_buff` by which its headers are found, read in one call.
struct SkbCopy {
    skb: u64,
    fields: [u64; COPIED / 8],
}

/// How many bytes are copied. On every supported kernel, they hold these fields.
const COPIED: usize = 40;

impl SkbCopy {
    /// Returns the offset of the copy, which is aligned as in the kernel's memory.
    #[inline(always)]
    fn start() -> u32 {
        offset(Field::SkbProtocol) & !7
    }

    #[inline(always)]
    fn new(skb: u64) -> Self {
        let fields = read_at(skb + u64::from(Self::start()));
        Self { skb, fields }
    }
}

impl Fields for SkbCopy {
    #[inline(always)]
    fn get<T: Plain>(&self, field: Field) -> T {
        let at = offset(field).wrapping_sub(Self::start()) as usize;
        if at > COPIED - size_of::<T>() {
            return read(self.skb, field);
        }
        // SAFETY: the field is in the copy. Volatile, so that the compiler does not merge several
        // loads.
        unsafe {
            (&raw const self.fields)
                .byte_add(at)
                .cast::<T>()
                .read_volatile()
        }
    }
}

/// Returns the local address in the key of a flow: that of the packet or, if a receive would not
/// see the local address, the one that the socket is bound to.
///
/// Without a branch, because the verifier would follow each path to the end.
#[inline(always)]
pub(super) fn local_of_flow(tracked: &UdpTracked, packet: &[u32; 4], own: &[u32; 4]) -> [u32; 4] {
    let hides = HIDES_LOCAL.get(0).copied().unwrap_or(0);
    let own = bound_address(tracked, own);
    core::array::from_fn(|index| packet[index] ^ (packet[index] ^ own[index]) & hides)
}

/// Returns the address that the socket has now, or none if only a `connect` may have given it one.
/// All datagrams of such a socket with one peer belong to one flow, whether the socket is connected
/// or not.
#[inline(always)]
pub(super) fn bound_address(tracked: &UdpTracked, own: &[u32; 4]) -> [u32; 4] {
    let is_bound = u32::from(tracked.connects & connects::VARYING_ADDRESS).wrapping_sub(1);
    own.map(|word| word & is_bound)
}

/// Returns whether an address is not the unspecified one.
#[inline(always)]
pub(super) const fn is_set([a, b, c, d]: &[u32; 4]) -> bool {
    *a | *b | *c | *d != 0
}

/// Returns the interface that the addresses of datagrams belong to. This is the interface that the
/// socket is bound to (0 for none), or the one that the datagrams went through if an address is
/// link-local.
#[inline(always)]
pub(super) fn scope(
    device: u32,
    peer: &Peer,
    local: &[u32; 4],
    interface: impl FnOnce() -> u32,
) -> u32 {
    let is_link_local = |address: &[u32; 4]| u32::from_be(address[0]) >> 22 == 0xfe80 >> 6;
    let is_either = is_link_local(&peer.address) || is_link_local(local);
    if device == 0 && peer.family == AF_INET6 && is_either {
        interface()
    } else {
        device
    }
}
