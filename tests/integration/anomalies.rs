//! Retransmissions and resets, which a tracer reports on request.

use std::{net::SocketAddr, thread::sleep, time::Duration};

use anyhow::{Context as _, ensure};
use integration_tests::{
    actor::Actor,
    collector::{Collector, show},
    expected_tcp::{ACTIVE_CLIENT, ExpectedTcp},
    netns::{FAR, ip, veth},
    observed_tcp::ObservedTcp,
    suite::Test,
    tcp_info,
    tcp_pair::{Connection, TcpPair, loopback},
};
use tcp_udp_trace::{Event, EventKind, ResetDirection};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            retransmissions_are_those_that_the_socket_counts,
            resets_at_either_end,
            refused_connection_is_a_reset,
            nothing_of_it_by_default,
        ],
    ]
}

fn start() -> anyhow::Result<Collector> {
    Collector::start_with(|builder| builder.retransmits(true).resets(true))
}

/// Returns the anomalies of the socket with this local address.
fn anomalies(events: &[Event], local: SocketAddr) -> Vec<EventKind> {
    let is_one = |kind: &EventKind| matches!(kind, EventKind::Retransmit | EventKind::Reset { .. });
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
    let retransmitted = || {
        let info = tcp_info::of(&socket)?;
        let total = info.iter().find(|(name, _)| *name == "total_retrans");
        total.map(|(_, total)| *total).context("no total_retrans")
    };
    far.run(|| ip(&format!("addr del {FAR}/24 dev far0")))?;
    pair.client.send(&client, BYTES)?;
    while retransmitted()? < AT_LEAST {
        sleep(Duration::from_millis(10));
    }
    far.run(|| ip(&format!("addr add {FAR}/24 dev far0")))?;
    pair.server.receive(&server, BYTES)?;
    let total = retransmitted()?;
    // Closed before the client's descriptor, which must be the last one.
    drop(socket);
    pair.close(&Connection { client, server })?;
    pair.server.close(&pair.listener)?;
    let events = pair.collector.finish_in_order(3)?;
    let reported = anomalies(&events, client.local);
    ensure!(
        reported == vec![EventKind::Retransmit; usize::try_from(total)?],
        "{total}, but{}",
        show(&events)
    );
    let identity = pair.client.identity()?;
    for event in events.iter().filter(|e| e.kind == EventKind::Retransmit) {
        let pid = event.process.as_ref().map(|process| process.pid);
        ensure!(pid == Some(identity.pid), "{event}");
    }
    Ok(())
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
        ensure!(
            reported == [EventKind::Reset { direction }],
            "{reported:?} at {local}:{}",
            show(&events)
        );
    }
    Ok(())
}

fn refused_connection_is_a_reset() -> anyhow::Result<()> {
    let mut pair = TcpPair::traced_by(start()?, loopback(false))?;
    let closed = pair.listener.local;
    pair.server.close(&pair.listener)?;
    let socket = pair.client.open(closed)?;
    pair.client
        .fail(integration_tests::actor::Command::Connect(
            socket.fd, closed,
        ))?;
    pair.client.close(&socket)?;
    let events = pair.collector.finish_in_order(2)?;
    let resets: Vec<_> = events
        .iter()
        .filter(|event| matches!(event.kind, EventKind::Reset { .. }))
        .collect();
    // The reset from the listener's namespace belongs to no socket, so it is no event.
    let received = EventKind::Reset {
        direction: ResetDirection::Received,
    };
    ensure!(
        matches!(resets[..], [reset] if reset.kind == received && reset.socket.remote == closed),
        "{}",
        show(&events)
    );
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
