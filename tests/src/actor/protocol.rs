//! The messages between a test and an actor: one JSON value a line.

use std::{net::SocketAddr, os::fd::RawFd, time::SystemTime};

use serde::{Deserialize, Serialize};

use super::{
    batch::Exchange,
    datagram::{Operation, Transfer},
};

/// The commands of an actor. Sockets are named by their descriptor in the actor.
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
    /// Lets a child process connect and end, and waits for its end.
    ConnectInChild(SocketAddr),
    /// Accepts one connection: [`Outcome::Socket`].
    Accept(RawFd),
    /// Accepts the connections that wait already: [`Outcome::Sockets`].
    AcceptWaiting(RawFd),
    /// Accepts one connection by `io_uring`: [`Outcome::Socket`].
    AcceptByUring(RawFd),
    /// Accepts this many connections by `io_uring` in a certain way, and keeps them.
    AcceptInRing(RawFd, UringAccept, u32),
    /// Connects by `io_uring`, in a worker's thread if `worker`: [`Outcome::Socket`].
    ConnectInRing {
        /// The socket.
        fd: RawFd,
        /// The destination.
        to: SocketAddr,
        /// Whether a worker connects it.
        worker: bool,
    },
    /// Takes a socket of another process, as a process that inherits it would have it:
    /// [`Outcome::Socket`].
    Take {
        /// The other process.
        pid: u32,
        /// The descriptor there.
        fd: RawFd,
    },
    /// Returns the addresses of a socket: [`Outcome::Socket`].
    Describe(RawFd),
    /// Runs an operation on a UDP socket.
    Udp(RawFd, Operation),
    /// Sends this many bytes.
    Send(RawFd, u64),
    /// Receives exactly this many bytes.
    Receive(RawFd, u64),
    /// Receives until the peer ends: [`Outcome::Bytes`].
    ReceiveAll(RawFd),
    /// Ends the sending direction.
    Shutdown(RawFd),
    /// Resets the connection: close with a linger time of zero.
    Abort(RawFd),
    /// Closes the socket.
    Close(RawFd),
    /// Runs a command on a new thread of that name.
    OnThread(String, Box<Command>),
    /// Serves this many connections of [`Command::Churn`]: [`Outcome::Exchanges`].
    Serve(RawFd, u32),
    /// Makes this many connections and has an exchange on each: [`Outcome::Exchanges`].
    Churn {
        /// The address of the server.
        to: SocketAddr,
        /// The number of connections.
        connections: u32,
        /// The seed of the sizes.
        seed: u64,
    },
    /// Makes this many sockets, and keeps them. The listeners are at this port and those that
    /// follow it.
    Hold {
        /// The address of the first listener.
        address: SocketAddr,
        /// The number of TCP listeners.
        tcp: u32,
        /// The number of bound UDP sockets.
        udp: u32,
    },
    /// Starts a tracer of each protocol, and keeps them.
    Trace,
}

/// The outcome of a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The command succeeded, without a result.
    Done,
    /// One socket.
    Socket(Endpoint),
    /// Several sockets.
    Sockets(Vec<Endpoint>),
    /// A number of bytes.
    Bytes(u64),
    /// A count.
    Count(u64),
    /// The transfers, in their order.
    Transfers(Vec<Transfer>),
    /// One exchange for each connection.
    Exchanges(Vec<Exchange>),
}

/// The properties of a socket that an application can read.
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
    /// When and where the command was done.
    pub(super) moment: Moment,
    /// The outcome of the command.
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

/// The reason why a command failed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    /// The system call's error.
    pub errno: Option<i32>,
    /// The error message.
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
    /// A request for each connection. A thread of the kernel polls for requests
    /// (`IORING_SETUP_SQPOLL`).
    Polled,
    /// A request for each connection, on a worker thread (`IOSQE_ASYNC`).
    Worker,
    /// A request for each connection. The process does the work when it waits
    /// (`IORING_SETUP_DEFER_TASKRUN`).
    Deferred,
    /// One request for all connections.
    Multishot,
    /// One request for all connections. The process does the work when it waits.
    MultishotDeferred,
    /// A request for each connection, into a slot of the ring instead of a descriptor.
    Direct,
    /// A request for each connection, into a slot that the kernel chooses.
    DirectAllocated,
    /// One request for all connections, into slots.
    MultishotDirect,
}

impl UringAccept {
    /// Whether the accepted connections have no descriptor.
    #[must_use]
    pub fn is_direct(self) -> bool {
        matches!(
            self,
            Self::Direct | Self::DirectAllocated | Self::MultishotDirect
        )
    }
}
