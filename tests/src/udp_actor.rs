//! A process with one UDP socket, which records everything that passes through the socket.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, bail};

use crate::{
    actor::{
        Actor, Command, Endpoint, Hold, Identity, Operation, Outcome, ReceiveCall, Segmentation,
        SendCall, SocketOption, Transfer,
    },
    expected_udp::ExpectedUdp,
};

/// The size of a buffer that holds every datagram of a test.
pub const ROOM: usize = 1 << 16;

/// An actor and its UDP socket.
#[derive(Debug)]
pub struct UdpActor {
    /// The process.
    pub actor: Actor,
    /// The socket, as it is now.
    pub socket: Endpoint,
    /// The events that the socket must have produced so far.
    pub expected: ExpectedUdp,
}

impl UdpActor {
    /// Starts a process with a socket of the family of `address`.
    pub fn open(name: &str, address: SocketAddr) -> anyhow::Result<Self> {
        Self::with(Actor::spawn(name)?, address)
    }

    /// Starts a process with a socket bound to `address`.
    pub fn bind(name: &str, address: SocketAddr) -> anyhow::Result<Self> {
        let mut actor = Self::open(name, address)?;
        actor.bind_to(address)?;
        Ok(actor)
    }

    /// Makes a new socket of this process, with the family of `address`.
    pub fn with(mut actor: Actor, address: SocketAddr) -> anyhow::Result<Self> {
        let v6 = address.is_ipv6();
        let socket = actor.socket(Command::OpenUdp { v6 })?;
        let expected = ExpectedUdp::of(&actor.identity()?, &socket);
        Ok(Self {
            actor,
            socket,
            expected,
        })
    }

    /// Passes the same socket to another process. It belongs to the process that made it.
    pub fn passed_to(&self, name: &str) -> anyhow::Result<Self> {
        let mut actor = Actor::spawn(name)?;
        let socket = actor.take(&self.actor, self.socket.fd)?;
        let expected = self.expected.clone();
        Ok(Self {
            actor,
            socket,
            expected,
        })
    }

    /// Returns the identity of the process.
    pub fn identity(&self) -> anyhow::Result<Identity> {
        self.actor.identity()
    }

    /// Returns the local address of the socket.
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        self.socket.local
    }

    /// Gives the socket a local address.
    pub fn bind_to(&mut self, address: SocketAddr) -> anyhow::Result<()> {
        self.socket = self.actor.socket(Command::Bind(self.socket.fd, address))?;
        self.expected.moved_to(&self.socket);
        Ok(())
    }

    /// Gives the socket a peer.
    pub fn connect(&mut self, to: SocketAddr) -> anyhow::Result<()> {
        self.socket = self.actor.socket(Command::Connect(self.socket.fd, to))?;
        self.expected.moved_to(&self.socket);
        self.expected.connected_to(to);
        Ok(())
    }

    /// Gives the socket a peer by `io_uring`.
    pub fn connect_in_ring(&mut self, to: SocketAddr, worker: bool) -> anyhow::Result<()> {
        let fd = self.socket.fd;
        self.socket = self
            .actor
            .socket(Command::ConnectInRing { fd, to, worker })?;
        self.expected.moved_to(&self.socket);
        self.expected.connected_to(to);
        Ok(())
    }

    /// Fails to give the socket a peer. Returns the `errno`.
    pub fn fail_to_connect(&mut self, to: SocketAddr) -> anyhow::Result<i32> {
        let errno = self.actor.fail(Command::Connect(self.socket.fd, to))?;
        self.update_addresses()?;
        Ok(errno)
    }

    /// Takes the peer from the socket.
    pub fn disconnect(&mut self) -> anyhow::Result<()> {
        self.run(Operation::Disconnect).map(drop)
    }

    /// Runs an operation, and records its transfers.
    pub fn run(&mut self, operation: Operation) -> anyhow::Result<Vec<Transfer>> {
        self.begin(operation)?;
        self.finish()
    }

    /// Begins an operation that [`finish`](Self::finish) waits for.
    pub fn begin(&mut self, operation: Operation) -> anyhow::Result<()> {
        self.actor.begin(&Command::Udp(self.socket.fd, operation))
    }

    /// Waits for the operation that was begun, and records its transfers.
    pub fn finish(&mut self) -> anyhow::Result<Vec<Transfer>> {
        match self.actor.finish().context("a UDP operation")? {
            Outcome::Transfers(transfers) => {
                self.expected.transferred(&transfers);
                self.update_addresses()?;
                Ok(transfers)
            }
            other => bail!("{other:?}"),
        }
    }

    /// Runs an operation that must fail. Returns the `errno`.
    pub fn fail(&mut self, operation: Operation) -> anyhow::Result<i32> {
        let errno = self.actor.fail(Command::Udp(self.socket.fd, operation))?;
        self.update_addresses()?;
        Ok(errno)
    }

    /// Updates the addresses: any call may give the socket one.
    fn update_addresses(&mut self) -> anyhow::Result<()> {
        self.socket = self.actor.socket(Command::Describe(self.socket.fd))?;
        self.expected.moved_to(&self.socket);
        Ok(())
    }

    /// Sends one datagram of each size.
    pub fn send(
        &mut self,
        by: SendCall,
        to: Option<SocketAddr>,
        sizes: &[usize],
    ) -> anyhow::Result<()> {
        let sizes = sizes.to_vec();
        self.run(Operation::Send { by, to, sizes }).map(drop)
    }

    /// Sends one datagram by several calls.
    pub fn send_pieces(
        &mut self,
        held_by: Hold,
        to: Option<SocketAddr>,
        sizes: &[usize],
    ) -> anyhow::Result<()> {
        let sizes = sizes.to_vec();
        self.run(Operation::SendPieces { held_by, to, sizes })
            .map(drop)
    }

    /// Sends several datagrams by one call.
    pub fn send_segments(
        &mut self,
        by: Segmentation,
        to: Option<SocketAddr>,
        bytes: usize,
        segment: u16,
    ) -> anyhow::Result<()> {
        self.run(Operation::SendSegments {
            by,
            to,
            bytes,
            segment,
        })
        .map(drop)
    }

    /// Sends one datagram after the other.
    pub fn pace(
        &mut self,
        to: Option<SocketAddr>,
        count: u32,
        every: Duration,
        size: usize,
    ) -> anyhow::Result<()> {
        self.run(Operation::Pace {
            to,
            count,
            every,
            size,
        })
        .map(drop)
    }

    /// Receives this many datagrams.
    pub fn receive(&mut self, by: ReceiveCall, count: usize) -> anyhow::Result<()> {
        let room = ROOM;
        self.run(Operation::Receive { by, count, room }).map(drop)
    }

    /// Sets an option.
    pub fn set(&mut self, option: SocketOption) -> anyhow::Result<()> {
        self.run(Operation::Set(option)).map(drop)
    }

    /// Returns how many datagrams found the receive buffer full, and records them.
    pub fn drops(&mut self) -> anyhow::Result<u64> {
        match self
            .actor
            .run(Command::Udp(self.socket.fd, Operation::Drops))?
        {
            Outcome::Count(drops) => {
                self.expected.dropped(drops);
                Ok(drops)
            }
            other => bail!("{other:?}"),
        }
    }

    /// Closes the socket, and ends the process. Returns the events that the socket must have
    /// produced.
    pub fn close(self) -> anyhow::Result<ExpectedUdp> {
        self.close_socket().map(|(expected, _)| expected)
    }

    /// Closes the socket. Returns the events that it must have produced, and the process.
    pub fn close_socket(mut self) -> anyhow::Result<(ExpectedUdp, Actor)> {
        self.update_addresses()?;
        self.actor.close(&self.socket)?;
        Ok((self.expected, self.actor))
    }

    /// Closes this descriptor of the socket, which other processes still have.
    pub fn leave(mut self) -> anyhow::Result<()> {
        self.actor.close(&self.socket)
    }

    /// Kills the process. Returns the events that its socket must have produced.
    pub fn kill(self) -> anyhow::Result<ExpectedUdp> {
        self.actor.kill()?;
        Ok(self.expected)
    }
}
