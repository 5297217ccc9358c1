//! Samples of every network namespace.

use std::{
    collections::{BTreeMap, HashSet},
    net::{Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket},
    num::NonZeroU32,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use integration_tests::{
    actor::{Actor, Command},
    collector::{Collector, show},
    flow_sums::last_reports,
    netns::{MountedNetns, Netns, ip},
    suite::{Test, skip},
    tcp_pair::loopback,
};
use nix::net::if_::if_nametoindex;
use socket2::{Domain, Socket, Type};
use tcp_udp_trace::{Event, EventKind, Origin};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            same_addresses_in_two_namespaces,
            namespace_that_is_only_mounted,
            link_local_addresses_of_two_links,
            one_socket_and_the_same_peer_over_two_links,
            device_that_a_socket_is_bound_to,
        ],
        Solitude: [
            namespaces_that_go_while_they_are_sampled,
        ],
    ]
}

/// Two namespaces, one older than the tracer and one younger, have sockets of the same addresses.
/// Each sample is of the right socket.
fn same_addresses_in_two_namespaces() -> anyhow::Result<()> {
    let address: SocketAddr = "127.0.0.1:7777".parse()?;
    let pair = |netns: &Netns| {
        netns.run(|| {
            let mut server = Actor::spawn("server")?;
            let mut client = Actor::spawn("client")?;
            let listener = server.listen(address)?;
            let fd = client.bind("127.0.0.1:6666".parse()?)?.fd;
            let connected = client.socket(Command::Connect(fd, address))?;
            let accepted = server.accept(&listener)?;
            client.begin(&Command::Send(fd, u64::from(client.pid())))?;
            server.receive(&accepted, u64::from(client.pid()))?;
            client.finish()?;
            Ok((server, client, connected))
        })
    };
    let old = Netns::new()?;
    let older = pair(&old)?;
    let collector = Collector::start_sampling()?;
    collector.also(old.inode()?);
    let new = Netns::new()?;
    collector.also(new.inode()?);
    let newer = pair(&new)?;
    let mut ids = HashSet::new();
    for (netns, (_, client, connected), origin) in [
        (&old, &older, Origin::Snapshot),
        (&new, &newer, Origin::Creator),
    ] {
        let inode = netns.inode()?;
        let sample = collector.wait_for_sample("a client", |event| {
            event.socket.netns == inode && event.socket.local == connected.local
        })?;
        let process = sample.process.as_ref().context("no owner")?;
        ensure!(
            (process.pid, process.origin) == (client.pid(), origin),
            "{sample}"
        );
        ensure!(sample.socket.cookie == Some(connected.cookie) && sample.socket.remote == address);
        ensure!(
            sample.traffic.tx_bytes == u64::from(client.pid()),
            "{sample}"
        );
        ids.insert(sample.socket.id);
    }
    ensure!(ids.len() == 2, "one id for both");
    Ok(())
}

/// A namespace as `ip netns add` makes it. No process is in it, but a process elsewhere has one of
/// its sockets.
fn namespace_that_is_only_mounted() -> anyhow::Result<()> {
    let mounted = MountedNetns::new("sampled")?;
    let netns = mounted.open()?;
    let listener = netns.run(|| {
        ip("link set lo up")?;
        Ok(TcpListener::bind("127.0.0.1:0")?)
    })?;
    let (inode, address) = (netns.inode()?, listener.local_addr()?);
    drop(netns);
    let collector = Collector::start_sampling()?;
    collector.also(inode);
    let sample =
        collector.wait_for_sample("the listener", |event| event.socket.local == address)?;
    let process = sample.process.as_ref().context("no owner")?;
    ensure!(
        process.pid == std::process::id() && sample.socket.netns == inode,
        "{sample}"
    );
    Ok(())
}

/// Namespaces with sockets come and go all the time. The tracer keeps none of them alive, none
/// counts as a fault, and no sample is of a closed socket.
fn namespaces_that_go_while_they_are_sampled() -> anyhow::Result<()> {
    const TURNS: usize = 60;
    let collector =
        Collector::start_with(|builder| builder.sample_interval(Duration::from_millis(100)))?;
    for _ in 0..TURNS {
        let netns = Netns::new()?;
        collector.also(netns.inode()?);
        netns.run(|| {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let client = TcpStream::connect(listener.local_addr()?)?;
            let accepted = listener.accept()?;
            drop((client, accepted, listener));
            Ok(())
        })?;
    }
    let rounds = collector.handle().stats().sample_rounds;
    let deadline = Instant::now() + Duration::from_secs(60);
    while collector.handle().stats().sample_rounds < rounds + 2 {
        ensure!(
            Instant::now() < deadline,
            "no rounds any more: {:?}",
            collector.handle().stats()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    let stats = collector.handle().stats();
    ensure!(
        stats.sample_faults == 0 && stats.sample_malformed == 0,
        "{stats:?}"
    );
    // Listener, client and server of each.
    collector.finish_in_order(3 * TURNS).map(drop)
}

/// A pair of devices with the same link-local addresses as every other pair.
struct Link {
    far: Netns,
    /// The numbers of the devices, at this end and at the far one.
    devices: [u32; 2],
}

/// The address at this end of a [`Link`].
const HERE: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// The address at the far end.
const THERE: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 9);

impl Link {
    fn new(name: &str) -> anyhow::Result<Self> {
        let far = Netns::new()?;
        if ip(&format!("link add {name} type veth peer name far0")).is_err() {
            return skip("no veth devices (module not loaded?) or no iproute2");
        }
        ip(&format!("link set far0 netns {}", far.path()))?;
        let set_up = |device: &str, address| {
            ip(&format!("link set {device} addrgenmode none"))?;
            ip(&format!("link set {device} up"))?;
            ip(&format!("addr add {address}/64 dev {device} nodad"))?;
            Ok(if_nametoindex(device)?)
        };
        let devices = [set_up(name, HERE)?, far.run(|| set_up("far0", THERE))?];
        Ok(Self { far, devices })
    }

    /// Returns a socket's own address at one end and its peer's, both as that end sees them.
    fn ends(&self, end: usize, ports: [u16; 2]) -> [SocketAddr; 2] {
        let device = self.devices[end];
        let at = |ip, port| SocketAddrV6::new(ip, port, 0, device).into();
        let addresses = [HERE, THERE];
        [
            at(addresses[end], ports[0]),
            at(addresses[1 - end], ports[1]),
        ]
    }
}

/// Whether an event is of a socket with these ends, bound to the device of their scope.
fn is_between(event: &Event, ends: [SocketAddr; 2]) -> bool {
    let SocketAddr::V6(local) = ends[0] else {
        return false;
    };
    [event.socket.local, event.socket.remote] == ends
        && event.socket.device == NonZeroU32::new(local.scope_id())
}

/// Two links have the same addresses and ports. Each connection and each flow shows its own link.
fn link_local_addresses_of_two_links() -> anyhow::Result<()> {
    const SERVER: u16 = 5100;
    const CLIENT: u16 = 5200;
    let links = [Link::new("near1")?, Link::new("near2")?];
    let (tcp, udp) = (Collector::start()?, Collector::start_udp()?);
    let mut open = Vec::new();
    for link in &links {
        for collector in [&tcp, &udp] {
            collector.also(link.far.inode()?);
        }
        let [server, _] = link.ends(1, [SERVER, CLIENT]);
        let [local, remote] = link.ends(0, [CLIENT, SERVER]);
        let listener = link.far.run(|| Ok(TcpListener::bind(server)?))?;
        let client = Socket::new(Domain::IPV6, Type::STREAM, None)?;
        client.bind(&local.into())?;
        client.connect(&remote.into())?;
        let (accepted, _) = listener.accept()?;
        let receiver = link.far.run(|| Ok(UdpSocket::bind(server)?))?;
        let sender = UdpSocket::bind(local)?;
        sender.send_to(b"over a link", remote)?;
        receiver.recv_from(&mut [0; 20])?;
        open.push((client, accepted, listener, sender, receiver));
    }
    drop(open);
    let tcp = tcp.finish_in_order(3 * links.len())?;
    let udp = udp.finish_in_order(2 * links.len())?;
    for link in &links {
        for ends in [
            link.ends(0, [CLIENT, SERVER]),
            link.ends(1, [SERVER, CLIENT]),
        ] {
            let closes = tcp.iter().filter(|event| event.is_close());
            let closes = closes.filter(|event| is_between(event, ends)).count();
            let is_last = |event: &&Event| matches!(event.kind, EventKind::Flow { last: true, .. });
            let flows = udp.iter().filter(is_last);
            let flows = flows.filter(|event| is_between(event, ends)).count();
            ensure!(
                (closes, flows) == (1, 1),
                "{ends:?}: {closes} connections, {flows} flows: {} {}",
                show(&tcp),
                show(&udp)
            );
        }
    }
    Ok(())
}

/// The same address over two links is two peers of one socket, which is bound to no link.
fn one_socket_and_the_same_peer_over_two_links() -> anyhow::Result<()> {
    const SERVER: u16 = 5100;
    let links = [Link::new("near1")?, Link::new("near2")?];
    let udp = Collector::start_udp()?;
    let socket = UdpSocket::bind("[::]:0")?;
    let port = socket.local_addr()?.port();
    let mut expected = BTreeMap::new();
    for (link, turns) in links.iter().zip([1, 3]) {
        udp.also(link.far.inode()?);
        let [server, client] = link.ends(1, [SERVER, port]);
        let [local, remote] = link.ends(0, [port, SERVER]);
        let router = link.far.run(|| Ok(UdpSocket::bind(server)?))?;
        for _ in 0..turns {
            socket.send_to(b"question", remote)?;
            let (_, from) = router.recv_from(&mut [0; 20])?;
            router.send_to(b"answer", from)?;
            let (_, from) = socket.recv_from(&mut [0; 20])?;
            ensure!(from == remote, "{from}");
        }
        expected.insert((local, remote), (8 * turns, 6 * turns));
        expected.insert((server, client), (6 * turns, 8 * turns));
    }
    drop(socket);
    let events = udp.finish_in_order(1 + links.len())?;
    let flows = last_reports(&events);
    ensure!(
        flows == expected,
        "{expected:?} expected: {}",
        show(&events)
    );
    Ok(())
}

/// An event shows the device also if the address needs none. It shows none if the socket is bound
/// to none.
fn device_that_a_socket_is_bound_to() -> anyhow::Result<()> {
    let (tcp, udp) = (Collector::start()?, Collector::start_udp()?);
    let device = NonZeroU32::new(if_nametoindex("lo")?);
    for (bound, expected) in [(true, device), (false, None)] {
        let socket = |kind| {
            let socket = Socket::new(Domain::IPV4, kind, None)?;
            if bound {
                socket.bind_device(Some(b"lo"))?;
            }
            socket.bind(&loopback(false).into())?;
            anyhow::Ok(socket)
        };
        let (listener, datagrams) = (socket(Type::STREAM)?, socket(Type::DGRAM)?);
        listener.listen(1)?;
        for (collector, socket) in [(&tcp, listener), (&udp, datagrams)] {
            let at = socket.local_addr()?.as_socket();
            drop(socket);
            let is_its_end = |event: &Event| event.is_end() && Some(event.socket.local) == at;
            collector.wait_for("end of a socket", is_its_end)?;
            let events = collector.events();
            let end = events.iter().find(|event| is_its_end(event));
            let shown = end.expect("an earlier wait found it").socket.device;
            ensure!(shown == expected, "{shown:?}: {}", show(&events));
        }
    }
    tcp.finish_all()?;
    udp.finish_all().map(drop)
}
