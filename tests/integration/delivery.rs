//! Every event reaches the consumer, in time and with the right time, or is counted.

use std::{
    collections::{HashMap, HashSet},
    fs,
    net::{SocketAddr, TcpListener, UdpSocket},
    thread::sleep,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::ensure;
use futures_util::StreamExt as _;
use integration_tests::{
    actor::{Actor, Command},
    kernel,
    life::{CLOCK_ERROR, LISTENER, Life},
    load::Load,
    netns::{FAR, Netns, veth},
    scene::{Scene, loopback},
    suite::{Test, skip},
    trace::{self, Trace, check_conservation, show},
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    time::{ClockId, clock_settime},
    unistd::Pid,
};
use tcp_udp_trace::{Buffer, Event, EventKind, LossStage, OverflowPolicy, TcpState, TcpTracer};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            two_tracers_at_once_give_the_same_events,
            what_moves_between_cpus_stays_in_order,
        ],
        Solitude: [
            first_event_after_a_pause_wakes_the_reader,
            churn_of_ten_thousand_connections_under_load,
            churn_across_namespaces_under_load,
            queue_overflow_sheds_the_oldest,
            queue_overflow_sheds_the_newest,
            closes_outlive_a_flood_of_datagrams,
            ring_overflow_is_counted_where_it_happened,
            closes_that_find_the_ring_full_come_late,
            clock_steps_do_no_harm,
        ],
    ]
}

/// Not one wrong owner, not one missing close, not one wrong byte, while every CPU is busy.
fn churn_of_ten_thousand_connections_under_load() -> anyhow::Result<()> {
    let here = Netns::current()?;
    churn(&here, &[loopback(false), loopback(true)], 2_500)
}

/// The same on a path where transitions run in softirqs, which interrupt whatever a CPU happens to do: the same program
/// in the middle of another transition, for one.
fn churn_across_namespaces_under_load() -> anyhow::Result<()> {
    let far = veth()?;
    churn(&far, &[SocketAddr::new(FAR.parse()?, 0)], 1_000)
}

/// At each address of a namespace, a process listens, two others accept, and two clients make so many connections each.
/// Those who listen accept nothing themselves, so every connection changes its owner.
fn churn(servers: &Netns, addresses: &[SocketAddr], connections: u32) -> anyhow::Result<()> {
    const PAIRS: usize = 2;
    const MOST_MISSED: u64 = 3;
    let trace = Trace::start()?;
    trace.also(servers.inode()?);
    remember_closed_connections()?;
    servers.run(remember_closed_connections)?;
    let load = Load::on_every_cpu();
    let began = Instant::now();
    let mut sites = Vec::new();
    let mut clients = Vec::new();
    for &address in addresses {
        let (owner, listener, acceptors) = servers.run(|| {
            let mut owner = Actor::spawn("owner")?;
            let listener = owner.listen(address)?;
            let mut acceptors = Vec::new();
            for _ in 0..PAIRS {
                let mut acceptor = Actor::spawn("acceptor")?;
                let fd = acceptor.take(&owner, listener.fd)?.fd;
                acceptor.begin(&Command::Serve(fd, connections))?;
                acceptors.push(acceptor);
            }
            Ok((owner, listener, acceptors))
        })?;
        for _ in 0..PAIRS {
            let mut client = Actor::spawn("client")?;
            let seed = clients.len() as u64;
            client.begin(&Command::Churn {
                to: listener.local,
                connections,
                seed,
            })?;
            clients.push(client);
        }
        sites.push((owner, listener, acceptors));
    }

    let mut expected = Vec::new();
    for client in &mut clients {
        let ends = client.finish_exchanges()?;
        let who = client.who()?;
        expected.extend(ends.iter().map(|end| Life::of_client_exchange(&who, end)));
    }
    for (owner, listener, acceptors) in &mut sites {
        let owner_is = owner.who()?;
        for mut acceptor in acceptors.drain(..) {
            let ends = acceptor.finish_exchanges()?;
            let who = acceptor.who()?;
            expected.extend(
                ends.iter()
                    .map(|end| Life::of_server_exchange(&owner_is, &who, end)),
            );
        }
        owner.close(listener)?;
        expected.push(Life::of(&owner_is, listener, LISTENER));
    }
    let traffic = began.elapsed();
    let made = addresses.len() * PAIRS * connections as usize;
    ensure!(expected.len() == 2 * made + addresses.len());
    let handle = trace.handle().clone();
    let lives = trace.finish(expected.len())?;
    let stats = handle.stats();
    // On a preemptible kernel both programs of a transition may be kept from it now and then: rarely, and never unnoticed.
    ensure!(stats.missed <= MOST_MISSED, "{stats:?}");
    let mut lives = lives.forgive(stats.missed);
    drop(load);
    for life in &expected {
        lives.check(life)?;
    }
    lives.nothing_else()?;
    ensure!(stats.untracked == 0, "{stats:?}");
    eprintln!("{made} connections in {traffic:.1?}; {stats:?}");
    Ok(())
}

/// A small machine has room for a few thousand connections in TIME_WAIT. Beyond that the kernel forgets them, and answers
/// the end of the peer with a reset, which a tracer rightly reports.
fn remember_closed_connections() -> anyhow::Result<()> {
    Ok(fs::write(
        "/proc/sys/net/ipv4/tcp_max_tw_buckets",
        "262144",
    )?)
}

/// Two tracers of one process see the same, each with ids of its own.
fn two_tracers_at_once_give_the_same_events() -> anyhow::Result<()> {
    const CONNECTIONS: usize = 20;
    // Samples would give a socket its cookie between the one's event and the other's.
    let start = || Trace::start_with(|builder| builder.sample_interval(None));
    let second = start()?;
    let mut scene = Scene::traced_by(start()?, loopback(false))?;
    for _ in 0..CONNECTIONS {
        let connection = scene.connect()?;
        scene.upload(&connection, 1_000)?;
        scene.close(&connection)?;
    }
    scene.server.close(&scene.listener)?;
    let what = |event: &Event| {
        let socket = event.socket;
        let addresses = (socket.local, socket.remote);
        (
            event.kind.clone(),
            event.process.clone(),
            addresses,
            socket.cookie,
            socket.uid,
            socket.netns,
            socket.cgroup,
            event.traffic,
        )
    };
    let closes = 2 * CONNECTIONS + 1;
    let [first, second] = [scene.trace, second].map(|trace| trace.finish_in_order(closes));
    let [first, second]: [Vec<_>; 2] =
        [first?, second?].map(|events| events.iter().map(what).collect());
    ensure!(
        first.len() == 11 * CONNECTIONS + 2,
        "{} events",
        first.len()
    );
    for (first, second) in first.iter().zip(&second) {
        ensure!(first == second, "{first:?}\nis not\n{second:?}");
    }
    ensure!(
        first.len() == second.len(),
        "{} events more",
        second.len() - first.len()
    );
    Ok(())
}

/// A reader that nobody wakes looks once a second only, so half of the events would come half a second late.
fn first_event_after_a_pause_wakes_the_reader() -> anyhow::Result<()> {
    const PAUSES: usize = 11;
    /// Long enough for it to go to sleep.
    const PAUSE: Duration = Duration::from_millis(200);
    let trace = Trace::start_with(|builder| builder.sample_interval(None))?;
    let mut delays = Vec::new();
    for _ in 0..PAUSES {
        sleep(PAUSE);
        let began = Instant::now();
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        trace.wait_for("a listener", |event| event.socket.local == address)?;
        delays.push(began.elapsed());
    }
    delays.sort();
    ensure!(
        delays[PAUSES / 2] < Duration::from_millis(300),
        "{delays:?}"
    );
    trace.finish_in_order(PAUSES).map(drop)
}

/// Each socket begins on one CPU and ends on another, while the reader looks as often as it can.
fn what_moves_between_cpus_stays_in_order() -> anyhow::Result<()> {
    let thread = Pid::from_raw(0);
    let allowed = sched_getaffinity(thread)?;
    let mut cpus = (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false));
    let (Some(first), Some(second)) = (cpus.next(), cpus.next()) else {
        return skip("there is one CPU only");
    };
    let sockets = if kernel::is_emulated()? { 300 } else { 3_000 };
    let trace = Trace::start_with(|builder| builder.latency(Duration::ZERO).sample_interval(None))?;
    let go_to = |cpu| {
        let mut only = CpuSet::new();
        only.set(cpu)?;
        sched_setaffinity(thread, &only)
    };
    for turn in 0..sockets {
        let (begin, end) = match turn % 2 {
            0 => (first, second),
            _ => (second, first),
        };
        go_to(begin)?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        go_to(end)?;
        drop(listener);
    }
    let mut lives = HashMap::<u64, Vec<Event>>::new();
    for event in trace.finish_in_order(sockets)? {
        lives.entry(event.socket.id).or_default().push(event);
    }
    ensure!(lives.len() == sockets, "{} sockets", lives.len());
    for life in lives.values() {
        let is_in_order = life.len() == 2 && !life[0].is_close() && life[1].is_close();
        ensure!(
            is_in_order && life[0].uptime < life[1].uptime,
            "{}",
            show(life)
        );
    }
    Ok(())
}

/// The reader is a task of a runtime that does not run while events are made: nobody empties the ring. What it had room for
/// is delivered, then the gap is told, and nothing is missing from the sum.
fn ring_overflow_is_counted_where_it_happened() -> anyhow::Result<()> {
    const RING_BYTES: u32 = 4096;
    /// At least so many fit: no record is longer, its header included, and the last eighth is not for all.
    const ROOM: usize = RING_BYTES as usize / 8 * 7 / 184;
    let mut scene = Scene::new()?;
    let here = Netns::current()?.inode()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let builder = trace::tcp()
        .ring_bytes(trace::bytes_for_a_cpu(RING_BYTES))
        .queue(1 << 20)
        .sample_interval(None);
    let mut tracer = runtime.block_on(builder.start())?;
    let reference = Trace::start()?;
    for _ in 0..20 {
        let connection = scene.connect()?;
        scene.close(&connection)?;
    }
    let reference = reference.finish_in_order(40)?;
    tracer.handle().stop();
    let (events, stats) = runtime.block_on(async {
        let events: Vec<Event> = tracer.by_ref().collect().await;
        anyhow::Ok((events, tracer.close().await?))
    })?;
    check_conservation(&stats)?;
    let lost = |event: &Event| lost(event, LossStage::Ring);
    let told: u64 = events.iter().map(lost).sum();
    ensure!(
        told > 0 && told == stats.ring_lost,
        "told {told}: {stats:?}"
    );
    ensure!(
        stats.emitted >= reference.len() as u64,
        "of {}: {stats:?}",
        reference.len()
    );
    let before = events.iter().take_while(|event| lost(event) == 0).count();
    ensure!(before >= ROOM, "a gap after {before} events");
    let ours = events[..before]
        .iter()
        .filter(|event| event.socket.netns == here);
    for (event, reference) in ours.zip(&reference) {
        ensure!(
            event.kind == reference.kind,
            "{event} instead of {reference}"
        );
    }
    Ok(())
}

/// A consumer that does not come finds the newest events, those that matter most before all others, and how many are missing.
fn queue_overflow_sheds_the_oldest() -> anyhow::Result<()> {
    let (kept, reference) = overflow(OverflowPolicy::ShedOldest)?;
    let newest: Vec<_> = vital(&reference)
        .into_iter()
        .rev()
        .take(kept.len())
        .rev()
        .collect();
    ensure!(
        kept == newest,
        "{kept:#?}\nare not the newest of\n{newest:#?}"
    );
    Ok(())
}

/// Told otherwise, it finds the oldest ones.
fn queue_overflow_sheds_the_newest() -> anyhow::Result<()> {
    let (kept, reference) = overflow(OverflowPolicy::ShedNewest)?;
    let oldest: Vec<_> = vital(&reference).into_iter().take(kept.len()).collect();
    ensure!(
        kept == oldest,
        "{kept:#?}\nare not the oldest of\n{oldest:#?}"
    );
    Ok(())
}

type What = (EventKind, SocketAddr, SocketAddr);

fn what(event: &Event) -> What {
    (event.kind.clone(), event.socket.local, event.socket.remote)
}

/// The events that outlive the others.
fn vital(events: &[Event]) -> Vec<What> {
    use TcpState::{Close, Established, Listen};
    let is_vital = |event: &&Event| match event.kind {
        EventKind::StateChange { from, to, .. } => [from, to]
            .into_iter()
            .any(|state| matches!(state, Close | Established | Listen)),
        _ => true,
    };
    events.iter().filter(is_vital).map(what).collect()
}

/// Lets a queue of eight overflow: what is left, and what there was.
fn overflow(policy: OverflowPolicy) -> anyhow::Result<(Vec<What>, Vec<Event>)> {
    const QUEUE: usize = 8;
    let mut scene = Scene::new()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let builder = trace::tcp()
        .queue(QUEUE)
        .overflow(policy)
        .sample_interval(None);
    let mut tracer = runtime.block_on(builder.start())?;
    let reference = Trace::start()?;
    for _ in 0..20 {
        let connection = scene.connect()?;
        scene.close(&connection)?;
    }
    let reference = reference.finish_in_order(40)?;
    let handle = tracer.handle();
    let (events, stats) = runtime.block_on(async {
        // Only when the reader has done its work is the consumer the one that is late.
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let stats = handle.stats();
            if stats.emitted >= reference.len() as u64
                && stats.emitted == stats.queue_shed + QUEUE as u64
            {
                break;
            }
            ensure!(
                Instant::now() < deadline,
                "the reader does not come to an end: {stats:?}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        handle.stop();
        let events: Vec<Event> = tracer.by_ref().collect().await;
        Ok((events, tracer.close().await?))
    })?;
    check_conservation(&stats)?;
    ensure!(
        stats.ring_lost + stats.malformed + stats.discarded == 0,
        "{stats:?}"
    );
    let told: u64 = events
        .iter()
        .map(|event| lost(event, LossStage::Queue))
        .sum();
    ensure!(
        told == stats.queue_shed && told > 0,
        "{stats:?}:{}",
        show(&events)
    );
    let kept = events
        .iter()
        .filter(|event| lost(event, LossStage::Queue) == 0);
    ensure!(
        kept.clone().count() == QUEUE && stats.delivered == QUEUE as u64,
        "{stats:?}:{}",
        show(&events)
    );
    // Others of this machine may be among them.
    let netns = reference[0].socket.netns;
    let kept: Vec<_> = kept
        .filter(|event| event.socket.netns == netns)
        .map(what)
        .collect();
    ensure!(!kept.is_empty(), "nothing of this test:{}", show(&events));
    Ok((kept, reference))
}

/// How many events of this stage's loss an event stands for.
fn lost(event: &Event, at: LossStage) -> u64 {
    match event.kind {
        EventKind::Lost { count, stage } if stage == at => count,
        _ => 0,
    }
}

/// While the reader does not run, datagrams fill the ring, and then sockets close; and when it runs, they fill the queue. Not one close is
/// missing, and what is, is told to the last datagram.
fn closes_outlive_a_flood_of_datagrams() -> anyhow::Result<()> {
    const DATAGRAMS: u64 = 20_000;
    const SOCKETS: usize = 30;
    let netns = Netns::current()?.inode()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let builder = trace::udp().per_datagram(true).sample_interval(None);
    let mut tracer = runtime.block_on(
        builder
            .ring_bytes(trace::bytes_for_a_cpu(1 << 16))
            .queue(64)
            .start(),
    )?;
    let sockets = (0..SOCKETS)
        .map(|_| UdpSocket::bind("127.0.0.1:0"))
        .collect::<Result<Vec<_>, _>>()?;
    let to = sockets[0].local_addr()?;
    for _ in 0..DATAGRAMS {
        sockets[1].send_to(b"flood", to)?;
    }
    let addresses: HashSet<_> = sockets
        .iter()
        .map(|socket| socket.local_addr().unwrap())
        .collect();
    drop(sockets);
    tracer.handle().stop();
    let (events, stats) = runtime.block_on(async {
        let events: Vec<Event> = tracer.by_ref().collect().await;
        anyhow::Ok((events, tracer.close().await?))
    })?;
    check_conservation(&stats)?;
    let closed: HashSet<_> = events
        .iter()
        .filter(|event| event.is_close() && event.socket.netns == netns)
        .map(|event| event.socket.local)
        .collect();
    ensure!(
        closed == addresses,
        "{} of {SOCKETS} closes: {stats:?}",
        closed.len()
    );
    for (stage, count) in [
        (LossStage::Ring, stats.ring_lost),
        (LossStage::Queue, stats.queue_shed),
    ] {
        let told: u64 = events.iter().map(|event| lost(event, stage)).sum();
        ensure!(
            told == count && told > 0,
            "{told} told of {stage:?}: {stats:?}"
        );
    }
    let of_sender = |event: &&Event| event.is_close() && event.traffic.tx_packets > 0;
    let sender = events
        .iter()
        .find(of_sender)
        .map(|event| event.traffic.tx_packets);
    ensure!(sender == Some(DATAGRAMS), "{sender:?}");
    ensure!(stats.emitted >= DATAGRAMS + SOCKETS as u64, "{stats:?}");
    Ok(())
}

/// The ring has room for twenty events, and nobody takes any; what there is of ten connections is lost, but not how they ended.
fn closes_that_find_the_ring_full_come_late() -> anyhow::Result<()> {
    const CONNECTIONS: u64 = 10;
    let mut scene = Scene::new()?;
    let netns = Netns::current()?.inode()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let builder = TcpTracer::builder()
        .buffer(Buffer::Ring)
        .ring_bytes(4096)
        .sample_interval(None);
    let mut tracer = runtime.block_on(builder.start())?;
    for connection in 1..=CONNECTIONS {
        let ends = scene.connect()?;
        scene.upload(&ends, connection)?;
        scene.close(&ends)?;
    }
    tracer.handle().stop();
    let (events, stats) = runtime.block_on(async {
        let events: Vec<Event> = tracer.by_ref().collect().await;
        anyhow::Ok((events, tracer.close().await?))
    })?;
    check_conservation(&stats)?;
    ensure!(stats.ring_lost > 4 * CONNECTIONS, "{stats:?}");
    let closes = || {
        let closes = events.iter().filter(|event| event.is_close());
        closes.filter(|event| event.socket.netns == netns)
    };
    let (mut sent, mut received): (Vec<_>, Vec<_>) = closes()
        .map(|event| (event.traffic.tx_bytes, event.traffic.rx_bytes))
        .partition(|(sent, _)| *sent > 0);
    sent.sort_unstable();
    received.sort_unstable();
    let bytes = 1..=CONNECTIONS;
    ensure!(
        sent.iter().map(|(tx, _)| *tx).eq(bytes.clone())
            && received.iter().map(|(_, rx)| *rx).eq(bytes),
        "{}",
        show(&events)
    );
    let told: u64 = events
        .iter()
        .map(|event| lost(event, LossStage::Ring))
        .sum();
    ensure!(told == stats.ring_lost, "{told} told: {stats:?}");
    ensure!(
        events.is_sorted_by_key(|event| event.uptime),
        "not in order: {}",
        show(&events)
    );
    Ok(())
}

/// The clock of the machine jumps forward by an hour and back; each event carries the wall clock of its moment.
fn clock_steps_do_no_harm() -> anyhow::Result<()> {
    if !kernel::is_emulated()? {
        return skip("would change the clock of this machine; only in a VM");
    }
    let mut client = Actor::spawn("client")?;
    let mut server = Actor::spawn("server")?;
    let listener = server.listen(loopback(false))?;
    let trace = Trace::start()?;
    let mut moments = Vec::new();
    let mut connect = |trace: &Trace| {
        let socket = client.connect(listener.local)?;
        moments.push((socket.local, client.moment()));
        // The clock must not step before the tracer has read the event.
        trace.wait_for("a connection", |event| {
            event.is_open() && event.socket.local == socket.local
        })?;
        client.abort(&socket)
    };
    connect(&trace)?;
    let step = ClockStep::forward(Duration::from_secs(3_600))?;
    connect(&trace)?;
    drop(step);
    connect(&trace)?;
    let events = trace.finish_in_order(6)?;
    for (local, moment) in moments {
        let window = moment.began - CLOCK_ERROR..=moment.ended + CLOCK_ERROR;
        let is_connect = |event: &&Event| event.socket.local == local && event.is_open();
        let event = events.iter().find(is_connect).expect("it was waited for");
        ensure!(window.contains(&event.time), "not in {window:?}: {event}");
    }
    let uptimes_grow = events
        .windows(2)
        .all(|pair| pair[0].uptime <= pair[1].uptime);
    ensure!(uptimes_grow, "time went back:{}", show(&events));
    ensure!(
        events
            .iter()
            .all(|event| event.socket.age < Duration::from_secs(600)),
        "{}",
        show(&events)
    );
    ensure!(events.iter().any(|event| matches!(
        event.kind,
        EventKind::StateChange {
            to: TcpState::Close,
            ..
        }
    )));
    Ok(())
}

/// The wall clock is wrong as long as this lives.
struct ClockStep(Duration);

impl ClockStep {
    fn forward(step: Duration) -> anyhow::Result<Self> {
        set_clock(SystemTime::now() + step)?;
        Ok(Self(step))
    }
}

impl Drop for ClockStep {
    fn drop(&mut self) {
        set_clock(SystemTime::now() - self.0).unwrap();
    }
}

fn set_clock(time: SystemTime) -> anyhow::Result<()> {
    let since_epoch = time.duration_since(UNIX_EPOCH)?;
    Ok(clock_settime(ClockId::CLOCK_REALTIME, since_epoch.into())?)
}
