//! What an actor can be asked to do with a UDP socket, and how it counts.

use std::{net::SocketAddr, time::Duration};

use serde::{Deserialize, Serialize};

/// Something to do with a UDP socket. Unless something else is said, the outcome is
/// [`Outcome::Transfers`](super::Outcome::Transfers).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// Sends one datagram of each size.
    Send {
        /// The call.
        by: SendCall,
        /// Where to; `None` leaves it to the connected socket.
        to: Option<SocketAddr>,
        /// Payload bytes.
        sizes: Vec<usize>,
    },
    /// Sends one datagram by several calls.
    SendPieces {
        /// What makes the kernel wait for the next piece.
        held_by: Hold,
        /// Where to.
        to: Option<SocketAddr>,
        /// Payload bytes of each piece.
        sizes: Vec<usize>,
    },
    /// Sends the beginning of a datagram, whose end never comes: nothing is sent.
    SendUnfinished {
        /// Where to.
        to: Option<SocketAddr>,
        /// Payload bytes.
        size: usize,
    },
    /// Sends several datagrams by one call: generic segmentation offload.
    SendSegments {
        /// How the kernel is told.
        by: Segmentation,
        /// Where to.
        to: Option<SocketAddr>,
        /// Payload bytes in all.
        bytes: usize,
        /// Payload bytes of each datagram but the last.
        segment: u16,
    },
    /// Receives so many datagrams.
    Receive {
        /// The call.
        by: ReceiveCall,
        /// How many.
        count: usize,
        /// The size of the buffer.
        room: usize,
    },
    /// Looks at the next datagram and leaves it where it is.
    Peek {
        /// Whether the call tells who sent it.
        with_address: bool,
        /// The size of the buffer.
        room: usize,
    },
    /// Receives one datagram with a buffer that may be too small, and is told its true size.
    ReceiveTruncated {
        /// The size of the buffer.
        room: usize,
    },
    /// Receives datagrams that the kernel may have merged, until there were so many bytes.
    ReceiveMerged {
        /// Payload bytes.
        bytes: u64,
    },
    /// Receives what is there, and does not wait.
    Drain,
    /// Waits for an error, and takes it from the error queue; with it comes the datagram that caused it.
    TakeError,
    /// Sets an option of the socket.
    Set(SocketOption),
    /// Undoes `connect`.
    Disconnect,
    /// How many datagrams found the receive buffer full: [`Outcome::Count`](super::Outcome::Count).
    Drops,
    /// Lets a child process, which inherits the socket, send one datagram.
    SendByChild {
        /// Payload bytes.
        size: usize,
    },
    /// Sends so many datagrams at full speed to the peer, which does [`Absorb`](Self::Absorb).
    Flood {
        /// How many.
        count: u64,
        /// Payload bytes of each: more than one, which is how the end looks.
        size: usize,
    },
    /// Receives from the peer, which does [`Flood`](Self::Flood), to the end.
    Absorb,
    /// Sends one datagram from each of so many addresses of the loopback network to another one, all at this port.
    Spray {
        /// The port.
        port: u16,
        /// How many addresses; at most 65,536.
        addresses: u16,
    },
    /// Sends so many datagrams, one at a time.
    Pace {
        /// Where to.
        to: Option<SocketAddr>,
        /// How many.
        count: u32,
        /// The time from one to the next.
        every: Duration,
        /// Payload bytes of each.
        size: usize,
    },
}

/// The calls that send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SendCall {
    /// `send`; with an address, `sendto`.
    SendTo,
    /// `sendmsg`.
    SendMsg,
    /// `sendmmsg`, all by one call.
    SendMmsg,
    /// `write`.
    Write,
    /// `writev`.
    Writev,
    /// `sendmsg` by `io_uring`.
    Uring,
    /// `write` by `io_uring`.
    UringWrite,
}

/// The calls that receive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReceiveCall {
    /// `recvfrom`.
    RecvFrom,
    /// `recvmsg`.
    RecvMsg,
    /// `recvmmsg`, as many by one call as are there.
    RecvMmsg,
    /// `recv`, which does not tell who sent it.
    Recv,
    /// `read`, which does not either.
    Read,
    /// `readv`.
    Readv,
    /// `recvmsg` by `io_uring`.
    Uring,
    /// `read` by `io_uring`.
    UringRead,
}

impl ReceiveCall {
    /// Whether the application hears who sent the datagram.
    #[must_use]
    pub fn tells_the_peer(self) -> bool {
        match self {
            Self::RecvFrom | Self::RecvMsg | Self::RecvMmsg | Self::Uring => true,
            Self::Recv | Self::Read | Self::Readv | Self::UringRead => false,
        }
    }
}

/// What makes the kernel wait for the next piece of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hold {
    /// `MSG_MORE` with every piece but the last.
    More,
    /// `UDP_CORK`, and its removal after the last piece.
    Cork,
}

/// How the kernel is told the size of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Segmentation {
    /// By the socket option `UDP_SEGMENT`.
    Option,
    /// By a control message with the payload.
    ControlMessage,
}

/// Options of a UDP socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SocketOption {
    /// `SO_RCVBUF`.
    ReceiveBuffer(usize),
    /// `SO_RCVBUFFORCE`: beyond the limit of the machine.
    LargeReceiveBuffer(usize),
    /// `SO_BROADCAST`.
    Broadcast,
    /// `SO_REUSEADDR`.
    ReuseAddress,
    /// `IP_RECVERR` or `IPV6_RECVERR`.
    ErrorQueue,
    /// `UDP_GRO`.
    Merge,
    /// Receives what is sent to a group, on the interface of that index.
    Join(std::net::IpAddr, u32),
    /// The index of the interface to which multicasts of IPv6 go. (Those of IPv4 go to that of the bound address.)
    MulticastTo(u32),
    /// How far multicasts go (`IP_MULTICAST_TTL`, `IPV6_MULTICAST_HOPS`): 0 keeps them on this
    /// host.
    MulticastHops(u32),
}

/// Datagrams that a process sent or received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// Which way.
    pub direction: Direction,
    /// The other side; `None` if the process was not told.
    pub peer: Option<SocketAddr>,
    /// Payload bytes.
    pub bytes: u64,
    /// Datagrams on the wire.
    pub datagrams: u64,
    /// Messages that passed between process and kernel, of which each may stand for several datagrams.
    pub messages: u64,
}

/// Which way a datagram went, as the process sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Direction {
    /// Out.
    Sent,
    /// In.
    Received,
}

impl Transfer {
    pub(super) fn one(direction: Direction, peer: Option<SocketAddr>, bytes: usize) -> Self {
        Self {
            direction,
            peer,
            bytes: bytes as u64,
            datagrams: 1,
            messages: 1,
        }
    }

    /// The same message, cut into segments of this size.
    pub(super) fn cut(self, segment: usize) -> Self {
        let datagrams = self.bytes.div_ceil(segment as u64).max(1);
        Self { datagrams, ..self }
    }
}
