//! Makes connections and datagrams of known sizes between two processes.

use std::net::SocketAddr;

use integration_tests::{
    actor::{Actor, Command, Endpoint, ReceiveCall, SendCall},
    netns::Netns,
    tcp_pair::loopback,
    udp_actor::UdpActor,
};

/// Returns a filter for all sockets in the network namespace of the test.
pub(crate) fn here() -> anyhow::Result<String> {
    Ok(format!("netns={}", Netns::current()?.inode()?))
}

/// A process that connects, and a process that listens.
pub(crate) struct Pair {
    pub(crate) client: Actor,
    pub(crate) server: Actor,
    pub(crate) listener: Endpoint,
}

/// The two ends of a connection.
pub(crate) struct Connection {
    pub(crate) client: Endpoint,
    pub(crate) server: Endpoint,
}

impl Pair {
    /// Starts two processes with these names. The server listens on a loopback address.
    pub(crate) fn new(client: &str, server: &str) -> anyhow::Result<Self> {
        Self::at(client, server, loopback(false))
    }

    /// Starts two processes with these names. The server listens on this address.
    pub(crate) fn at(client: &str, server: &str, address: SocketAddr) -> anyhow::Result<Self> {
        let (client, mut server) = (Actor::spawn(client)?, Actor::spawn(server)?);
        let listener = server.listen(address)?;
        Ok(Self {
            client,
            server,
            listener,
        })
    }

    /// Makes a connection.
    pub(crate) fn connect(&mut self) -> anyhow::Result<Connection> {
        let client = self.client.connect(self.listener.local)?;
        let server = self.server.accept(&self.listener)?;
        Ok(Connection { client, server })
    }

    /// Sends `up` bytes to the server, and `down` bytes to the client.
    pub(crate) fn exchange(&mut self, on: &Connection, up: u64, down: u64) -> anyhow::Result<()> {
        self.client.begin(&Command::Send(on.client.fd, up))?;
        self.server.receive(&on.server, up)?;
        self.client.finish()?;
        self.server.begin(&Command::Send(on.server.fd, down))?;
        self.client.receive(&on.client, down)?;
        self.server.finish().map(drop)
    }

    /// Closes a connection, the client first.
    pub(crate) fn close(&mut self, connection: &Connection) -> anyhow::Result<()> {
        self.client.close(&connection.client)?;
        self.server.receive_all(&connection.server)?;
        self.server.close(&connection.server)
    }

    /// Makes a connection that carries `up` bytes to the server and `down` bytes to the client, and
    /// closes it. Returns the client's address.
    pub(crate) fn connection(&mut self, up: u64, down: u64) -> anyhow::Result<SocketAddr> {
        let connection = self.connect()?;
        self.exchange(&connection, up, down)?;
        self.close(&connection)?;
        Ok(connection.client.local)
    }

    /// Tries to connect to an address without a listener.
    pub(crate) fn fail_to_connect(&mut self) -> anyhow::Result<()> {
        let nowhere = self.client.bind(loopback(false))?;
        let socket = self.client.open(nowhere.local)?;
        self.client
            .fail(Command::Connect(socket.fd, nowhere.local))?;
        self.client.close(&socket)?;
        self.client.close(&nowhere)
    }
}

/// Sends datagrams of these sizes from one process to another, and closes the sockets. Returns the
/// processes.
pub(crate) fn datagrams(from: &str, to: &str, sizes: &[usize]) -> anyhow::Result<[Actor; 2]> {
    let mut to = UdpActor::bind(to, loopback(false))?;
    let mut from = UdpActor::open(from, loopback(false))?;
    from.send(SendCall::SendTo, Some(to.local()), sizes)?;
    to.receive(ReceiveCall::RecvFrom, sizes.len())?;
    let ((_, from), (_, to)) = (from.close_socket()?, to.close_socket()?);
    Ok([from, to])
}
