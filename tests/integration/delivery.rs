//! Each event reaches the consumer, in time and with the right time, or is counted.

use std::{
    collections::HashMap,
    net::{SocketAddr, TcpListener},
    thread::sleep,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::ensure;
use integration_tests::{
    actor::{Actor, Command},
    collector::{Collector, show, without_summary},
    cpu_load::CpuLoad,
    crowd::remember_closed_connections,
    expected_tcp::{CLOCK_ERROR, ExpectedTcp, LISTENER},
    kernel,
    netns::{FAR, Netns, steer_packets, veth},
    suite::{Test, skip},
    tcp_pair::{TcpPair, loopback},
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    time::{ClockId, clock_settime},
    unistd::Pid,
};
use tcp_udp_trace::{Event, EventKind, TcpState};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            two_tracers_at_once_give_the_same_events,
            sockets_that_move_between_cpus_stay_in_order,
        ],
        Solitude: [
            first_event_after_a_pause_wakes_the_reader,
            churn_of_ten_thousand_connections_under_load,
            churn_across_namespaces_under_load,
            churn_with_packets_steered_to_every_cpu,
            clock_steps_do_no_harm,
        ],
    ]
}

/// No wrong owner, no missing close and no wrong byte, while every CPU is busy.
fn churn_of_ten_thousand_connections_under_load() -> anyhow::Result<()> {
    let here = Netns::current()?;
    churn(&here, &[loopback(false), loopback(true)], 2_500)
}

/// The same on a path where transitions run in softirqs. They interrupt a CPU at any moment, for
/// example in the same program in the middle of another transition.
fn churn_across_namespaces_under_load() -> anyhow::Result<()> {
    let far = veth()?;
    churn(&far, &[SocketAddr::new(FAR.parse()?, 0)], 1_000)
}

/// The same where the softirqs of one connection run on all CPUs. A softirq interrupts each program
/// hundreds of times. The kernel then skips the program, and the tracepoint's other one runs.
fn churn_with_packets_steered_to_every_cpu() -> anyhow::Result<()> {
    if !kernel::is_emulated()? {
        return skip("a hardened kernel runs no program in softirqs that interrupt pid 1");
    }
    let here = Netns::enter_new()?;
    steer_packets()?;
    churn(&here, &[loopback(false), loopback(true)], 500)
}

/// At each address of a namespace, a process listens, two others accept, and two clients make this
/// many connections each. The processes that listen accept nothing themselves, so every connection
/// changes its owner.
fn churn(netns: &Netns, addresses: &[SocketAddr], connections: u32) -> anyhow::Result<()> {
    const PAIRS: usize = 2;
    const MOST_MISSED: u64 = 3;
    let collector = Collector::start()?;
    collector.also(netns.inode()?);
    remember_closed_connections()?;
    netns.run(remember_closed_connections)?;
    let load = CpuLoad::on_every_cpu();
    let began = Instant::now();
    let mut servers = Vec::new();
    let mut clients = Vec::new();
    for &address in addresses {
        let (owner, listener, acceptors) = netns.run(|| {
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
        servers.push((owner, listener, acceptors));
    }

    let mut expected = Vec::new();
    for client in &mut clients {
        let ends = client.finish_exchanges()?;
        let identity = client.identity()?;
        expected.extend(
            ends.iter()
                .map(|end| ExpectedTcp::of_client_exchange(&identity, end)),
        );
    }
    for (owner, listener, acceptors) in &mut servers {
        let owner_is = owner.identity()?;
        for mut acceptor in acceptors.drain(..) {
            let ends = acceptor.finish_exchanges()?;
            let identity = acceptor.identity()?;
            expected.extend(
                ends.iter()
                    .map(|end| ExpectedTcp::of_server_exchange(&owner_is, &identity, end)),
            );
        }
        owner.close(listener)?;
        expected.push(ExpectedTcp::of(&owner_is, listener, LISTENER));
    }
    let traffic = began.elapsed();
    let made = addresses.len() * PAIRS * connections as usize;
    ensure!(expected.len() == 2 * made + addresses.len());
    let handle = collector.handle().clone();
    let observed = collector.finish(expected.len())?;
    let stats = handle.stats();
    // On a preemptible kernel, both programs of a transition may be skipped now and then: rarely,
    // and always counted.
    ensure!(stats.missed <= MOST_MISSED, "{stats:?}");
    let mut observed = observed.forgive(stats.missed);
    drop(load);
    for expected in &expected {
        observed.check(expected)?;
    }
    observed.nothing_else()?;
    ensure!(stats.untracked == 0, "{stats:?}");
    eprintln!("{made} connections in {traffic:.1?}; {stats:?}");
    Ok(())
}

/// Two tracers of one process report the same events, each with ids of its own.
fn two_tracers_at_once_give_the_same_events() -> anyhow::Result<()> {
    const CONNECTIONS: usize = 20;
    // Samples would give a socket its cookie between the two tracers' events.
    let start = || Collector::start_with(|builder| builder.sample_interval(None));
    let second = start()?;
    let mut pair = TcpPair::traced_by(start()?, loopback(false))?;
    for _ in 0..CONNECTIONS {
        let connection = pair.connect()?;
        pair.upload(&connection, 1_000)?;
        pair.close(&connection)?;
    }
    pair.server.close(&pair.listener)?;
    let what = |event: &Event| {
        let socket = event.socket;
        let addresses = (socket.local, socket.remote);
        (
            without_summary(event),
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
    let [first, second] =
        [pair.collector, second].map(|collector| collector.finish_in_order(closes));
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

/// Without a wake-up, the reader looks once a second only, so half of the events would come half a
/// second late.
fn first_event_after_a_pause_wakes_the_reader() -> anyhow::Result<()> {
    const PAUSES: usize = 11;
    /// Long enough for the reader to go to sleep.
    const PAUSE: Duration = Duration::from_millis(200);
    let collector = Collector::start_with(|builder| builder.sample_interval(None))?;
    let mut delays = Vec::new();
    for _ in 0..PAUSES {
        sleep(PAUSE);
        let began = Instant::now();
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        collector.wait_for("a listener", |event| event.socket.local == address)?;
        delays.push(began.elapsed());
    }
    delays.sort();
    ensure!(
        delays[PAUSES / 2] < Duration::from_millis(300),
        "{delays:?}"
    );
    collector.finish_in_order(PAUSES).map(drop)
}

/// Each socket begins on one CPU and ends on another, while the reader looks as often as it can.
fn sockets_that_move_between_cpus_stay_in_order() -> anyhow::Result<()> {
    let thread = Pid::from_raw(0);
    let allowed = sched_getaffinity(thread)?;
    let mut cpus = (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false));
    let (Some(first), Some(second)) = (cpus.next(), cpus.next()) else {
        return skip("there is one CPU only");
    };
    let sockets = if kernel::is_emulated()? { 300 } else { 3_000 };
    let collector =
        Collector::start_with(|builder| builder.latency(Duration::ZERO).sample_interval(None))?;
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
    let mut observed = HashMap::<u64, Vec<Event>>::new();
    for event in collector.finish_in_order(sockets)? {
        observed.entry(event.socket.id).or_default().push(event);
    }
    ensure!(observed.len() == sockets, "{} sockets", observed.len());
    for expected in observed.values() {
        let is_in_order = expected.len() == 2 && !expected[0].is_end() && expected[1].is_end();
        ensure!(
            is_in_order && expected[0].uptime < expected[1].uptime,
            "{}",
            show(expected)
        );
    }
    Ok(())
}

/// The clock of the machine jumps forward by an hour and back. Each event carries the wall clock of
/// its moment.
fn clock_steps_do_no_harm() -> anyhow::Result<()> {
    if !kernel::is_emulated()? {
        return skip("would change the clock of this machine; only in a VM");
    }
    let mut client = Actor::spawn("client")?;
    let mut server = Actor::spawn("server")?;
    let listener = server.listen(loopback(false))?;
    let collector = Collector::start()?;
    let mut moments = Vec::new();
    let mut connect = |collector: &Collector| {
        let socket = client.connect(listener.local)?;
        moments.push((socket.local, client.moment()));
        // The clock must not step before the tracer has read the event.
        collector.wait_for("a connection", |event| {
            event.is_open() && event.socket.local == socket.local
        })?;
        client.abort(&socket)
    };
    connect(&collector)?;
    let step = ClockStep::forward(Duration::from_secs(3_600))?;
    connect(&collector)?;
    drop(step);
    connect(&collector)?;
    let events = collector.finish_in_order(6)?;
    for (local, moment) in moments {
        let window = moment.began - CLOCK_ERROR..=moment.ended + CLOCK_ERROR;
        let is_connect = |event: &&Event| event.socket.local == local && event.is_open();
        let event = events
            .iter()
            .find(is_connect)
            .expect("an earlier wait found it");
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

/// Keeps the wall clock wrong until it is dropped.
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
