//! The operations of an actor on a UDP socket, and the counts of each.

use std::{net::SocketAddr, time::Duration};

use serde::{Deserialize, Serialize};

/// An operation on a UDP socket. Its outcome is [`Outcome::Transfers`](super::Outcome::Transfers),
/// unless its documentation names another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// Sends one datagram of each size.
    Send {
        /// The call.
        by: SendCall,
        /// The destination; `None` leaves it to the connected socket.
        to: Option<SocketAddr>,
        /// Payload bytes.
        sizes: Vec<usize>,
    },
    /// Sends one datagram by several calls.
    SendPieces {
        /// The flag that makes the kernel wait for the next piece.
        held_by: Hold,
        /// The destination.
        to: Option<SocketAddr>,
        /// Payload bytes of each piece.
        sizes: Vec<usize>,
    },
    /// Sends the beginning of a datagram, whose end never comes. Nothing is sent.
    SendUnfinished {
        /// The destination.
        to: Option<SocketAddr>,
        /// Payload bytes.
        size: usize,
    },
    /// Sends several datagrams by one call: generic segmentation offload.
    SendSegments {
        /// How the kernel learns the size of a segment.
        by: Segmentation,
        /// The destination.
        to: Option<SocketAddr>,
        /// Payload bytes in all.
        bytes: usize,
        /// Payload bytes of each datagram but the last.
        segment: u16,
    },
    /// Receives this many datagrams.
    Receive {
        /// The call.
        by: ReceiveCall,
        /// The number of datagrams.
        count: usize,
        /// The size of the buffer.
        room: usize,
    },
    /// Reads the next datagram without removing it from the buffer.
    Peek {
        /// Whether the call returns the sender.
        with_address: bool,
        /// The size of the buffer.
        room: usize,
    },
    /// Receives one datagram with a buffer that may be too small. The call returns the datagram's
    /// true size.
    ReceiveTruncated {
        /// The size of the buffer.
        room: usize,
    },
    /// Receives datagrams that the kernel may have merged, until there were this many bytes.
    ReceiveMerged {
        /// Payload bytes.
        bytes: u64,
    },
    /// Receives the datagrams that are there, without waiting.
    Drain,
    /// Waits for an error, and takes it from the error queue, with the datagram that caused it.
    TakeError,
    /// Sets an option of the socket.
    Set(SocketOption),
    /// Undoes `connect`.
    Disconnect,
    /// Counts the datagrams that found the receive buffer full:
    /// [`Outcome::Count`](super::Outcome::Count).
    Drops,
    /// Lets a child process, which inherits the socket, send one datagram.
    SendByChild {
        /// Payload bytes.
        size: usize,
    },
    /// Sends this many datagrams at full speed to the peer, which does [`Absorb`](Self::Absorb).
    Flood {
        /// The number of datagrams.
        count: u64,
        /// Payload bytes of each: more than one, which is the size of the end mark.
        size: usize,
    },
    /// Receives from the peer, which does [`Flood`](Self::Flood), until the end mark.
    Absorb,
    /// Sends one datagram from each of this many addresses of the loopback network to another
    /// address, all at this port.
    Spray {
        /// The port.
        port: u16,
        /// The number of addresses; at most 65,536.
        addresses: u16,
    },
    /// Sends this many datagrams, one at a time.
    Pace {
        /// The destination.
        to: Option<SocketAddr>,
        /// The number of datagrams.
        count: u32,
        /// The time from one datagram to the next.
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
    /// `recvmmsg`: one call takes all datagrams that are there.
    RecvMmsg,
    /// `recv`, which does not return the sender.
    Recv,
    /// `read`, which does not return the sender.
    Read,
    /// `readv`.
    Readv,
    /// `recvmsg` by `io_uring`.
    Uring,
    /// `read` by `io_uring`.
    UringRead,
}

impl ReceiveCall {
    /// Whether the call returns the sender of the datagram.
    #[must_use]
    pub fn names_the_peer(self) -> bool {
        match self {
            Self::RecvFrom | Self::RecvMsg | Self::RecvMmsg | Self::Uring => true,
            Self::Recv | Self::Read | Self::Readv | Self::UringRead => false,
        }
    }
}

/// The flags that make the kernel wait for the next piece of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hold {
    /// `MSG_MORE` with every piece but the last.
    More,
    /// `UDP_CORK`, and its removal after the last piece.
    Cork,
}

/// How the kernel learns the size of a segment.
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
    /// `SO_RCVBUFFORCE`, which may exceed the limit of the machine.
    LargeReceiveBuffer(usize),
    /// `SO_BROADCAST`.
    Broadcast,
    /// `SO_REUSEADDR`.
    ReuseAddress,
    /// `IP_RECVERR` or `IPV6_RECVERR`.
    ErrorQueue,
    /// `UDP_GRO`.
    Merge,
    /// Joins a multicast group, on the interface of that index.
    Join(std::net::IpAddr, u32),
    /// Sets the index of the interface for IPv6 multicasts. (Those of IPv4 go to the interface of
    /// the bound address.)
    MulticastTo(u32),
    /// Sets how far multicasts go (`IP_MULTICAST_TTL`, `IPV6_MULTICAST_HOPS`): 0 keeps them on this
    /// host.
    MulticastHops(u32),
}

/// Datagrams that a process sent or received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// The direction.
    pub direction: Direction,
    /// The other side; `None` if the call did not return it.
    pub peer: Option<SocketAddr>,
    /// Payload bytes.
    pub bytes: u64,
    /// Datagrams on the wire.
    pub datagrams: u64,
    /// Messages that passed between process and kernel, of which each may stand for several
    /// datagrams.
    pub messages: u64,
}

/// The direction of a datagram, as the process sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Direction {
    /// From the process.
    Sent,
    /// To the process.
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

    /// Returns the same message, cut into segments of this size.
    pub(super) fn cut(self, segment: usize) -> Self {
        let datagrams = self.bytes.div_ceil(segment as u64).max(1);
        Self { datagrams, ..self }
    }
}
