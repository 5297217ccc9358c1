//! Two sockets that talk, in each of the ways in which UDP sockets can be set up.

use std::net::SocketAddr;

use anyhow::Context as _;

use crate::{
    collector::Collector, expected_udp::ExpectedUdp, netns::Netns, tcp_pair::loopback,
    udp_actor::UdpActor,
};

/// Two tracers of the same sockets: one in its default mode, one that reports each datagram as well.
#[derive(Debug)]
pub struct UdpCollectors {
    /// In default mode.
    pub flows: Collector,
    /// With each datagram.
    pub datagrams: Collector,
}

impl UdpCollectors {
    /// Starts both.
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

    /// Waits until these sockets are closed, checks them, and that there was nothing else.
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

/// The family of two sockets, and of what they send.
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
    /// All of them.
    pub const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Mapped];

    /// The loopback address, port to be chosen.
    #[must_use]
    pub fn loopback(self) -> SocketAddr {
        match self {
            Self::V4 => loopback(false),
            Self::V6 => loopback(true),
            Self::Mapped => SocketAddr::new([0, 0, 0, 0, 0, 0xffff, 0x7f00, 1].into(), 0),
        }
    }
}

/// Two processes that talk on the loopback.
#[derive(Debug)]
pub struct UdpPair {
    /// Their family.
    pub family: Family,
    /// Whether both sockets are connected to each other. Otherwise the sender has no address until it sends.
    pub connected: bool,
    /// It begins.
    pub sender: UdpActor,
    /// It is bound to the loopback address.
    pub receiver: UdpActor,
}

impl UdpPair {
    /// Sets up both ends.
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

    /// The address that the sender must give.
    #[must_use]
    pub fn to(&self) -> Option<SocketAddr> {
        (!self.connected).then_some(self.receiver.local())
    }

    /// The receiver knows without being told that the sender is the only one who sends.
    pub fn introduce(&mut self) {
        let from = SocketAddr::new(self.family.loopback().ip(), self.sender.local().port());
        self.receiver.expected.hears(from);
    }

    /// Closes both sockets: what they must have shown.
    pub fn close(mut self) -> anyhow::Result<[ExpectedUdp; 2]> {
        self.introduce();
        Ok([self.sender.close()?, self.receiver.close()?])
    }
}

/// Does something at each kind of site, under both tracers.
pub fn everywhere(act: impl Fn(&mut UdpPair) -> anyhow::Result<()>) -> anyhow::Result<()> {
    at([false, true], act)
}

/// Does something at each kind of site where the sockets are connected, under both tracers.
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
