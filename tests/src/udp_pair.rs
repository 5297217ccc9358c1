//! Two UDP sockets that exchange datagrams, in each of the possible set-ups.

use std::net::SocketAddr;

use anyhow::Context as _;

use crate::{
    actor::{ReceiveCall, SendCall},
    collector::Collector,
    expected_udp::ExpectedUdp,
    netns::Netns,
    tcp_pair::loopback,
    udp_actor::UdpActor,
};

/// Two tracers of the same sockets: one in its default mode, one that reports each datagram as
/// well.
#[derive(Debug)]
pub struct UdpCollectors {
    /// The tracer in default mode.
    pub flows: Collector,
    /// The tracer that reports each datagram.
    pub datagrams: Collector,
}

impl UdpCollectors {
    /// Starts both tracers.
    pub fn start() -> anyhow::Result<Self> {
        Ok(Self {
            flows: Collector::start_udp()?,
            datagrams: Collector::start_udp_with(|builder| builder.per_datagram(true))?,
        })
    }

    /// Collects the events of this namespace as well.
    pub fn also(&self, netns: &Netns) -> anyhow::Result<()> {
        for collector in [&self.flows, &self.datagrams] {
            collector.also(netns.inode()?);
        }
        Ok(())
    }

    /// Waits until these sockets are closed, and checks them, and that there is no other event.
    pub fn finish(self, expected: &[ExpectedUdp]) -> anyhow::Result<()> {
        let per_datagram: Vec<_> = expected.iter().map(ExpectedUdp::per_datagram).collect();
        let flows = self.flows.finish_udp(expected.len());
        let datagrams = self.datagrams.finish_udp(expected.len());
        flows?.check_all(expected).context("in default mode")?;
        datagrams?
            .check_all(&per_datagram)
            .context("with each datagram")
    }
}

/// The family of two sockets, and of their datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
    /// IPv4 through IPv6 sockets.
    Mapped,
}

impl Family {
    /// All families.
    pub const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Mapped];

    /// Returns the loopback address, with the port to be chosen.
    #[must_use]
    pub fn loopback(self) -> SocketAddr {
        match self {
            Self::V4 => loopback(false),
            Self::V6 => loopback(true),
            Self::Mapped => SocketAddr::new([0, 0, 0, 0, 0, 0xffff, 0x7f00, 1].into(), 0),
        }
    }
}

/// Two processes that exchange datagrams on the loopback.
#[derive(Debug)]
pub struct UdpPair {
    /// The family of both sockets.
    pub family: Family,
    /// Whether both sockets are connected to each other. Otherwise the sender has no address until
    /// it sends.
    pub connected: bool,
    /// The process that sends first.
    pub sender: UdpActor,
    /// The process whose socket is bound to the loopback address.
    pub receiver: UdpActor,
}

impl UdpPair {
    /// Sets up both processes.
    pub fn new(family: Family, connected: bool) -> anyhow::Result<Self> {
        let address = family.loopback();
        let mut receiver = UdpActor::bind("receiver", address)?;
        let mut sender = UdpActor::open("sender", address)?;
        if connected {
            sender.bind_to(address)?;
            sender.connect(receiver.local())?;
            receiver.connect(sender.local())?;
        }
        Ok(Self {
            family,
            connected,
            sender,
            receiver,
        })
    }

    /// Returns the address that the sender must give.
    #[must_use]
    pub fn to(&self) -> Option<SocketAddr> {
        (!self.connected).then_some(self.receiver.local())
    }

    /// Sets the sender as the only peer of the receiver, also for calls that do not return the
    /// peer.
    pub fn introduce(&mut self) {
        let from = SocketAddr::new(self.family.loopback().ip(), self.sender.local().port());
        self.receiver.expected.hears(from);
    }

    /// Closes both sockets. Returns the events that they must have produced.
    pub fn close(mut self) -> anyhow::Result<[ExpectedUdp; 2]> {
        self.introduce();
        Ok([self.sender.close()?, self.receiver.close()?])
    }
}

/// Sends three datagrams between connected sockets, and checks the contents of their events.
pub fn check_transfer(family: Family, collector: Collector) -> anyhow::Result<()> {
    let mut pair = UdpPair::new(family, true)?;
    pair.sender.send(SendCall::SendTo, None, &[10, 0, 20])?;
    pair.receiver.receive(ReceiveCall::RecvFrom, 3)?;
    let expected = pair.close()?;
    collector.finish_udp(expected.len())?.check_all(&expected)
}

/// Runs `act` with each kind of pair, under both tracers.
pub fn everywhere(act: impl Fn(&mut UdpPair) -> anyhow::Result<()>) -> anyhow::Result<()> {
    at([false, true], act)
}

/// Runs `act` with each kind of connected pair, under both tracers.
pub fn connected(act: impl Fn(&mut UdpPair) -> anyhow::Result<()>) -> anyhow::Result<()> {
    at([true], act)
}

fn at<const N: usize>(
    connected: [bool; N],
    act: impl Fn(&mut UdpPair) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let collectors = UdpCollectors::start()?;
    let mut expected = Vec::new();
    for family in Family::ALL {
        for connected in connected {
            let mut pair = UdpPair::new(family, connected)?;
            act(&mut pair).with_context(|| format!("{family:?}, connected: {connected}"))?;
            expected.extend(pair.close()?);
        }
    }
    collectors.finish(&expected)
}
