//! What happens when the buffer or the queue is full.

use std::{
    collections::HashSet,
    net::{SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::ensure;
use integration_tests::{
    collect::rest,
    netns::Netns,
    scene::Scene,
    suite::Test,
    trace::{self, Trace, check_conservation, show},
};
use tcp_udp_trace::{Buffer, Event, EventKind, LossStage, OverflowPolicy, TcpState, TcpTracer};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Solitude: [
            queue_overflow_sheds_the_oldest,
            queue_overflow_sheds_the_newest,
            closes_outlive_a_flood_of_datagrams,
            ring_overflow_is_counted_where_it_happened,
            closes_that_find_the_ring_full_come_late,
        ],
    ]
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
    let tracer = runtime.block_on(builder.start())?;
    let reference = Trace::start()?;
    for _ in 0..20 {
        let connection = scene.connect()?;
        scene.close(&connection)?;
    }
    let reference = reference.finish_in_order(40)?;
    tracer.handle().stop();
    let (events, stats) = runtime.block_on(rest(tracer))?;
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
    let tracer = runtime.block_on(builder.start())?;
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
        Ok(rest(tracer).await?)
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
    let tracer = runtime.block_on(
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
    let (events, stats) = runtime.block_on(rest(tracer))?;
    check_conservation(&stats)?;
    let closed: HashSet<_> = events
        .iter()
        .filter(|event| event.is_end() && event.socket.netns == netns)
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
    let of_sender = |event: &&Event| event.is_end() && event.traffic.tx_packets > 0;
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
    let tracer = runtime.block_on(builder.start())?;
    for connection in 1..=CONNECTIONS {
        let ends = scene.connect()?;
        scene.upload(&ends, connection)?;
        scene.close(&ends)?;
    }
    tracer.handle().stop();
    let (events, stats) = runtime.block_on(rest(tracer))?;
    check_conservation(&stats)?;
    ensure!(stats.ring_lost > 4 * CONNECTIONS, "{stats:?}");
    let closes = || {
        let closes = events.iter().filter(|event| event.is_end());
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
