//! The summary at the end of a connection: its numbers are those of the socket's `TCP_INFO`, and it
//! says how the connection ended.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    process::{self, Command as Program},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use integration_tests::{
    actor::{Actor, Command, Endpoint, Exchange},
    collector::{Collector, show},
    kernel,
    netns::{FAR, NEAR, ip, tc, veth},
    suite::{Test, skip},
    tcp_info,
    tcp_pair::{Connection, TcpPair, loopback},
};
use nix::{
    errno::Errno,
    sys::socket::{setsockopt, sockopt::TcpFastOpenConnect},
};
use socket2::{Domain, Socket, TcpKeepalive, Type};
use tcp_udp_trace::{
    Direction, EndedBy, Event, EventKind, ResetDirection, ResetReason, Summary, TcpState, Traffic,
};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            numbers_are_those_of_tcp_info,
            loss_and_delay_are_those_of_tcp_info,
            handshake_takes_as_long_as_the_network,
            fast_open,
            closed_by_either_side,
            reset_by_either_side,
            reset_that_does_not_end_its_connection,
            connections_that_fail,
            established_connections_that_time_out,
            killed_and_not_accepted,
            older_than_the_tracer,
            only_summaries,
            only_summaries_of_every_ending,
        ],
    ]
}

/// How long a test waits for something that must come.
const PATIENCE: Duration = Duration::from_secs(30);

/// Returns the summary at the end of the socket with this local address.
fn summary_of(events: &[Event], local: SocketAddr) -> anyhow::Result<Summary> {
    summary_where(events, |event| event.socket.local == local)
}

/// Returns the summary at the one end that matches.
fn summary_where(events: &[Event], is_it: impl Fn(&Event) -> bool) -> anyhow::Result<Summary> {
    let mut ends = events.iter().filter(|event| event.is_end() && is_it(event));
    let (Some(end), None) = (ends.next(), ends.next()) else {
        bail!("not one end:{}", show(events));
    };
    match &end.kind {
        EventKind::StateChange {
            summary: Some(summary),
            ..
        } => Ok((**summary).clone()),
        _ => bail!("no summary: {end}"),
    }
}

/// Both ends, whose descriptors stay open beyond the end of the connection.
struct Lent {
    client: OwnedFd,
    server: OwnedFd,
}

impl Lent {
    fn new(pair: &TcpPair, connection: &Connection) -> anyhow::Result<Self> {
        Ok(Self {
            client: pair.client.lend(&connection.client)?,
            server: pair.server.lend(&connection.server)?,
        })
    }
}

/// Lets the client, then the server, end the connection, and waits until both have ended.
fn shut_down(pair: &mut TcpPair, connection: &Connection) -> anyhow::Result<()> {
    pair.client.shutdown(&connection.client)?;
    pair.server.receive_all(&connection.server)?;
    pair.server.shutdown(&connection.server)?;
    pair.client.receive_all(&connection.client)?;
    pair.collector.wait_closed(2)
}

/// Compares a summary with the `TCP_INFO` of its socket, which has ended.
fn check_tcp_info(summary: &Summary, socket: &OwnedFd) -> anyhow::Result<()> {
    let info: BTreeMap<_, _> = tcp_info::of(socket)?.into_iter().collect();
    let micros = |duration: Option<Duration>| duration.map(|duration| duration.as_micros() as u64);
    let numbers = [
        ("rtt", micros(summary.srtt)),
        ("rttvar", micros(summary.rttvar)),
        ("min_rtt", micros(summary.min_rtt)),
        ("total_retrans", Some(summary.retransmitted_packets.into())),
        ("bytes_retrans", Some(summary.retransmitted_bytes)),
        ("rcv_ooopack", Some(summary.out_of_order.into())),
    ];
    for (name, number) in numbers {
        let expected = info.get(name).copied();
        ensure!(
            number == expected && expected.is_some(),
            "{name} is {expected:?}: {summary:?}"
        );
    }
    Ok(())
}

fn numbers_are_those_of_tcp_info() -> anyhow::Result<()> {
    for v6 in [false, true] {
        let mut pair = TcpPair::at(loopback(v6))?;
        let began = Instant::now();
        let connection = pair.connect()?;
        let connected = Instant::now();
        let lent = Lent::new(&pair, &connection)?;
        pair.upload(&connection, 300_000)?;
        pair.download(&connection, 70)?;
        sleep(Duration::from_millis(30));
        let used = connected.elapsed();
        shut_down(&mut pair, &connection)?;
        let total = began.elapsed();
        let events = pair.collector.events();
        for (local, socket) in [
            (connection.client.local, &lent.client),
            (connection.server.local, &lent.server),
        ] {
            let summary = summary_of(&events, local)?;
            check_tcp_info(&summary, socket)?;
            let established = summary.established.context("no time")?;
            ensure!(used <= established && established <= total, "{summary:?}");
            let handshake = summary.handshake.context("no handshake")?;
            ensure!(
                !handshake.is_zero() && handshake + established <= total + Duration::from_millis(1),
                "{summary:?}"
            );
        }
        drop(lent);
        pair.collector.finish_all()?;
    }
    Ok(())
}

fn loss_and_delay_are_those_of_tcp_info() -> anyhow::Result<()> {
    let (mut pair, far) = TcpPair::over_veth()?;
    let connection = pair.connect()?;
    let lent = Lent::new(&pair, &connection)?;
    tc("qdisc add dev near0 root netem loss 10% delay 2ms")?;
    pair.upload(&connection, 2_000_000)?;
    tc("qdisc del dev near0 root")?;
    shut_down(&mut pair, &connection)?;
    let events = pair.collector.events();
    let client = summary_of(&events, connection.client.local)?;
    check_tcp_info(&client, &lent.client)?;
    let server = summary_of(&events, connection.server.local)?;
    check_tcp_info(&server, &lent.server)?;
    ensure!(
        client.retransmitted_packets > 0 && client.retransmitted_bytes > 0,
        "{client:?}"
    );
    ensure!(client.lost_packets > 0, "{client:?}");
    ensure!(server.out_of_order > 0, "{server:?}");
    ensure!(
        (server.lost_packets, server.retransmitted_bytes) == (0, 0),
        "{server:?}"
    );
    drop((lent, far));
    pair.collector.finish_all().map(drop)
}

fn handshake_takes_as_long_as_the_network() -> anyhow::Result<()> {
    const DELAY: Duration = Duration::from_millis(40);
    let (mut pair, _far) = TcpPair::over_veth()?;
    tc("qdisc add dev near0 root netem delay 40ms")?;
    let began = Instant::now();
    let connection = pair.connect()?;
    let took = began.elapsed();
    shut_down(&mut pair, &connection)?;
    let events = pair.collector.finish_all()?;
    for local in [connection.client.local, connection.server.local] {
        let handshake = summary_of(&events, local)?.handshake.context("absent")?;
        ensure!(
            DELAY <= handshake && handshake <= took,
            "{handshake:?} of {took:?} at {local}"
        );
    }
    Ok(())
}

/// TCP Fast Open: the SYN has data, so a process may accept and answer before the handshake ends.
fn fast_open() -> anyhow::Result<()> {
    /// Both sides, all listeners, and no cookies: bits of `tcp_fastopen` in the kernel's
    /// `Documentation/networking/ip-sysctl.rst`.
    const EVERYWHERE: u32 = 0x1 | 0x2 | 0x4 | 0x200 | 0x400;
    /// A bit of `tcpi_options`: the data in the SYN was acknowledged.
    const SYN_DATA: u64 = 32;
    const SIZES: [usize; 2] = [700, 9_000];
    fs::write("/proc/sys/net/ipv4/tcp_fastopen", EVERYWHERE.to_string())?;
    for v6 in [false, true] {
        let collector = Collector::start()?;
        let listener = TcpListener::bind(loopback(v6))?;
        let address = listener.local_addr()?;
        let began = Instant::now();
        let domain = Domain::for_address(address);
        let client = Socket::new(domain, Type::STREAM, None)?;
        setsockopt(&client, TcpFastOpenConnect, &true)?;
        // This sends nothing: the SYN takes the first data along.
        client.connect(&address.into())?;
        let mut client = TcpStream::from(client);
        client.write_all(&vec![1; SIZES[0]])?;
        let (mut server, from) = listener.accept()?;
        let mut request = vec![0; SIZES[0]];
        server.read_exact(&mut request)?;
        server.write_all(&vec![2; SIZES[1]])?;
        let mut answer = vec![0; SIZES[1]];
        client.read_exact(&mut answer)?;
        for (stream, mut other) in [(&client, &server), (&server, &client)] {
            stream.shutdown(Shutdown::Write)?;
            ensure!(other.read(&mut request)? == 0);
        }
        collector.wait_closed(2)?;
        let total = began.elapsed();
        let events = collector.events();
        let (client, server) = (OwnedFd::from(client), OwnedFd::from(server));
        let ends = [
            (from, &client, Direction::Outbound, EndedBy::Local, SIZES),
            (
                address,
                &server,
                Direction::Inbound,
                EndedBy::Peer,
                [SIZES[1], SIZES[0]],
            ),
        ];
        for (local, socket, direction, ended_by, [sent, received]) in ends {
            let info: BTreeMap<_, _> = tcp_info::of(socket)?.into_iter().collect();
            ensure!(info["options"] & SYN_DATA != 0, "no Fast Open: {info:?}");
            let is_it = |event: &&Event| {
                event.socket.local == local && event.socket.direction != Some(Direction::Listener)
            };
            for event in events.iter().filter(is_it) {
                let owner = event.process.as_ref().map(|process| process.pid);
                ensure!(event.socket.direction == Some(direction), "{event}");
                ensure!(owner == Some(process::id()), "{event}");
            }
            let summary = summary_of(&events, local)?;
            check_tcp_info(&summary, socket)?;
            ensure!(summary.ended_by == Some(ended_by), "{summary:?}");
            let (Some(handshake), Some(established)) = (summary.handshake, summary.established)
            else {
                bail!("no times: {summary:?}");
            };
            ensure!(
                !handshake.is_zero() && handshake + established <= total + Duration::from_millis(1),
                "{summary:?}"
            );
            let end = events.iter().rfind(is_it).context("no end")?;
            let Traffic {
                tx_bytes, rx_bytes, ..
            } = end.traffic;
            ensure!(
                (tx_bytes, rx_bytes) == (sent as u64, received as u64),
                "{end}"
            );
        }
        drop(listener);
        collector.finish_all()?;
    }
    Ok(())
}

/// Checks how the ends of a connection ended.
fn check_ends(events: &[Event], ends: &[(SocketAddr, EndedBy)]) -> anyhow::Result<()> {
    for &(local, expected) in ends {
        let ended_by = summary_of(events, local)?.ended_by;
        ensure!(
            ended_by == Some(expected),
            "{ended_by:?}, not {expected} at {local}:{}",
            show(events)
        );
    }
    Ok(())
}

/// Checks how the server's ends ended, which have the same local address, by their clients.
fn check_far_ends(events: &[Event], ends: &[(SocketAddr, EndedBy)]) -> anyhow::Result<()> {
    for &(remote, expected) in ends {
        let summary = summary_where(events, |event| event.socket.remote == remote)?;
        ensure!(
            summary.ended_by == Some(expected),
            "not {expected} from {remote}: {summary:?}"
        );
    }
    Ok(())
}

fn closed_by_either_side() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    let first = pair.connect()?;
    pair.upload(&first, 10)?;
    pair.close(&first)?;
    let second = pair.connect()?;
    pair.server.close(&second.server)?;
    pair.client.receive_all(&second.client)?;
    pair.client.close(&second.client)?;
    let third = pair.connect()?;
    shut_down_in_halves(&mut pair, &third)?;
    // Each of these has two ends.
    pair.collector.wait_closed(6)?;
    let events = pair.collector.finish_all()?;
    check_ends(
        &events,
        &[
            (first.client.local, EndedBy::Local),
            (second.client.local, EndedBy::Peer),
            (third.client.local, EndedBy::Local),
        ],
    )?;
    check_far_ends(
        &events,
        &[
            (first.client.local, EndedBy::Peer),
            (second.client.local, EndedBy::Local),
            (third.client.local, EndedBy::Peer),
        ],
    )
}

/// Ends a connection whose client closes first, with descriptors that stay open.
fn shut_down_in_halves(pair: &mut TcpPair, connection: &Connection) -> anyhow::Result<()> {
    pair.client.shutdown(&connection.client)?;
    ensure!(pair.server.receive_all(&connection.server)? == 0);
    pair.download(connection, 5_000)?;
    pair.server.shutdown(&connection.server)?;
    ensure!(pair.client.receive_all(&connection.client)? == 0);
    Ok(())
}

/// By a linger time of zero, and by a close over unread bytes, with and without an earlier FIN.
fn reset_by_either_side() -> anyhow::Result<()> {
    let mut pair = TcpPair::traced_by(with_resets()?, loopback(false))?;
    let mut clients = Vec::new();
    for kind in 0..4 {
        let Connection { client, server } = pair.connect()?;
        match kind {
            0 => pair.client.abort(&client)?,
            1 => {
                pair.server.send(&server, 5)?;
                wait_readable(&pair.client, &client)?;
                pair.client.close(&client)?;
            }
            2 => {
                pair.server.shutdown(&server)?;
                pair.client.receive_all(&client)?;
                pair.client.abort(&client)?;
            }
            _ => {
                pair.client.shutdown(&client)?;
                pair.server.receive_all(&server)?;
                pair.client.abort(&client)?;
            }
        }
        clients.push(client.local);
        pair.collector.wait_closed(2 * clients.len())?;
    }
    let events = pair.collector.finish_all()?;
    for (kind, client) in clients.into_iter().enumerate() {
        check_ends(&events, &[(client, EndedBy::LocalReset)])
            .and_then(|()| check_far_ends(&events, &[(client, EndedBy::PeerReset)]))
            // The kernel sends this reset after the change to `CLOSE`.
            .and_then(|()| check_reset(&events, client, None))
            .with_context(|| format!("case {kind}"))?;
    }
    Ok(())
}

/// The server still has an earlier connection of the client's address. Its answer to the SYN is not
/// acceptable, so the client's kernel answers by a reset, and goes on to connect.
fn reset_that_does_not_end_its_connection() -> anyhow::Result<()> {
    let far = veth()?;
    let server = far.run(|| Actor::spawn("server"))?;
    let (address, client) = (SocketAddr::new(FAR.parse()?, 0), Actor::spawn("client")?);
    let mut pair = TcpPair::traced_between(with_resets()?, server, address, client)?;
    let earlier = pair.connect()?;
    // The server does not see the reset.
    ip(&format!(
        "neigh replace {FAR} lladdr 02:00:00:00:00:99 dev near0 nud permanent"
    ))?;
    pair.client.abort(&earlier.client)?;
    pair.collector.wait_closed(1)?;
    ip(&format!("neigh del {FAR} dev near0"))?;
    let local = earlier.client.local;
    let socket = pair.client.bind(local)?;
    let client = (pair.client).socket(Command::Connect(socket.fd, pair.listener.local))?;
    let server = pair.server.accept(&pair.listener)?;
    pair.close(&Connection { client, server })?;
    pair.collector.wait_closed(4)?;
    let events = pair.collector.finish_all()?;
    let mut ours = events.iter().rev();
    let last = ours.find(|event| event.socket.local == local);
    let id = last.context("no event")?.socket.id;
    let resets: Vec<_> = events
        .iter()
        .filter(|event| event.socket.id == id)
        .filter_map(|event| match &event.kind {
            EventKind::Reset { direction, reason } => Some((*direction, reason)),
            _ => None,
        })
        .collect();
    let [(ResetDirection::Sent, reason)] = resets[..] else {
        bail!("{resets:?}:{}", show(&events));
    };
    let expected = kernel::is_at_least(6, 10)?.then_some("TCP_INVALID_ACK_SEQUENCE");
    ensure!(
        reason.as_ref().map(ResetReason::name) == expected,
        "{reason:?}"
    );
    let summary = summary_where(&events, |event| event.socket.id == id)?;
    ensure!(
        summary.ended_by == Some(EndedBy::Local)
            && summary.established.is_some()
            && summary.reset_reason.is_none(),
        "{summary:?}"
    );
    Ok(())
}

/// Waits until the socket has received something that its process has not read.
fn wait_readable(actor: &Actor, socket: &Endpoint) -> anyhow::Result<()> {
    let socket = actor.lend(socket)?;
    let deadline = Instant::now() + PATIENCE;
    let received = || {
        let info = tcp_info::of(&socket)?;
        let bytes = info.iter().find(|(name, _)| *name == "bytes_received");
        bytes.map(|(_, bytes)| *bytes).context("no bytes_received")
    };
    while received()? == 0 {
        ensure!(Instant::now() < deadline, "nothing came");
        sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Refused, without an answer, and unreachable. They have no handshake and no round-trip time.
fn connections_that_fail() -> anyhow::Result<()> {
    const UNUSED: &str = "10.77.0.9";
    let _far = veth()?;
    ip(&format!(
        "neigh replace {FAR} lladdr 02:00:00:00:00:99 dev near0 nud permanent"
    ))?;
    // One retransmission: 1 s + 2 s.
    fs::write("/proc/sys/net/ipv4/tcp_syn_retries", "1")?;
    let mut client = Actor::spawn("client")?;
    let collector = Collector::start()?;
    let near = SocketAddr::new(NEAR.parse()?, 0);
    let mut fails = |from, to: SocketAddr, errno: Errno| {
        let socket = client.bind(from)?;
        ensure!(client.fail(Command::Connect(socket.fd, to))? == errno as i32);
        anyhow::Ok(socket.local)
    };
    let refused = |v6| SocketAddr::new(loopback(v6).ip(), 1);
    let timeout = SocketAddr::new(FAR.parse()?, 80);
    let unreachable = SocketAddr::new(UNUSED.parse()?, 80);
    let mut ends = vec![
        (
            fails(loopback(false), refused(false), Errno::ECONNREFUSED)?,
            EndedBy::Refused,
            0,
        ),
        (
            fails(loopback(true), refused(true), Errno::ECONNREFUSED)?,
            EndedBy::Refused,
            0,
        ),
        (fails(near, timeout, Errno::ETIMEDOUT)?, EndedBy::Timeout, 1),
    ];
    // The search for the hardware address takes 3 s.
    fs::write("/proc/sys/net/ipv4/tcp_syn_retries", "4")?;
    ends.push((
        fails(near, unreachable, Errno::EHOSTUNREACH)?,
        EndedBy::Unreachable,
        0,
    ));
    let events = collector.finish_in_order(ends.len())?;
    for (local, expected, at_least) in ends {
        let summary = summary_of(&events, local)?;
        ensure!(summary.ended_by == Some(expected), "{summary:?}");
        ensure!(summary.retransmitted_packets >= at_least, "{summary:?}");
        ensure!(summary.retransmitted_bytes == 0, "{summary:?}");
        let times = [
            summary.handshake,
            summary.established,
            summary.srtt,
            summary.min_rtt,
            summary.rttvar,
        ];
        ensure!(times == [None; 5], "{summary:?}");
    }
    Ok(())
}

/// The peer does not answer any more: neither keepalive probes, after which the kernel sends a
/// reset, nor data.
fn established_connections_that_time_out() -> anyhow::Result<()> {
    const TIMEOUT: Duration = Duration::from_secs(1);
    const BYTES: u64 = 1_000;
    let far = veth()?;
    let collector = with_resets()?;
    let server = far.run(|| Actor::spawn("server"))?;
    let address = SocketAddr::new(FAR.parse()?, 0);
    let mut pair = TcpPair::traced_between(collector, server, address, Actor::spawn("client")?)?;
    let began = Instant::now();
    let (idle, busy) = (pair.connect()?, pair.connect()?);
    let socket = |connection: &Connection| {
        let socket = pair.client.lend(&connection.client)?;
        anyhow::Ok(Socket::from(socket))
    };
    let (idle_socket, busy_socket) = (socket(&idle)?, socket(&busy)?);
    let keepalive = TcpKeepalive::new().with_time(TIMEOUT);
    idle_socket.set_tcp_keepalive(&keepalive.with_interval(TIMEOUT).with_retries(1))?;
    busy_socket.set_tcp_user_timeout(Some(TIMEOUT))?;
    // No device has this address.
    ip(&format!(
        "neigh replace {FAR} lladdr 02:00:00:00:00:99 dev near0 nud permanent"
    ))?;
    pair.client.send(&busy.client, BYTES)?;
    // Here, because a failure then shows the events.
    pair.collector.wait_closed(2)?;
    for Connection { client, .. } in [&idle, &busy] {
        let errno = pair.client.fail(Command::Receive(client.fd, 1))?;
        ensure!(errno == Errno::ETIMEDOUT as i32, "{errno}");
    }
    let took = began.elapsed();
    ip(&format!("neigh del {FAR} dev near0"))?;
    // The server's ends are still established. The client's kernel answers their FINs by resets.
    for Connection { server, .. } in [&idle, &busy] {
        pair.server.close(server)?;
    }
    pair.collector.wait_closed(4)?;
    let events = pair.collector.finish_all()?;
    for (connection, socket) in [(&idle, idle_socket), (&busy, busy_socket)] {
        let local = connection.client.local;
        let summary = summary_of(&events, local)?;
        check_tcp_info(&summary, &socket.into())?;
        check_ends(&events, &[(local, EndedBy::Timeout)])?;
        let end = events
            .iter()
            .find(|event| event.socket.local == local && event.is_end());
        ensure!(
            end.is_some_and(|end| matches!(
                end.kind,
                EventKind::StateChange {
                    from: TcpState::Established,
                    error: Some(110),
                    ..
                }
            )),
            "{end:?}"
        );
        let established = summary.established.context("no time")?;
        // The kernel's timers count in ticks of its clock, of up to 10 ms.
        let at_least = TIMEOUT - Duration::from_millis(20);
        ensure!(
            at_least <= established && established <= took,
            "{summary:?}"
        );
    }
    let summary = summary_of(&events, busy.client.local)?;
    ensure!(
        summary.retransmitted_bytes >= BYTES && summary.lost_packets > 0,
        "{summary:?}"
    );
    check_reset(&events, idle.client.local, Some("TCP_KEEPALIVE_TIMEOUT"))?;
    check_reset(&events, busy.client.local, None)
}

/// Starts a tracer that reports resets.
fn with_resets() -> anyhow::Result<Collector> {
    Collector::start_with(|builder| builder.resets(true))
}

/// Checks the reset that this side sent before it closed the socket with this local address, by the
/// kernel's reason, or that there was none.
fn check_reset(events: &[Event], local: SocketAddr, reason: Option<&str>) -> anyhow::Result<()> {
    let ours = || events.iter().filter(|event| event.socket.local == local);
    let mut before = ours().take_while(|event| !event.is_end());
    let reset = before.find_map(|event| match &event.kind {
        EventKind::Reset {
            direction: ResetDirection::Sent,
            reason,
        } => Some(reason),
        _ => None,
    });
    ensure!(
        reset.is_some() == reason.is_some(),
        "{reset:?}:{}",
        show(events)
    );
    // The kernel has these reasons since 6.12.
    let reason = reason.filter(|_| matches!(kernel::is_at_least(6, 12), Ok(true)));
    let name =
        |reason: &Option<ResetReason>| reason.as_ref().map(|reason| reason.name().to_owned());
    let found = [
        reset.and_then(name),
        name(&summary_of(events, local)?.reset_reason),
    ];
    ensure!(
        found.iter().all(|found| found.as_deref() == reason),
        "{found:?} at {local}:{}",
        show(events)
    );
    Ok(())
}

fn killed_and_not_accepted() -> anyhow::Result<()> {
    let mut pair = TcpPair::traced_by(with_resets()?, loopback(false))?;
    let connection = pair.connect()?;
    let port = connection.client.local.port();
    let killed = Program::new("ss")
        .args([
            "--kill",
            "--tcp",
            "--no-header",
            "sport",
            "=",
            &format!(":{port}"),
        ])
        .output()
        .context("needs `ss` (iproute2)")?;
    if killed.stdout.is_empty() {
        return skip("this kernel cannot destroy sockets (CONFIG_INET_DIAG_DESTROY)");
    }
    pair.collector.wait_closed(2)?;
    let waiting = pair.client.connect(pair.listener.local)?;
    pair.server.close(&pair.listener)?;
    pair.collector.wait_closed(5)?;
    let events = pair.collector.finish_all()?;
    check_ends(
        &events,
        &[
            (connection.client.local, EndedBy::Killed),
            (waiting.local, EndedBy::PeerReset),
        ],
    )?;
    check_far_ends(
        &events,
        &[
            (connection.client.local, EndedBy::PeerReset),
            (waiting.local, EndedBy::NotAccepted),
        ],
    )?;
    check_reset(&events, connection.client.local, Some("TCP_STATE"))?;
    check_reset(&events, waiting.local, None)
}

/// The kernel's numbers are whole, and the times that the tracer did not see are absent.
fn older_than_the_tracer() -> anyhow::Result<()> {
    let (mut server, mut client) = (Actor::spawn("server")?, Actor::spawn("client")?);
    let listener = server.listen(loopback(false))?;
    let connected = client.connect(listener.local)?;
    let accepted = server.accept(&listener)?;
    let socket = client.lend(&connected)?;
    let collector = Collector::start()?;
    client.send(&connected, 10)?;
    server.receive(&accepted, 10)?;
    client.shutdown(&connected)?;
    server.receive_all(&accepted)?;
    server.shutdown(&accepted)?;
    collector.wait_closed(2)?;
    let events = collector.finish_all()?;
    let summary = summary_of(&events, connected.local)?;
    check_tcp_info(&summary, &socket)?;
    ensure!(
        (summary.handshake, summary.established) == (None, None),
        "{summary:?}"
    );
    ensure!(summary.ended_by == Some(EndedBy::Local), "{summary:?}");
    Ok(())
}

/// Each connection is one event, with its bytes, owner, direction and end.
fn only_summaries() -> anyhow::Result<()> {
    const CONNECTIONS: u32 = 200;
    let collector = Collector::start_with(|builder| builder.summaries_only(true))?;
    let mut pair = TcpPair::traced_by(collector, loopback(false))?;
    pair.server
        .begin(&Command::Serve(pair.listener.fd, CONNECTIONS))?;
    pair.client.begin(&Command::Churn {
        to: pair.listener.local,
        connections: CONNECTIONS,
        seed: 7,
    })?;
    let of_client = pair.client.finish_exchanges()?;
    let of_server = pair.server.finish_exchanges()?;
    pair.server.close(&pair.listener)?;
    let ends = 2 * CONNECTIONS as usize;
    let events = pair.collector.finish_in_order(ends)?;
    ensure!(
        events.len() == ends,
        "{} events:{}",
        events.len(),
        show(&events)
    );
    let mut by_address: BTreeMap<_, Vec<&Event>> = BTreeMap::new();
    for event in &events {
        let key = (event.socket.local, event.socket.remote);
        by_address.entry(key).or_default().push(event);
    }
    let sides = [
        (of_client, pair.client.pid(), Direction::Outbound),
        (of_server, pair.server.pid(), Direction::Inbound),
    ];
    for (exchanges, pid, direction) in sides {
        for end in exchanges {
            let found = by_address.get_mut(&(end.local, end.remote));
            let found = found.context("no event of a connection")?;
            let matches = |event: &&Event| is_end_of(event, &end, pid, direction);
            let at = found.iter().position(matches);
            let at = at.with_context(|| format!("{end:?} is none of {found:?}"))?;
            found.swap_remove(at);
        }
    }
    Ok(())
}

fn is_end_of(event: &Event, end: &Exchange, pid: u32, direction: Direction) -> bool {
    let Traffic {
        tx_bytes, rx_bytes, ..
    } = event.traffic;
    let EventKind::StateChange {
        to: TcpState::Close,
        summary: Some(summary),
        error: None,
        ..
    } = &event.kind
    else {
        return false;
    };
    let ended_by = if end.active {
        EndedBy::Local
    } else {
        EndedBy::Peer
    };
    (tx_bytes, rx_bytes) == (end.sent, end.received)
        && event.process.as_ref().is_some_and(|it| it.pid == pid)
        && event.socket.direction == Some(direction)
        && summary.ended_by == Some(ended_by)
        && summary.established.is_some()
}

/// A reset connection, a refused one, one that no process accepts, and a listener, which has no
/// event.
fn only_summaries_of_every_ending() -> anyhow::Result<()> {
    let collector = Collector::start_with(|builder| {
        let builder = builder.summaries_only(true).resets(true);
        builder.sample_interval(Duration::from_millis(100))
    })?;
    let mut pair = TcpPair::traced_by(collector, loopback(true))?;
    let reset = pair.connect()?;
    pair.client.abort(&reset.client)?;
    let refused = pair.client.bind(loopback(true))?;
    let unused = SocketAddr::new(loopback(true).ip(), 1);
    pair.client.fail(Command::Connect(refused.fd, unused))?;
    let waiting = pair.client.connect(pair.listener.local)?;
    pair.collector.wait_closed(3)?;
    pair.server.close(&pair.listener)?;
    pair.collector.wait_closed(5)?;
    ensure!(pair.collector.samples().is_empty(), "a sample");
    let events = pair.collector.finish_all()?;
    ensure!(events.len() == 5, "{}", show(&events));
    check_ends(
        &events,
        &[
            (reset.client.local, EndedBy::LocalReset),
            (refused.local, EndedBy::Refused),
            (waiting.local, EndedBy::PeerReset),
        ],
    )
}
