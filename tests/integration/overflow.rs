//! Overflow of the buffer or the queue.

use std::{
    collections::HashSet,
    fs,
    hint::black_box,
    net::{SocketAddr, UdpSocket},
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use integration_tests::{
    any_tracer::rest,
    collector::{self, Collector, check_conservation, show, without_summary},
    crowd,
    netns::Netns,
    suite::{self, Test},
    tcp_pair::TcpPair,
};
use tcp_udp_trace::{
    Buffer, Error, Event, EventKind, Filter, LossStage, OverflowPolicy, Stats, TcpState, TcpTracer,
    TcpTracerBuilder,
};
use tokio::runtime::Runtime;

/// How long the reader may take.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Solitude: [
            default_settings_lose_nothing,
            default_settings_lose_nothing_of_ab,
            records_stay_in_the_ring_while_the_queue_is_full,
            queue_overflow_sheds_the_oldest,
            queue_overflow_sheds_the_newest,
            closes_outlive_a_flood_of_datagrams,
            ring_overflow_is_counted_where_it_happened,
            closes_that_find_the_ring_full_come_late,
        ],
    ]
}

/// The reader is a task of a runtime that does not run while events are made, so the ring fills up.
/// The records that fitted are delivered, then the gap is reported, and nothing is missing from the
/// sum.
fn ring_overflow_is_counted_where_it_happened() -> anyhow::Result<()> {
    const RING_BYTES: u32 = 4096;
    /// At least this many fit: no record is longer, header included, and the last eighth is
    /// reserved.
    const ROOM: usize = RING_BYTES as usize / 8 * 7 / 256;
    let mut pair = TcpPair::new()?;
    let here = Netns::current()?.inode()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let builder = collector::tcp()
        .ring_bytes(collector::bytes_for_a_cpu(RING_BYTES))
        .queue(1 << 20)
        .sample_interval(None);
    let tracer = runtime.block_on(builder.start())?;
    let reference = Collector::start()?;
    for _ in 0..20 {
        let connection = pair.connect()?;
        pair.close(&connection)?;
    }
    let reference = reference.finish_in_order(40)?;
    tracer.handle().stop();
    let (events, stats) = runtime.block_on(rest(tracer))?;
    check_conservation(&stats)?;
    let lost = |event: &Event| lost(event, LossStage::Ring);
    let reported: u64 = events.iter().map(lost).sum();
    ensure!(
        reported > 0 && reported == stats.ring_lost,
        "reported {reported}: {stats:?}"
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
    let ours: Vec<_> = ours.map(event_key).collect();
    let reference: Vec<_> = reference.iter().map(event_key).collect();
    let gap = Gap::between(&ours, &reference)?;
    ensure!(gap.before + AT_ONCE >= ours.len(), "{gap:?}");
    Ok(())
}

/// 5,000 connections of ten clients, and README's program with everything at its default.
fn default_settings_lose_nothing() -> anyhow::Result<()> {
    const CLIENTS: u32 = 10;
    const EACH: u32 = 500;
    // Both ends of each connection, and the listener.
    let expected_closes = 2 * (CLIENTS * EACH) as usize + 1;
    let events = readme_program(expected_closes, || crowd::connect(CLIENTS, EACH))?;
    let count = |is_it: fn(&Event) -> bool| events.iter().filter(|event| is_it(event)).count();
    let accepts = count(|event| event.kind == EventKind::Accept);
    let established = count(
        |event| matches!(event.kind, EventKind::StateChange { to, .. } if to == TcpState::Established),
    );
    // Without the closes of children that were never established, of which old kernels now and then
    // make one.
    let closes = count(|event| {
        matches!(event.kind, EventKind::StateChange { from, to: TcpState::Close, .. }
            if from != TcpState::SynRecv)
    });
    let connections = (CLIENTS * EACH) as usize;
    ensure!(
        (accepts, established, closes) == (connections, 2 * connections, expected_closes),
        "{accepts} accepts, {established} established, {closes} closes"
    );
    Ok(())
}

/// The same with the load generator that a newcomer would try first.
fn default_settings_lose_nothing_of_ab() -> anyhow::Result<()> {
    const CONNECTIONS: usize = 5_000;
    let events = readme_program(0, crowd::apache_bench)?;
    let accepts = events
        .iter()
        .filter(|event| event.kind == EventKind::Accept)
        .count();
    ensure!(accepts >= CONNECTIONS, "{accepts} accepts");
    Ok(())
}

/// Runs README's program on the runtime of `#[tokio::main]` during `traffic`, until it has reported
/// so many closes. Returns the events of this namespace, none of which is lost.
fn readme_program(
    expected_closes: usize,
    traffic: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Event>> {
    let netns = Netns::current()?.inode()?;
    let runtime = Runtime::new()?;
    let mut tracer = runtime.block_on(collector::tcp().start())?;
    let handle = tracer.handle();
    let closes = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&closes);
    let consumer = thread::spawn(move || {
        runtime.block_on(async {
            let mut events = Vec::new();
            while let Some(event) = tracer.next().await {
                if event.socket.netns == netns && event.is_end() {
                    counted.fetch_add(1, Ordering::Relaxed);
                }
                // Formats the event, which takes as long as printing it.
                black_box(event.to_string());
                events.push(event);
            }
            Ok::<_, Error>((events, tracer.close().await?))
        })
    });
    let traffic = traffic();
    // On a busy machine, the kernel closes the last connections after their processes did.
    let deadline = Instant::now() + Duration::from_secs(10);
    while closes.load(Ordering::Relaxed) < expected_closes && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    // The tracer ends here, also if the traffic failed.
    handle.stop();
    let (events, stats) = consumer.join().unwrap()?;
    traffic?;
    check_conservation(&stats)?;
    ensure!(stats.ring_lost + stats.queue_shed == 0, "{stats:?}");
    ensure!(stats.delivered == events.len() as u64, "{stats:?}");
    let ours = events.into_iter();
    Ok(ours.filter(|event| event.socket.netns == netns).collect())
}

/// A consumer that pauses finds all events for which the ring had room, also those from before the
/// tracer was stopped.
fn records_stay_in_the_ring_while_the_queue_is_full() -> anyhow::Result<()> {
    const QUEUE: usize = 8;
    const CONNECTIONS: usize = 50;
    let builder = collector::tcp().queue(QUEUE).sample_interval(None);
    let (events, stats, reference) = read_late(builder, CONNECTIONS)?;
    ensure!(
        stats.delivered == stats.emitted && stats.delivered > QUEUE as u64,
        "{stats:?}"
    );
    let netns = reference[0].socket.netns;
    let ours = events.iter().filter(|event| event.socket.netns == netns);
    let ours: Vec<_> = ours.map(event_key).collect();
    let reference: Vec<_> = reference.iter().map(event_key).collect();
    let gap = Gap::between(&ours, &reference)?;
    ensure!(gap.before == reference.len(), "{gap:?}");
    Ok(())
}

/// Makes connections, and reads the tracer only after it was stopped. Returns its events and
/// counts, and the events that another tracer saw.
fn read_late(
    builder: TcpTracerBuilder,
    connections: usize,
) -> anyhow::Result<(Vec<Event>, Stats, Vec<Event>)> {
    let mut pair = TcpPair::new()?;
    // No two connections have the same ports, however long that takes.
    fs::write("/proc/sys/net/ipv4/tcp_tw_reuse", "0")?;
    let runtime = Runtime::new()?;
    let tracer = runtime.block_on(builder.start())?;
    let reference = Collector::start()?;
    for _ in 0..connections {
        let connection = pair.connect()?;
        pair.close(&connection)?;
    }
    let reference = reference.finish_in_order(2 * connections)?;
    tracer.handle().stop();
    let (events, stats) = runtime.block_on(rest(tracer))?;
    check_conservation(&stats)?;
    Ok((events, stats, reference))
}

/// A consumer that comes only after ring and queue are full finds the newest lifecycle events.
fn queue_overflow_sheds_the_oldest() -> anyhow::Result<()> {
    overflow(OverflowPolicy::ShedOldest, |gap| gap.before <= AT_ONCE)
}

/// With the other policy, it finds the oldest ones in the queue, and those that were still in the
/// ring.
fn queue_overflow_sheds_the_newest() -> anyhow::Result<()> {
    overflow(OverflowPolicy::ShedNewest, |gap| gap.before > AT_ONCE)
}

type EventKey = (EventKind, SocketAddr, SocketAddr);

fn event_key(event: &Event) -> EventKey {
    (
        without_summary(event),
        event.socket.local,
        event.socket.remote,
    )
}

/// By how many places two tracers may disagree about the order: two CPUs change the states of two
/// sockets at once.
const AT_ONCE: usize = 4;

/// The events that are missing.
#[derive(Debug)]
struct Gap {
    /// How many events are there before the first missing one.
    before: usize,
    /// How many events are there between the first and the last missing one.
    inside: usize,
    /// How many events are there after the last missing one.
    after: usize,
    /// The places of the missing events.
    #[expect(dead_code, reason = "for the message of a failure")]
    missing: Vec<Range<usize>>,
}

impl Gap {
    /// Compares the events that are left with all of them.
    fn between(kept: &[EventKey], all: &[EventKey]) -> anyhow::Result<Self> {
        let mut is_kept = vec![false; all.len()];
        for event_key in kept {
            let mut same = all.iter().zip(&is_kept);
            let at = same.position(|(is, is_kept)| is == event_key && !is_kept);
            is_kept[at.with_context(|| format!("{event_key:?} did not happen"))?] = true;
        }
        let before = is_kept.iter().take_while(|kept| **kept).count();
        let after = is_kept[before..]
            .iter()
            .rev()
            .take_while(|kept| **kept)
            .count();
        let mut missing = Vec::new();
        let mut place = 0;
        for row in is_kept.chunk_by(|a, b| a == b) {
            if !row[0] {
                missing.push(place..place + row.len());
            }
            place += row.len();
        }
        Ok(Self {
            before,
            inside: kept.len() - before - after,
            after,
            missing,
        })
    }
}

/// Returns the lifecycle events, without those of sockets that do not have both ports yet, which
/// are all alike.
fn lifecycle<'a>(events: impl Iterator<Item = &'a Event>) -> Vec<EventKey> {
    use TcpState::{Close, Established, Listen};
    let is_lifecycle = |event: &&Event| match event.kind {
        EventKind::StateChange { from, to, .. } => [from, to]
            .into_iter()
            .any(|state| matches!(state, Close | Established | Listen)),
        EventKind::Lost { .. } => false,
        _ => true,
    };
    let has_ports = |event: &&Event| {
        let ports = [event.socket.local, event.socket.remote].map(|address| address.port());
        !ports.contains(&0)
    };
    events
        .filter(is_lifecycle)
        .filter(has_ports)
        .map(event_key)
        .collect()
}

/// Lets a small ring and a queue of eight overflow. Lifecycle events are missing in one place,
/// which `is_right` checks.
fn overflow(policy: OverflowPolicy, is_right: impl FnOnce(&Gap) -> bool) -> anyhow::Result<()> {
    const QUEUE: usize = 8;
    const RING_BYTES: u32 = 1 << 16;
    /// Their records are ten times the size of the ring.
    const CONNECTIONS: usize = 400;
    let builder = collector::tcp()
        .ring_bytes(collector::bytes_for_a_cpu(RING_BYTES))
        .queue(QUEUE)
        .overflow(policy)
        .filter(Filter::new().netns(Netns::current()?.inode()?))
        .sample_interval(None);
    let (events, stats, reference) = read_late(builder, CONNECTIONS)?;
    for (stage, count) in [
        (LossStage::Ring, stats.ring_lost),
        (LossStage::Queue, stats.queue_shed),
    ] {
        let reported: u64 = events.iter().map(|event| lost(event, stage)).sum();
        ensure!(
            reported == count,
            "{reported} reported at {stage:?}: {stats:?}"
        );
    }
    ensure!(
        stats.queue_shed > 0 && stats.delivered > QUEUE as u64,
        "{stats:?}"
    );
    let kept = lifecycle(events.iter());
    let reference = lifecycle(reference.iter());
    let gap = Gap::between(&kept, &reference)?;
    ensure!(
        is_right(&gap) && gap.inside <= AT_ONCE && gap.after > 0,
        "{gap:?} of {}: {stats:?}",
        reference.len()
    );
    Ok(())
}

/// Returns how many events of this stage's loss an event stands for.
fn lost(event: &Event, at: LossStage) -> u64 {
    match event.kind {
        EventKind::Lost { count, stage } if stage == at => count,
        _ => 0,
    }
}

/// While the reader does not run, datagrams fill the ring, and then sockets close. When it runs,
/// they fill the queue. No close is missing, and the missing events are counted in the stream.
fn closes_outlive_a_flood_of_datagrams() -> anyhow::Result<()> {
    const DATAGRAMS: u64 = 20_000;
    const SOCKETS: usize = 30;
    let netns = Netns::current()?.inode()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let builder = collector::udp().per_datagram(true).sample_interval(None);
    let tracer = runtime.block_on(
        builder
            .ring_bytes(collector::bytes_for_a_cpu(1 << 18))
            .queue(64)
            .start(),
    )?;
    let sockets = (0..SOCKETS)
        .map(|_| UdpSocket::bind("127.0.0.1:0"))
        .collect::<Result<Vec<_>, _>>()?;
    let to = sockets[0].local_addr()?;
    let flood = || (0..DATAGRAMS / 2).try_for_each(|_| sockets[1].send_to(b"flood", to).map(drop));
    let handle = tracer.handle();
    let read_until = |is_done: fn(&Stats) -> bool| {
        runtime.block_on(async {
            let deadline = Instant::now() + PATIENCE;
            while !is_done(&handle.stats()) {
                ensure!(Instant::now() < deadline, "{:?}", handle.stats());
                tokio::task::yield_now().await;
            }
            Ok(())
        })
    };
    // The reader moves as many records as fit into the queue, and finds the ring full again when it
    // continues. It empties perf buffers into its own memory.
    flood()?;
    read_until(|stats| stats.emitted > stats.ring_lost)?;
    flood()?;
    let sheds = suite::buffer() != Some(Buffer::Perf);
    if sheds {
        read_until(|stats| stats.queue_shed > 0)?;
    }
    let addresses: HashSet<_> = sockets
        .iter()
        .map(|socket| socket.local_addr().unwrap())
        .collect();
    drop(sockets);
    handle.stop();
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
    for (stage, count, is_lossy) in [
        (LossStage::Ring, stats.ring_lost, true),
        (LossStage::Queue, stats.queue_shed, sheds),
    ] {
        let reported: u64 = events.iter().map(|event| lost(event, stage)).sum();
        ensure!(
            reported == count && (reported > 0 || !is_lossy),
            "{reported} reported at {stage:?}: {stats:?}"
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

/// Each of the two rings has room for sixteen events, and the reader does not run. Events of eight
/// connections are lost, but not their ends.
fn closes_that_find_the_ring_full_come_late() -> anyhow::Result<()> {
    // The second ring has room for 13 ends.
    const CONNECTIONS: u64 = 6;
    let mut pair = TcpPair::new()?;
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
        let ends = pair.connect()?;
        pair.upload(&ends, connection)?;
        pair.close(&ends)?;
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
    let reported: u64 = events
        .iter()
        .map(|event| lost(event, LossStage::Ring))
        .sum();
    ensure!(
        reported == stats.ring_lost,
        "{reported} reported: {stats:?}"
    );
    ensure!(
        events.is_sorted_by_key(|event| event.uptime),
        "not in order: {}",
        show(&events)
    );
    Ok(())
}
