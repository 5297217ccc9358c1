//! Samples of every network namespace.

use std::{
    collections::HashSet,
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use integration_tests::{
    actor::{Actor, Command},
    netns::{Netns, ip},
    suite::Test,
    trace::Trace,
};
use tcp_udp_trace::Origin;

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            same_addresses_in_two_namespaces,
            namespace_that_is_only_mounted,
        ],
        Solitude: [
            namespaces_that_go_while_they_are_sampled,
        ],
    ]
}

/// Two namespaces, one older than the tracer and one younger, with sockets of the same addresses: each is sampled as what it is.
fn same_addresses_in_two_namespaces() -> anyhow::Result<()> {
    let address: SocketAddr = "127.0.0.1:7777".parse()?;
    let site = |netns: &Netns| {
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
    let older = site(&old)?;
    let trace = Trace::start_sampling()?;
    trace.also(old.inode()?);
    let new = Netns::new()?;
    trace.also(new.inode()?);
    let newer = site(&new)?;
    let mut ids = HashSet::new();
    for (netns, (_, client, connected), origin) in [
        (&old, &older, Origin::Snapshot),
        (&new, &newer, Origin::Creator),
    ] {
        let inode = netns.inode()?;
        let sample = trace.wait_for_sample("a client", |event| {
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

/// As `ip netns add` leaves it: no process is there, but a socket that a process has taken elsewhere.
fn namespace_that_is_only_mounted() -> anyhow::Result<()> {
    let name = format!("tut-{}", std::process::id());
    ip(&format!("netns add {name}"))?;
    let mounted = MountedNetns(name);
    let netns = Netns::named(&mounted.0)?;
    let listener = netns.run(|| {
        ip("link set lo up")?;
        Ok(TcpListener::bind("127.0.0.1:0")?)
    })?;
    let (inode, address) = (netns.inode()?, listener.local_addr()?);
    drop(netns);
    let trace = Trace::start_sampling()?;
    trace.also(inode);
    let sample = trace.wait_for_sample("the listener", |event| event.socket.local == address)?;
    let process = sample.process.as_ref().context("no owner")?;
    ensure!(
        process.pid == std::process::id() && sample.socket.netns == inode,
        "{sample}"
    );
    Ok(())
}

struct MountedNetns(String);

impl Drop for MountedNetns {
    fn drop(&mut self) {
        ip(&format!("netns del {}", self.0)).unwrap();
    }
}

/// Namespaces come and go all the time, with sockets in them. None stays because of us, none is a fault, and no sample is of a socket that
/// was closed.
fn namespaces_that_go_while_they_are_sampled() -> anyhow::Result<()> {
    const TURNS: usize = 60;
    let trace = Trace::start_with(|builder| builder.sample_interval(Duration::from_millis(100)))?;
    for _ in 0..TURNS {
        let netns = Netns::new()?;
        trace.also(netns.inode()?);
        netns.run(|| {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let client = TcpStream::connect(listener.local_addr()?)?;
            let accepted = listener.accept()?;
            drop((client, accepted, listener));
            Ok(())
        })?;
    }
    let rounds = trace.handle().stats().sample_rounds;
    let deadline = Instant::now() + Duration::from_secs(60);
    while trace.handle().stats().sample_rounds < rounds + 2 {
        ensure!(
            Instant::now() < deadline,
            "no rounds any more: {:?}",
            trace.handle().stats()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    let stats = trace.handle().stats();
    ensure!(
        stats.sample_faults == 0 && stats.sample_malformed == 0,
        "{stats:?}"
    );
    // Listener, client and server of each.
    trace.finish_in_order(3 * TURNS).map(drop)
}
