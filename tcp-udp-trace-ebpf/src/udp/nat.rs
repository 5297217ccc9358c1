//! The addresses that a packet had before netfilter translated them.

use tcp_udp_trace_common::{ABSENT, AF_INET, Field, Peer};

use super::packet::{IPPROTO_UDP, is_set};
use crate::{
    datagrams::Datagrams,
    read::{offset, read, read_at},
};

/// The bits of `skb->_nfct` that do not belong to the address: one of `enum ip_conntrack_info`.
const INFO: u64 = 7;
/// `IP_CT_IS_REPLY`: from this value on, the packet goes in the opposite direction of the first
/// one.
const REPLY: u64 = 3;

/// `IPS_NAT_MASK`: the entry has different addresses or ports in the two directions.
const NAT: u64 = 3 << 4;

// The offsets of two fields of `struct nf_conn`, for kernels whose BTF lacks them because conntrack
// is a module.
const TUPLES: u32 = 16;
const STATUS: u32 = 128;

// The layout of a `struct nf_conntrack_tuple_hash`: its size, the offset of its tuple, and within
// the tuple the distance from source to destination, and from an address to its port.
//
// <https://github.com/torvalds/linux/blob/v6.12/include/net/netfilter/nf_conntrack_tuple.h>
const EACH: u64 = 56;
const LINKS: u64 = 16;
const DESTINATION: u64 = 20;
const PORT: u64 = 16;

/// Gives datagrams the addresses that their packet had when its socket sent it. Returns false if
/// netfilter has not translated them.
#[inline(always)]
pub(super) fn undo(skb: u64, datagrams: &mut Datagrams) -> bool {
    let conntrack = read::<u64>(skb, Field::SkbConntrack);
    let (entry, info) = (conntrack & !INFO, conntrack & INFO);
    if entry == 0 || read_at::<u64>(field_address(entry, Field::ConntrackStatus, STATUS)) & NAT == 0
    {
        return false;
    }
    let direction = u64::from(info >= REPLY);
    let tuple = field_address(entry, Field::ConntrackTuples, TUPLES) + direction * EACH + LINKS;
    let [local_port, family] = read_at::<[u16; 2]>(tuple + PORT);
    let [port, kind] = read_at::<[u16; 2]>(tuple + DESTINATION + PORT);
    // The protocol and the direction prove that this is a tuple.
    let expected = u16::from_ne_bytes([IPPROTO_UDP, direction as u8]);
    if family != datagrams.flow.peer.family || kind != expected {
        return false;
    }
    let address = |at| match read_at::<[u32; 4]>(at) {
        [v4, ..] if family == AF_INET => [v4, 0, 0, 0],
        v6 => v6,
    };
    let local = address(tuple);
    datagrams.flow.peer = Peer {
        address: address(tuple + DESTINATION),
        port: u16::from_be(port),
        family,
    };
    if is_set(&datagrams.flow.local) {
        datagrams.flow.local = local;
    }
    datagrams.local = Peer {
        address: local,
        port: u16::from_be(local_port),
        family,
    };
    true
}

/// Returns the address of a field. If BTF lacks the field, uses a guess, which the contents there
/// must confirm.
#[inline(always)]
fn field_address(base: u64, field: Field, guess: u32) -> u64 {
    base + u64::from(match offset(field) {
        ABSENT => guess,
        known => known,
    })
}
