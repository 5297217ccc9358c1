//! The contract between the eBPF programs and user space. It consists of a record for each kind of
//! event, the state that the programs keep of a socket, the counters of anomalies, and the kernel
//! fields that the programs read.
//!
//! All types are plain integers and bytes with explicit padding, in the byte order of the machine.
//! This is not a public API, because the library and its eBPF object always come from the same
//! commit.
#![no_std]
#![forbid(unsafe_code)]

use core::mem::offset_of;

mod fields;
pub mod filter;

pub use fields::{ABSENT, FIELDS, Field, Offsets, WantedField};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The flags in the object of a hash map that allocates its entries when they are needed, if the
/// kernel can. User space replaces this number by the flags that the kernel gets.
pub const ON_DEMAND: u32 = 0x4f6e_446d;

/// The kind of a record, in [`Head::kind`].
pub mod kind {
    /// Only this number. It wakes the reader of perf buffers.
    pub const BELL: u32 = 0;
    /// A [`StateChange`](super::StateChange).
    pub const STATE_CHANGE: u32 = 1;
    /// A [`Tcp`](super::Tcp): a process accepted the connection.
    pub const ACCEPT: u32 = 2;
    /// A [`Udp`](super::Udp): the socket got a peer.
    pub const CONNECT: u32 = 3;
    /// A [`Udp`](super::Udp): the totals of a flow.
    pub const FLOW: u32 = 4;
    /// A [`Udp`](super::Udp): a datagram was sent.
    pub const SEND: u32 = 5;
    /// A [`Udp`](super::Udp): a datagram was received.
    pub const RECEIVE: u32 = 6;
    /// A [`Udp`](super::Udp): the socket has been closed.
    pub const CLOSE: u32 = 7;
    /// A [`Tcp`](super::Tcp): a sample of a live socket.
    pub const SAMPLE_TCP: u32 = 8;
    /// A [`Udp`](super::Udp): a sample of a live socket.
    pub const SAMPLE_UDP: u32 = 9;
    /// An [`Anomaly`](super::Anomaly): a segment was retransmitted.
    pub const RETRANSMIT: u32 = 10;
    /// An [`Anomaly`](super::Anomaly): a reset was sent.
    pub const RESET_SENT: u32 = 11;
    /// An [`Anomaly`](super::Anomaly): a reset was received.
    pub const RESET_RECEIVED: u32 = 12;
    /// A [`Tcp`](super::Tcp): a `connect` failed without a state change.
    pub const CONNECT_FAILED_TCP: u32 = 13;
    /// A [`Udp`](super::Udp): a `connect` failed.
    pub const CONNECT_FAILED_UDP: u32 = 14;
    /// An [`Anomaly`](super::Anomaly): a full queue of a listener refused a connection.
    pub const LISTEN_OVERFLOW: u32 = 15;
    /// The number of kinds of events.
    pub const COUNT: usize = 16;
    /// A piece of an [`Image`](super::Image). It is not an event, and not among the counts of
    /// events.
    pub const IMAGE: u32 = 32;
}

/// How the owner was determined, in [`Owner::origin`].
pub mod origin {
    /// The owner is not known.
    pub const NONE: u16 = 0;
    /// The owner created the socket (UDP), or called `connect` or `listen` (TCP).
    pub const CREATOR: u16 = 1;
    /// The owner called `accept`.
    pub const ACCEPTOR: u16 = 2;
    /// The owner was the first process seen sending or receiving.
    pub const USER: u16 = 3;
    /// The owner had a descriptor of the socket when the tracer started.
    pub const SNAPSHOT: u16 = 4;
}

/// Whether the socket's own SYN is part of `tcp_sock.bytes_acked`, in [`Tracked::syn`].
pub mod syn {
    /// Not known, because the socket is older than the tracer.
    pub const UNKNOWN: u8 = 0;
    /// The socket called `connect`. Its SYN counts as one byte once it is acknowledged.
    pub const COUNTED: u8 = 1;
    /// The socket came from a listener. The kernel begins to count after its SYN.
    pub const NOT_COUNTED: u8 = 2;
    /// The socket called `connect` to take over a connection (`TCP_REPAIR`). No SYN was sent.
    pub const NOT_SENT: u8 = 3;
    /// The bits of the values above.
    pub const MASK: u8 = 3;

    /// An additional bit: the socket listens, and its event is held until its port is known.
    pub const HELD: u8 = 1 << 2;
    /// An additional bit: the connection has ended, and a `connect` has not returned its errno yet.
    pub const UNRETURNED: u8 = 1 << 3;
}

/// Which listeners without a port are held before they are reported. They must be those that a
/// later hook sees.
pub mod hold {
    /// None, because there is no such hook.
    pub const NONE: u32 = 0;
    /// Those of the system call `listen`, because the hook is at its exit.
    pub const OF_SYSTEM_CALL: u32 = 1;
    /// All listeners.
    pub const ALL: u32 = 2;
}

/// Whether a socket existed before the programs were attached, in [`TcpSocket::older`] and
/// [`Udp::older`].
pub mod older {
    /// No: the programs saw its beginning.
    pub const NO: u8 = 0;
    /// Yes: the programs saw the socket first after its beginning.
    pub const YES: u8 = 1;
    /// Not known: the programs may have missed its beginning.
    pub const UNKNOWN: u8 = 2;

    /// The position of these values in [`Tracked::syn`](super::Tracked::syn) and
    /// [`UdpTracked::flows`](super::UdpTracked::flows), in bits.
    pub const SHIFT: u32 = 4;
    /// The bits below that position.
    pub const REST: u8 = (1 << SHIFT) - 1;
}

/// The reason of a retransmission, in [`Anomaly::what`].
pub mod retransmission {
    /// Not known.
    pub const UNKNOWN: u32 = 0;
    /// No acknowledgment came in time.
    pub const TIMEOUT: u32 = 1;
    /// Acknowledgments showed that the segment was lost.
    pub const FAST: u32 = 2;
    /// No SYN-ACK answered the SYN in time.
    pub const SYN: u32 = 3;
    /// No acknowledgment answered the SYN-ACK in time.
    pub const SYN_ACK: u32 = 4;
    /// The last segment was sent again to provoke an acknowledgment (tail loss probe).
    pub const PROBE: u32 = 5;
}

/// The side that started a TCP connection, in [`TcpSocket::direction`].
pub mod direction {
    /// Not known.
    pub const UNKNOWN: u8 = 0;
    /// This side, by `connect`.
    pub const OUTBOUND: u8 = 1;
    /// The peer, through a listener.
    pub const INBOUND: u8 = 2;
    /// None: the socket listens.
    pub const LISTENER: u8 = 3;
}

/// `AF_INET`.
pub const AF_INET: u16 = 2;
/// `AF_INET6`.
pub const AF_INET6: u16 = 10;

/// The head of every record.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Head {
    /// One of [`kind`].
    pub kind: u32,
    /// How many records the full buffer has refused before this record, modulo 2³².
    pub lost: u32,
    /// `CLOCK_BOOTTIME`, nanoseconds.
    pub time: u64,
}

/// The owner of a socket.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Owner {
    /// Process id (`tgid`).
    pub pid: u32,
    /// Thread id.
    pub tid: u32,
    /// User id.
    pub uid: u32,
    /// One of [`origin`].
    pub origin: u16,
    /// How many programs the process and its ancestors had executed (`self_exec_id`), modulo 2¹⁶.
    /// With the pid and the start time, it identifies the program that the process ran.
    pub exec: u16,
    /// The main thread's `comm`, as its bytes are in memory.
    pub comm: [u64; 2],
    /// The time when the process was created: `CLOCK_BOOTTIME`, nanoseconds. With the pid, it
    /// identifies the process uniquely.
    pub started: u64,
    /// Id of its cgroup (v2), 0 if it is not known.
    pub cgroup: u64,
}

/// The last process that was seen using a socket.
///
/// Programs on several CPUs may write it at the same time, and others may read it meanwhile.
/// [`check`](Self::check) proves that all fields belong to one process.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct User {
    /// Process id above thread id, in one word, which is written as a whole. 0 for none. If the
    /// process is the owner's, the other fields have no meaning.
    pub thread: u64,
    /// User id.
    pub uid: u32,
    /// The [`checksum`](Self::checksum) of the other fields.
    pub check: u32,
    /// See [`Owner::comm`].
    pub comm: [u64; 2],
    /// See [`Owner::started`].
    pub started: u64,
    /// See [`Owner::cgroup`].
    pub cgroup: u64,
}

impl User {
    /// No process.
    pub const NONE: Self = Self {
        thread: 0,
        uid: 0,
        check: 0,
        comm: [0; 2],
        started: 0,
        cgroup: 0,
    };

    /// Returns a process id and a thread id in one word.
    #[inline(always)]
    pub const fn thread(pid: u32, tid: u32) -> u64 {
        (pid as u64) << 32 | tid as u64
    }

    /// Returns the process id.
    #[inline(always)]
    pub const fn pid(&self) -> u32 {
        (self.thread >> 32) as u32
    }

    /// Returns the checksum of all fields except [`check`](Self::check).
    #[inline(always)]
    pub const fn checksum(&self) -> u32 {
        /// 2⁶⁴ divided by the golden ratio. The factor is odd, so a multiplication loses no bit of
        /// the sum.
        const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut sum = self.thread.wrapping_mul(FACTOR);
        sum = (sum ^ sum >> 32 ^ self.uid as u64).wrapping_mul(FACTOR);
        sum = (sum ^ sum >> 32 ^ self.comm[0]).wrapping_mul(FACTOR);
        sum = (sum ^ sum >> 32 ^ self.comm[1]).wrapping_mul(FACTOR);
        sum = (sum ^ sum >> 32 ^ self.started).wrapping_mul(FACTOR);
        sum = (sum ^ sum >> 32 ^ self.cgroup).wrapping_mul(FACTOR);
        (sum >> 32) as u32
    }
}

/// A TCP socket in a record.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TcpSocket {
    /// The id of this life of the socket.
    pub id: u64,
    /// The time when this life began: `CLOCK_BOOTTIME`, nanoseconds.
    pub born: u64,
    /// `SO_COOKIE`, 0 if the socket has none yet.
    pub cookie: u64,
    /// cgroup v2 id, 0 if it is not known.
    pub cgroup: u64,
    /// Cookie of the network namespace, 0 if the kernel has none.
    pub netns_cookie: u64,
    /// Payload bytes sent.
    pub tx_bytes: u64,
    /// Payload bytes received.
    pub rx_bytes: u64,
    /// Segments sent.
    pub tx_packets: u32,
    /// Segments received.
    pub rx_packets: u32,
    /// `sk_uid`.
    pub uid: u32,
    /// Inode of the network namespace.
    pub netns: u32,
    /// The owner.
    pub owner: Owner,
    /// The last process seen using the socket. For a listener, this is the last process that
    /// accepted a connection.
    pub user: User,
    /// Local address, network byte order. An IPv4 address is in the first word.
    pub local: [u32; 4],
    /// Remote address, network byte order. An IPv4 address is in the first word.
    pub remote: [u32; 4],
    /// Local port, host byte order.
    pub local_port: u16,
    /// Remote port, host byte order.
    pub remote_port: u16,
    /// [`AF_INET`] or [`AF_INET6`].
    pub family: u16,
    /// One of [`older`].
    pub older: u8,
    /// One of [`direction`].
    pub direction: u8,
    /// The interface that the socket is bound to, 0 for none.
    pub device: u32,
    /// In a [`kind::CONNECT_FAILED_TCP`], the `errno` that the call returned. In a
    /// [`kind::SAMPLE_TCP`] of a listener, `sk_drops`. Otherwise 0.
    pub error: u32,
}

/// A TCP socket changed from one state to another.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct StateChange {
    /// The head, with [`kind::STATE_CHANGE`].
    pub head: Head,
    /// The socket.
    pub socket: TcpSocket,
    /// The previous state.
    pub from: u8,
    /// The new state.
    pub to: u8,
    /// Padding.
    pub _pad: [u8; 2],
    /// The `errno` of a change to `CLOSE`, 0 if there is none: usually `sk_err`.
    pub error: u32,
}

/// A summary of a TCP connection, or of an attempt at one. All numbers are the kernel's own.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Summary {
    /// See [`Tracked::established`].
    pub established: u64,
    /// Bytes retransmitted.
    pub bytes_retrans: u64,
    /// See [`Tracked::handshake`].
    pub handshake: u32,
    /// The smoothed round-trip time in eighths of a microsecond, 0 if there is none.
    pub smoothed_rtt: u32,
    /// The mean deviation of the round-trip time in quarters of a microsecond.
    pub rtt_deviation: u32,
    /// The shortest round-trip time in microseconds, [`u32::MAX`] if there is none.
    pub min_rtt: u32,
    /// Segments retransmitted.
    pub total_retrans: u32,
    /// Segments that the kernel marked as lost.
    pub lost: u32,
    /// Segments received out of order.
    pub out_of_order: u32,
    /// The state of the `struct socket`. 0 if there is none, because no process has accepted the
    /// socket, or its last descriptor has been closed. [`Summary::MISSED`] if no program saw the
    /// change.
    pub socket_state: u32,
    /// Not 0 if not everything in the send queue was sent.
    pub unsent: u32,
    /// The lowest bits of `sk_flags`.
    pub flags: u8,
    /// Not 0 if the connection is being moved to another socket (`TCP_REPAIR`), and goes on there.
    pub repair: u8,
    /// See [`Tracked::reset_reason`].
    pub reset_reason: u16,
}

impl Summary {
    /// In [`Summary::socket_state`]: no program saw the change.
    pub const MISSED: u32 = u32::MAX;
}

/// Bits of [`Summary::flags`].
///
/// <https://github.com/torvalds/linux/blob/v6.12/include/net/sock.h>
pub mod sk_flag {
    /// `SOCK_DEAD`: the last descriptor of the socket has been closed.
    pub const CLOSED: u8 = 1 << 0;
    /// `SOCK_DONE`: the peer's FIN has arrived.
    pub const PEER_CLOSED: u8 = 1 << 1;
}

/// The end of a TCP connection, or of an attempt at one.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct End {
    /// The change to `CLOSE`.
    pub change: StateChange,
    /// The summary.
    pub summary: Summary,
}

/// A retransmission, a reset, or a connection that a listener's full queue refused.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Anomaly {
    /// The head.
    pub head: Head,
    /// The socket.
    pub socket: TcpSocket,
    /// One of [`retransmission`]. For a reset, the kernel's number of the reason plus 1, or 0.
    /// Otherwise 0.
    pub what: u32,
    /// How many segments were retransmitted.
    pub packets: u32,
    /// How many payload bytes were retransmitted.
    pub bytes: u32,
    /// Padding.
    pub _pad: u32,
}

/// Another event of a TCP socket.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Tcp {
    /// The head.
    pub head: Head,
    /// The socket. In a [`kind::ACCEPT`], its owner is already the acceptor.
    pub socket: TcpSocket,
}

/// The traffic of a socket or a flow.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Traffic {
    /// Payload bytes sent.
    pub tx_bytes: u64,
    /// Payload bytes received.
    pub rx_bytes: u64,
    /// Datagrams sent.
    pub tx_packets: u64,
    /// Datagrams received.
    pub rx_packets: u64,
}

/// The remote end of a datagram.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Peer {
    /// Its address, network byte order. An IPv4 address is in the first word.
    pub address: [u32; 4],
    /// Its port, host byte order.
    pub port: u16,
    /// [`AF_INET`] or [`AF_INET6`].
    pub family: u16,
}

/// A flow: a UDP socket, one of its local addresses, and a peer.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct FlowKey {
    /// The socket and its local port, see [`FlowKey::socket`].
    pub socket: u64,
    /// The peer.
    pub peer: Peer,
    /// The interface that link-local addresses belong to, 0 for none.
    pub scope: u32,
    /// Local address, of the peer's family. Unspecified if the socket is bound to none and the
    /// receive hook does not see it.
    pub local: [u32; 4],
}

impl FlowKey {
    /// Returns a socket and one of its local ports in one word. A socket that is disconnected may
    /// get another port.
    ///
    /// The socket is identified by its id, because its key may change once (see [`Udp::key`]). The
    /// highest 16 bits of an id are not used.
    #[inline(always)]
    pub const fn socket(id: u64, local_port: u16) -> u64 {
        id << 16 | local_port as u64
    }

    /// Returns the id of the socket.
    #[inline(always)]
    pub const fn id(&self) -> u64 {
        self.socket >> 16
    }

    /// Returns the local port of the socket.
    #[inline(always)]
    pub const fn local_port(&self) -> u16 {
        self.socket as u16
    }
}

/// The state that the programs remember of a flow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Flow {
    /// Its totals.
    pub traffic: Traffic,
    /// Whether the next datagram is reported: one of [`report`]. For a flow that did not pass the
    /// filter, the time of that check (`CLOCK_BOOTTIME`, nanoseconds).
    pub report: u64,
    /// The time when its first datagram was counted: `CLOCK_BOOTTIME`, nanoseconds.
    pub born: u64,
    /// Not 0 if one of the totals may be too small, see [`mark::APPROXIMATE`].
    pub approximate: u32,
    /// Not 0 once datagrams of several local addresses were counted. The flow then has no local
    /// address.
    pub is_mixed: u32,
    /// The local address, unspecified until it is known.
    pub local: [u32; 4],
}

/// Values of [`Flow::report`] for a flow that passed the filter.
pub mod report {
    /// The kernel reports the flow at its next datagram.
    pub const NEXT_DATAGRAM: u64 = 0;
    /// User space reads the totals by itself, one interval after the last report.
    pub const BY_USER_SPACE: u64 = u64::MAX;
    /// Added to [`BY_USER_SPACE`], results in [`NEXT_DATAGRAM`] by wrapping.
    pub const ARM: u64 = 1;
    /// Added to either value when the flow is removed, results in neither.
    pub const REMOVED: u64 = 2;
}

/// A query of a flow, in the form of a packet, because the programs that user space can run with
/// data take packets.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FlowQuery {
    /// The Ethernet header of the packet, and padding.
    pub _header: [u64; 2],
    /// The flow.
    pub key: FlowKey,
    /// The totals that user space knows. If they have not changed, the kernel reports the next
    /// datagram.
    pub known: Traffic,
    /// The result: its totals.
    pub traffic: Traffic,
    /// The result: see [`Flow::local`].
    pub local: [u32; 4],
    /// The result: see [`Flow::approximate`].
    pub approximate: u32,
    /// Padding.
    pub _pad: u32,
    /// The key of the flow's socket, see [`Udp::key`], or 0 if it is not known.
    pub socket: u64,
    /// The result: see [`UdpTracked::user`].
    pub user: User,
    /// Not 0 if the flow has ended and is to be removed.
    pub forget: u64,
}

/// Bits of [`UdpTracked::approximate`]: why the totals may be wrong.
pub mod approximate {
    /// A read may have been several datagrams.
    pub const READS: u8 = 1;
    /// The kernel dropped a datagram, and the result of its send is not known.
    pub const SENDS: u8 = 2;
}

/// Bits of [`UdpTracked::connects`].
pub mod connects {
    /// The socket was connected while it was bound to no address. From then on, it may have an
    /// address or not.
    pub const VARYING_ADDRESS: u8 = 1;
    /// A `connect` of the socket, which had no peer, has begun. Its end may not be seen.
    pub const BEGUN: u8 = 2;
    /// That `connect` has been reported before its end was seen.
    pub const REPORTED: u8 = 4;
}

/// Bits of [`UdpTracked::translated`]: what has changed the addresses of packets that the socket
/// sent.
pub mod translated {
    /// Netfilter.
    pub const BY_NETFILTER: u8 = 1;
    /// Another program at the cgroup.
    pub const BY_PROGRAM: u8 = 2;
}

/// Bits of [`Udp::marks`].
pub mod mark {
    /// [`Traffic::rx_packets`](super::Traffic::rx_packets) counts reads that may have been several
    /// datagrams each. Or datagrams of the socket were counted for no flow before this flow began.
    pub const APPROXIMATE: u8 = 1;
    /// This is the first report of a [`kind::FLOW`](super::kind::FLOW).
    pub const FIRST: u8 = 2;
    /// The key of the flow has no local address.
    pub const HIDES_LOCAL: u8 = 4;
}

/// An event of a UDP socket.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Udp {
    /// The head.
    pub head: Head,
    /// The socket's cookie. A socket that is older than the tracer may have no cookie yet. Until it
    /// gets one, its key is its address, whose highest bit is set.
    pub key: u64,
    /// The id of this socket in the tracer.
    pub id: u64,
    /// The time when the socket was first seen: `CLOCK_BOOTTIME`, nanoseconds.
    pub born: u64,
    /// cgroup v2 id, 0 if it is not known.
    pub cgroup: u64,
    /// See [`TcpSocket::netns_cookie`].
    pub netns_cookie: u64,
    /// The totals: those of the flow in a [`kind::FLOW`], otherwise those of the socket.
    pub traffic: Traffic,
    /// In a [`kind::CLOSE`], the datagrams dropped because the receive buffer was full. In a
    /// [`kind::FLOW`], [`Flow::born`]. In a [`kind::CONNECT_FAILED_UDP`], the `errno`. Otherwise,
    /// the bytes of a datagram.
    pub amount: u64,
    /// The owner.
    pub owner: Owner,
    /// See [`UdpTracked::user`].
    pub user: User,
    /// `sk_uid`.
    pub uid: u32,
    /// Inode of the network namespace.
    pub netns: u32,
    /// The peer. Its family is the socket's family in this event.
    pub peer: Peer,
    /// Local address, of the peer's family.
    pub local: [u32; 4],
    /// Local port, host byte order.
    pub local_port: u16,
    /// Bits of [`mark`].
    pub marks: u8,
    /// One of [`older`].
    pub older: u8,
    /// The interface that the socket is bound to, 0 for none.
    pub device: u32,
    /// See [`FlowKey::scope`].
    pub scope: u32,
}

/// The state that the programs remember of a UDP socket, by [`Udp::key`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct UdpTracked {
    /// The address of its `struct sock`.
    pub sk: u64,
    /// The id of this socket in the tracer.
    pub id: u64,
    /// The time when the socket was first seen: `CLOCK_BOOTTIME`, nanoseconds.
    pub born: u64,
    /// cgroup v2 id, 0 if it is not known.
    pub cgroup: u64,
    /// See [`TcpSocket::netns_cookie`].
    pub netns_cookie: u64,
    /// Inode of the network namespace.
    pub netns: u32,
    /// Bits of [`approximate`].
    pub approximate: u8,
    /// The lowest bit is 1 once a flow of the socket has been reported. The close of the socket is
    /// then reported as well, so that user space reports the flows for the last time. The bits
    /// above hold one of [`older`].
    pub flows: u8,
    /// See [`Tracked::tree_generation`].
    pub tree_generation: u16,
    /// 1 once a datagram was counted for no flow, see [`Counters::unassigned`].
    pub unassigned: u8,
    /// Bits of [`connects`].
    pub connects: u8,
    /// Bits of [`translated`].
    pub translated: u8,
    /// 1 once another program at the cgroup has refused a packet that the socket sent.
    pub is_refused: u8,
    /// How many packets were found to be refused before they were counted, and are not freed yet.
    pub unsent: u32,
    /// How many datagrams that are still to be received may have arrived before the socket was
    /// connected, and so from any peer. Read as a signed number, 0 or less means none.
    pub strangers: u32,
    /// See [`Tracked::room_uid`].
    pub room_uid: u32,
    /// The owner.
    pub owner: Owner,
    /// The last process seen connecting the socket, sending or receiving. At first, this is the
    /// owner.
    pub user: User,
    /// The tick of the kernel's clock in which the user last changed, modulo 2³².
    pub user_tick: u32,
    /// How often the user changed in that tick.
    pub user_changes: u32,
    /// The totals.
    pub traffic: Traffic,
}

/// The state that the programs remember of a TCP socket, by the address of its `struct sock`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Tracked {
    /// The id of this life of the socket.
    pub id: u64,
    /// The time when this life began: `CLOCK_BOOTTIME`, nanoseconds.
    pub born: u64,
    /// cgroup v2 id, 0 if it is not known.
    pub cgroup: u64,
    /// See [`TcpSocket::netns_cookie`].
    pub netns_cookie: u64,
    /// Inode of the network namespace.
    pub netns: u32,
    /// The TCP state that was last reported.
    pub state: u8,
    /// One of [`syn`], perhaps with [`syn::HELD`] or [`syn::UNRETURNED`]. The bits above hold one
    /// of [`older`].
    pub syn: u8,
    /// The [generation](filter::generation) of the filter in one of whose process trees the owner
    /// was found. It stays when the process has ended.
    pub tree_generation: u16,
    /// `sk_uid` when the socket was put into the map. Its room there is counted for this user.
    pub room_uid: u32,
    /// The last search that found the socket gone, 0 for none.
    pub gone_in: u32,
    /// For a child of a listener: the time from the SYN-ACK to its acknowledgment, in microseconds.
    /// 0 if it is not known.
    pub handshake: u32,
    /// The [generation](filter::generation) of the filter that lets no event of the socket pass, by
    /// properties of the socket that stay. 0 if there is none.
    pub rejected_by: u16,
    /// The kernel's number of the reason of the reset with which it is ending the connection, plus
    /// 1. 0 if the programs did not see such a reset.
    pub reset_reason: u16,
    /// The time when the handshake was over: `CLOCK_BOOTTIME`, nanoseconds. 0 if the programs did
    /// not see that.
    pub established: u64,
    /// For a child of a listener, the listener's id. For a listener, its own id. Otherwise 0.
    pub listener: u64,
    /// The process that called `connect` or `listen`, or had the socket open when the tracer
    /// started. For a listener's child, the listener's owner.
    pub creator: Owner,
    /// The process that called `accept`, which is the owner from then on. It is a separate field,
    /// because another CPU may read `creator` while this one is written. Its origin is written
    /// last, and marks it as present.
    pub acceptor: Owner,
}

impl Tracked {
    /// Returns one of [`syn`].
    #[inline(always)]
    pub const fn syn(&self) -> u8 {
        self.syn & syn::MASK
    }

    /// Replaces the one of [`syn`].
    #[inline(always)]
    pub const fn set_syn(&mut self, syn: u8) {
        self.syn = self.syn & !syn::MASK | syn;
    }

    /// Returns whether the socket listens and has not been reported, because its port was not
    /// known.
    #[inline(always)]
    pub const fn is_held(&self) -> bool {
        self.syn & syn::HELD != 0
    }

    /// Stores whether a `connect` has not returned the errno of its end yet. Returns the previous
    /// value.
    #[inline(always)]
    pub const fn set_unreturned(&mut self, unreturned: bool) -> bool {
        let before = self.syn & syn::UNRETURNED != 0;
        if unreturned {
            self.syn |= syn::UNRETURNED;
        } else {
            self.syn &= !syn::UNRETURNED;
        }
        before
    }

    /// Returns one of [`older`].
    #[inline(always)]
    pub const fn older(&self) -> u8 {
        self.syn >> older::SHIFT
    }

    /// Returns one of [`direction`].
    #[inline(always)]
    pub const fn direction(&self) -> u8 {
        // For each of `syn`, two bits.
        const OF_CONNECTIONS: u8 = direction::OUTBOUND << (2 * syn::COUNTED)
            | direction::INBOUND << (2 * syn::NOT_COUNTED);
        if self.listener != self.id {
            OF_CONNECTIONS >> (2 * self.syn()) & 3
        } else if self.id != 0 {
            direction::LISTENER
        } else {
            // A listener without an id cannot be distinguished from a connection.
            direction::UNKNOWN
        }
    }
}

impl UdpTracked {
    /// Returns whether a flow of the socket has been reported.
    #[inline(always)]
    pub const fn has_flows(&self) -> bool {
        self.flows & older::REST != 0
    }

    /// Returns one of [`older`].
    #[inline(always)]
    pub const fn older(&self) -> u8 {
        self.flows >> older::SHIFT
    }
}

/// The kinds of pieces of an [`Image`], in [`Image::part`].
pub mod part {
    /// A component of the executable's path and its NUL. It is empty for a mount point. The last
    /// component comes first.
    pub const NAME: u16 = 1;
    /// Bytes of the command line, each argument with its NUL.
    pub const ARGUMENTS: u16 = 2;
    /// The end of the image: all pieces have been written. Its bytes are an
    /// [`Identity`](super::Identity).
    pub const END: u16 = 3;
    /// The end of the path. [`Image::size`](super::Image::size) is 1 if the path is complete.
    pub const PATH_END: u16 = 4;
}

/// The maximum number of bytes that are read of a command line.
pub const MAX_ARGUMENTS: usize = 4096;

/// A piece of the program that a process ran when it became the owner of a socket.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Image {
    /// The head, of [`kind::IMAGE`].
    pub head: Head,
    /// See [`Owner::started`].
    pub started: u64,
    /// See [`Owner::pid`].
    pub pid: u32,
    /// See [`Owner::exec`].
    pub exec: u16,
    /// One of [`part`].
    pub part: u16,
    /// How many pieces of the path, or of the arguments, precede this one.
    pub index: u32,
    /// How many of `bytes` are in use.
    pub size: u32,
    /// The bytes.
    pub bytes: [u8; PIECE],
}

/// The maximum number of bytes in a piece of an [`Image`].
pub const PIECE: usize = 136;

/// The relation of a process to others when its [`Image`] was written. A number is 0 if it is not
/// known.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Identity {
    /// The name of the parent, as [`Owner::comm`].
    pub parent_comm: [u64; 2],
    /// The process id of the parent.
    pub parent: u32,
    /// The process id in the process's own pid namespace.
    pub ns_pid: u32,
}

/// Counters of anomalies in the kernel.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Counters {
    /// Records that found the buffer full.
    pub lost: u64,
    /// The same for each [`kind`].
    pub lost_of: [u64; kind::COUNT],
    /// How often a socket could not be remembered because its map was full, or had no room for its
    /// user.
    pub untracked: u64,
    /// State changes that no hook saw, noticed at the socket's next one.
    pub missed: u64,
    /// TCP sockets that are neither IPv4 nor IPv6. They are not reported.
    pub unknown_family: u64,
    /// Members of a filter's process trees that could not be remembered because their map was full.
    pub untracked_processes: u64,
    /// Pieces of [`Image`]s that found the buffer full.
    pub lost_pieces: u64,
    /// Datagrams that were counted for their socket and for no flow, because the map of flows was
    /// full, or because the first report of a flow found the buffer full.
    pub unassigned: u64,
}

// The layouts are the contract. A change here changes both sides.
const _: () = {
    assert!(size_of::<Head>() == 16);
    assert!(size_of::<Owner>() == 48);
    assert!(size_of::<User>() == 48);
    assert!(size_of::<TcpSocket>() == 216);
    assert!(size_of::<StateChange>() == 240);
    assert!(size_of::<Tcp>() == 232);
    assert!(size_of::<Summary>() == 56);
    assert!(size_of::<End>() == 296);
    assert!(size_of::<Anomaly>() == 248);
    assert!(size_of::<Tracked>() == 168);
    assert!(size_of::<Udp>() == 248);
    assert!(size_of::<Image>() == 176);
    assert!(size_of::<Identity>() == 24);
    assert!(offset_of!(Image, bytes) % align_of::<Identity>() == 0);
    assert!(size_of::<UdpTracked>() == 200);
    assert!(size_of::<FlowKey>() == 48);
    assert!(size_of::<Flow>() == 72);
    assert!(size_of::<FlowQuery>() == 216);
};
