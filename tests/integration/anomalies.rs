//! Retransmissions and resets, which a tracer reports on request.

use std::{
    collections::BTreeSet,
    net::{SocketAddr, TcpStream},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use integration_tests::{
    actor::{Actor, Command},
    collector::{Collector, show},
    expected_tcp::{ACTIVE_CLIENT, ExpectedTcp},
    kernel,
    netns::{FAR, NEAR, ip, veth},
    observed_tcp::ObservedTcp,
    suite::{Test, skip},
    tcp_info,
    tcp_pair::{Connection, TcpPair, loopback},
};
use socket2::{Domain, SockAddr, Socket, Type};
use tcp_udp_trace::{Direction, Event, EventKind, ResetDirection, Retransmission};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            retransmissions_are_those_that_the_socket_counts,
            handshake_that_is_not_answered,
            resets_at_either_end,
            refused_connection_is_a_reset,
            connections_that_a_full_queue_refuses,
            nothing_of_it_by_default,
        ],
    ]
}

fn start() -> anyhow::Result<Collector> {
    Collector::start_with(|builder| builder.retransmits(true).resets(true))
}

/// Returns the anomalies of the socket with this local address.
fn anomalies(events: &[Event], local: SocketAddr) -> Vec<EventKind> {
    let is_one =
        |kind: &EventKind| matches!(kind, EventKind::Retransmit { .. } | EventKind::Reset { .. });
    let ours = events.iter().filter(|event| event.socket.local == local);
    ours.map(|event| event.kind.clone())
        .filter(is_one)
        .collect()
}

/// The far end loses its address for a while, so the kernel retransmits the segments.
fn retransmissions_are_those_that_the_socket_counts() -> anyhow::Result<()> {
    const BYTES: u64 = 1_000;
    const AT_LEAST: u64 = 3;
    let far = veth()?;
    let collector = start()?;
    let server = far.run(|| Actor::spawn("server"))?;
    let address = SocketAddr::new(FAR.parse()?, 0);
    let mut pair = TcpPair::traced_between(collector, server, address, Actor::spawn("client")?)?;
    let Connection { client, server } = pair.connect()?;
    let socket = pair.client.lend(&client)?;
    let number = |name: &str| {
        let info = tcp_info::of(&socket)?;
        let number = info.iter().find(|(found, _)| *found == name);
        number.map(|(_, number)| *number).context("no such number")
    };
    let retransmitted = || number("total_retrans");
    far.run(|| ip(&format!("addr del {FAR}/24 dev far0")))?;
    pair.client.send(&client, BYTES)?;
    while retransmitted()? < AT_LEAST {
        sleep(Duration::from_millis(10));
    }
    far.run(|| ip(&format!("addr add {FAR}/24 dev far0")))?;
    pair.server.receive(&server, BYTES)?;
    let (total, bytes) = (retransmitted()?, number("bytes_retrans")?);
    // Closed before the client's descriptor, which must be the last one.
    drop(socket);
    pair.close(&Connection { client, server })?;
    pair.server.close(&pair.listener)?;
    let events = pair.collector.finish_in_order(3)?;
    let reported = anomalies(&events, client.local);
    let mut sums = (0, 0);
    for kind in &reported {
        let EventKind::Retransmit {
            what: Some(Retransmission::Timeout | Retransmission::Probe),
            packets,
            bytes,
        } = *kind
        else {
            bail!("{kind:?}:{}", show(&events));
        };
        sums = (sums.0 + u64::from(packets), sums.1 + u64::from(bytes));
    }
    ensure!(
        sums == (total, bytes),
        "{total} {bytes}, but{}",
        show(&events)
    );
    let is_timeout = |kind: &EventKind| {
        matches!(
            kind,
            EventKind::Retransmit {
                what: Some(Retransmission::Timeout),
                ..
            }
        )
    };
    ensure!(reported.iter().any(is_timeout), "{}", show(&events));
    let identity = pair.client.identity()?;
    let is_one = |event: &&Event| matches!(event.kind, EventKind::Retransmit { .. });
    for event in events.iter().filter(is_one) {
        let pid = event.process.as_ref().map(|process| process.pid);
        ensure!(pid == Some(identity.pid), "{event}");
    }
    Ok(())
}

/// The server's SYN-ACKs go to a hardware address that no device has, until both ends have
/// retransmitted.
fn handshake_that_is_not_answered() -> anyhow::Result<()> {
    let far = veth()?;
    far.run(|| {
        ip(&format!(
            "neigh replace {NEAR} lladdr 02:00:00:00:00:99 dev far0 nud permanent"
        ))
    })?;
    let collector = start()?;
    let server = far.run(|| Actor::spawn("server"))?;
    let address = SocketAddr::new(FAR.parse()?, 0);
    let mut pair = TcpPair::traced_between(collector, server, address, Actor::spawn("client")?)?;
    let listener = pair.listener.local;
    let socket = pair.client.open(listener)?;
    pair.client.begin(&Command::Connect(socket.fd, listener))?;
    let is = |event: &Event, expected| {
        matches!(event.kind, EventKind::Retransmit { what: Some(what), packets: 1, bytes: 0 }
            if what == expected)
    };
    pair.collector.wait_for("a SYN", |event| {
        is(event, Retransmission::Syn)
            && event.socket.remote == listener
            && event.socket.direction == Some(Direction::Outbound)
    })?;
    pair.collector.wait_for("a SYN-ACK", |event| {
        is(event, Retransmission::SynAck)
            && event.socket.local == listener
            && event.socket.remote.ip().to_string() == NEAR
            && event.socket.direction == Some(Direction::Listener)
    })?;
    far.run(|| ip(&format!("neigh del {NEAR} dev far0")))?;
    let client = pair.client.finish_socket()?;
    let server = pair.server.accept(&pair.listener)?;
    pair.close(&Connection { client, server })?;
    pair.collector.finish_all().map(drop)
}

fn resets_at_either_end() -> anyhow::Result<()> {
    let mut pair = TcpPair::traced_by(start()?, loopback(true))?;
    let connection = pair.connect()?;
    pair.client.abort(&connection.client)?;
    pair.collector.wait_for("the server's reset", |event| {
        event.socket.local == connection.server.local
            && matches!(event.kind, EventKind::Reset { .. })
    })?;
    pair.server.close(&connection.server)?;
    pair.server.close(&pair.listener)?;
    let events = pair.collector.finish_in_order(3)?;
    for (local, direction) in [
        (connection.client.local, ResetDirection::Sent),
        (connection.server.local, ResetDirection::Received),
    ] {
        let reported = anomalies(&events, local);
        let [
            EventKind::Reset {
                direction: is,
                reason,
            },
        ] = &reported[..]
        else {
            bail!("{reported:?} at {local}:{}", show(&events));
        };
        ensure!(*is == direction, "{reported:?}");
        // The kernel has a reason of what it sends.
        let has_reason = kernel::is_at_least(6, 10)? && direction == ResetDirection::Sent;
        ensure!(reason.is_some() == has_reason, "{reported:?}");
    }
    Ok(())
}

fn refused_connection_is_a_reset() -> anyhow::Result<()> {
    let mut pair = TcpPair::traced_by(start()?, loopback(false))?;
    let closed = pair.listener.local;
    pair.server.close(&pair.listener)?;
    let socket = pair.client.open(closed)?;
    pair.client.fail(Command::Connect(socket.fd, closed))?;
    pair.client.close(&socket)?;
    let events = pair.collector.finish_in_order(2)?;
    let resets: Vec<_> = events
        .iter()
        .filter(|event| matches!(event.kind, EventKind::Reset { .. }))
        .collect();
    // The reset from the listener's namespace belongs to no socket, so it is no event.
    let received = EventKind::Reset {
        direction: ResetDirection::Received,
        reason: None,
    };
    ensure!(
        matches!(resets[..], [reset] if reset.kind == received && reset.socket.remote == closed),
        "{}",
        show(&events)
    );
    Ok(())
}

/// Each segment that the kernel counts is an event of the listener, with the addresses of the
/// client.
fn connections_that_a_full_queue_refuses() -> anyhow::Result<()> {
    const BACKLOG: i32 = 1;
    const CLIENTS: u32 = 5;
    let overflows = || kernel::tcp_counter("ListenOverflows");
    for v6 in [false, true] {
        let before = overflows()?;
        let collector = Collector::start_with(|builder| builder.listen_overflows(true))?;
        let mut hooks = collector.handle().hooks().into_iter();
        let hook = hooks.find(|hook| hook.signal == "listen_overflow");
        if hook.context("no signal")?.programs.is_empty() {
            return skip("this kernel has no kprobes");
        }
        let domain = Domain::for_address(loopback(v6));
        let socket = || Socket::new(domain, Type::STREAM, None);
        let listener = socket()?;
        listener.bind(&loopback(v6).into())?;
        listener.listen(BACKLOG)?;
        let address = listener.local_addr()?.as_socket().context("an address")?;
        // The queue takes one more than its backlog.
        let fit = (0..=BACKLOG).map(|_| TcpStream::connect(address));
        let fit = fit.collect::<Result<Vec<_>, _>>()?;
        ensure!(overflows()? == before);
        let mut refused = Vec::new();
        for _ in 0..CLIENTS {
            let client = socket()?;
            client.bind(&loopback(v6).into())?;
            client.set_nonblocking(true)?;
            ensure!(client.connect(&address.into()).is_err());
            refused.push(client);
        }
        let locals = refused.iter().map(|client| client.local_addr());
        let locals = locals.collect::<Result<Vec<_>, _>>()?;
        let locals: BTreeSet<_> = locals.iter().filter_map(SockAddr::as_socket).collect();
        // The kernel drops a SYN again when it is retransmitted.
        while overflows()? - before <= CLIENTS {
            sleep(Duration::from_millis(10));
        }
        // The clients give up.
        drop(refused);
        let counted = overflows()? - before;
        drop((listener, fit));
        let events = collector.finish_all()?;
        let is_overflow = |event: &&Event| matches!(event.kind, EventKind::ListenOverflow);
        let reported: Vec<_> = events.iter().filter(is_overflow).collect();
        ensure!(
            reported.len() == counted as usize,
            "{counted}:{}",
            show(&events)
        );
        for event in reported {
            let pid = event.process.as_ref().map(|process| process.pid);
            ensure!(pid == Some(std::process::id()), "{event}");
            ensure!(
                event.socket.local == address
                    && locals.contains(&event.socket.remote)
                    && event.socket.direction == Some(Direction::Listener),
                "{event}"
            );
        }
    }
    Ok(())
}

fn nothing_of_it_by_default() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    let aborted = pair.connect()?;
    pair.client.abort(&aborted.client)?;
    pair.server.close(&aborted.server)?;
    let connection = pair.connect()?;
    pair.close(&connection)?;
    pair.server.close(&pair.listener)?;
    let events = pair.collector.finish_in_order(5)?;
    for local in [aborted.client.local, aborted.server.local] {
        ensure!(anomalies(&events, local).is_empty(), "{}", show(&events));
    }
    let identity = pair.client.identity()?;
    let mut observed = ObservedTcp::new(events, std::time::UNIX_EPOCH);
    observed.check(&ExpectedTcp::of(
        &identity,
        &connection.client,
        ACTIVE_CLIENT,
    ))?;
    Ok(())
}
