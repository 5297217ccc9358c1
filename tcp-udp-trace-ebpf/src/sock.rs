//! Reads `struct sock` and the structures around it.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_skc_to_tcp_sock;
use tcp_udp_trace_common::{AF_INET, AF_INET6, Field, Peer};

use crate::read::{Plain, current_task, has, is_typed, load, offset, read, read_at, read_into};

const IPPROTO_TCP: u16 = 6;
pub(crate) const IPPROTO_UDP: u16 = 17;
const IPPROTO_MPTCP: u16 = 262;

/// The states of TCP, in [`Field::State`]. A UDP socket with a peer is also in `ESTABLISHED`.
///
/// <https://github.com/torvalds/linux/blob/v6.12/include/net/tcp_states.h>
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

    /// Returns whether the handshake of a socket in this state is over, and the connection is not.
    pub(crate) const fn is_connected(state: u8) -> bool {
        !matches!(state, CLOSE | LISTEN | SYN_SENT | SYN_RECV | NEW_SYN_RECV)
    }
}

/// A socket whose fields can be read. The implementations differ in the verifier's knowledge of the
/// pointer.
pub(crate) trait Socket: Copy {
    /// Returns the value of a field, or 0 if the kernel lacks the field or the address is bad.
    fn get<T: Plain>(self, field: Field) -> T;

    /// Reads a field into its destination, which saves a copy.
    fn get_into<T: Plain>(self, to: &mut T, field: Field);

    /// Returns whether this is a TCP socket over IPv4 or IPv6. MPTCP has a socket of its own above
    /// its TCP sockets, with the same ports. That one is not TCP.
    #[inline(always)]
    fn is_tcp(self) -> bool {
        self.get::<u16>(Field::Protocol) == IPPROTO_TCP
    }

    #[inline(always)]
    fn family(self) -> u16 {
        self.get(Field::Family)
    }

    /// Returns the port that the socket is bound to, or 0 once the socket has given it back.
    #[inline(always)]
    fn bound_port(self) -> u16 {
        self.get(Field::BoundPort)
    }

    /// Returns the local port of the connection, or of the last one.
    #[inline(always)]
    fn connected_port(self) -> u16 {
        u16::from_be(self.get(Field::LocalPort))
    }

    /// Returns the state of the `struct socket` above this socket, 0 if there is none. That is not
    /// the state of TCP.
    #[inline(always)]
    fn socket_state(self) -> u32 {
        match self.get::<u64>(Field::SkSocket) {
            0 => 0,
            socket => read(socket, Field::SocketState),
        }
    }

    /// Returns the listener that this socket was just cloned from, if the socket is a clone.
    ///
    /// The kernel clones a socket byte by byte, and an empty list points to itself. Until the
    /// kernel initializes the clone's own list, that list points into the listener. This is not
    /// documented, so the caller checks the result.
    #[inline(always)]
    fn listener(self) -> Option<Sock> {
        if !has(Field::SentQueue) {
            return None;
        }
        let list = self.get::<u64>(Field::SentQueue);
        Some(Sock(list.wrapping_sub(offset(Field::SentQueue).into())))
    }

    /// Returns the inode and the cookie of the socket's network namespace.
    #[inline(always)]
    fn netns(self) -> (u32, u64) {
        let net = self.get::<u64>(Field::Net);
        (read(net, Field::NetInode), read(net, Field::NetCookie))
    }

    /// Returns the id of the socket's cgroup (v2), or 0 if it has none.
    #[inline(always)]
    fn cgroup(self) -> u64 {
        let cgroup = self.get::<u64>(Field::Cgroup);
        // Before 5.15, an odd value is not a pointer but a network class of cgroup v1.
        if cgroup == 0 || cgroup & 1 == 1 {
            return 0;
        }
        cgroup_id(cgroup)
    }
}

/// The address of a `struct sock`. A helper reads its fields.
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

/// A copy of the most used fields of a socket, read in one call.
pub(crate) struct SockCopy {
    sk: Sock,
    common: [u64; COMMON / 8],
}

/// How many bytes of `struct sock` are copied. On every supported kernel, they hold the addresses,
/// ports, state, cookie and flags.
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
        // SAFETY: the field is in the copy. Volatile, so that the compiler does not merge several
        // loads.
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

/// A pointer that the verifier knows to be to a `struct tcp_sock`. Its fields are loaded like any
/// other memory, which is ten times as fast as the helper.
#[derive(Clone, Copy)]
pub(crate) struct TcpSock {
    /// The argument of the program. Since Linux 6.2, the verifier knows that this pointer is valid,
    /// so a load needs no check of the address.
    sk: *const u8,
    tcp: *const u8,
}

impl TcpSock {
    /// Returns the TCP socket at `sk`, or `None` if it is not a TCP socket. The verifier must know
    /// that `sk`, an argument of the program, is a socket.
    #[inline(always)]
    pub(crate) fn new(sk: *mut c_void) -> Option<Self> {
        // SAFETY: the helper checks the type. The verifier refuses the program if `sk` is not a
        // socket.
        let tcp = unsafe { bpf_skc_to_tcp_sock(sk) };
        (!tcp.is_null()).then_some(Self {
            sk: sk.cast_const().cast(),
            tcp: tcp.cast_const().cast(),
        })
    }
}

impl Socket for TcpSock {
    #[inline(always)]
    fn get<T: Plain>(self, field: Field) -> T {
        let base = if field.is_of_sock() {
            self.sk
        } else {
            self.tcp
        };
        load(base, field)
    }

    #[inline(always)]
    fn get_into<T: Plain>(self, to: &mut T, field: Field) {
        *to = self.get(field);
    }

    /// The verifier knows the type of this pointer as well.
    #[inline(always)]
    fn socket_state(self) -> u32 {
        follow(self.get(Field::SkSocket), Field::SocketState)
    }

    #[inline(always)]
    fn netns(self) -> (u32, u64) {
        let net = self.get(Field::Net);
        (follow(net, Field::NetInode), follow(net, Field::NetCookie))
    }

    #[inline(always)]
    fn cgroup(self) -> u64 {
        if !is_typed() {
            return Sock::new(self.sk as u64).cgroup();
        }
        let node: *const u8 = follow(self.get(Field::Cgroup), Field::CgroupNode);
        follow(node, Field::CgroupNodeId)
    }

    /// [`TcpSock::new`] has checked that.
    #[inline(always)]
    fn is_tcp(self) -> bool {
        true
    }
}

/// Loads a field through a pointer that was itself loaded, or returns 0 if the pointer is null.
#[inline(always)]
fn follow<T: Plain>(pointer: *const u8, field: Field) -> T {
    if pointer.is_null() {
        T::ZERO
    } else {
        load(pointer, field)
    }
}

/// Returns the id of the cgroup (v2) at this address.
#[inline(always)]
pub(crate) fn cgroup_id(cgroup: u64) -> u64 {
    read(read::<u64>(cgroup, Field::CgroupNode), Field::CgroupNodeId)
}

/// Returns the address of the open file of a descriptor of the current process.
#[inline(always)]
pub(crate) fn file_of_descriptor(fd: i64) -> Option<u64> {
    let files = read::<u64>(current_task(), Field::Files);
    let table = read::<u64>(files, Field::FdTable);
    if fd < 0 || fd >= i64::from(read::<u32>(table, Field::FdCount)) {
        return None;
    }
    let array = read::<u64>(table, Field::FdArray);
    Some(read_at(array + (fd as u64) * 8))
}

impl Sock {
    pub(crate) const fn new(address: u64) -> Self {
        Self(address)
    }

    #[inline(always)]
    pub(crate) fn is_udp(self) -> bool {
        self.get::<u16>(Field::Protocol) == IPPROTO_UDP
    }

    /// Returns the socket of an open file, if the file is a socket.
    #[inline(always)]
    pub(crate) fn of_file(file: u64) -> Option<Self> {
        let socket = read::<u64>(file, Field::FilePrivate);
        // Only a socket and its file point to each other. The file may just have been replaced.
        if file == 0 || read::<u64>(socket, Field::SocketFile) != file {
            return None;
        }
        let sk = Self::new(read(socket, Field::SocketSock));
        (sk.0 != 0 && sk.get::<u64>(Field::SkSocket) == socket).then_some(sk)
    }

    /// Returns the socket of a descriptor of the current process.
    #[inline(always)]
    pub(crate) fn of_descriptor(fd: i64) -> Option<Self> {
        Self::of_file(file_of_descriptor(fd)?)
    }

    /// Returns the TCP socket: the first subflow if this is a socket of Multipath TCP, otherwise
    /// itself.
    #[inline(always)]
    pub(crate) fn of_tcp(self) -> Self {
        if self.get::<u16>(Field::Protocol) == IPPROTO_MPTCP {
            Self::new(read(self.0, Field::MptcpFirst))
        } else {
            self
        }
    }

    /// Returns whether the socket has a local address, by `bind` or by `connect`.
    #[inline(always)]
    pub(crate) fn has_address(self) -> bool {
        if self.family() == AF_INET {
            return self.get::<u32>(Field::LocalAddr4) != 0;
        }
        self.get::<[u32; 4]>(Field::LocalAddr6) != [0; 4]
    }

    /// Returns whether a process has, or had, a descriptor of this socket. The kernel's own sockets
    /// have no file.
    #[inline(always)]
    pub(crate) fn has_file(self) -> bool {
        read::<u64>(self.get(Field::SkSocket), Field::SocketFile) != 0
    }

    /// Returns the two ends of a connection, or of a future one. An IPv4-mapped address becomes its
    /// IPv4 address.
    #[inline(always)]
    pub(crate) fn ends(self) -> (Peer, Peer) {
        // A listener, or a socket that is about to connect, has only the port that it is bound to.
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

    /// Returns the local end with this port.
    #[inline(always)]
    pub(crate) fn local_end(self, port: u16) -> Peer {
        self.end(Field::LocalAddr4, Field::LocalAddr6, port)
    }

    /// Returns the end whose address is in one of these fields, depending on the socket's family.
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

/// Returns an IPv6 address and a port as a peer. An IPv4-mapped address becomes its IPv4 address.
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
