//! Samples of live sockets: what they say, and of which sockets.

use std::{
    collections::{HashMap, HashSet},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use futures_util::StreamExt as _;
use integration_tests::{
    actor::{Actor, Command, Outcome, ReceiveCall, SendCall, SocketOption},
    netns::{Netns, ip},
    scene::{Scene, loopback},
    talker::Talker,
    tcp_info,
    trace::{SAMPLE_INTERVAL, Trace, check_conservation},
};
use libtest_mimic::Trial;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tcp_udp_trace::{
    Event, EventKind, Origin, SampleInfo,
    TcpState::{Established, FinWait1, FinWait2},
    TcpTracer, TracerHandle, Traffic, UdpInfo, UdpTracer,
};
use tokio::runtime::{Builder, Runtime};

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        Nothing: [
            tcp_sample_is_what_the_socket_itself_is_told,
            tcp_sample_is_of_the_socket_of_the_state_changes,
            listener_is_sampled_with_its_backlog,
            udp_sample_has_queues_buffers_and_drops,
            same_addresses_in_two_namespaces,
            namespace_that_is_only_mounted,
            without_the_privilege_only_its_own_namespace,
            samples_can_be_switched_off,
        ],
        Solitude: [
            namespaces_that_go_while_they_are_sampled,
            sampling_sheds_nothing,
            failing_netlink_is_counted_and_tried_again,
            many_sockets,
        ],
    ]
}

fn runtime() -> anyhow::Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}

fn is_of(event: &Event, cookie: u64) -> bool {
    event.socket.cookie == Some(cookie)
}

/// Every field of `tcp_info` is what `getsockopt` gives of the same socket. Those that time changes lie between what it gave before and
/// after.
fn tcp_sample_is_what_the_socket_itself_is_told() -> anyhow::Result<()> {
    for v6 in [false, true] {
        let mut scene = Scene::traced_by(Trace::start_sampling()?, loopback(v6))?;
        let connection = scene.connect()?;
        scene.upload(&connection, 1_000_000)?;
        scene.download(&connection, 300_000)?;
        let ends = [
            (
                scene.client.lend(&connection.client)?,
                connection.client,
                (1_000_000, 300_000),
            ),
            (
                scene.server.lend(&connection.server)?,
                connection.server,
                (300_000, 1_000_000),
            ),
        ];
        for (socket, endpoint, (sent, received)) in &ends {
            // Delayed acknowledgments, and the like: what still changes is no truth to compare with.
            let (before, sample, after) = loop {
                let before = tcp_info::of(socket)?;
                let sample = scene
                    .trace
                    .wait_for_sample("a connection", |event| is_of(event, endpoint.cookie))?;
                let after = tcp_info::of(socket)?;
                let segments = |info: &[(&str, u64)]| {
                    let is_segments = |(name, _): &&(&str, u64)| name.starts_with("segs_");
                    info.iter()
                        .filter(is_segments)
                        .copied()
                        .map(|(_, n)| n)
                        .collect::<Vec<_>>()
                };
                if segments(&before) == segments(&after) {
                    break (before, sample, after);
                }
            };
            let info = &serde_json::to_value(&sample.kind)?["info"];
            for ((name, before), (_, after)) in before.iter().zip(&after) {
                let value = info[name]
                    .as_u64()
                    .with_context(|| format!("no {name} in {info}"))?;
                let range = before.min(after)..=before.max(after);
                ensure!(
                    range.contains(&&value),
                    "{name} is {value}, not in {range:?}"
                );
            }
            let field = |name| info[name].as_u64().unwrap();
            let Traffic {
                tx_bytes,
                rx_bytes,
                tx_packets,
                rx_packets,
                ..
            } = sample.traffic;
            ensure!((tx_bytes, rx_bytes) == (*sent, *received), "{sample}");
            ensure!(
                (tx_packets, rx_packets) == (field("segs_out"), field("segs_in")),
                "{sample}"
            );
        }
        drop(ends);
        scene.close(&connection)?;
        scene.server.close(&scene.listener)?;
        scene.trace.finish_in_order(3)?;
    }
    Ok(())
}

/// Same id, owner, cookie and birth. (`Trace` compares each sample with the events before and after it; here, that there are such.)
fn tcp_sample_is_of_the_socket_of_the_state_changes() -> anyhow::Result<()> {
    let mut scene = Scene::traced_by(Trace::start_sampling()?, loopback(false))?;
    let connection = scene.connect()?;
    let mut samples = Vec::new();
    for cookie in [
        scene.listener.cookie,
        connection.client.cookie,
        connection.server.cookie,
    ] {
        samples.push(
            scene
                .trace
                .wait_for_sample("a socket", |event| is_of(event, cookie))?,
        );
    }
    scene.close(&connection)?;
    scene.server.close(&scene.listener)?;
    let (server, client) = (scene.server.pid(), scene.client.pid());
    let events = scene.trace.finish_in_order(3)?;
    let owners = [
        (server, Origin::Creator),
        (client, Origin::Creator),
        (server, Origin::Acceptor),
    ];
    for (sample, owner) in samples.iter().zip(owners) {
        let process = sample.process.as_ref().context("no owner")?;
        ensure!((process.pid, process.origin) == owner, "{sample}");
        let of_socket = |event: &&Event| event.socket.id == sample.socket.id;
        let (first, last) = (
            events.iter().find(of_socket),
            events.iter().rfind(of_socket),
        );
        let (Some(first), Some(last)) = (first, last) else {
            bail!("no events of {sample}")
        };
        ensure!(
            last.is_close() && last.socket.cookie == sample.socket.cookie,
            "{last}"
        );
        ensure!(last.process == sample.process, "{last}");
        let birth = |event: &Event| event.uptime - event.socket.age;
        ensure!(
            birth(first) == birth(sample) && birth(last) == birth(sample),
            "{first}\n{sample}"
        );
    }
    Ok(())
}

/// A listener has no traffic, and says how many wait for it.
fn listener_is_sampled_with_its_backlog() -> anyhow::Result<()> {
    let mut scene = Scene::traced_by(Trace::start_sampling()?, loopback(false))?;
    let waiting: Vec<_> = (0..3)
        .map(|_| scene.client.connect(scene.listener.local))
        .collect::<anyhow::Result<_>>()?;
    let listener = scene.listener.cookie;
    let sample = scene
        .trace
        .wait_for_sample("the listener", |event| is_of(event, listener))?;
    let EventKind::Sample {
        info: SampleInfo::Tcp(info),
    } = &sample.kind
    else {
        bail!("{sample:?}")
    };
    ensure!(
        (info.state, info.unacked, info.sacked) == (10, 3, 1024),
        "{info:?}"
    );
    ensure!(sample.traffic == Traffic::default(), "{sample}");
    ensure!(
        sample.socket.remote.port() == 0 && sample.to_string().contains("LISTEN"),
        "{sample}"
    );
    // Nobody has accepted them, so they are the listener's.
    for client in &waiting {
        let is_it = |event: &Event| event.socket.remote == client.local;
        let sample = scene
            .trace
            .wait_for_sample("a connection that waits", is_it)?;
        let process = sample.process.as_ref().context("no owner")?;
        ensure!(
            process.pid == scene.server.pid() && process.origin == Origin::Creator,
            "{sample}"
        );
    }
    Ok(())
}

fn udp_sample_has_queues_buffers_and_drops() -> anyhow::Result<()> {
    const SENT: usize = 100;
    let trace = Trace::start_udp_with(|builder| builder.sample_interval(SAMPLE_INTERVAL))?;
    for v6 in [false, true] {
        let mut receiver = Talker::bind("receiver", loopback(v6))?;
        let mut sender = Talker::open("sender", loopback(v6))?;
        receiver.set(SocketOption::ReceiveBuffer(4_000))?;
        sender.send(SendCall::SendTo, Some(receiver.local()), &[100; SENT])?;
        let buffer = socket2::SockRef::from(&receiver.actor.lend(&receiver.socket)?.as_fd())
            .recv_buffer_size()?;
        let sample = |trace: &Trace| {
            let sample = trace
                .wait_for_sample("the receiver", |event| is_of(event, receiver.socket.cookie))?;
            match &sample.kind {
                EventKind::Sample {
                    info: SampleInfo::Udp(info),
                } => Ok((sample.clone(), **info)),
                _ => bail!("{sample:?}"),
            }
        };
        let (full, info) = sample(&trace)?;
        let UdpInfo {
            rx_queue,
            rx_buffer,
            drops,
            ..
        } = info;
        ensure!(
            rx_buffer as usize == buffer,
            "{info:?}, but SO_RCVBUF is {buffer}"
        );
        // Each takes more memory than its payload.
        ensure!(
            rx_queue > 100 && drops > 0 && (drops as usize) < SENT,
            "{info:?}"
        );
        ensure!(
            full.traffic == Traffic::default(),
            "nothing was received yet: {full}"
        );
        let kept = SENT - drops as usize;
        receiver.receive(ReceiveCall::RecvFrom, kept)?;
        let cookie = receiver.socket.cookie;
        let empty = trace.wait_for_sample("the receiver", |event| {
            is_of(event, cookie) && event.traffic.rx_packets == kept as u64
        })?;
        let EventKind::Sample {
            info: SampleInfo::Udp(info),
        } = &empty.kind
        else {
            bail!("{empty:?}")
        };
        ensure!(info.rx_queue == 0 && info.drops == drops, "{info:?}");
        ensure!(empty.traffic.rx_bytes == 100 * kept as u64, "{empty}");
        ensure!(receiver.drops()? == u64::from(drops));
        let process = empty.process.as_ref().context("no owner")?;
        ensure!(
            process.pid == receiver.actor.pid() && process.origin == Origin::Creator,
            "{empty}"
        );
        let from = SocketAddr::new(loopback(v6).ip(), sender.local().port());
        receiver.life.hears(from);
        sender.close()?;
        receiver.close()?;
    }
    trace.finish_in_order(4).map(drop)
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

/// With `CAP_BPF` and `CAP_PERFMON` alone: its own namespace is sampled, the others are not, and `hooks` says so.
fn without_the_privilege_only_its_own_namespace() -> anyhow::Result<()> {
    let elsewhere = Netns::new()?;
    let mut stranger = elsewhere.run(|| Actor::spawn("stranger"))?;
    let far = stranger.listen(loopback(false))?;
    let mut neighbour = Actor::spawn("neighbour")?;
    let near = neighbour.listen(loopback(false))?;
    let mut tracer = Actor::spawn("tracer")?;
    let Outcome::Sampled { hook, cookies } = tracer.run(Command::SampleWithFewCapabilities)? else {
        bail!("?")
    };
    ensure!(hook.contains("CAP_SYS_ADMIN"), "{hook}");
    ensure!(
        cookies.contains(&near.cookie),
        "{cookies:?} without {near:?}"
    );
    ensure!(!cookies.contains(&far.cookie), "{cookies:?} with {far:?}");
    Ok(())
}

fn samples_can_be_switched_off() -> anyhow::Result<()> {
    let trace = Trace::start_with(|builder| builder.sample_interval(None))?;
    let hooks = trace.handle().hooks();
    ensure!(
        hooks.iter().all(|hook| hook.signal != "sample"),
        "{hooks:?}"
    );
    let mut scene = Scene::traced_by(Trace::start_sampling()?, loopback(false))?;
    let connection = scene.connect()?;
    // The other tracer has sampled it, twice.
    for _ in 0..2 {
        scene
            .trace
            .wait_for_sample("the client", |event| is_of(event, connection.client.cookie))?;
    }
    ensure!(trace.samples().is_empty() && trace.handle().stats().sample_rounds == 0);
    Ok(())
}

/// Namespaces come and go all the time, with sockets in them. None stays because of us, none is a fault, and no sample is of a socket that
/// was closed.
fn namespaces_that_go_while_they_are_sampled() -> anyhow::Result<()> {
    const TURNS: usize = 150;
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

/// However many sockets there are to be sampled, and however long nobody reads: no event is shed, and when somebody reads,
/// the samples come.
fn sampling_sheds_nothing() -> anyhow::Result<()> {
    const QUEUE: usize = 64;
    const SOCKETS: usize = 1_000;
    let netns = Netns::current()?.inode()?;
    let listeners = listen(SOCKETS)?;
    runtime()?.block_on(async {
        let builder = TcpTracer::builder().queue(QUEUE).ring_bytes(1 << 16);
        let mut tracer = builder
            .sample_interval(Duration::from_millis(100))
            .start()
            .await?;
        let handle = tracer.handle();
        let address = listeners[0].local_addr()?;
        wait_until(&handle, "room for samples is used", |handle| {
            handle.stats().emitted >= QUEUE as u64 / 4
        })
        .await?;
        // Nobody reads; there is room for these, however many samples there might be.
        let client = TcpStream::connect(address)?;
        let local = client.local_addr()?;
        drop(client);
        tokio::time::sleep(Duration::from_millis(500)).await;
        let mut sampled = HashSet::new();
        let mut states = Vec::new();
        while sampled.len() < SOCKETS || !states.contains(&FinWait2) {
            let event = tracer.next().await.context("the stream has ended")?;
            match event.kind {
                EventKind::Sample { .. } if event.socket.netns == netns => {
                    sampled.insert(event.socket.id);
                }
                EventKind::StateChange { to, .. } if event.socket.local == local => states.push(to),
                _ => {}
            }
        }
        ensure!(
            states.starts_with(&[Established, FinWait1, FinWait2]),
            "{states:?}"
        );
        let stats = tracer.close().await?;
        ensure!(stats.queue_shed == 0 && stats.ring_lost == 0, "{stats:?}");
        check_conservation(&stats)
    })
}

async fn wait_until(
    handle: &TracerHandle,
    what: &str,
    is_done: impl Fn(&TracerHandle) -> bool,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_done(handle) {
        ensure!(
            Instant::now() < deadline,
            "not {what}: {:?}",
            handle.stats()
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// So many listeners, at as many addresses as they need.
fn listen(count: usize) -> anyhow::Result<Vec<TcpListener>> {
    const PER_ADDRESS: usize = 20_000;
    (0..count)
        .map(|index| {
            let ip = [127, 0, 1, u8::try_from(index / PER_ADDRESS)?];
            let port = u16::try_from(10_000 + index % PER_ADDRESS)?;
            Ok(TcpListener::bind((std::net::Ipv4Addr::from(ip), port))?)
        })
        .collect()
}

/// No descriptor is to be had, so no netlink socket: a fault, which is counted. The events go on, and so do the samples afterwards.
fn failing_netlink_is_counted_and_tried_again() -> anyhow::Result<()> {
    let mut scene = Scene::traced_by(Trace::start_sampling()?, loopback(false))?;
    let connection = scene.connect()?;
    let client = connection.client.cookie;
    scene
        .trace
        .wait_for_sample("the client", |event| is_of(event, client))?;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let limit = FewFiles { soft, hard };
    setrlimit(Resource::RLIMIT_NOFILE, 3, hard)?;
    let handle = scene.trace.handle().clone();
    let before = handle.stats();
    let deadline = Instant::now() + Duration::from_secs(60);
    while handle.stats().sample_faults < before.sample_faults + 3 {
        ensure!(Instant::now() < deadline, "no faults: {:?}", handle.stats());
        std::thread::sleep(Duration::from_millis(10));
    }
    let second = scene.client.connect(scene.listener.local)?;
    scene
        .trace
        .wait_for("a connection while netlink fails", |event| {
            event.is_open() && event.socket.local == second.local
        })?;
    drop(limit);
    scene
        .trace
        .wait_for_sample("the client", |event| is_of(event, client))?;
    ensure!(handle.stats().sample_rounds > before.sample_rounds);
    Ok(())
}

struct FewFiles {
    soft: u64,
    hard: u64,
}

impl Drop for FewFiles {
    fn drop(&mut self) {
        setrlimit(Resource::RLIMIT_NOFILE, self.soft, self.hard).unwrap();
    }
}

/// 100,000 TCP sockets and 20,000 of UDP, of eight processes: each is sampled once in a round, with the default queue, and belongs to whom
/// it belongs; and meanwhile connections are reported as ever.
fn many_sockets() -> anyhow::Result<()> {
    const TCP: u32 = 100_000;
    const UDP: u32 = 20_000;
    const HOLDERS: u32 = 8;
    let mut holders = Vec::new();
    for index in 0..HOLDERS {
        let mut holder = Actor::spawn("holder")?;
        let address = std::net::Ipv4Addr::from([127, 0, 1, u8::try_from(index)?]);
        holder.begin(&Command::Hold {
            address: SocketAddr::new(address.into(), 10_000),
            tcp: TCP / HOLDERS,
            udp: UDP / HOLDERS,
        })?;
        holders.push(holder);
    }
    for holder in &mut holders {
        holder.finish()?;
    }
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let crowd = Crowd {
        netns: Netns::current()?.inode()?,
        pids: holders.iter().map(Actor::pid).collect(),
    };
    runtime()?.block_on(async {
        const ONCE: Duration = Duration::from_secs(3_600);
        let builder = TcpTracer::builder()
            .max_sockets(1 << 18)
            .sample_interval(ONCE);
        let mut tcp = builder.start().await?;
        crowd.is_sampled(&mut tcp, TCP, Some(&listener)).await?;
        let has_ended = |handle: &TracerHandle| handle.stats().sample_rounds > 0;
        wait_until(&tcp.handle(), "a whole round", has_ended).await?;
        let tcp = tcp.close().await?;
        let mut udp = UdpTracer::builder().sample_interval(ONCE).start().await?;
        crowd.is_sampled(&mut udp, UDP, None).await?;
        wait_until(&udp.handle(), "a whole round", has_ended).await?;
        let udp = udp.close().await?;
        for stats in [tcp, udp] {
            let lost = [
                stats.queue_shed,
                stats.ring_lost,
                stats.untracked,
                stats.sample_faults,
            ];
            ensure!(lost == [0; 4], "{stats:?}");
        }
        let (tcp, udp) = (tcp.sample_last_round, udp.sample_last_round);
        eprintln!("{TCP} TCP sockets in {tcp:?}, {UDP} UDP sockets in {udp:?}");
        Ok(())
    })
}

/// The sockets of some processes, the same number of each.
struct Crowd {
    netns: u32,
    pids: Vec<u32>,
}

impl Crowd {
    /// Reads the first round of samples: so many of this namespace, each once and with an owner. Connects once, in the middle of it.
    async fn is_sampled(
        &self,
        tracer: &mut (impl futures_util::Stream<Item = Event> + Unpin),
        count: u32,
        connect_to: Option<&TcpListener>,
    ) -> anyhow::Result<()> {
        let mut times = HashMap::<u64, u32>::new();
        let mut of_process = HashMap::<u32, u32>::new();
        let mut client = None;
        let mut is_open = connect_to.is_none();
        while times.len() < count as usize || !is_open {
            let event = tokio::time::timeout(Duration::from_secs(60), tracer.next()).await;
            let event = event
                .with_context(|| format!("{} of {count} samples, and no more", times.len()))?
                .context("the stream has ended")?;
            if event.socket.netns != self.netns {
                continue;
            }
            if let Some(client) = &client {
                let local = TcpStream::local_addr(client)?;
                is_open |= event.is_open() && event.socket.local == local;
            }
            let process = event.process.as_ref().map(|process| process.pid);
            let pid = process.filter(|pid| self.pids.contains(pid));
            if let (EventKind::Sample { .. }, Some(pid)) = (&event.kind, pid) {
                *times.entry(event.socket.id).or_default() += 1;
                *of_process.entry(pid).or_default() += 1;
                if let Some(listener) =
                    connect_to.filter(|_| client.is_none() && times.len() == count as usize / 2)
                {
                    client = Some(TcpStream::connect(listener.local_addr()?)?);
                }
            }
        }
        let twice = times.values().filter(|times| **times > 1).count();
        ensure!(twice == 0, "{twice} sockets were sampled twice");
        let share = count / self.pids.len() as u32;
        ensure!(
            of_process.values().all(|sockets| *sockets == share),
            "{of_process:?}"
        );
        Ok(())
    }
}
