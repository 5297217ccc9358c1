//! The reports of a flow: their numbers are exact, or marked as approximate.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use integration_tests::{
    actor::{Operation, ReceiveCall, Segmentation, SendCall, SocketOption},
    collector::{Collector, show},
    flow_sums::FlowSums,
    netns::Netns,
    suite::Test,
    tcp_pair::loopback,
    udp_pair::{Family, UdpPair},
};
use tcp_udp_trace::{Event, EventKind, Filter};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            merged_receives_after_a_send_are_approximate,
            the_least_recently_used_makes_room,
            sums_are_exact_whatever_makes_room,
        ],
    ]
}

/// Each report after the first receive is marked if its numbers may be too small, though the flow
/// began with a datagram sent.
fn merged_receives_after_a_send_are_approximate() -> anyhow::Result<()> {
    const SENDS: usize = 10;
    const BYTES: usize = 5_000;
    for family in Family::ALL {
        let collector = Collector::start_udp()?;
        let mut pair = UdpPair::new(family, true)?;
        pair.sender.set(SocketOption::Merge)?;
        pair.sender.send(SendCall::SendTo, None, &[5])?;
        pair.receiver.receive(ReceiveCall::RecvFrom, 1)?;
        for _ in 0..SENDS {
            let by = Segmentation::ControlMessage;
            pair.receiver.send_segments(by, None, BYTES, 500)?;
            let bytes = BYTES as u64;
            pair.sender.run(Operation::ReceiveMerged { bytes })?;
        }
        let cookie = pair.sender.socket.cookie;
        let is_received = |event: &Event| {
            matches!(event.kind, EventKind::Flow { .. })
                && event.socket.cookie == Some(cookie)
                && event.traffic.rx_bytes > 0
        };
        collector.wait_for("a report before the end", is_received)?;
        let approximate = !collector.names_every_peer();
        let expected = pair.close()?;
        let mut seen = collector.finish_udp(2)?;
        let events = seen.check(&expected[0])?;
        for event in events.iter().filter(|event| is_received(event)) {
            let is_right =
                matches!(event.kind, EventKind::Flow { approximate: is, .. } if is == approximate);
            ensure!(is_right, "approximate: {approximate} expected: {event}");
        }
        seen.check_all(&expected[1..])?;
    }
    Ok(())
}

const FLOWS: u32 = 200;

/// Returns an address of the loopback network.
fn stranger(number: u32) -> SocketAddr {
    let [_, a, b, c] = number.to_be_bytes();
    SocketAddr::from(([127, 1 + a, b, c], 9))
}

/// Starts a tracer with room for few flows, all of which are of this test.
fn start(interval: Duration) -> anyhow::Result<Collector> {
    let filter = Filter::new().netns(Netns::current()?.inode()?);
    Collector::start_udp_with(move |builder| {
        let builder = builder.filter(filter).interval(interval);
        builder.max_flows(FLOWS)
    })
}

/// A flow that is used all the time is kept, however many others come and fall silent. The reports
/// of each of the others are complete.
fn the_least_recently_used_makes_room() -> anyhow::Result<()> {
    const ROUNDS: u32 = 40;
    let collector = start(tcp_udp_trace::DEFAULT_INTERVAL)?;
    let socket = UdpSocket::bind(loopback(false))?;
    let silent = UdpSocket::bind(loopback(false))?;
    let steady = silent.local_addr()?;
    for number in 0..FLOWS * 2 {
        socket.send_to(b"stranger", stranger(number))?;
    }
    // These flows fall silent before the next ones come.
    let deadline = Instant::now() + tcp_udp_trace::DEFAULT_INTERVAL * 2;
    while Instant::now() < deadline {
        socket.send_to(b"steady", steady)?;
        std::thread::sleep(Duration::from_millis(100));
    }
    let before = collector
        .events()
        .iter()
        .filter(|event| event.socket.remote == steady)
        .count();
    for round in 0..ROUNDS {
        for number in 0..10 {
            socket.send_to(b"new", stranger(10_000 + round * 10 + number))?;
        }
        socket.send_to(b"steady", steady)?;
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(socket);
    drop(silent);
    collector.wait_closed(2)?;
    let handle = collector.handle().clone();
    let events = collector.finish_all()?;
    let stats = handle.stats();
    let evicted = u64::from(FLOWS * 2 + ROUNDS * 10 + 1 - FLOWS);
    ensure!(
        stats.flows_evicted == evicted,
        "{evicted} expected: {stats:?}"
    );
    ensure!(stats.unassigned == 0, "{stats:?}");
    let of_steady: Vec<_> = events
        .into_iter()
        .filter(|event| event.socket.remote == steady)
        .collect();
    let lasts = of_steady
        .iter()
        .filter(|event| matches!(event.kind, EventKind::Flow { last: true, .. }))
        .count();
    ensure!(before > 0 && lasts == 1, "{}", show(&of_steady));
    Ok(())
}

/// There are more peers than the tracer remembers, each more than once, while the tracer looks. The
/// reports add up to the datagrams sent. A datagram that meets the removal of its flow counts as
/// unassigned, and may be in the flow's reports.
fn sums_are_exact_whatever_makes_room() -> anyhow::Result<()> {
    const PEERS: u32 = 1_000;
    const SOCKETS: u32 = 3;
    let collector = start(Duration::from_millis(10))?;
    let mut truth = BTreeMap::<SocketAddr, u64>::new();
    for _ in 0..SOCKETS {
        let socket = UdpSocket::bind(loopback(false))?;
        for number in 0..PEERS * 8 {
            // Each peer comes back, some soon and some late.
            let to = stranger((number.wrapping_mul(2_654_435_761) >> 16) % PEERS);
            socket.send_to(b"datagram", to)?;
            *truth.entry(to).or_default() += 1;
        }
    }
    collector.wait_closed(SOCKETS as usize)?;
    let handle = collector.handle().clone();
    let events = collector.finish_all()?;
    let stats = handle.stats();
    ensure!(stats.flows_evicted > u64::from(FLOWS), "{stats:?}");
    let mut sums = FlowSums::default();
    events.iter().for_each(|event| sums.add(event));
    let mut sent = BTreeMap::<SocketAddr, u64>::new();
    for ((_, peer), traffic) in sums.sums() {
        *sent.entry(peer).or_default() += traffic.tx_packets;
    }
    let mut lacking = 0;
    for (peer, packets) in &truth {
        let reported = sent.remove(peer).unwrap_or_default();
        let lacks = packets.checked_sub(reported);
        lacking += lacks.with_context(|| format!("{peer}: {reported} of {packets}"))?;
    }
    ensure!(sent.is_empty(), "no datagrams counted to {sent:?}");
    ensure!(
        lacking <= stats.unassigned && stats.unassigned < u64::from(PEERS),
        "{lacking} are lacking: {stats:?}"
    );
    Ok(())
}
