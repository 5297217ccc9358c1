//! The tools for consumers: the increments, the set of connections, the merged stream and recorded
//! events agree with what the tests sent.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use integration_tests::{
    collector::{self, show},
    netns::Netns,
    recording::Recording,
    suite::Test,
    tcp_pair::{TcpPair, loopback},
};
use tcp_udp_trace::{
    Event, EventKind, Filter, Protocol, Traffic,
    consumer::{Connection, Connections, Growth, Increment, merge, replay},
};
use tokio::runtime::Runtime;

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            increments_of_tcp_are_what_was_sent,
            increments_of_older_connections_begin_with_the_first_sample,
            increments_of_udp_are_what_was_sent_whatever_makes_room,
            both_ends_on_the_loopback,
            both_ends_in_two_namespaces,
            merged_events_are_as_ordered_as_each_stream,
            recorded_events_are_replayed,
        ],
        Solitude: [
            increments_are_right_across_lost_events,
        ],
    ]
}

const SAMPLES: Duration = Duration::from_millis(100);
const QUEUE: usize = 1 << 20;

/// Adds up the increments of each socket.
fn sums(events: &[Event], growth: &mut Growth) -> BTreeMap<u64, Increment> {
    let mut sums = BTreeMap::<u64, Increment>::new();
    for event in events {
        let added = growth.add(event);
        let sum = sums.entry(event.socket.id).or_default();
        plus(&mut sum.traffic, added.traffic);
        plus(&mut sum.outside_flows, added.outside_flows);
    }
    sums
}

fn plus(sum: &mut Traffic, added: Traffic) {
    sum.tx_bytes += added.tx_bytes;
    sum.rx_bytes += added.rx_bytes;
    sum.tx_packets += added.tx_packets;
    sum.rx_packets += added.rx_packets;
}

fn bytes(traffic: Traffic) -> (u64, u64) {
    (traffic.tx_bytes, traffic.rx_bytes)
}

/// Returns the ids of the sockets by their addresses, of those that ended.
fn ended(events: &[Event]) -> BTreeMap<(SocketAddr, SocketAddr), &Event> {
    let ends = events.iter().filter(|event| event.is_end());
    ends.map(|end| ((end.socket.local, end.socket.remote), end))
        .collect()
}

fn increments_of_tcp_are_what_was_sent() -> anyhow::Result<()> {
    let tracer = collector::tcp().queue(QUEUE).sample_interval(SAMPLES);
    let mut pair = TcpPair::new()?;
    let mut recording = Recording::of(tracer.blocking()?, &[])?;
    let mut truth = BTreeMap::new();
    for (up, down) in [(0, 0), (1, 70_000), (3_000_000, 5), (100, 100)] {
        let connection = pair.connect()?;
        pair.upload(&connection, up)?;
        let local = connection.client.local;
        // A sample shows a part of the bytes before the rest is sent.
        recording.wait_for("a sample", |event| {
            let is_sample = matches!(event.kind, EventKind::Sample { .. });
            is_sample && event.socket.local == local && event.traffic.tx_bytes == up
        })?;
        pair.download(&connection, down)?;
        pair.close(&connection)?;
        let (near, far) = (local, connection.server.local);
        truth.insert((near, far), (up, down));
        truth.insert((far, near), (down, up));
    }
    recording.wait_ends(truth.len())?;
    let (events, stats) = recording.finish()?;
    ensure!(stats.ring_lost + stats.queue_shed == 0, "{stats:?}");
    let mut growth = Growth::new();
    let sums = sums(&events, &mut growth);
    let ends = ended(&events);
    for (addresses, expected) in &truth {
        let end = ends.get(addresses).context("no end")?;
        let sum = sums[&end.socket.id];
        ensure!(
            bytes(sum.traffic) == *expected,
            "{sum:?}, not {expected:?}: {end}"
        );
        // With the segments, and counted once.
        ensure!(sum.traffic == end.traffic, "{sum:?}: {end}");
    }
    ensure!(growth.forgotten() == 0);
    Ok(())
}

fn increments_of_older_connections_begin_with_the_first_sample() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    let connection = pair.connect()?;
    pair.upload(&connection, 50_000)?;
    let tracer = collector::tcp().queue(QUEUE).sample_interval(SAMPLES);
    let mut recording = Recording::of(tracer.blocking()?, &[])?;
    for end in [connection.client.local, connection.server.local] {
        recording.wait_for("a sample", |event| event.socket.local == end)?;
        // The other end may have come before.
        pair.upload(&connection, 7)?;
    }
    pair.close(&connection)?;
    recording.wait_ends(2)?;
    let (events, _) = recording.finish()?;
    let sums = sums(&events, &mut Growth::new());
    for end in ended(&events).values() {
        let first = events.iter().find(|event| event.socket.id == end.socket.id);
        let first = first.context("no event")?;
        let since = (
            end.traffic.tx_bytes - first.traffic.tx_bytes,
            end.traffic.rx_bytes - first.traffic.rx_bytes,
        );
        let sum = sums[&end.socket.id].traffic;
        ensure!(
            bytes(sum) == since && sum.tx_bytes + sum.rx_bytes <= 14,
            "{sum:?}: {end}"
        );
    }
    Ok(())
}

/// Returns an address of the loopback network.
fn stranger(number: u32) -> SocketAddr {
    let [_, a, b, c] = number.to_be_bytes();
    SocketAddr::from(([127, 1 + a, b, c], 9))
}

/// Sends datagrams of random sizes from some sockets to more peers than fit. Returns the datagrams
/// and bytes of each socket, by its address.
fn datagrams(sockets: u32, each: u32) -> anyhow::Result<BTreeMap<SocketAddr, (u64, u64)>> {
    const PEERS: u32 = 500;
    let mut truth = BTreeMap::new();
    let payload = [0; 300];
    for _ in 0..sockets {
        let socket = UdpSocket::bind(loopback(false))?;
        let mut sum = (0, 0);
        for number in 0..each {
            let random = number.wrapping_mul(2_654_435_761) >> 16;
            let length = random as usize % payload.len();
            socket.send_to(&payload[..length], stranger(random % PEERS))?;
            sum = (sum.0 + 1, sum.1 + length as u64);
            if number % 1_000 == 999 {
                // Flows fall silent, and have idle reports.
                thread::sleep(Duration::from_millis(30));
            }
        }
        truth.insert(socket.local_addr()?, sum);
    }
    Ok(truth)
}

/// Checks the increments of UDP sockets against the datagrams sent.
fn check_datagrams(
    events: &[Event],
    truth: &BTreeMap<SocketAddr, (u64, u64)>,
    growth: &mut Growth,
) -> anyhow::Result<Traffic> {
    let sums = sums(events, growth);
    let mut outside = Traffic::default();
    let mut found = 0;
    for end in events.iter().filter(|event| event.is_end()) {
        let Some(&(packets, bytes)) = truth.get(&end.socket.local) else {
            continue;
        };
        let sum = sums[&end.socket.id];
        let (mut both, by_flow) = (sum.outside_flows, sum.traffic);
        plus(&mut both, by_flow);
        ensure!(
            (both.tx_packets, both.tx_bytes) == (packets, bytes),
            "{sum:?}, not {packets} and {bytes}: {end}"
        );
        plus(&mut outside, sum.outside_flows);
        found += 1;
    }
    ensure!(found == truth.len(), "{found} of {}", truth.len());
    Ok(outside)
}

fn increments_of_udp_are_what_was_sent_whatever_makes_room() -> anyhow::Result<()> {
    let filter = Filter::new().netns(Netns::current()?.inode()?);
    let tracer = collector::udp().queue(QUEUE).ring_bytes(16 << 20);
    let tracer = tracer
        .filter(filter)
        .max_flows(100)
        .sample_interval(SAMPLES);
    let tracer = tracer.interval(Duration::from_millis(10)).blocking()?;
    let mut recording = Recording::of(tracer, &[])?;
    let truth = datagrams(3, 4_000)?;
    recording.wait_ends(truth.len())?;
    let (events, stats) = recording.finish()?;
    ensure!(
        stats.flows_evicted > 1_000 && stats.queue_shed == 0,
        "{stats:?}"
    );
    let outside = check_datagrams(&events, &truth, &mut Growth::new())?;
    // The flows have all that was assigned to one.
    ensure!(
        outside.tx_packets <= stats.unassigned,
        "{outside:?}, {stats:?}"
    );
    // A small set counts less, and nothing twice.
    let mut small = Growth::with_capacity(20);
    let sums = sums(&events, &mut small);
    ensure!(small.forgotten() > 100, "{small:?}");
    for end in events.iter().filter(|event| event.is_end()) {
        let sum = sums[&end.socket.id];
        let all = sum.traffic.tx_bytes + sum.outside_flows.tx_bytes;
        ensure!(all <= end.traffic.tx_bytes, "{sum:?}: {end}");
    }
    Ok(())
}

/// A consumer that comes too late finds the ends of sockets in the queue, and gaps. The increments
/// are still what was sent.
fn increments_are_right_across_lost_events() -> anyhow::Result<()> {
    let filter = Filter::new().netns(Netns::current()?.inode()?);
    let small = 64 << 10;
    let mut pair = TcpPair::new()?;
    let tcp = collector::tcp()
        .queue(64)
        .filter(filter.clone())
        .sample_interval(None);
    let tcp = tcp
        .ring_bytes(collector::bytes_for_a_cpu(small))
        .blocking()?;
    let udp = collector::udp()
        .queue(64)
        .filter(filter)
        .sample_interval(None);
    let udp = udp.interval(Duration::from_millis(10)).ring_bytes(small);
    let udp = udp.blocking()?;
    let mut truth = BTreeMap::new();
    for number in 0..60 {
        let connection = pair.connect()?;
        pair.upload(&connection, number)?;
        pair.close(&connection)?;
        truth.insert(
            (connection.client.local, connection.server.local),
            (number, 0),
        );
        truth.insert(
            (connection.server.local, connection.client.local),
            (0, number),
        );
    }
    let datagrams = datagrams(3, 3_000)?;
    let mut recorded = Vec::new();
    for tracer in [tcp, udp] {
        let handle = tracer.handle();
        let recording = Recording::of(tracer, &[])?;
        let (events, stats) = recording.finish()?;
        ensure!(
            stats.queue_shed + stats.ring_lost > 0,
            "nothing was lost: {stats:?}"
        );
        drop(handle);
        recorded.push(events);
    }
    let sums = sums(&recorded[0], &mut Growth::new());
    let ends = ended(&recorded[0]);
    let mut exact = 0;
    for (addresses, expected) in &truth {
        // The end itself may be lost.
        let Some(end) = ends.get(addresses) else {
            continue;
        };
        let sum = sums[&end.socket.id].traffic;
        ensure!(bytes(sum) == *expected, "{sum:?}, not {expected:?}: {end}");
        exact += 1;
    }
    ensure!(exact > 10, "{exact} ends");
    check_datagrams(&recorded[1], &datagrams, &mut Growth::new())?;
    Ok(())
}

/// Returns the records of all connections that ended.
fn records(events: &[Event], set: &mut Connections) -> Vec<Connection> {
    events.iter().filter_map(|event| set.add(event)).collect()
}

fn pid(connection: &Connection) -> Option<u32> {
    connection.process.as_ref().map(|process| process.pid)
}

/// Makes connections, and checks the records of both ends.
fn check_ends(mut pair: TcpPair, far: &[u32]) -> anyhow::Result<()> {
    const CONNECTIONS: usize = 5;
    let tracer = collector::tcp().queue(QUEUE).sample_interval(SAMPLES);
    let mut recording = Recording::of(tracer.blocking()?, far)?;
    for _ in 0..CONNECTIONS {
        let connection = pair.connect()?;
        pair.upload(&connection, 1_000)?;
        pair.close(&connection)?;
    }
    let still_open = pair.connect()?;
    recording.wait_ends(2 * CONNECTIONS)?;
    let local = still_open.server.local;
    recording.wait_for("a sample", |event| {
        let is_sample = matches!(event.kind, EventKind::Sample { .. });
        is_sample && event.socket.local == local && event.socket.remote == still_open.client.local
    })?;
    let (events, _) = recording.finish()?;
    let mut set = Connections::new();
    let records = records(&events, &mut set);
    ensure!(records.len() == 2 * CONNECTIONS, "{records:#?}");
    for record in records.iter().chain(set.iter()) {
        let peer = record
            .peer
            .as_ref()
            .with_context(|| format!("no peer of {record:#?}"))?;
        let other = peer.process.as_ref().map(|process| process.pid);
        let ours = [pair.client.pid(), pair.server.pid()];
        let is_client = record.socket.remote == pair.listener.local;
        let expected = if is_client { ours } else { [ours[1], ours[0]] };
        ensure!([pid(record), other] == expected.map(Some), "{record:#?}");
        ensure!(record.handshake.is_some(), "{record:#?}");
    }
    ensure!(set.len() == 2 && set.forgotten() == 0, "{set:#?}");
    Ok(())
}

fn both_ends_on_the_loopback() -> anyhow::Result<()> {
    check_ends(TcpPair::new()?, &[])
}

fn both_ends_in_two_namespaces() -> anyhow::Result<()> {
    let (pair, far) = TcpPair::over_veth()?;
    check_ends(pair, &[far.inode()?])
}

/// By how much the time of an event is less than that of an earlier event.
fn backward(events: &[&Event]) -> Duration {
    let (mut latest, mut most) = (Duration::ZERO, Duration::ZERO);
    for event in events {
        most = most.max(latest.saturating_sub(event.uptime));
        latest = latest.max(event.uptime);
    }
    most
}

fn merged_events_are_as_ordered_as_each_stream() -> anyhow::Result<()> {
    const ROUNDS: u32 = 500;
    let netns = Netns::current()?.inode()?;
    let runtime = Runtime::new()?;
    let (tcp, udp) = runtime.block_on(async {
        let tcp = collector::tcp().queue(QUEUE).sample_interval(SAMPLES);
        let udp = collector::udp().queue(QUEUE).sample_interval(SAMPLES);
        let udp = udp.per_datagram(true).interval(Duration::from_millis(10));
        anyhow::Ok((tcp.start().await?, udp.start().await?))
    })?;
    let handles = [tcp.handle(), udp.handle()];
    let consumer = thread::spawn(move || {
        runtime.block_on(async {
            // On a busy machine, a tracer's reader may run late.
            let mut both = merge(tcp, udp).hold(Duration::from_secs(30));
            let mut events = Vec::new();
            while let Some(event) = both.next().await {
                events.push(event);
            }
            events
        })
    });
    let traffic = || {
        let listener = TcpListener::bind(loopback(false))?;
        let socket = UdpSocket::bind(loopback(false))?;
        for _ in 0..ROUNDS {
            let mut client = TcpStream::connect(listener.local_addr()?)?;
            let (mut server, _) = listener.accept()?;
            socket.send_to(b"datagram", socket.local_addr()?)?;
            client.write_all(b"stream")?;
            server.read_exact(&mut [0; 6])?;
            socket.recv_from(&mut [0; 16])?;
        }
        anyhow::Ok(())
    };
    let traffic = traffic();
    handles.iter().for_each(tcp_udp_trace::TracerHandle::stop);
    let events = consumer.join().unwrap();
    traffic?;
    let ours = events.iter().filter(|event| event.socket.netns == netns);
    let ours: Vec<_> = ours.collect();
    let of = |protocol| {
        let events = events.iter();
        let of = events.filter(|event| event.socket.protocol == protocol);
        backward(&of.collect::<Vec<_>>())
    };
    let alone = of(Protocol::Tcp).max(of(Protocol::Udp));
    let merged = backward(&events.iter().collect::<Vec<_>>());
    eprintln!(
        "{} events go back by {merged:?}, one stream by {alone:?}",
        events.len()
    );
    ensure!(merged <= alone, "{merged:?}, but a stream alone {alone:?}");
    // They alternate, so a merge by arrival would have long runs of one protocol.
    let changes = ours
        .windows(2)
        .filter(|pair| pair[0].socket.protocol != pair[1].socket.protocol)
        .count();
    ensure!(changes >= ROUNDS as usize, "{changes} changes");
    let sends = ours
        .iter()
        .filter(|event| matches!(event.kind, EventKind::Send { .. }));
    ensure!(sends.count() == ROUNDS as usize);
    let opens = ours.iter().filter(|event| event.is_open()).count();
    ensure!(opens == 2 * ROUNDS as usize, "{opens} opens");
    Ok(())
}

fn recorded_events_are_replayed() -> anyhow::Result<()> {
    let tracer = collector::tcp().queue(QUEUE).sample_interval(SAMPLES);
    let mut recording = Recording::of(tracer.blocking()?, &[])?;
    let mut pair = TcpPair::new()?;
    let connection = pair.connect()?;
    recording.wait_for("a sample", |event| {
        matches!(event.kind, EventKind::Sample { .. })
    })?;
    pair.upload(&connection, 123)?;
    pair.close(&connection)?;
    recording.wait_ends(2)?;
    let (events, _) = recording.finish()?;
    let mut file = Vec::new();
    for event in &events {
        serde_json::to_writer(&mut file, event)?;
        file.push(b'\n');
    }
    let replayed: Vec<_> = replay(&*file).into_iter().collect::<Result<_, _>>()?;
    ensure!(
        replayed == events,
        "{} instead of {}",
        show(&replayed),
        show(&events)
    );
    Ok(())
}
