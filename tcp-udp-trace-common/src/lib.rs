//! The contract between the eBPF programs and user space: one record per kind of event, the state that the
//! programs keep of a socket, the counters of what went wrong, and the kernel fields that the programs read.
//!
//! Everything is plain integers and bytes with explicit padding, in the byte order of the machine. Not a
//! public API: the library and its eBPF object always come from the same commit.
#![no_std]
#![forbid(unsafe_code)]

mod fields;
pub mod filter;

pub use fields::{ABSENT, FIELDS, Field, Offsets, WantedField};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The kind of a record, in [`Head::kind`].
pub mod kind {
    /// Nothing but this number: it wakes the reader of perf buffers.
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
    /// A [`Udp`](super::Udp): the socket is gone.
    pub const CLOSE: u32 = 7;
    /// A [`Tcp`](super::Tcp): the socket is alive, and this is how it is.
    pub const SAMPLE_TCP: u32 = 8;
    /// A [`Udp`](super::Udp): the same.
    pub const SAMPLE_UDP: u32 = 9;
    /// A [`Tcp`](super::Tcp): a segment was sent again.
    pub const RETRANSMIT: u32 = 10;
    /// A [`Tcp`](super::Tcp): a reset was sent.
    pub const RESET_SENT: u32 = 11;
    /// A [`Tcp`](super::Tcp): a reset was received.
    pub const RESET_RECEIVED: u32 = 12;
    /// A [`Tcp`](super::Tcp): a `connect` failed before any change of state.
    pub const CONNECT_FAILED_TCP: u32 = 13;
    /// A [`Udp`](super::Udp): a `connect` failed.
    pub const CONNECT_FAILED_UDP: u32 = 14;
    /// One more than the last.
    pub const COUNT: usize = 15;
    /// A piece of an [`Image`](super::Image). It is no event, and is not among the counts of events.
    pub const IMAGE: u32 = 32;
}

/// How an owner is known, in [`Owner::origin`].
pub mod origin {
    /// The owner is not known.
    pub const NONE: u16 = 0;
    /// It made the socket (UDP), or called `connect` or `listen` (TCP).
    pub const CREATOR: u16 = 1;
    /// It called `accept`.
    pub const ACCEPTOR: u16 = 2;
    /// It was the first seen sending or receiving.
    pub const USER: u16 = 3;
    /// It held a descriptor of the socket when the tracer started.
    pub const SNAPSHOT: u16 = 4;
}

/// Whether the socket's own SYN is part of `tcp_sock.bytes_acked`, in [`Tracked::syn`].
pub mod syn {
    /// The socket is older than the tracer: not known.
    pub const UNKNOWN: u8 = 0;
    /// It called `connect`: its SYN counts one byte once it is acknowledged.
    pub const COUNTED: u8 = 1;
    /// It came from a listener: the kernel starts counting after its SYN.
    pub const NOT_COUNTED: u8 = 2;
    /// It called `connect` to take over a connection (`TCP_REPAIR`): no SYN was sent.
    pub const NOT_SENT: u8 = 3;
    /// The bits of these.
    pub const MASK: u8 = 3;

    /// A bit beside these: the socket listens, and the event of that waits for its port.
    pub const HELD: u8 = 1 << 2;
    /// A bit beside these: the life has ended, and a `connect` has yet to return its errno.
    pub const UNRETURNED: u8 = 1 << 3;
}

/// Which listeners without a port wait for one before they are reported: those that a later hook
/// sees.
pub mod hold {
    /// None of them: there is no such hook.
    pub const NONE: u32 = 0;
    /// Those of the system call `listen`: the hook is at its exit.
    pub const OF_SYSTEM_CALL: u32 = 1;
    /// All of them.
    pub const ALL: u32 = 2;
}

/// Whether a socket existed before the programs were attached, in [`TcpSocket::older`] and
/// [`Udp::older`].
pub mod older {
    /// No: the programs saw its beginning.
    pub const NO: u8 = 0;
    /// Yes: the programs saw it for the first time, and not at its beginning.
    pub const YES: u8 = 1;
    /// Not known: it may be one whose beginning the programs missed.
    pub const UNKNOWN: u8 = 2;

    /// [`Tracked::syn`](super::Tracked::syn) and [`UdpTracked::flows`](super::UdpTracked::flows)
    /// have one of these above so many bits.
    pub const SHIFT: u32 = 4;
    /// The bits below.
    pub const REST: u8 = (1 << SHIFT) - 1;
}

/// `AF_INET`.
pub const AF_INET: u16 = 2;
/// `AF_INET6`.
pub const AF_INET6: u16 = 10;

/// What every record starts with.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Head {
    /// One of [`kind`].
    pub kind: u32,
    /// How many records the full buffer has refused before this one, modulo 2³².
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
    /// How many programs the process and its ancestors had executed (`self_exec_id`), modulo 2¹⁶:
    /// with the pid and the start, it names the program that the process ran.
    pub exec: u16,
    /// The main thread's `comm`, byte by byte in memory.
    pub comm: [u64; 2],
    /// When the process was made: `CLOCK_BOOTTIME`, nanoseconds. With the pid, names it for good.
    pub started: u64,
    /// Id of its cgroup (v2), 0 when unknown.
    pub cgroup: u64,
}

/// The last process that was seen using a socket.
///
/// Programs of several CPUs may write it at the same time, and others may read it meanwhile.
/// [`check`](Self::check) proves that all of it is of one process.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct User {
    /// Process id above thread id, in one word, which is written as a whole. 0 for none. If it is the
    /// owner's process, the other fields mean nothing.
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

    /// Puts a process id and a thread id into one word.
    #[inline(always)]
    pub const fn thread(pid: u32, tid: u32) -> u64 {
        (pid as u64) << 32 | tid as u64
    }

    /// Process id.
    #[inline(always)]
    pub const fn pid(&self) -> u32 {
        (self.thread >> 32) as u32
    }

    /// The checksum of all fields but [`check`](Self::check).
    #[inline(always)]
    pub const fn checksum(&self) -> u32 {
        /// Odd, so that no bit of a sum gets lost: 2⁶⁴ divided by the golden ratio.
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

/// A TCP socket as a record shows it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TcpSocket {
    /// Names this life of the socket.
    pub id: u64,
    /// When it began: `CLOCK_BOOTTIME`, nanoseconds.
    pub born: u64,
    /// `SO_COOKIE`, 0 when none was made yet.
    pub cookie: u64,
    /// cgroup v2 id, 0 when unknown.
    pub cgroup: u64,
    /// Cookie of the network namespace, 0 where the kernel has none.
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
    /// The last process seen using it: of a listener, and of a connection that waits to be accepted,
    /// the last process that accepted a connection of the listener.
    pub user: User,
    /// Local address, network byte order; IPv4 in the first word.
    pub local: [u32; 4],
    /// Remote address, network byte order; IPv4 in the first word.
    pub remote: [u32; 4],
    /// Local port, host byte order.
    pub local_port: u16,
    /// Remote port, host byte order.
    pub remote_port: u16,
    /// [`AF_INET`] or [`AF_INET6`].
    pub family: u16,
    /// One of [`older`].
    pub older: u16,
    /// The interface that it is bound to, 0 for none.
    pub device: u32,
    /// Of a [`kind::CONNECT_FAILED_TCP`], what the call returned: an `errno`. Else 0.
    pub error: u32,
}

/// A TCP socket went from one state to another.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct StateChange {
    /// The head, of [`kind::STATE_CHANGE`].
    pub head: Head,
    /// The socket.
    pub socket: TcpSocket,
    /// The state it left.
    pub from: u8,
    /// The state it entered.
    pub to: u8,
    /// Padding.
    pub _pad: [u8; 2],
    /// `sk_err`.
    pub error: u32,
}

/// Something about a TCP socket that its state and traffic tell.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Tcp {
    /// The head.
    pub head: Head,
    /// The socket; in a [`kind::ACCEPT`] its owner is already the acceptor.
    pub socket: TcpSocket,
}

/// What a socket or a flow has carried.
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

/// The other side of a datagram.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Peer {
    /// Its address, network byte order; IPv4 in the first word.
    pub address: [u32; 4],
    /// Its port, host byte order.
    pub port: u16,
    /// [`AF_INET`] or [`AF_INET6`].
    pub family: u16,
}

/// A flow: a UDP socket, one of its local addresses, and a peer.
///
/// The socket is named by its id and not by its key, which may change once (see [`Udp::key`]).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct FlowKey {
    /// The socket, see [`Udp::id`].
    pub socket: u64,
    /// The peer.
    pub peer: Peer,
    /// The interface that link-local addresses belong to, 0 for none.
    pub scope: u32,
    /// Local address, of the family of the peer. Unspecified if the socket is bound to none and the
    /// receive hook does not tell it.
    pub local: [u32; 4],
}

/// What the programs remember of a flow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Flow {
    /// Its totals.
    pub traffic: Traffic,
    /// Whether the next datagram shall be reported: one of [`report`]. Of a flow that nobody wants, when that was found
    /// (`CLOCK_BOOTTIME`, nanoseconds).
    pub report: u64,
    /// When its first datagram was counted: `CLOCK_BOOTTIME`, nanoseconds.
    pub born: u64,
    /// Not 0 if a number of its totals may be too small, see [`mark::APPROXIMATE`].
    pub approximate: u32,
    /// Not 0 once datagrams of several local addresses were counted: then it has none.
    pub is_mixed: u32,
    /// The local address, unspecified until it is known.
    pub local: [u32; 4],
}

/// Values of [`Flow::report`].
pub mod report {
    /// It shall.
    pub const NEXT_DATAGRAM: u64 = 0;
    /// User space will look by itself.
    pub const BY_USER_SPACE: u64 = u64::MAX;
    /// Added to [`BY_USER_SPACE`], makes it [`NEXT_DATAGRAM`].
    pub const ARM: u64 = 1;
    /// Added to either value, makes it neither: the flow is being removed.
    pub const REMOVED: u64 = 2;
}

/// A question about a flow, in the form of a packet: the programs that can be asked take packets.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FlowQuery {
    /// Where a packet has its Ethernet header, and padding.
    pub _header: [u64; 2],
    /// The flow.
    pub key: FlowKey,
    /// The totals that are known. If there is nothing new, the next datagram shall be reported.
    pub known: Traffic,
    /// The answer: its totals.
    pub traffic: Traffic,
    /// The answer: see [`Flow::local`].
    pub local: [u32; 4],
    /// The answer: see [`Flow::approximate`].
    pub approximate: u32,
    /// Padding.
    pub _pad: u32,
    /// The key of the flow's socket, see [`Udp::key`]; 0 if it is not known.
    pub socket: u64,
    /// The answer: see [`UdpTracked::user`].
    pub user: User,
    /// Not 0 if the flow has ended and shall be forgotten.
    pub forget: u64,
}

/// Bits of [`Udp::marks`].
pub mod mark {
    /// [`Traffic::rx_packets`](super::Traffic::rx_packets) counts reads that may have been several
    /// datagrams each, or datagrams of the socket were counted for no flow before this flow began.
    pub const APPROXIMATE: u8 = 1;
    /// The first report of a [`kind::FLOW`](super::kind::FLOW).
    pub const FIRST: u8 = 2;
    /// The key of the flow has no local address.
    pub const HIDES_LOCAL: u8 = 4;
}

/// Something happened to a UDP socket.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Udp {
    /// The head.
    pub head: Head,
    /// The socket's cookie. A socket that has none (it is older than the tracer and was never asked for it) is named by its address,
    /// which has the highest bit set, until it gets one.
    pub key: u64,
    /// Names this socket in the tracer.
    pub id: u64,
    /// When it was first seen: `CLOCK_BOOTTIME`, nanoseconds.
    pub born: u64,
    /// cgroup v2 id, 0 when unknown.
    pub cgroup: u64,
    /// See [`TcpSocket::netns_cookie`].
    pub netns_cookie: u64,
    /// The totals: of the flow in a [`kind::FLOW`], else of the socket.
    pub traffic: Traffic,
    /// Bytes of a datagram; of a [`kind::CLOSE`], the datagrams dropped because the receive buffer was full; of a [`kind::FLOW`],
    /// [`Flow::born`]; of a [`kind::CONNECT_FAILED_UDP`], the `errno`.
    pub amount: u64,
    /// The owner.
    pub owner: Owner,
    /// See [`UdpTracked::user`].
    pub user: User,
    /// `sk_uid`.
    pub uid: u32,
    /// Inode of the network namespace.
    pub netns: u32,
    /// The peer; its family is the socket's on this occasion.
    pub peer: Peer,
    /// Local address, of the family of the peer.
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

/// What the programs remember of a UDP socket, keyed like [`Udp::key`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct UdpTracked {
    /// The address of its `struct sock`.
    pub sk: u64,
    /// Names this socket in the tracer.
    pub id: u64,
    /// When it was first seen: `CLOCK_BOOTTIME`, nanoseconds.
    pub born: u64,
    /// cgroup v2 id, 0 when unknown.
    pub cgroup: u64,
    /// See [`TcpSocket::netns_cookie`].
    pub netns_cookie: u64,
    /// Inode of the network namespace.
    pub netns: u32,
    /// See [`mark::APPROXIMATE`].
    pub approximate: u8,
    /// 1 once a flow of it has been reported: then its close must be, too, for user space to report its flows for the last time.
    /// And above that, one of [`older`].
    pub flows: u8,
    /// See [`Tracked::tree_generation`].
    pub tree_generation: u16,
    /// 1 once a datagram was counted for no flow, see [`Counters::unassigned`].
    pub unassigned: u16,
    /// 1 once netfilter has translated the addresses of a packet that it sent.
    pub is_translated: u8,
    /// 1 once another program at the cgroup has refused a packet that it sent.
    pub is_refused: u8,
    /// How many packets were found to be refused before they were counted, and are yet to be freed.
    pub unsent: u32,
    /// How many datagrams that have not been received yet may have come before the socket got its peer, so from anybody. At or below 0 (as a
    /// signed number): none.
    pub strangers: u32,
    /// See [`Tracked::room_uid`].
    pub room_uid: u32,
    /// The owner.
    pub owner: Owner,
    /// The last process seen connecting it, sending or receiving; the owner at first.
    pub user: User,
    /// The tick of the kernel's clock in which the user last changed, modulo 2³².
    pub user_tick: u32,
    /// How often it changed in that tick.
    pub user_changes: u32,
    /// The totals.
    pub traffic: Traffic,
}

/// What the programs remember of a TCP socket, keyed by the address of its `struct sock`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Tracked {
    /// Names this life of the socket.
    pub id: u64,
    /// When it began: `CLOCK_BOOTTIME`, nanoseconds.
    pub born: u64,
    /// cgroup v2 id, 0 when unknown.
    pub cgroup: u64,
    /// See [`TcpSocket::netns_cookie`].
    pub netns_cookie: u64,
    /// Inode of the network namespace.
    pub netns: u32,
    /// The TCP state last reported.
    pub state: u8,
    /// One of [`syn`], perhaps with [`syn::HELD`] or [`syn::UNRETURNED`], and above that one of
    /// [`older`].
    pub syn: u8,
    /// The [generation](filter::generation) of the filter whose process trees its owner was found to be in: it stays so when the process has ended.
    pub tree_generation: u16,
    /// `sk_uid` when it was put into the map, which its room there is counted for.
    pub room_uid: u32,
    /// Padding.
    pub _pad: u32,
    /// Of a child of a listener, the listener's id; of a listener, its own; else 0.
    pub listener: u64,
    /// Who called `connect` or `listen`, or had the socket open when the tracer started; of a listener's child, the listener's owner.
    pub creator: Owner,
    /// Who called `accept`, the owner from then on. In a place of its own, because another CPU may read the first while this is written:
    /// its origin, written last, tells whether it is there.
    pub acceptor: Owner,
}

impl Tracked {
    /// One of [`syn`].
    #[inline(always)]
    pub const fn syn(&self) -> u8 {
        self.syn & syn::MASK
    }

    /// Replaces the one of [`syn`].
    #[inline(always)]
    pub const fn set_syn(&mut self, syn: u8) {
        self.syn = self.syn & !syn::MASK | syn;
    }

    /// Whether the socket listens and has not been reported, because its port was not known.
    #[inline(always)]
    pub const fn is_held(&self) -> bool {
        self.syn & syn::HELD != 0
    }

    /// Takes note of whether a `connect` has yet to return the errno of its end; returns whether
    /// that was so before.
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

    /// One of [`older`].
    #[inline(always)]
    pub const fn older(&self) -> u8 {
        self.syn >> older::SHIFT
    }
}

impl UdpTracked {
    /// Whether a flow of it has been reported.
    #[inline(always)]
    pub const fn has_flows(&self) -> bool {
        self.flows & older::REST != 0
    }

    /// One of [`older`].
    #[inline(always)]
    pub const fn older(&self) -> u8 {
        self.flows >> older::SHIFT
    }
}

/// What a piece of an [`Image`] is, in [`Image::part`].
pub mod part {
    /// A component of the executable's path and its NUL, empty for a mount point. The last
    /// component comes first.
    pub const NAME: u16 = 1;
    /// Bytes of the command line, each argument with its NUL.
    pub const ARGUMENTS: u16 = 2;
    /// The end: all pieces have been written.
    pub const END: u16 = 3;
    /// The end of the path. [`Image::size`](super::Image::size) is 1 if it is whole.
    pub const PATH_END: u16 = 4;
}

/// The most bytes that are read of a command line.
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
    /// How many pieces of the path, or of the arguments, came before it.
    pub index: u32,
    /// How many bytes of `bytes` count.
    pub size: u32,
    /// The bytes.
    pub bytes: [u8; PIECE],
}

/// The most bytes that a piece of an [`Image`] has.
pub const PIECE: usize = 136;

/// What went wrong in the kernel, counted there.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Counters {
    /// Records that found the buffer full.
    pub lost: u64,
    /// Of them, those of each [`kind`].
    pub lost_of: [u64; kind::COUNT],
    /// Times that a socket could not be remembered because the map of sockets was full.
    pub untracked: u64,
    /// State changes that no hook saw, noticed at the socket's next one.
    pub missed: u64,
    /// Sockets of TCP that are neither IPv4 nor IPv6, left out.
    pub unknown_family: u64,
    /// Processes of a filter's trees that could not be remembered because the map of them was full.
    pub untracked_processes: u64,
    /// Pieces of [`Image`]s that found the buffer full.
    pub lost_pieces: u64,
    /// Datagrams that were counted for their socket and for no flow: the map of flows was full, or the first report of a flow found
    /// the buffer full.
    pub unassigned: u64,
}

// The layouts are the contract: a change here is a change of both sides.
const _: () = {
    assert!(size_of::<Head>() == 16);
    assert!(size_of::<Owner>() == 48);
    assert!(size_of::<User>() == 48);
    assert!(size_of::<TcpSocket>() == 216);
    assert!(size_of::<StateChange>() == 240);
    assert!(size_of::<Tcp>() == 232);
    assert!(size_of::<Tracked>() == 152);
    assert!(size_of::<Udp>() == 248);
    assert!(size_of::<Image>() == 176);
    assert!(size_of::<UdpTracked>() == 200);
    assert!(size_of::<FlowKey>() == 48);
    assert!(size_of::<Flow>() == 72);
    assert!(size_of::<FlowQuery>() == 216);
};
