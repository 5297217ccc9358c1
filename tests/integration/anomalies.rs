//! Retransmissions and resets, which a tracer reports on request.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use integration_tests::{
    actor::{Actor, Command},
    collector::{Collector, show},
    expected_tcp::{ACTIVE_CLIENT, ExpectedTcp},
    kernel::{self, NetCounters},
    netns::{FAR, NEAR, ip, nft, veth},
    observed_tcp::ObservedTcp,
    suite::{Test, skip},
    tcp_info,
    tcp_pair::{Connection, TcpPair, loopback},
};
use socket2::{Domain, Protocol, Socket, Type};
use tcp_udp_trace::{Direction, Event, EventKind, ResetDirection, Retransmission};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            retransmissions_are_those_that_the_socket_counts,
            handshake_that_is_not_answered,
            resets_at_either_end,
            refused_connection_is_a_reset,
            losses_in_the_middle_of_a_burst,
            connections_that_a_full_queue_refuses,
            connections_that_a_full_queue_of_mptcp_refuses,
            handshakes_that_a_full_queue_refuses_at_the_end,
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

/// Returns a field of the socket's `TCP_INFO`.
fn number(socket: &impl AsFd, name: &str) -> anyhow::Result<u64> {
    let info = tcp_info::of(socket)?;
    let number = info.iter().find(|(found, _)| *found == name);
    number.map(|(_, number)| *number).context("no such number")
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
    let retransmitted = || number(&socket, "total_retrans");
    far.run(|| ip(&format!("addr del {FAR}/24 dev far0")))?;
    pair.client.send(&client, BYTES)?;
    while retransmitted()? < AT_LEAST {
        sleep(Duration::from_millis(10));
    }
    far.run(|| ip(&format!("addr add {FAR}/24 dev far0")))?;
    pair.server.receive(&server, BYTES)?;
    let (total, bytes) = (retransmitted()?, number(&socket, "bytes_retrans")?);
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

/// The receiver's kernel drops some segments in the middle of a burst. The acknowledgments of the
/// others show the loss.
fn losses_in_the_middle_of_a_burst() -> anyhow::Result<()> {
    /// The initial congestion window: all of them are sent at once.
    const SEGMENTS: u32 = 10;
    const BEFORE: u32 = 3;
    // Each segment is a packet.
    ip("link set lo mtu 1500 gso_max_segs 1")?;
    for lost in [2, 4] {
        let collector = start()?;
        let listener = TcpListener::bind(loopback(false))?;
        let address = listener.local_addr()?;
        let mut client = TcpStream::connect(address)?;
        let (mut server, local) = listener.accept()?;
        // The retransmissions pass, whose numbers follow those of the burst.
        let (last, packets) = (BEFORE + lost - 1, SEGMENTS + lost);
        let port = address.port();
        nft(&format!(
            "table ip losses {{
                chain input {{
                    type filter hook input priority 0;
                    tcp dport {port} meta length > 1000 numgen inc mod {packets} {BEFORE}-{last} drop
                }}
            }}"
        ))?;
        let counters = NetCounters::now()?;
        let segment = number(&client, "snd_mss")?;
        let mut burst = vec![0; (u64::from(SEGMENTS) * segment) as usize];
        client.write_all(&burst)?;
        server.read_exact(&mut burst)?;
        let now = NetCounters::now()?;
        for (name, expected) in [("TcpExt.TCPFastRetrans", lost), ("Tcp.RetransSegs", lost)] {
            let growth = counters.growth(&now, name)?;
            ensure!(
                growth == u64::from(expected),
                "{name} {growth}, not {expected}"
            );
        }
        drop((client, server, listener));
        nft("delete table ip losses")?;
        let events = collector.finish_in_order(3)?;
        let retransmission = EventKind::Retransmit {
            what: Some(Retransmission::Fast),
            packets: 1,
            bytes: segment as u32,
        };
        let reported = anomalies(&events, local);
        ensure!(
            reported == vec![retransmission; lost as usize],
            "{}",
            show(&events)
        );
        let mut ours = events.iter().filter(|event| event.socket.local == local);
        let summary = ours.find_map(|event| match &event.kind {
            EventKind::StateChange { summary, .. } => summary.as_deref(),
            _ => None,
        });
        let summary = summary.context("no summary")?;
        let numbers = [
            summary.lost_packets,
            summary.retransmitted_packets,
            (summary.retransmitted_bytes / segment) as u32,
        ];
        ensure!(numbers == [lost; 3], "{summary:?}");
    }
    Ok(())
}

/// The segments that the kernel counted in `ListenOverflows`.
struct Overflows {
    listener: SocketAddr,
    clients: BTreeSet<SocketAddr>,
    count: u32,
}

/// More connections than this wait to be accepted: one more.
const BACKLOG: i32 = 4;

/// Starts a tracer that reports these segments.
fn start_with_overflows() -> anyhow::Result<Collector> {
    let collector = Collector::start_with(|builder| builder.listen_overflows(true))?;
    let mut hooks = collector.handle().hooks().into_iter();
    let hook = hooks.find(|hook| hook.signal == "listen_overflow");
    if hook.context("no signal")?.programs.is_empty() {
        return skip("this kernel has no kprobes");
    }
    Ok(collector)
}

/// Sets when a listener of this namespace answers a SYN with a cookie, and remembers no handshake:
/// 0 never, 1 when too many handshakes have begun, 2 always.
fn set_cookies(cookies: u32) -> anyhow::Result<()> {
    Ok(fs::write(
        "/proc/sys/net/ipv4/tcp_syncookies",
        cookies.to_string(),
    )?)
}

/// Makes a listener.
fn listen(v6: bool, protocol: Protocol) -> anyhow::Result<(Socket, SocketAddr)> {
    let listener = stream(v6, protocol)?;
    listener.listen(BACKLOG)?;
    let address = address(&listener)?;
    Ok((listener, address))
}

/// Makes a socket that is bound to the loopback.
fn stream(v6: bool, protocol: Protocol) -> anyhow::Result<Socket> {
    let loopback = loopback(v6);
    let socket = Socket::new(Domain::for_address(loopback), Type::STREAM, Some(protocol))?;
    socket.bind(&loopback.into())?;
    Ok(socket)
}

fn address(socket: &Socket) -> anyhow::Result<SocketAddr> {
    socket.local_addr()?.as_socket().context("an address")
}

/// Fills the queue of a listener.
fn fill(listener: SocketAddr) -> anyhow::Result<Vec<TcpStream>> {
    let before = kernel::tcp_counter("ListenOverflows")?;
    let fit = (0..=BACKLOG).map(|_| TcpStream::connect(listener));
    let fit = fit.collect::<Result<Vec<_>, _>>()?;
    ensure!(kernel::tcp_counter("ListenOverflows")? == before);
    Ok(fit)
}

/// Lets clients connect to a listener whose queue is full.
fn refuse_syns(v6: bool, protocol: Protocol) -> anyhow::Result<Overflows> {
    const CLIENTS: u32 = 5;
    let before = kernel::tcp_counter("ListenOverflows")?;
    let count = || anyhow::Ok(kernel::tcp_counter("ListenOverflows")? - before);
    let (_listener, listener) = listen(v6, protocol)?;
    let _fit = fill(listener)?;
    let mut refused = Vec::new();
    for _ in 0..CLIENTS {
        let client = stream(v6, protocol)?;
        client.set_nonblocking(true)?;
        ensure!(client.connect(&listener.into()).is_err());
        refused.push(client);
    }
    let clients = refused.iter().map(address).collect::<Result<_, _>>()?;
    // The kernel drops a SYN again when it is retransmitted.
    while count()? <= CLIENTS {
        sleep(Duration::from_millis(10));
    }
    // The clients give up.
    drop(refused);
    Ok(Overflows {
        listener,
        clients,
        count: count()?,
    })
}

/// Lets a client send the last segment of a handshake when the queue, which had room for its SYN,
/// is full.
fn refuse_last_segments(v6: bool) -> anyhow::Result<Overflows> {
    let before = kernel::tcp_counter("ListenOverflows")?;
    let count = || anyhow::Ok(kernel::tcp_counter("ListenOverflows")? - before);
    let (_listener, listener) = listen(v6, Protocol::TCP)?;
    let mut client = stream(v6, Protocol::TCP)?;
    let local = address(&client)?;
    // All but its SYN is lost at first.
    nft(&format!(
        "table inet losses {{
            chain input {{
                type filter hook input priority 0;
                tcp sport {} tcp flags ack drop
            }}
        }}",
        local.port()
    ))?;
    client.connect(&listener.into())?;
    let _fit = fill(listener)?;
    nft("delete table inet losses")?;
    client.write_all(&[0; 10])?;
    // The data is retransmitted, and is the last segment of the handshake each time.
    while count()? < 3 {
        sleep(Duration::from_millis(10));
    }
    // The client gives up, with a reset.
    client.set_linger(Some(Duration::ZERO))?;
    drop(client);
    Ok(Overflows {
        listener,
        clients: [local].into(),
        count: count()?,
    })
}

/// Checks that each segment that the kernel counted is an event of the listener, with the addresses
/// of the client.
fn check_overflows(collector: Collector, expected: &[Overflows]) -> anyhow::Result<()> {
    let events = collector.finish_all()?;
    let is_overflow = |event: &&Event| matches!(event.kind, EventKind::ListenOverflow);
    let mut reported: Vec<_> = events.iter().filter(is_overflow).collect();
    for Overflows {
        listener,
        clients,
        count,
    } in expected
    {
        let is_one = |event: &&Event| event.socket.local == *listener;
        let (ours, others): (Vec<_>, _) = reported.into_iter().partition(is_one);
        reported = others;
        ensure!(ours.len() == *count as usize, "{count}:{}", show(&events));
        for event in ours {
            let pid = event.process.as_ref().map(|process| process.pid);
            ensure!(pid == Some(std::process::id()), "{event}");
            ensure!(
                clients.contains(&event.socket.remote)
                    && event.socket.direction == Some(Direction::Listener),
                "{event}"
            );
        }
    }
    ensure!(reported.is_empty(), "{reported:?}");
    Ok(())
}

/// With and without SYN cookies, which do not help against a full queue.
fn connections_that_a_full_queue_refuses() -> anyhow::Result<()> {
    let collector = start_with_overflows()?;
    let mut refused = Vec::new();
    for cookies in [1, 2] {
        set_cookies(cookies)?;
        for v6 in [false, true] {
            let before = kernel::tcp_counter("SyncookiesSent")?;
            refused.push(refuse_syns(v6, Protocol::TCP)?);
            let has_cookies = kernel::tcp_counter("SyncookiesSent")? > before;
            ensure!(has_cookies == (cookies == 2));
        }
    }
    check_overflows(collector, &refused)
}

fn connections_that_a_full_queue_of_mptcp_refuses() -> anyhow::Result<()> {
    if stream(false, Protocol::MPTCP).is_err() {
        return skip("this kernel has no MPTCP");
    }
    let collector = start_with_overflows()?;
    let mut refused = Vec::new();
    for v6 in [false, true] {
        refused.push(refuse_syns(v6, Protocol::MPTCP)?);
    }
    check_overflows(collector, &refused)
}

/// The listener remembers the handshake, or has sent a cookie.
fn handshakes_that_a_full_queue_refuses_at_the_end() -> anyhow::Result<()> {
    let collector = start_with_overflows()?;
    let mut refused = Vec::new();
    for cookies in [1, 2] {
        set_cookies(cookies)?;
        for v6 in [false, true] {
            let before = kernel::tcp_counter("SyncookiesRecv")?;
            refused.push(refuse_last_segments(v6)?);
            let has_cookies = kernel::tcp_counter("SyncookiesRecv")? > before;
            ensure!(has_cookies == (cookies == 2));
        }
    }
    check_overflows(collector, &refused)
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
