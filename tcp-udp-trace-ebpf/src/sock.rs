//! Reading the kernel's structures.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_skc_to_tcp_sock;
use tcp_udp_trace_common::{ABSENT, AF_INET, AF_INET6, Field, Peer};

use crate::read::{Plain, current_task, has, offset, read, read_at, read_into};

const IPPROTO_TCP: u16 = 6;
pub(crate) const IPPROTO_UDP: u16 = 17;
const IPPROTO_MPTCP: u16 = 262;

/// The states of TCP, in [`Field::State`]. A UDP socket with a peer is in `ESTABLISHED`, too.
pub(crate) mod tcp_state {
    pub(crate) const ESTABLISHED: u8 = 1;
    pub(crate) const SYN_SENT: u8 = 2;
    pub(crate) const SYN_RECV: u8 = 3;
    pub(crate) const FIN_WAIT1: u8 = 4;
    pub(crate) const FIN_WAIT2: u8 = 5;
    pub(crate) const TIME_WAIT: u8 = 6;
    pub(crate) const CLOSE: u8 = 7;
    pub(crate) const LAST_ACK: u8 = 9;
    pub(crate) const LISTEN: u8 = 10;
    pub(crate) const CLOSING: u8 = 11;
    pub(crate) const NEW_SYN_RECV: u8 = 12;
}

/// A socket whose fields can be read. How, depends on what the verifier knows of the pointer.
pub(crate) trait Socket: Copy {
    /// The value of a field; 0 where the kernel lacks the field or the address is bad.
    fn get<T: Plain>(self, field: Field) -> T;

    /// Puts it where it is wanted, which saves a copy.
    fn get_into<T: Plain>(self, to: &mut T, field: Field);

    /// Whether it is a TCP socket over IPv4 or IPv6. MPTCP has a socket of its own above its TCP ones,
    /// with the same ports; it is not TCP.
    #[inline(always)]
    fn is_tcp(self) -> bool {
        self.get::<u16>(Field::Protocol) == IPPROTO_TCP
    }

    #[inline(always)]
    fn family(self) -> u16 {
        self.get(Field::Family)
    }

    /// The port it is bound to; 0 once the port has been given back.
    #[inline(always)]
    fn bound_port(self) -> u16 {
        self.get(Field::BoundPort)
    }

    /// The port of its connection: of the last one, if it has none.
    #[inline(always)]
    fn connected_port(self) -> u16 {
        u16::from_be(self.get(Field::LocalPort))
    }
}

/// The address of a `struct sock`: its fields are read by a helper.
#[derive(Clone, Copy)]
pub(crate) struct Sock(pub(crate) u64);

impl Socket for Sock {
    #[inline(always)]
    fn get<T: Plain>(self, field: Field) -> T {
        read(self.0, field)
    }

    #[inline(always)]
    fn get_into<T: Plain>(self, to: &mut T, field: Field) {
        read_into(to, self.0, field);
    }
}

/// A copy of what is read most of a socket, made at once.
pub(crate) struct SockCopy {
    sk: Sock,
    common: [u64; COMMON / 8],
}

/// How much of `struct sock` is copied: addresses, ports, state, cookie and flags, on every kernel so far.
const COMMON: usize = 104;

impl Plain for [u64; COMMON / 8] {
    const ZERO: Self = [0; COMMON / 8];
}

impl SockCopy {
    #[inline(always)]
    pub(crate) fn new(sk: Sock) -> Self {
        Self {
            sk,
            common: read_at(sk.0),
        }
    }
}

impl Socket for &SockCopy {
    #[inline(always)]
    fn get<T: Plain>(self, field: Field) -> T {
        let offset = offset(field) as usize;
        if offset > COMMON - size_of::<T>() {
            return self.sk.get(field);
        }
        // SAFETY: it is in the copy. Volatile, for the compiler not to make one load of several.
        unsafe {
            (&raw const self.common)
                .byte_add(offset)
                .cast::<T>()
                .read_volatile()
        }
    }

    #[inline(always)]
    fn get_into<T: Plain>(self, to: &mut T, field: Field) {
        *to = self.get(field);
    }
}

/// A pointer that the verifier knows to be to a `struct tcp_sock`: its fields are loaded like any other memory's, which is ten times as fast.
#[derive(Clone, Copy)]
pub(crate) struct TcpSock(*const u8);

impl TcpSock {
    /// The TCP socket that the program's first argument is, if it is one. The verifier must know that argument to be a socket.
    #[inline(always)]
    pub(crate) fn new(sk: *mut c_void) -> Option<Self> {
        // SAFETY: the helper looks whether it is one; the verifier refuses the program if `sk` is not a socket.
        let tcp = unsafe { bpf_skc_to_tcp_sock(sk) };
        (!tcp.is_null()).then_some(Self(tcp.cast_const().cast()))
    }
}

impl Socket for TcpSock {
    #[inline(always)]
    fn get<T: Plain>(self, field: Field) -> T {
        match offset(field) {
            ABSENT => T::ZERO,
            // SAFETY: the kernel has made sure that it is a TCP socket, and the verifier that the field is in it. Volatile, because the compiler
            // must not load another size than the field's.
            offset => unsafe { self.0.add(offset as usize).cast::<T>().read_volatile() },
        }
    }

    #[inline(always)]
    fn get_into<T: Plain>(self, to: &mut T, field: Field) {
        *to = self.get(field);
    }

    /// That is how it became one.
    #[inline(always)]
    fn is_tcp(self) -> bool {
        true
    }
}

/// The id of the cgroup (v2) at this address.
#[inline(always)]
pub(crate) fn cgroup_id(cgroup: u64) -> u64 {
    read(read::<u64>(cgroup, Field::CgroupNode), Field::CgroupNodeId)
}

impl Sock {
    pub(crate) const fn new(address: u64) -> Self {
        Self(address)
    }

    #[inline(always)]
    pub(crate) fn is_udp(self) -> bool {
        self.get::<u16>(Field::Protocol) == IPPROTO_UDP
    }

    /// The socket behind an open file, if it is one.
    #[inline(always)]
    pub(crate) fn of_file(file: u64) -> Option<Self> {
        let socket = read::<u64>(file, Field::FilePrivate);
        // Only a socket and its file know each other; and the file may just have been replaced.
        if file == 0 || read::<u64>(socket, Field::SocketFile) != file {
            return None;
        }
        let sk = Self::new(read(socket, Field::SocketSock));
        (sk.0 != 0 && sk.get::<u64>(Field::SkSocket) == socket).then_some(sk)
    }

    /// The socket behind a descriptor of the current process.
    #[inline(always)]
    pub(crate) fn of_descriptor(fd: i64) -> Option<Self> {
        let files = read::<u64>(current_task(), Field::Files);
        let table = read::<u64>(files, Field::FdTable);
        if fd < 0 || fd >= i64::from(read::<u32>(table, Field::FdCount)) {
            return None;
        }
        let array = read::<u64>(table, Field::FdArray);
        Self::of_file(read_at(array + (fd as u64) * 8))
    }

    /// The socket of TCP that it is; of Multipath TCP, the first subflow.
    #[inline(always)]
    pub(crate) fn of_tcp(self) -> Self {
        if self.get::<u16>(Field::Protocol) == IPPROTO_MPTCP {
            Self::new(read(self.0, Field::MptcpFirst))
        } else {
            self
        }
    }

    /// The state of the `struct socket` above it, 0 if it has none. Not to be confused with the
    /// state of TCP.
    #[inline(always)]
    pub(crate) fn socket_state(self) -> u32 {
        match self.get::<u64>(Field::SkSocket) {
            0 => 0,
            socket => read(socket, Field::SocketState),
        }
    }

    /// Whether a process has, or had, a descriptor of it: the kernel's own sockets have no file.
    #[inline(always)]
    pub(crate) fn has_file(self) -> bool {
        read::<u64>(self.get(Field::SkSocket), Field::SocketFile) != 0
    }

    /// The inode and the cookie of its network namespace.
    #[inline(always)]
    pub(crate) fn netns(self) -> (u32, u64) {
        let net = self.get::<u64>(Field::Net);
        (read(net, Field::NetInode), read(net, Field::NetCookie))
    }

    /// The id of its cgroup (v2); 0 when it has none.
    #[inline(always)]
    pub(crate) fn cgroup(self) -> u64 {
        let cgroup = self.get::<u64>(Field::Cgroup);
        // Before 5.15 an odd value is not a pointer, but a network class of cgroup v1.
        if cgroup == 0 || cgroup & 1 == 1 {
            return 0;
        }
        cgroup_id(cgroup)
    }

    /// The listener that this socket was just cloned from, if it can be told.
    ///
    /// A clone is made byte by byte, and an empty list points to itself: until the clone's own list is
    /// set up, it still points into the listener. Undocumented, so the caller checks what it finds there.
    #[inline(always)]
    pub(crate) fn listener(self) -> Option<Self> {
        if !has(Field::SentQueue) {
            return None;
        }
        let list = self.0 + u64::from(offset(Field::SentQueue));
        let listener = read_at::<u64>(list).wrapping_sub(u64::from(offset(Field::SentQueue)));
        (listener != self.0).then_some(Self(listener))
    }

    /// The two ends of a connection, or of what may become one; an IPv4-mapped address is the IPv4 address that it is.
    #[inline(always)]
    pub(crate) fn ends(self) -> (Peer, Peer) {
        // A listener, and a socket that is about to connect, has no other port than the one it is bound to.
        let bound = self.bound_port();
        let port = if bound == 0 {
            self.connected_port()
        } else {
            bound
        };
        let remote_port = u16::from_be(self.get(Field::RemotePort));
        let remote = self.end(Field::RemoteAddr4, Field::RemoteAddr6, remote_port);
        (self.local_end(port), remote)
    }

    /// This end, with a port that it has.
    #[inline(always)]
    pub(crate) fn local_end(self, port: u16) -> Peer {
        self.end(Field::LocalAddr4, Field::LocalAddr6, port)
    }

    /// The end whose address is in one of these fields, by the family of the socket.
    #[inline(always)]
    fn end(self, v4: Field, v6: Field, port: u16) -> Peer {
        if self.family() == AF_INET {
            Peer {
                address: [self.get(v4), 0, 0, 0],
                port,
                family: AF_INET,
            }
        } else {
            peer6(self.get(v6), port)
        }
    }
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
