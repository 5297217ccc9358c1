//! What a test and an actor tell each other: one JSON value a line.

use std::{net::SocketAddr, os::fd::RawFd, time::SystemTime};

use serde::{Deserialize, Serialize};

use super::{
    batch::Exchange,
    datagram::{Operation, Transfer},
};

/// What an actor can be asked to do. Sockets are named by their descriptor in the actor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Makes a TCP socket: [`Outcome::Socket`].
    Open {
        /// Whether it is an IPv6 socket.
        v6: bool,
        /// Whether it speaks Multipath TCP.
        mptcp: bool,
    },
    /// Makes a UDP socket: [`Outcome::Socket`].
    OpenUdp {
        /// Whether it is an IPv6 socket.
        v6: bool,
    },
    /// Gives a socket a local address: [`Outcome::Socket`].
    Bind(RawFd, SocketAddr),
    /// Lets several sockets listen at the same address.
    ReusePort(RawFd),
    /// Lets a socket wait for connections: [`Outcome::Socket`].
    Listen(RawFd),
    /// Connects a socket: [`Outcome::Socket`].
    Connect(RawFd, SocketAddr),
    /// Lets a child process connect and end, and waits for that.
    ConnectInChild(SocketAddr),
    /// Accepts one connection: [`Outcome::Socket`].
    Accept(RawFd),
    /// Accepts the connections that wait already: [`Outcome::Sockets`].
    AcceptWaiting(RawFd),
    /// Accepts one connection by `io_uring`: [`Outcome::Socket`].
    AcceptByUring(RawFd),
    /// Accepts so many connections by `io_uring` in a certain way, and keeps them.
    AcceptInRing(RawFd, UringAccept, u32),
    /// Connects by `io_uring`, perhaps in a worker's thread: [`Outcome::Socket`].
    ConnectInRing {
        /// The socket.
        fd: RawFd,
        /// Where to.
        to: SocketAddr,
        /// Whether a worker does it.
        worker: bool,
    },
    /// Takes a socket of another process, as one that inherits it would have it: [`Outcome::Socket`].
    Take {
        /// The other process.
        pid: u32,
        /// The descriptor there.
        fd: RawFd,
    },
    /// Tells the addresses of a socket: [`Outcome::Socket`].
    Tell(RawFd),
    /// Does something with a UDP socket.
    Udp(RawFd, Operation),
    /// Sends so many bytes.
    Send(RawFd, u64),
    /// Receives exactly so many bytes.
    Receive(RawFd, u64),
    /// Receives until the peer ends: [`Outcome::Bytes`].
    ReceiveAll(RawFd),
    /// Ends the sending direction.
    Shutdown(RawFd),
    /// Resets the connection: close with a linger time of zero.
    Abort(RawFd),
    /// Closes.
    Close(RawFd),
    /// Does a command on a new thread of that name.
    OnThread(String, Box<Command>),
    /// Serves so many connections of [`Command::Churn`]: [`Outcome::Exchanges`].
    Serve(RawFd, u32),
    /// Makes so many connections and has an exchange on each: [`Outcome::Exchanges`].
    Churn {
        /// Where the server listens.
        to: SocketAddr,
        /// How many.
        connections: u32,
        /// Decides the sizes.
        seed: u64,
    },
    /// Makes so many sockets, and keeps them. The listeners are at this port and those that follow it.
    Hold {
        /// Where the first listens.
        address: SocketAddr,
        /// TCP listeners.
        tcp: u32,
        /// Bound UDP sockets.
        udp: u32,
    },
    /// Starts a tracer of each protocol, and keeps them.
    Trace,
}

/// What came of a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It was done; there is nothing to tell.
    Done,
    /// One socket.
    Socket(Endpoint),
    /// Several sockets.
    Sockets(Vec<Endpoint>),
    /// So many bytes.
    Bytes(u64),
    /// So many.
    Count(u64),
    /// What was sent and received, in this order.
    Transfers(Vec<Transfer>),
    /// One for each connection.
    Exchanges(Vec<Exchange>),
}

/// What an application can know of its socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The descriptor in the actor.
    pub fd: RawFd,
    /// `getsockname`.
    pub local: SocketAddr,
    /// `getpeername`.
    pub remote: Option<SocketAddr>,
    /// `SO_COOKIE`.
    pub cookie: u64,
}

/// The answer to a command.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Answer {
    /// When and where it was done.
    pub(super) moment: Moment,
    /// What came of it.
    pub(super) outcome: Result<Outcome, Failure>,
}

/// When and where a command was done.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Moment {
    /// The thread.
    pub tid: u32,
    /// The wall clock just before.
    pub began: SystemTime,
    /// The wall clock just after.
    pub ended: SystemTime,
}

/// Why a command failed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    /// The system call's error.
    pub errno: Option<i32>,
    /// In words.
    pub message: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self {
            errno: error.raw_os_error(),
            message: error.to_string(),
        }
    }
}

/// How `io_uring` accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum UringAccept {
    /// A request for each connection.
    Once,
    /// The same, and a thread of the kernel looks for requests (`IORING_SETUP_SQPOLL`).
    Polled,
    /// The same, on a worker thread (`IOSQE_ASYNC`).
    Worker,
    /// The same, and the process does the work when it waits (`IORING_SETUP_DEFER_TASKRUN`).
    Deferred,
    /// One request for all connections.
    Multishot,
    /// The same, and the process does the work when it waits.
    MultishotDeferred,
    /// Into a slot of the ring instead of a descriptor.
    Direct,
    /// The same, and the kernel chooses the slot.
    DirectAllocated,
    /// One request for all connections, into slots.
    MultishotDirect,
}

impl UringAccept {
    /// Whether there is no descriptor.
    #[must_use]
    pub fn is_direct(self) -> bool {
        matches!(
            self,
            Self::Direct | Self::DirectAllocated | Self::MultishotDirect
        )
    }
}
