//! The usual set-up of a test: a tracer, a server that listens, a client.

use std::net::SocketAddr;

use anyhow::ensure;
use tcp_udp_trace::TcpState;

use crate::{
    actor::{Actor, Command, Endpoint},
    collector::Collector,
    expected_tcp::{ACTIVE_CLIENT, ExpectedTcp, LISTENER, PASSIVE_SERVER},
    netns::{FAR, Netns, veth},
    observed_tcp::ObservedTcp,
};

/// A server and a client in the namespace of the test, traced from before the server listens.
#[derive(Debug)]
pub struct TcpPair {
    /// The tracer.
    pub collector: Collector,
    /// The process that listens.
    pub server: Actor,
    /// The server's listener.
    pub listener: Endpoint,
    /// The process that connects.
    pub client: Actor,
}

/// The two ends of a connection.
#[derive(Debug, Clone, Copy)]
pub struct Connection {
    /// The client's end.
    pub client: Endpoint,
    /// The end of the process that accepted the connection.
    pub server: Endpoint,
}

impl TcpPair {
    /// Sets up the pair on the IPv4 loopback.
    pub fn new() -> anyhow::Result<Self> {
        Self::at(loopback(false))
    }

    /// Sets up the client in the calling thread's namespace, and the server in another, joined by a
    /// pair of devices.
    pub fn over_veth() -> anyhow::Result<(Self, Netns)> {
        let far = veth()?;
        let server = far.run(|| Actor::spawn("server"))?;
        let address = SocketAddr::new(FAR.parse()?, 0);
        Ok((
            Self::between(server, address, Actor::spawn("client")?)?,
            far,
        ))
    }

    /// Sets up the pair with a listener at `address`.
    pub fn at(address: SocketAddr) -> anyhow::Result<Self> {
        Self::between(Actor::spawn("server")?, address, Actor::spawn("client")?)
    }

    /// Sets up these two processes, the server listening at `address`.
    pub fn between(server: Actor, address: SocketAddr, client: Actor) -> anyhow::Result<Self> {
        Self::traced_between(Collector::start()?, server, address, client)
    }

    /// Sets up the pair with this tracer.
    pub fn traced_by(collector: Collector, address: SocketAddr) -> anyhow::Result<Self> {
        Self::traced_between(
            collector,
            Actor::spawn("server")?,
            address,
            Actor::spawn("client")?,
        )
    }

    /// Sets up these two processes with this tracer.
    pub fn traced_between(
        collector: Collector,
        mut server: Actor,
        address: SocketAddr,
        client: Actor,
    ) -> anyhow::Result<Self> {
        collector.also(server.netns());
        collector.also(client.netns());
        let listener = server.listen(address)?;
        Ok(Self {
            collector,
            server,
            listener,
            client,
        })
    }

    /// Lets the client connect, and the server accept.
    pub fn connect(&mut self) -> anyhow::Result<Connection> {
        self.connect_to(self.listener.local)
    }

    /// Lets the client connect to `address`, and the server accept.
    pub fn connect_to(&mut self, address: SocketAddr) -> anyhow::Result<Connection> {
        let client = self.client.connect(address)?;
        let server = self.server.accept(&self.listener)?;
        Ok(Connection { client, server })
    }

    /// Lets the client send, and the server receive.
    pub fn upload(&mut self, connection: &Connection, bytes: u64) -> anyhow::Result<()> {
        self.client
            .begin(&Command::Send(connection.client.fd, bytes))?;
        self.server.receive(&connection.server, bytes)?;
        self.client.finish().map(drop)
    }

    /// Lets the server send, and the client receive.
    pub fn download(&mut self, connection: &Connection, bytes: u64) -> anyhow::Result<()> {
        self.server
            .begin(&Command::Send(connection.server.fd, bytes))?;
        self.client.receive(&connection.client, bytes)?;
        self.server.finish().map(drop)
    }

    /// Lets the client close, then the server.
    pub fn close(&mut self, connection: &Connection) -> anyhow::Result<()> {
        self.client.close(&connection.client)?;
        self.server.receive_all(&connection.server)?;
        self.server.close(&connection.server)
    }

    /// Makes a connection that carries this many bytes each way, and finishes.
    pub fn check_transfer(mut self, up: u64, down: u64) -> anyhow::Result<()> {
        let connection = self.connect()?;
        self.upload(&connection, up)?;
        self.download(&connection, down)?;
        self.client.shutdown(&connection.client)?;
        ensure!(self.server.receive_all(&connection.server)? == 0);
        self.server.close(&connection.server)?;
        ensure!(self.client.receive_all(&connection.client)? == 0);
        self.client.close(&connection.client)?;
        let client = self.expected_client(&connection, ACTIVE_CLIENT)?;
        let server = self.expected_server(&connection, PASSIVE_SERVER)?;
        self.finish(&[client, server])
    }

    /// Returns the events that the client's end must have produced.
    pub fn expected_client(
        &self,
        connection: &Connection,
        states: &[TcpState],
    ) -> anyhow::Result<ExpectedTcp> {
        ExpectedTcp::of_actor(&self.client, &connection.client, states)
    }

    /// Returns the events that the server's end must have produced, if the server accepted it
    /// itself.
    pub fn expected_server(
        &self,
        connection: &Connection,
        states: &[TcpState],
    ) -> anyhow::Result<ExpectedTcp> {
        let server = self.server.identity()?;
        let child = ExpectedTcp::of_child(&server, &connection.client, states);
        let (sent, received) = self.server.carried(&connection.server);
        Ok(child
            .accepted(&server, &connection.server)
            .bytes(sent, received))
    }

    /// Closes the listener, waits for as many other closes, and checks these sockets, and that
    /// there is no other event.
    pub fn finish(self, sockets: &[ExpectedTcp]) -> anyhow::Result<()> {
        self.finish_with(sockets.len(), |observed| {
            sockets
                .iter()
                .try_for_each(|expected| observed.check(expected).map(drop))
        })
    }

    /// Closes the listener, and waits for this many other closes. Lets `check` remove the sockets
    /// that it expects, and checks that there is no other event.
    pub fn finish_with(
        mut self,
        closes: usize,
        check: impl FnOnce(&mut ObservedTcp) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        self.server.close(&self.listener)?;
        let listener = ExpectedTcp::of(&self.server.identity()?, &self.listener, LISTENER);
        let mut observed = self.collector.finish(closes + 1)?;
        check(&mut observed)?;
        observed.check(&listener)?;
        observed.nothing_else()
    }
}

/// Returns the loopback address, with the port to be chosen.
#[must_use]
pub fn loopback(v6: bool) -> SocketAddr {
    let ip = if v6 { "::1" } else { "127.0.0.1" };
    SocketAddr::new(ip.parse().unwrap(), 0)
}
