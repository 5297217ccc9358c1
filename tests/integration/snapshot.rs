//! Sockets that are older than the tracer: known from the start, and exact from then on.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{SocketAddr, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, ensure};
use integration_tests::{
    actor::{Actor, Command, Exchange},
    collector::{Collector, SAMPLE_INTERVAL, show},
    expected_tcp::ExpectedTcp,
    kernel,
    netns::Netns,
    observed_tcp::{ObservedTcp, is_stillborn},
    suite::Test,
    tcp_pair::loopback,
};
use tcp_udp_trace::{
    Direction, Event, EventKind, Origin,
    TcpState::{Close, CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, Listen},
    Traffic,
};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            connection_in_another_namespace,
            connection_that_waits_to_be_accepted,
            udp_socket_that_has_no_cookie,
            udp_socket_that_gets_its_cookie_by_a_sample,
        ],
        Solitude: [
            tracers_that_start_and_stop_during_churn,
        ],
    ]
}

/// The connection is known by its sample, with owner and traffic. Its end has the same.
fn connection_in_another_namespace() -> anyhow::Result<()> {
    let netns = Netns::new()?;
    let (mut server, mut client) =
        netns.run(|| Ok((Actor::spawn("server")?, Actor::spawn("client")?)))?;
    let listener = server.listen(loopback(true))?;
    let connected = client.connect(listener.local)?;
    let accepted = server.accept(&listener)?;
    client.send(&connected, 5_000)?;
    server.receive(&accepted, 5_000)?;
    let collector = Collector::start_sampling()?;
    collector.also(netns.inode()?);
    let is_client = |event: &Event| event.socket.cookie == Some(connected.cookie);
    let sample = collector.wait_for_sample("the client", is_client)?;
    let process = sample.process.as_ref().context("no owner")?;
    ensure!(
        (process.pid, process.origin) == (client.pid(), Origin::Snapshot),
        "{sample}"
    );
    ensure!(
        sample.traffic.tx_bytes == 5_000 && sample.traffic.rx_bytes == 0,
        "{sample}"
    );
    server.send(&accepted, 70)?;
    client.receive(&connected, 70)?;
    server.close(&accepted)?;
    ensure!(client.receive_all(&connected)? == 0);
    client.close(&connected)?;
    server.close(&listener)?;
    let events = collector.finish_in_order(3)?;
    let of_client: Vec<_> = events.iter().filter(|event| is_client(event)).collect();
    ensure!(
        of_client
            .iter()
            .all(|event| event.socket.id == sample.socket.id)
    );
    let mut observed = ObservedTcp::new(events.clone(), sample.time - sample.socket.age);
    let states = [Established, CloseWait, LastAck, Close];
    let client_is = ExpectedTcp::of_actor(&client, &connected, &states)?;
    observed.check(&client_is.older_than_the_tracer())?;
    observed.check(
        &ExpectedTcp::of(&server.identity()?, &listener, &[Listen, Close]).older_than_the_tracer(),
    )?;
    Ok(())
}

/// No process has the connection open yet, so it has no known owner. It is the same socket after
/// the accept.
fn connection_that_waits_to_be_accepted() -> anyhow::Result<()> {
    let (mut server, mut client) = (Actor::spawn("server")?, Actor::spawn("client")?);
    let listener = server.listen(loopback(false))?;
    let connected = client.connect(listener.local)?;
    client.send(&connected, 300)?;
    let collector = Collector::start_sampling()?;
    let is_it = |event: &Event| event.socket.remote == connected.local;
    let sample = collector.wait_for_sample("the connection", is_it)?;
    ensure!(
        sample.process.is_none() && sample.traffic.rx_bytes == 300,
        "{sample}"
    );
    let accepted = server.accept(&listener)?;
    collector.wait_for("the accept", |event| {
        is_it(event) && event.kind == EventKind::Accept
    })?;
    let sample_of_accepted = collector.wait_for_sample("the connection", is_it)?;
    let process = sample_of_accepted.process.as_ref().context("no owner")?;
    ensure!((process.pid, process.origin) == (server.pid(), Origin::Acceptor));
    ensure!(sample_of_accepted.socket.cookie == Some(accepted.cookie));
    // The peer may have been a listener's client, or have connected at the same time.
    ensure!(sample.socket.direction.is_none(), "{:?}", sample.socket);
    ensure!(sample_of_accepted.socket.direction == Some(Direction::Inbound));
    server.receive(&accepted, 300)?;
    server.send(&accepted, 40)?;
    client.receive(&connected, 40)?;
    client.close(&connected)?;
    ensure!(server.receive_all(&accepted)? == 0);
    server.close(&accepted)?;
    let events = collector.finish_in_order(2)?;
    let of_child: Vec<_> = events.iter().filter(|event| is_it(event)).collect();
    for event in &of_child {
        ensure!(
            event.socket.id == sample.socket.id,
            "another id:{}",
            show(&events)
        );
    }
    let last = of_child.last().context("no events")?;
    let Traffic {
        tx_bytes, rx_bytes, ..
    } = last.traffic;
    ensure!(last.is_end() && (tx_bytes, rx_bytes) == (40, 300), "{last}");
    Ok(())
}

/// The tracer first knows the socket by its address, and by its cookie as soon as it has one. It
/// remains the same socket, with the same flow.
fn udp_socket_that_has_no_cookie() -> anyhow::Result<()> {
    old_udp_socket(false)
}

fn udp_socket_that_gets_its_cookie_by_a_sample() -> anyhow::Result<()> {
    old_udp_socket(true)
}

fn old_udp_socket(sampled: bool) -> anyhow::Result<()> {
    let (old, peer) = (
        UdpSocket::bind("127.0.0.1:0")?,
        UdpSocket::bind("127.0.0.1:0")?,
    );
    let (old_is, peer_is) = (old.local_addr()?, peer.local_addr()?);
    let collector = Collector::start_udp_with(move |builder| {
        builder.sample_interval(sampled.then_some(SAMPLE_INTERVAL))
    })?;
    let receive = |count: usize| {
        for _ in 0..count {
            peer.send_to(b"hello", old_is)?;
            old.recv_from(&mut [0; 16])?;
        }
        anyhow::Ok(())
    };
    receive(3)?;
    if sampled {
        collector.wait_for_sample("the socket", |event| event.socket.local == old_is)?;
    }
    receive(2)?;
    // Sending gives the socket a cookie, if it has none.
    old.send_to(b"hi", peer_is)?;
    receive(1)?;
    drop(old);
    drop(peer);
    let events = collector.finish_in_order(2)?;
    let of_old: Vec<_> = events
        .iter()
        .filter(|event| event.socket.local.port() == old_is.port())
        .collect();
    let ids: BTreeSet<_> = of_old.iter().map(|event| event.socket.id).collect();
    ensure!(ids.len() == 1, "ids {ids:?}:{}", show(&events));
    for event in &of_old {
        let process = event.process.as_ref().context("no owner")?;
        let owner = (process.pid, process.origin);
        ensure!(owner == (std::process::id(), Origin::Snapshot), "{event}");
    }
    let all = of_old[of_old.len() - 1].traffic;
    let Traffic {
        tx_bytes,
        rx_bytes,
        tx_packets,
        rx_packets,
        ..
    } = all;
    ensure!(
        (tx_bytes, tx_packets, rx_bytes, rx_packets) == (2, 1, 30, 6),
        "{}",
        show(&events)
    );
    let is_flow = |event: &&&Event| matches!(event.kind, EventKind::Flow { .. });
    let flow = of_old.iter().rfind(is_flow).context("no flow")?;
    ensure!(
        flow.socket.remote == peer_is && flow.traffic == all,
        "{flow}"
    );
    Ok(())
}

/// Tracers start and stop while connections come and go as fast as they can. Between the first
/// connection whose beginning a tracer has seen and the last one, it misses none and reports none
/// twice. Each end is exact, and each owner is right. An owner may be absent only if the socket was
/// made before the hooks were attached, and its process closed it before the tracer was ready.
fn tracers_that_start_and_stop_during_churn() -> anyhow::Result<()> {
    const TRACERS: usize = 5;
    // In an emulated guest, a CPU now and then fails in code that another CPU patches at that
    // moment, as attaching does. So there, the traffic pauses now and then.
    let (batch, pause) = if kernel::is_emulated()? {
        (20, Duration::from_millis(150))
    } else {
        (500, Duration::ZERO)
    };
    let mut server = Actor::spawn("server")?;
    let mut client = Actor::spawn("client")?;
    let listener = server.listen("0.0.0.0:0".parse()?)?;
    let port = listener.local.port();
    let pids = [client.pid(), server.pid()];
    let enough = AtomicBool::new(false);
    let churn = || {
        let (mut clients, mut servers) = (Vec::new(), Vec::new());
        let mut turn = 0_u16;
        while !enough.load(Ordering::Relaxed) {
            server.begin(&Command::Serve(listener.fd, batch))?;
            client.begin(&Command::Churn {
                // Each time another address, or there would be no free ports at some time.
                to: SocketAddr::from(([127, 0, 0, 1 + (turn % 250) as u8], port)),
                connections: batch,
                seed: turn.into(),
            })?;
            clients.extend(client.finish_exchanges()?);
            servers.extend(server.finish_exchanges()?);
            turn += 1;
            ensure!(u32::from(turn) * batch < 250 * 500, "it takes too long");
            thread::sleep(pause);
        }
        anyhow::Ok([clients, servers])
    };
    let (traced, ends) = thread::scope(|scope| {
        let churn = scope.spawn(churn);
        let traced = (0..TRACERS)
            .map(|_| {
                let collector = Collector::start()?;
                Ok((
                    collector.ready(),
                    collector.finish_in_order(2 * batch as usize)?,
                ))
            })
            .collect::<anyhow::Result<Vec<_>>>();
        enough.store(true, Ordering::Relaxed);
        anyhow::Ok((traced?, churn.join().unwrap()?))
    })?;
    let connections = ends[0].len();
    eprintln!(
        "{connections} connections, {:?} events",
        traced
            .iter()
            .map(|(_, events)| events.len())
            .collect::<Vec<_>>()
    );
    for (ready, events) in &traced {
        for (ends, pid) in ends.iter().zip(pids) {
            judge(events, *ready, ends, pid).with_context(|| format!("of process {pid}"))?;
        }
    }
    Ok(())
}

/// Compares the events of a tracer with the connections of one process, which had one at a time.
fn judge(events: &[Event], ready: SystemTime, ends: &[Exchange], pid: u32) -> anyhow::Result<()> {
    let mut indices = BTreeMap::new();
    for (index, end) in ends.iter().enumerate() {
        indices
            .entry((end.local, end.remote))
            .or_insert_with(Vec::new)
            .push(index);
    }
    let mut observed = BTreeMap::<u64, Vec<&Event>>::new();
    for event in events {
        observed.entry(event.socket.id).or_default().push(event);
    }
    let mut seen = BTreeMap::new();
    // The first connection whose beginning was seen. The ends of some before it may have come after
    // the tracer's start.
    let mut first = usize::MAX;
    for of_socket in observed.values() {
        let last = of_socket[of_socket.len() - 1];
        let Some(&[index]) = indices
            .get(&(last.socket.local, last.socket.remote))
            .map(Vec::as_slice)
        else {
            // A socket of another process, or one of two with the same addresses.
            continue;
        };
        if of_socket
            .iter()
            .all(|event| event.kind == EventKind::Accept)
        {
            // Accepted when the tracer had begun to stop.
            continue;
        }
        if is_stillborn(of_socket) {
            // The connection has another socket, or is missed below.
            continue;
        }
        let is_whole = matches!(
            of_socket[0].kind,
            EventKind::StateChange {
                from: Close | Listen,
                ..
            }
        );
        if is_whole {
            first = first.min(index);
        }
        let doubled = seen.insert(index, last.is_end());
        ensure!(doubled.is_none(), "two sockets for one: {last}");
        // Before the connection is established, the kernel may not have written the addresses into
        // the socket.
        let known = of_socket
            .iter()
            .filter(|event| event.socket.local.port() != 0 && event.socket.remote.port() != 0);
        let addresses: BTreeSet<_> = known
            .map(|event| (event.socket.local, event.socket.remote))
            .collect();
        ensure!(addresses.len() <= 1, "one id for {addresses:?}");
        let is_born_here = matches!(
            of_socket[0].kind,
            EventKind::StateChange { from: Close, .. }
        );
        // Its process had closed it, and so had no descriptor of it any more.
        let is_orphan = matches!(
            of_socket[0].kind,
            EventKind::StateChange {
                from: FinWait1 | FinWait2 | Closing | LastAck,
                ..
            }
        );
        let may_be_absent = !is_born_here && (is_orphan || of_socket[0].time <= ready);
        for event in of_socket {
            match &event.process {
                Some(process) => ensure!(process.pid == pid, "wrong owner: {event}"),
                None => ensure!(may_be_absent, "no owner: {event}"),
            }
        }
        if last.is_end() {
            let Traffic {
                tx_bytes, rx_bytes, ..
            } = last.traffic;
            let end = &ends[index];
            ensure!(
                (tx_bytes, rx_bytes) == (end.sent, end.received),
                "{end:?}: {last}"
            );
            let closes = of_socket.iter().filter(|event| event.is_end()).count();
            ensure!(closes == 1, "{closes} closes: {last}");
        }
    }
    let last = seen.last_key_value().map_or(0, |(index, _)| *index);
    ensure!(first < last, "{first} to {last} is no range of connections");
    // When the tracer was stopped, the last connections were not over, nor some whose last packet a
    // busy machine has delayed.
    const UNDER_WAY: usize = 5;
    let mut open = Vec::new();
    for (index, end) in ends.iter().enumerate().take(last + 1).skip(first) {
        if indices[&(end.local, end.remote)].len() > 1 {
            continue;
        }
        let place = || format!("{end:?}, {index} of {first} to {last}");
        let is_closed = seen
            .get(&index)
            .with_context(|| format!("not seen: {}", place()))?;
        if !is_closed {
            open.push(place());
        }
    }
    ensure!(open.len() <= UNDER_WAY, "not closed: {open:#?}");
    Ok(())
}
