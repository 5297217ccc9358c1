//! What happens to a UDP socket: datagrams are counted in maps, per socket and per flow, and few things are records.

pub(crate) mod connect;
pub(crate) mod drop;
pub(crate) mod flow;
mod nat;
pub(crate) mod receive;
pub(crate) mod send;

use core::{
    intrinsics::{AtomicOrdering, atomic_xadd},
    ptr,
};

use aya_ebpf::{
    Global,
    bindings::BPF_NOEXIST,
    helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_boot_ns, generated::bpf_jiffies64},
    macros::map,
    maps::{Array, HashMap},
};
use tcp_udp_trace_common::{
    AF_INET, AF_INET6, Field, FlowKey, Owner, Peer, Traffic, Udp, UdpTracked, User, kind, mark,
    older, origin, report,
};

use crate::{
    anomaly,
    emit::{self, Context, Weight},
    filter, owner, room,
    sock::{Sock, Socket, read, read_at},
    track,
};

/// The sockets by cookie, which the kernel never reuses.
#[map]
static UDP_SOCKETS: HashMap<u64, UdpTracked> = HashMap::with_max_entries(65_536, 0);

/// Not 0 if each datagram shall be a record.
#[unsafe(no_mangle)]
static PER_DATAGRAM: Global<u8> = Global::new(0);

/// All ones if the receive hook does not tell the local address of a datagram; set by user space.
#[map]
static HIDES_LOCAL: Array<u32> = Array::with_max_entries(1, 0);

const IPPROTO_UDP: u8 = 17;
/// The size of a UDP header.
const UDP_HEADER: u64 = 8;
const SOCK_DGRAM: u16 = 2;
/// `skb->protocol` of IPv4, network byte order.
const ETH_P_IP: u16 = 0x0800_u16.to_be();
const TCP_ESTABLISHED: u8 = 1;

/// Which way a datagram goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Sent,
    Received,
}

/// What is counted at once: a datagram, or some that were handed over together.
#[derive(Clone, Copy)]
pub(crate) struct Datagrams {
    pub(crate) direction: Direction,
    pub(crate) bytes: u64,
    pub(crate) packets: u64,
    /// The key of their flow. The socket is added where the flow is looked for.
    pub(crate) flow: FlowKey,
    /// This side, of the peer's family.
    pub(crate) local: Peer,
    /// Not 0 if the packet has not the socket's port, so NAT has changed it.
    pub(crate) other_port: u16,
    /// The interface that the socket is bound to, where that costs nothing.
    pub(crate) device: Option<u32>,
}

/// The key of the flow with this peer, of a socket that is not known yet.
#[inline(always)]
pub(crate) const fn flow_with(peer: Peer, scope: u32, local: [u32; 4]) -> FlowKey {
    FlowKey {
        socket: 0,
        peer,
        scope,
        local,
    }
}

/// What is known of the socket of this key.
#[inline(always)]
fn get(key: u64) -> Option<&'static mut UdpTracked> {
    // SAFETY: the map is preallocated, so its memory stays. Other CPUs write to the same entry: the totals are added to
    // atomically, the rest is written once or is the same whoever writes it.
    UDP_SOCKETS
        .get_ptr_mut(key)
        .and_then(|tracked| unsafe { tracked.as_mut() })
}

/// Starts to track the socket of this key. `sk` is a pointer that the verifier may have a type for: it is stored, and so
/// loses the type, but nothing is computed with it.
///
/// It is put together under a name that nobody else knows: whoever finds it under its own finds all of it.
#[inline(always)]
pub(crate) fn begin(
    key: u64,
    sk: *const core::ffi::c_void,
    owner: Owner,
) -> Option<&'static mut UdpTracked> {
    let id = track::ticket();
    let draft = DRAFT | id;
    if UDP_SOCKETS
        .insert(draft, &NOTHING_KNOWN, u64::from(BPF_NOEXIST))
        .is_err()
    {
        anomaly::untracked();
        return None;
    }
    let tracked = get(draft)?;
    tracked.id = id;
    tracked.born = now();
    tracked.owner = owner;
    tracked.user.thread = User::thread(owner.pid, owner.tid);
    // SAFETY: a valid pointer into the map. Volatile, for the compiler not to keep the typed pointer.
    let sk = unsafe {
        (&raw mut tracked.sk)
            .cast::<*const core::ffi::c_void>()
            .write_volatile(sk);
        Sock::new((&raw const tracked.sk).read_volatile())
    };
    // Not a raw socket that makes its UDP headers itself.
    if sk.get::<u16>(Field::SockType) == SOCK_DGRAM {
        tracked.cgroup = sk.cgroup();
        (tracked.netns, tracked.netns_cookie) = sk.netns();
        let is_old = owner.origin != origin::CREATOR;
        if is_old && sk.get::<u8>(Field::State) == TCP_ESTABLISHED {
            tracked.strangers = connect::queued(sk);
        }
        let old = if key == sk.0 { None } else { get(sk.0) };
        if let Some(old) = old {
            // It has got its cookie: what was known of it by its address is known by its cookie from now on.
            tracked.id = old.id;
            tracked.born = old.born;
            tracked.approximate = old.approximate;
            tracked.flows = old.flows;
            tracked.unassigned = old.unassigned;
            tracked.is_translated = old.is_translated;
            tracked.is_refused = old.is_refused;
            tracked.unsent = old.unsent;
            tracked.strangers = old.strangers;
            tracked.kin = old.kin;
            tracked.traffic = old.traffic;
            if old.owner.origin != origin::NONE {
                tracked.owner = old.owner;
                tracked.user = old.user;
            }
        } else if owner.origin != origin::CREATOR {
            tracked.flows = if sk.has_file() {
                track::met()
            } else {
                // No hook sees the beginning of the kernel's own sockets.
                older::UNKNOWN << older::SHIFT
            };
        }
        tracked.room_uid = sk.get(Field::SkUid);
        let complete: &UdpTracked = tracked;
        if room::is_left(complete.room_uid) {
            let is_ours = UDP_SOCKETS
                .insert(key, complete, u64::from(BPF_NOEXIST))
                .is_ok();
            if is_ours {
                room::take(complete.room_uid);
                if key != sk.0 {
                    forget(sk.0);
                }
            } else if get(key).is_none() {
                // Nor has another CPU been first.
                anomaly::untracked();
            }
        }
    }
    let _ = UDP_SOCKETS.remove(draft);
    get(key)
}

/// What a new entry begins with. In the programs' memory: on the stack it would take too much.
static NOTHING_KNOWN: UdpTracked = UdpTracked {
    sk: 0,
    id: 0,
    born: 0,
    cgroup: 0,
    netns_cookie: 0,
    netns: 0,
    approximate: 0,
    flows: 0,
    kin: 0,
    unassigned: 0,
    is_translated: 0,
    is_refused: 0,
    unsent: 0,
    strangers: 0,
    room_uid: 0,
    owner: owner::UNKNOWN,
    user: User::NONE,
    user_tick: 0,
    user_changes: 0,
    traffic: Traffic {
        tx_bytes: 0,
        rx_bytes: 0,
        tx_packets: 0,
        rx_packets: 0,
    },
};

/// Stops to track the socket of this key, if it is tracked.
#[inline(always)]
fn forget(key: u64) {
    let Some(user) = get(key).map(|tracked| tracked.room_uid) else {
        return;
    };
    if UDP_SOCKETS.remove(key).is_ok() {
        room::give_back(user);
    }
}

/// Marks the name of an entry that is not complete yet; the rest is its id.
const DRAFT: u64 = 1 << 62;

/// The name of a socket where no helper tells its cookie.
#[inline(always)]
pub(crate) fn key_of(sk: Sock) -> u64 {
    key(sk, sk.get(Field::Cookie))
}

#[inline(always)]
fn key(sk: Sock, cookie: u64) -> u64 {
    if cookie == 0 { sk.0 } else { cookie }
}

/// The socket, tracked from now on if it was not; the current process uses it.
#[inline(always)]
pub(crate) fn used(
    ctx: Context,
    key: u64,
    sk: *const core::ffi::c_void,
) -> Option<&'static mut UdpTracked> {
    let tracked = held(ctx, key, sk)?;
    set_user(tracked, (bpf_get_current_pid_tgid() >> 32) as u32, 0);
    Some(tracked)
}

/// How often the user of a socket may change in one tick of the kernel's clock (1 to 10 ms), unless
/// each datagram is a record: to find out about a process takes longer than to count a datagram.
const MAX_USER_CHANGES: u32 = 8;

/// The process of this pid, the current one, uses the socket; see [`owner::set_user`].
#[inline(always)]
fn set_user(tracked: &mut UdpTracked, pid: u32, sent_by: u64) {
    if tracked.user.pid() == pid || tracked.owner.pid == 0 {
        return;
    }
    // SAFETY: the helper takes nothing and cannot fail.
    let tick = unsafe { bpf_jiffies64() } as u32;
    if tracked.user_tick != tick {
        tracked.user_tick = tick;
        tracked.user_changes = 0;
    }
    tracked.user_changes += 1;
    if tracked.user_changes <= MAX_USER_CHANGES || PER_DATAGRAM.load() != 0 {
        owner::set_user(&mut tracked.user, tracked.owner.pid, sent_by);
    }
}

/// The socket, tracked from now on if it was not; the current process has it open.
#[inline(always)]
fn held(ctx: Context, key: u64, sk: *const core::ffi::c_void) -> Option<&'static mut UdpTracked> {
    let Some(tracked) = get(key) else {
        return begin(key, sk, owner::current(ctx, origin::USER));
    };
    if tracked.owner.origin == origin::NONE {
        owner::settle_current(ctx, &mut tracked.owner, origin::USER);
    }
    Some(tracked)
}

/// The socket, tracked from now on if it was not; the current process has perhaps nothing to do with it.
#[inline(always)]
pub(crate) fn seen(key: u64, sk: *const core::ffi::c_void) -> Option<&'static mut UdpTracked> {
    match get(key) {
        Some(tracked) => Some(tracked),
        None => begin(key, sk, owner::UNKNOWN),
    }
}

/// What is known of the socket, if anything is. By its address too: it may just have got its cookie.
#[inline(always)]
pub(crate) fn known(key: u64, sk: Sock) -> Option<&'static mut UdpTracked> {
    if let Some(tracked) = get(key) {
        return Some(tracked);
    }
    get(sk.0)?;
    begin(key, ptr::without_provenance(sk.0 as usize), owner::UNKNOWN)
}

/// What can be asked of the packet of some datagrams.
pub(crate) trait Packet: Copy {
    /// Whether it may have other addresses than those that the socket knows.
    const MAY_BE_TRANSLATED: bool;

    /// Puts back the addresses that the packet had when the socket sent it. False if netfilter has
    /// not translated them.
    #[inline(always)]
    fn undo_nat(self, _datagrams: &mut Datagrams) -> bool {
        false
    }

    /// Whether another program at the cgroup has refused it, as far as that is known yet.
    #[inline(always)]
    fn is_refused(self) -> bool {
        false
    }
}

/// Datagrams went through the socket.
#[inline(always)]
pub(crate) fn count(
    ctx: Context,
    key: u64,
    tracked: &mut UdpTracked,
    datagrams: &mut Datagrams,
    packet: impl Packet,
) {
    add(&mut tracked.traffic, datagrams);
    flow::count(ctx, key, tracked, datagrams, packet);
    if PER_DATAGRAM.load() != 0 {
        let kind = match datagrams.direction {
            Direction::Sent => kind::SEND,
            Direction::Received => kind::RECEIVE,
        };
        if !packet.is_refused() && filter::wants_udp(kind, tracked, datagrams) {
            record(
                ctx,
                kind,
                key,
                tracked,
                datagrams,
                totals_of(tracked),
                datagrams.bytes,
            );
        }
    }
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: the helper takes nothing and cannot fail.
    unsafe { bpf_ktime_get_boot_ns() }
}

#[inline(always)]
fn add(traffic: &mut Traffic, datagrams: &Datagrams) {
    let (bytes, packets) = match datagrams.direction {
        Direction::Sent => (&raw mut traffic.tx_bytes, &raw mut traffic.tx_packets),
        Direction::Received => (&raw mut traffic.rx_bytes, &raw mut traffic.rx_packets),
    };
    // SAFETY: pointers into a map's value; other CPUs add to them too, so it is atomic.
    unsafe {
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(bytes, datagrams.bytes);
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(packets, datagrams.packets);
    }
}

/// So many packets more (or, wrapping, fewer) were found to be refused and are yet to be freed.
#[inline(always)]
fn add_unsent(tracked: &mut UdpTracked, packets: u32) {
    // SAFETY: a pointer into a map's value; other CPUs add to it too, so it is atomic.
    unsafe {
        atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(&raw mut tracked.unsent, packets)
    };
}

/// What a socket or a flow has carried.
#[derive(Clone, Copy)]
struct Totals<'a> {
    traffic: &'a Traffic,
    approximate: bool,
    /// It is the first report of them.
    first: bool,
}

#[inline(always)]
fn totals_of(tracked: &UdpTracked) -> Totals<'_> {
    Totals {
        traffic: &tracked.traffic,
        approximate: tracked.approximate != 0,
        first: false,
    }
}

#[inline(always)]
fn record(
    ctx: Context,
    kind: u32,
    key: u64,
    tracked: &UdpTracked,
    at: &Datagrams,
    totals: Totals<'_>,
    amount: u64,
) -> bool {
    let weight = match kind {
        kind::CLOSE => Weight::Last,
        kind::CONNECT_FAILED_UDP => Weight::Vital,
        _ => Weight::Other,
    };
    emit::record(ctx, kind, weight, |record: &mut Udp| {
        record.key = key;
        record.id = tracked.id;
        record.born = tracked.born;
        record.cgroup = tracked.cgroup;
        record.netns_cookie = tracked.netns_cookie;
        record.traffic = *totals.traffic;
        record.amount = amount;
        record.owner = tracked.owner;
        record.user = tracked.user;
        let sk = Sock::new(tracked.sk);
        record.device = at.device.unwrap_or_else(|| sk.get(Field::Device));
        record.uid = sk.get(Field::SkUid);
        record.netns = tracked.netns;
        record.peer = at.flow.peer;
        record.local = at.local.address;
        record.local_port = at.local.port;
        record.marks = u8::from(totals.approximate) * mark::APPROXIMATE
            + u8::from(totals.first) * mark::FIRST
            + u8::from(!is_set(&at.flow.local)) * mark::HIDES_LOCAL;
        record.older = tracked.older();
        record.scope = at.flow.scope;
    })
}

/// Reports the socket as it is; false if that is not wanted, or did not fit into the ring.
#[inline(always)]
pub(crate) fn sample(ctx: Context, key: u64, sk: Sock, tracked: &mut UdpTracked) -> bool {
    report(ctx, kind::SAMPLE_UDP, key, tracked, sk, 0)
}

/// Reports something about the socket itself, if it is wanted; false if it is not, or did not fit into the ring.
#[inline(always)]
fn report(
    ctx: Context,
    kind: u32,
    key: u64,
    tracked: &mut UdpTracked,
    sk: Sock,
    amount: u64,
) -> bool {
    let addresses = addresses(sk);
    filter::wants_udp(kind, tracked, &addresses)
        && record(
            ctx,
            kind,
            key,
            tracked,
            &addresses,
            totals_of(tracked),
            amount,
        )
}

/// The headers of a packet that the kernel has at this address.
#[derive(Clone, Copy)]
struct Headers {
    family: u16,
    source: [u32; 4],
    destination: [u32; 4],
    source_port: u16,
    destination_port: u16,
    /// Of the UDP header: its own bytes are among them.
    length: u16,
    /// How many datagrams it is.
    packets: u64,
}

#[inline(always)]
fn headers(skb: u64) -> Headers {
    let head = read::<u64>(skb, Field::SkbHead);
    let network = head + u64::from(read::<u16>(skb, Field::SkbNetworkHeader));
    let transport = head + u64::from(read::<u16>(skb, Field::SkbTransportHeader));
    let [source_port, destination_port, length, _] = read_at::<[u16; 4]>(transport);
    let v4 = read::<u16>(skb, Field::SkbProtocol) == ETH_P_IP;
    let (source, destination) = if v4 {
        let [source, destination] = read_at::<[u32; 2]>(network + 12);
        ([source, 0, 0, 0], [destination, 0, 0, 0])
    } else {
        (read_at(network + 8), read_at(network + 24))
    };
    let shared = head + u64::from(read::<u32>(skb, Field::SkbEnd));
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

/// Nothing was carried; for records about the socket itself, with the addresses that it has.
#[inline(always)]
pub(crate) fn addresses(sk: impl Socket) -> Datagrams {
    // A socket that was disconnected still shows parts of its last peer.
    let connected = sk.get::<u8>(Field::State) == TCP_ESTABLISHED;
    let port = if connected {
        u16::from_be(sk.get(Field::RemotePort))
    } else {
        0
    };
    let (local, peer) = if sk.family() == AF_INET {
        let address = if connected {
            sk.get(Field::RemoteAddr4)
        } else {
            0
        };
        let peer = Peer {
            address: [address, 0, 0, 0],
            port,
            family: AF_INET,
        };
        ([sk.get(Field::LocalAddr4), 0, 0, 0], peer)
    } else {
        let address = if connected {
            sk.get(Field::RemoteAddr6)
        } else {
            [0; 4]
        };
        let peer = peer6(address, port);
        (local6(sk, peer.family), peer)
    };
    let device = sk.get(Field::Device);
    Datagrams {
        direction: Direction::Sent,
        bytes: 0,
        packets: 0,
        flow: flow_with(peer, device, local),
        local: Peer {
            address: local,
            port: sk.bound_port(),
            family: peer.family,
        },
        other_port: 0,
        device: Some(device),
    }
}

/// The local address of an IPv6 socket, for a peer of this family.
#[inline(always)]
fn local6(sk: impl Socket, family: u16) -> [u32; 4] {
    let local = sk.get::<[u32; 4]>(Field::LocalAddr6);
    // Of an IPv4-mapped address, and of `::`, the last word is the IPv4 address.
    if family == AF_INET {
        [local[3], 0, 0, 0]
    } else {
        local
    }
}

/// The local address in the key of a flow: that of the packet, or that which the socket is bound to
/// where a receive would tell no other.
///
/// Without a branch: the verifier would follow each way to the end.
#[inline(always)]
fn local_of_flow(packet: &[u32; 4], own: &[u32; 4]) -> [u32; 4] {
    let hides = HIDES_LOCAL.get(0).copied().unwrap_or(0);
    core::array::from_fn(|index| packet[index] ^ (packet[index] ^ own[index]) & hides)
}

/// Whether an address is not the unspecified one.
#[inline(always)]
const fn is_set([a, b, c, d]: &[u32; 4]) -> bool {
    *a | *b | *c | *d != 0
}

/// The interface that the addresses of datagrams belong to: the one that the socket is bound to
/// (0 for none), or the one they went through if one of them is a link-local address.
#[inline(always)]
pub(crate) fn scope(
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

/// The socket's last descriptor is closed.
#[inline(always)]
pub(crate) fn closed(ctx: Context, key: u64, sk: *const core::ffi::c_void) {
    // One that is older than the tracer and was never used gets its only event here.
    let Some(tracked) = held(ctx, key, sk) else {
        return;
    };
    let sk = Sock::new(tracked.sk);
    report(ctx, kind::CLOSE, key, tracked, sk, drops(sk));
    forget(key);
}

/// How many datagrams found the receive buffer full.
#[inline(always)]
fn drops(sk: Sock) -> u64 {
    // Since 6.18, a busy socket counts them apart for even and odd NUMA nodes.
    let counters = sk.get::<u64>(Field::DropCounters);
    if counters == 0 {
        return u64::from(sk.get::<u32>(Field::Drops));
    }
    u64::from(read::<u32>(counters, Field::Drops0))
        + u64::from(read::<u32>(counters, Field::Drops1))
}

/// An IPv6 address and port as a peer; an IPv4-mapped address is the IPv4 address that it is.
#[inline(always)]
pub(crate) fn peer6(address: [u32; 4], port: u16) -> Peer {
    match address {
        [0, 0, mapped, v4] if mapped == 0xffff_u32.to_be() => Peer {
            address: [v4, 0, 0, 0],
            port,
            family: AF_INET,
        },
        address => Peer {
            address,
            port,
            family: AF_INET6,
        },
    }
}
