//! Changes of a filter while events come, and the room that a filter saves.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use futures_util::StreamExt as _;
use integration_tests::{
    actor::{Actor, Command},
    collector::{Collector, check_conservation, show},
    expected_tcp::{ACTIVE_CLIENT, ExpectedTcp, PASSIVE_SERVER},
    netns::Netns,
    suite::Test,
    tcp_pair::{TcpPair, loopback},
};
use tcp_udp_trace::{Direction, ErrorKind, Event, EventKind, Filter, Kind, TcpTracer, UdpTracer};

use crate::filters::connect;

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            filter_that_makes_no_sense_changes_nothing,
            flows_that_no_longer_pass,
            sockets_rejected_before,
        ],
        Solitude: [
            filtered_sockets_take_no_room,
            changes_under_load_miss_nothing,
        ],
    ]
}

/// The error names the setting, and the previous filter stays.
fn filter_that_makes_no_sense_changes_nothing() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    let port = pair.listener.local.port();
    pair.collector.set_filter(Filter::new().port(port))?;
    let ended = {
        let actor = Actor::spawn("ended")?;
        let pid = actor.pid();
        actor.kill()?;
        pid
    };
    let nonsense = [
        (Filter::new().port(0), "port is 0".to_owned()),
        (
            Filter::new().port(port).pid_tree(ended),
            format!("pid_tree is {ended}: there is no such process"),
        ),
    ];
    for (filter, message) in nonsense {
        let error = pair
            .collector
            .set_filter(filter)
            .err()
            .context("accepted")?;
        let error: &tcp_udp_trace::Error = error.downcast_ref().context("another error")?;
        ensure!(error.kind() == ErrorKind::InvalidFilter, "{error:?}");
        ensure!(error.to_string().starts_with(&message), "{error}");
    }
    ensure!(pair.collector.handle().filter() == Some(Filter::new().port(port)));
    let elsewhere = pair.server.listen(loopback(false))?;
    connect(&mut pair.client, &elsewhere, &mut pair.server)?;
    let connection = pair.connect()?;
    pair.close(&connection)?;
    let client = pair.expected_client(&connection, ACTIVE_CLIENT)?;
    let server = pair.expected_server(&connection, PASSIVE_SERVER)?;
    pair.finish(&[client, server])
}

/// User space applies the current filter to the reports that it makes itself.
fn flows_that_no_longer_pass() -> anyhow::Result<()> {
    // The counts of the tracer are of the whole machine. The flows of other tests never pass.
    let here = Netns::current()?.inode()?;
    let builder = move |builder: tcp_udp_trace::UdpTracerBuilder| {
        let builder = builder.interval(Duration::from_secs(3600));
        builder
            .filter(Filter::new().netns(here))
            .sample_interval(None)
    };
    let collector = Collector::start_udp_with(builder)?;
    let [sender, first, second] = [(); 3].map(|()| UdpSocket::bind(loopback(false)));
    let (sender, first, second) = (sender?, first?, second?);
    let to = [first.local_addr()?, second.local_addr()?];
    for to in to {
        // Only user space reports the second datagram.
        for _ in 0..2 {
            sender.send_to(b"datagram", to)?;
        }
    }
    collector.wait_count(2)?;
    collector.set_filter(Filter::new().netns(here).port(to[1].port()))?;
    drop(sender);
    let events = collector.wait_count(4)?;
    let of = |peer: SocketAddr| {
        let flows = events.iter().filter(|event| event.socket.remote == peer);
        let reported = flows.map(|event| match event.kind {
            EventKind::Flow {
                approximate: false,
                last,
                ..
            } => (Some(last), event.traffic.tx_packets),
            _ => (None, event.traffic.tx_packets),
        });
        reported.collect::<Vec<_>>()
    };
    ensure!(of(to[0]) == [(Some(false), 1)], "{}", show(&events));
    ensure!(
        of(to[1]) == [(Some(false), 1), (Some(true), 2)],
        "{}",
        show(&events)
    );
    let handle = collector.handle().clone();
    collector.finish_all()?;
    let stats = handle.stats();
    // The flow is filtered. The socket's close, which has neither port, passes with the other flow.
    let filtered = [stats.kinds.flow, stats.kinds.close].map(|counts| counts.reader_filtered);
    ensure!(filtered == [1, 0], "{stats:?}");
    ensure!(
        events.last().is_some_and(Event::is_close),
        "{}",
        show(&events)
    );
    Ok(())
}

/// A socket that no filter has let pass so far passes the next one, with its owner and its numbers.
/// Each of the filters rejects both ends by another property.
fn sockets_rejected_before() -> anyhow::Result<()> {
    const BYTES: u64 = 1234;
    let mut pair = TcpPair::new()?;
    let port = pair.listener.local.port();
    let filters = [
        Filter::new().port(if port == 1 { 2 } else { 1 }),
        Filter::new().remote("192.0.2.0".parse::<Ipv4Addr>()?, 24),
        Filter::new().netns(1),
        Filter::new().cgroup(u64::MAX),
        Filter::new().direction(Direction::Listener),
    ];
    let mut before = pair.collector.wait_count(1)?.len();
    for filter in filters {
        pair.collector.set_filter(filter.clone())?;
        let connection = pair.connect()?;
        pair.upload(&connection, BYTES)?;
        pair.collector.set_filter(Filter::new().port(port))?;
        pair.close(&connection)?;
        // Three changes of state at each end.
        let events = pair.collector.wait_count(before + 6)?.split_off(before);
        before += events.len();
        let [client, server] = [connection.client.local, pair.listener.local];
        for (local, actor, bytes) in [
            (client, &pair.client, (BYTES, 0)),
            (server, &pair.server, (0, BYTES)),
        ] {
            let of_end = || events.iter().filter(|event| event.socket.local == local);
            let last = of_end().next_back().context("no event")?;
            let traffic = (last.traffic.tx_bytes, last.traffic.rx_bytes);
            let is_owner = |event: &Event| {
                let pid = event.process.as_ref().map(|process| process.pid);
                pid == Some(actor.pid())
            };
            ensure!(
                of_end().count() == 3 && of_end().all(is_owner),
                "{filter}: {}",
                show(&events)
            );
            ensure!(
                last.is_close() && last.socket.older == Some(false) && traffic == bytes,
                "{filter}: {last:?}"
            );
        }
    }
    let handle = pair.collector.handle().clone();
    pair.collector.finish_all()?;
    let stats = handle.stats();
    // The changes of state up to the connection, and the accepts. Other tests may add to them.
    let rejected = [stats.kinds.state_change, stats.kinds.accept].map(|kind| kind.kernel_filtered);
    ensure!(rejected[0] >= 20 && rejected[1] >= 5, "{stats:?}");
    Ok(())
}

/// The reader does not run, and the ring has room for twenty events. Thousands of events that do
/// not pass come before those that do.
fn filtered_sockets_take_no_room() -> anyhow::Result<()> {
    const RING_BYTES: u32 = 4096;
    const UNWANTED: u32 = 300;
    let mut server = Actor::spawn("server")?;
    let [selected, other] = [(); 2].map(|()| server.listen(loopback(false)));
    let (selected, other) = (selected?, other?);
    let mut client = Actor::spawn("client")?;
    let receiver = UdpSocket::bind(loopback(false))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let tcp = TcpTracer::builder()
        .ring_bytes(RING_BYTES)
        .filter(Filter::new().port(selected.local.port()))
        .sample_interval(None);
    let udp = UdpTracer::builder()
        .ring_bytes(RING_BYTES)
        .filter(
            Filter::new()
                .kind(Kind::Send)
                .port(receiver.local_addr()?.port()),
        )
        .per_datagram(true)
        .sample_interval(None);
    let (mut tcp, mut udp) =
        runtime.block_on(async { anyhow::Ok((tcp.start().await?, udp.start().await?)) })?;
    for _ in 0..UNWANTED {
        connect(&mut client, &other, &mut server)?;
        // Only this sender's own port does not pass: it has a peer, but no socket receives its
        // datagrams.
        let sender = UdpSocket::bind(loopback(false))?;
        for _ in 0..10 {
            sender.send_to(b"other", sender.local_addr()?)?;
        }
    }
    connect(&mut client, &selected, &mut server)?;
    UdpSocket::bind(loopback(false))?.send_to(b"selected", receiver.local_addr()?)?;
    let handles = [tcp.handle(), udp.handle()];
    for handle in &handles {
        handle.stop();
    }
    let (tcp, udp) = runtime.block_on(async {
        let events: (Vec<Event>, Vec<Event>) =
            (tcp.by_ref().collect().await, udp.by_ref().collect().await);
        tcp.close().await?;
        udp.close().await?;
        anyhow::Ok(events)
    })?;
    let [tcp_stats, udp_stats] = handles.map(|handle| handle.stats());
    for stats in [&tcp_stats, &udp_stats] {
        check_conservation(stats)?;
        ensure!(stats.ring_lost + stats.queue_shed == 0, "{stats:?}");
    }
    // Five changes of state at either end, and the accept.
    ensure!(tcp.len() == 11, "{}", show(&tcp));
    ensure!(udp.len() == 1, "{}", show(&udp));
    // No program sees a change of state in a softirq over a thread of pid 1 (docs/kernels.md).
    ensure!(
        tcp_stats.kernel_filtered >= u64::from(UNWANTED) * 10,
        "{tcp_stats:?}"
    );
    ensure!(
        udp_stats.kinds.send.kernel_filtered >= u64::from(UNWANTED) * 10,
        "{udp_stats:?}"
    );
    Ok(())
}

/// Filters follow each other as fast as they can. None misses an event that it lets pass.
fn changes_under_load_miss_nothing() -> anyhow::Result<()> {
    const CONNECTIONS: u32 = 2_000;
    let collector = Collector::start_with(|builder| builder.sample_interval(None))?;
    let mut server = Actor::spawn("server")?;
    let listener = server.listen(loopback(false))?;
    let mut client = Actor::spawn("client")?;
    let port = listener.local.port();
    collector.set_filter(Filter::new().port(port))?;
    server.begin(&Command::Serve(listener.fd, CONNECTIONS))?;
    client.begin(&Command::Churn {
        to: listener.local,
        connections: CONNECTIONS,
        seed: 1,
    })?;
    let began = Instant::now();
    let mut changes = 0;
    let is_over = |collector: &Collector| {
        let closed = collector.events().iter().filter(|e| e.is_end()).count();
        closed >= 2 * CONNECTIONS as usize
    };
    while !is_over(&collector) && began.elapsed() < Duration::from_secs(120) {
        for _ in 0..100 {
            let other = 1 + changes % 1000;
            collector.set_filter(
                Filter::new()
                    .port(port)
                    .port(other)
                    .local(Ipv4Addr::LOCALHOST, 32),
            )?;
            changes += 1;
        }
    }
    let mut expected = Vec::new();
    let (client_is, server_is) = (client.identity()?, server.identity()?);
    for end in client.finish_exchanges()? {
        expected.push(ExpectedTcp::of_client_exchange(&client_is, &end));
    }
    for end in server.finish_exchanges()? {
        expected.push(ExpectedTcp::of_server_exchange(
            &server_is, &server_is, &end,
        ));
    }
    let mut observed = collector.finish(expected.len())?;
    for expected in &expected {
        observed.check(expected)?;
    }
    eprintln!("{changes} changes of the filter during {CONNECTIONS} connections");
    Ok(())
}
