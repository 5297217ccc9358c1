//! Samples of open sockets: their values, and their choice.

use std::{
    net::{SocketAddr, TcpStream},
    os::fd::AsFd as _,
};

use anyhow::{Context as _, bail, ensure};
use integration_tests::{
    actor::{ReceiveCall, SendCall, SocketOption},
    collector::{Collector, SAMPLE_INTERVAL},
    kernel,
    suite::Test,
    tcp_info,
    tcp_pair::{TcpPair, loopback},
    udp_actor::UdpActor,
};
use tcp_udp_trace::{Event, EventKind, Origin, SampleInfo, Traffic, UdpInfo};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            tcp_sample_equals_tcp_info,
            tcp_sample_is_of_the_socket_of_the_state_changes,
            listener_is_sampled_with_its_backlog,
            listener_is_sampled_with_its_drops,
            udp_sample_has_queues_buffers_and_drops,
            samples_can_be_switched_off,
        ],
    ]
}

fn is_of(event: &Event, cookie: u64) -> bool {
    event.socket.cookie == Some(cookie)
}

/// Each field of `tcp_info` equals the value of `getsockopt` for the same socket. A field that
/// changes with time lies between the values before and after the sample.
fn tcp_sample_equals_tcp_info() -> anyhow::Result<()> {
    for v6 in [false, true] {
        let mut pair = TcpPair::traced_by(Collector::start_sampling()?, loopback(v6))?;
        let connection = pair.connect()?;
        pair.upload(&connection, 1_000_000)?;
        pair.download(&connection, 300_000)?;
        let ends = [
            (
                pair.client.lend(&connection.client)?,
                connection.client,
                (1_000_000, 300_000),
            ),
            (
                pair.server.lend(&connection.server)?,
                connection.server,
                (300_000, 1_000_000),
            ),
        ];
        for (socket, endpoint, (sent, received)) in &ends {
            // Delayed acknowledgments, and the like: a value that still changes cannot be compared.
            let (before, sample, after) = loop {
                let before = tcp_info::of(socket)?;
                let sample = pair
                    .collector
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
        pair.close(&connection)?;
        pair.server.close(&pair.listener)?;
        pair.collector.finish_in_order(3)?;
    }
    Ok(())
}

/// The samples have the same id, owner, cookie and birth as the events. (`Collector` compares each
/// sample with the events before and after it. This test checks that such events exist.)
fn tcp_sample_is_of_the_socket_of_the_state_changes() -> anyhow::Result<()> {
    let mut pair = TcpPair::traced_by(Collector::start_sampling()?, loopback(false))?;
    let connection = pair.connect()?;
    let mut samples = Vec::new();
    for cookie in [
        pair.listener.cookie,
        connection.client.cookie,
        connection.server.cookie,
    ] {
        samples.push(
            pair.collector
                .wait_for_sample("a socket", |event| is_of(event, cookie))?,
        );
    }
    pair.close(&connection)?;
    pair.server.close(&pair.listener)?;
    let (server, client) = (pair.server.pid(), pair.client.pid());
    let events = pair.collector.finish_in_order(3)?;
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
            last.is_end() && last.socket.cookie == sample.socket.cookie,
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

/// A listener has no traffic, and its sample has the number of waiting connections.
fn listener_is_sampled_with_its_backlog() -> anyhow::Result<()> {
    let mut pair = TcpPair::traced_by(Collector::start_sampling()?, loopback(false))?;
    let waiting: Vec<_> = (0..3)
        .map(|_| pair.client.connect(pair.listener.local))
        .collect::<anyhow::Result<_>>()?;
    let listener = pair.listener.cookie;
    let sample = pair
        .collector
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
    // No process has accepted them, so they are the listener's.
    for client in &waiting {
        let is_it = |event: &Event| event.socket.remote == client.local;
        let sample = pair
            .collector
            .wait_for_sample("a connection that waits", is_it)?;
        let process = sample.process.as_ref().context("no owner")?;
        ensure!(
            process.pid == pair.server.pid() && process.origin == Origin::Creator,
            "{sample}"
        );
    }
    Ok(())
}

/// Returns the count of dropped connections in the thread's network namespace.
fn listen_drops() -> anyhow::Result<u32> {
    kernel::tcp_counter("ListenDrops")
}

/// The kernel drops the attempts to connect to a listener whose queue is full.
fn listener_is_sampled_with_its_drops() -> anyhow::Result<()> {
    const BACKLOG: u32 = 1;
    // The queue takes one more.
    const FIT: u32 = BACKLOG + 1;
    let collector = Collector::start_sampling()?;
    let listener = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    listener.bind(&loopback(false).into())?;
    listener.listen(BACKLOG as i32)?;
    let address = listener.local_addr()?.as_socket().context("an address")?;
    let info = |dropped: bool| {
        let sample = collector.wait_for_sample("the listener", |event| {
            event.socket.local == address
                && matches!(&event.kind, EventKind::Sample { info: SampleInfo::Tcp(info) }
                            if info.drops.is_some_and(|drops| (drops > 0) == dropped))
        })?;
        match sample.kind {
            EventKind::Sample {
                info: SampleInfo::Tcp(info),
            } => Ok(info),
            kind => bail!("{kind:?}"),
        }
    };
    let fit = (0..FIT).map(|_| TcpStream::connect(address));
    let _fit = fit.collect::<Result<Vec<_>, _>>()?;
    ensure!(listen_drops()? == 0);
    let before = info(false)?;
    ensure!(
        (before.unacked, before.sacked) == (FIT, BACKLOG),
        "{before:?}"
    );

    // Each is dropped at once, and again when its SYN is retransmitted.
    let mut refused = Vec::new();
    for _ in 0..3 {
        let client = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        client.set_nonblocking(true)?;
        ensure!(client.connect(&address.into()).is_err());
        refused.push(client);
    }
    let at_least = listen_drops()?;
    ensure!(at_least >= 3, "{at_least}");
    let full = info(true)?;
    let at_most = listen_drops()?;
    ensure!(
        full.drops
            .is_some_and(|drops| (at_least..=at_most).contains(&drops)),
        "not {at_least} to {at_most}: {full:?}"
    );
    ensure!((full.unacked, full.sacked) == (FIT, BACKLOG), "{full:?}");
    // No other socket has the number.
    let client = collector.wait_for_sample("a client", |event| event.socket.remote == address)?;
    ensure!(serde_json::to_value(&client.kind)?["info"]["drops"].is_null());
    Ok(())
}

fn udp_sample_has_queues_buffers_and_drops() -> anyhow::Result<()> {
    const SENT: usize = 100;
    let collector = Collector::start_udp_with(|builder| builder.sample_interval(SAMPLE_INTERVAL))?;
    for v6 in [false, true] {
        let mut receiver = UdpActor::bind("receiver", loopback(v6))?;
        let mut sender = UdpActor::open("sender", loopback(v6))?;
        receiver.set(SocketOption::ReceiveBuffer(4_000))?;
        sender.send(SendCall::SendTo, Some(receiver.local()), &[100; SENT])?;
        let buffer = socket2::SockRef::from(&receiver.actor.lend(&receiver.socket)?.as_fd())
            .recv_buffer_size()?;
        let sample = |collector: &Collector| {
            let sample = collector
                .wait_for_sample("the receiver", |event| is_of(event, receiver.socket.cookie))?;
            match &sample.kind {
                EventKind::Sample {
                    info: SampleInfo::Udp(info),
                } => Ok((sample.clone(), **info)),
                _ => bail!("{sample:?}"),
            }
        };
        let (full, info) = sample(&collector)?;
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
        // Each datagram takes more memory than its payload.
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
        let empty = collector.wait_for_sample("the receiver", |event| {
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
        receiver.expected.hears(from);
        sender.close()?;
        receiver.close()?;
    }
    collector.finish_in_order(4).map(drop)
}

fn samples_can_be_switched_off() -> anyhow::Result<()> {
    let collector = Collector::start_with(|builder| builder.sample_interval(None))?;
    let hooks = collector.handle().hooks();
    ensure!(
        hooks.iter().all(|hook| hook.signal != "sample"),
        "{hooks:?}"
    );
    let mut pair = TcpPair::traced_by(Collector::start_sampling()?, loopback(false))?;
    let connection = pair.connect()?;
    // The other tracer has sampled it, twice.
    for _ in 0..2 {
        pair.collector
            .wait_for_sample("the client", |event| is_of(event, connection.client.cookie))?;
    }
    ensure!(collector.samples().is_empty() && collector.handle().stats().sample_rounds == 0);
    Ok(())
}
