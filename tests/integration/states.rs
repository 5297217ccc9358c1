//! The states of a socket, at both ends of a connection, and with them all other fields of its
//! events.

use std::{
    fs,
    net::{Shutdown, SocketAddr},
    process,
    time::SystemTime,
};

use anyhow::{Context as _, bail, ensure};
use integration_tests::{
    actor::{Actor, Command, Endpoint, Moment},
    collector::{Collector, show},
    expected_tcp::{
        ACTIVE_CLIENT, ACTIVE_SERVER, CLOCK_ERROR, ExpectedTcp, LISTENER, PASSIVE_CLIENT,
        PASSIVE_SERVER,
    },
    netns::{FAR, NEAR, ip, veth},
    suite::{Test, skip},
    tcp_pair::{Connection, TcpPair, loopback},
};
use nix::{errno::Errno, unistd::gettid};
use socket2::{Domain, Socket, Type};
use tcp_udp_trace::{
    Event, EventKind, Filter,
    TcpState::{
        self, Close, CloseWait, Closing, Established, FinWait1, FinWait2, Listen, SynRecv, SynSent,
    },
};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            connect_accept_close_v4,
            connect_accept_close_v6,
            connect_accept_close_v4_to_dual_stack_listener,
            connect_accept_close_v4_mapped_at_both_ends,
            half_close_client_first,
            half_close_server_first,
            reset_by_linger,
            reset_in_close_wait_is_epipe,
            reset_before_accept,
            listener_closed_before_accept,
            connect_refused,
            reconnect_on_the_same_socket_begins_anew,
            connect_timed_out,
            simultaneous_close,
            simultaneous_open_with_itself,
            listen_and_its_end,
            listen_without_bind_has_its_port,
            listen_without_bind_passes_a_filter_of_its_port,
            mptcp_sockets_are_kept_out,
        ],
    ]
}

fn connect_accept_close_v4() -> anyhow::Result<()> {
    connect_accept_close(loopback(false), "127.0.0.1")
}

fn connect_accept_close_v6() -> anyhow::Result<()> {
    connect_accept_close(loopback(true), "::1")
}

fn connect_accept_close_v4_to_dual_stack_listener() -> anyhow::Result<()> {
    connect_accept_close("[::]:0".parse()?, "127.0.0.1")
}

fn connect_accept_close_v4_mapped_at_both_ends() -> anyhow::Result<()> {
    connect_accept_close("[::]:0".parse()?, "::ffff:127.0.0.1")
}

fn connect_accept_close(listen: SocketAddr, to: &str) -> anyhow::Result<()> {
    let mut pair = TcpPair::at(listen)?;
    let listened = pair.server.moment();
    let to = SocketAddr::new(to.parse()?, pair.listener.local.port());
    let client = pair.client.connect(to)?;
    let connected = pair.client.moment();
    let server = pair.server.accept(&pair.listener)?;
    let accepted = pair.server.moment();
    let connection = Connection { client, server };
    pair.upload(&connection, 1_000)?;
    pair.download(&connection, 3_000)?;
    pair.client.close(&client)?;
    let closed = pair.client.moment();
    ensure!(pair.server.receive_all(&server)? == 0);
    pair.server.close(&server)?;
    let answered = pair.server.moment();

    let expected_client = pair.expected_client(&connection, ACTIVE_CLIENT)?;
    let expected_server = pair.expected_server(&connection, PASSIVE_SERVER)?;
    let expected_listener = ExpectedTcp::of(&pair.server.identity()?, &pair.listener, LISTENER);
    pair.server.close(&pair.listener)?;
    let mut observed = pair.collector.finish(3)?;
    let events = observed.check(&expected_client)?;
    check_time(&events[0], connected)?;
    check_time(&events[2], closed)?;
    let events = observed.check(&expected_server)?;
    ensure!(
        events[2].kind == EventKind::Accept,
        "accepted at once, but {}",
        events[2]
    );
    check_time(&events[2], accepted)?;
    check_time(&events[4], answered)?;
    let events = observed.check(&expected_listener)?;
    check_time(&events[0], listened)?;
    observed.nothing_else()
}

/// Checks that an event which a command causes happens during that command.
fn check_time(event: &Event, Moment { began, ended, .. }: Moment) -> anyhow::Result<()> {
    let window: (SystemTime, SystemTime) = (began - CLOCK_ERROR, ended + CLOCK_ERROR);
    ensure!(
        window.0 <= event.time && event.time <= window.1,
        "not in {window:?}: {event}"
    );
    Ok(())
}

fn half_close_client_first() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    let connection = pair.connect()?;
    pair.upload(&connection, 10)?;
    pair.client.shutdown(&connection.client)?;
    ensure!(pair.server.receive_all(&connection.server)? == 0);
    pair.download(&connection, 100_000)?;
    pair.server.close(&connection.server)?;
    ensure!(pair.client.receive_all(&connection.client)? == 0);
    pair.client.close(&connection.client)?;
    let client = pair.expected_client(&connection, ACTIVE_CLIENT)?;
    let server = pair.expected_server(&connection, PASSIVE_SERVER)?;
    pair.finish(&[client, server])
}

fn half_close_server_first() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    let connection = pair.connect()?;
    pair.download(&connection, 10)?;
    pair.server.shutdown(&connection.server)?;
    ensure!(pair.client.receive_all(&connection.client)? == 0);
    pair.upload(&connection, 100_000)?;
    pair.client.close(&connection.client)?;
    ensure!(pair.server.receive_all(&connection.server)? == 0);
    pair.server.close(&connection.server)?;
    let client = pair.expected_client(&connection, PASSIVE_CLIENT)?;
    let server = pair.expected_server(&connection, ACTIVE_SERVER)?;
    pair.finish(&[client, server])
}

/// Only the end that is reset has an error.
fn reset_by_linger() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    let connection = pair.connect()?;
    pair.upload(&connection, 5)?;
    pair.client.abort(&connection.client)?;
    let client = pair.expected_client(&connection, &[Close, SynSent, Established, Close])?;
    let server = pair.expected_server(&connection, &[Listen, SynRecv, Established, Close])?;
    pair.finish(&[client, server.error(Errno::ECONNRESET as i32)])
}

fn reset_in_close_wait_is_epipe() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    let connection = pair.connect()?;
    pair.upload(&connection, 5)?;
    pair.client.shutdown(&connection.client)?;
    ensure!(pair.server.receive_all(&connection.server)? == 0);
    pair.download(&connection, 7)?;
    pair.client.abort(&connection.client)?;
    let states = [Close, SynSent, Established, FinWait1, FinWait2, Close];
    let client = pair.expected_client(&connection, &states)?;
    let states = [Listen, SynRecv, Established, CloseWait, Close];
    let server = pair.expected_server(&connection, &states)?;
    pair.finish(&[client, server.error(Errno::EPIPE as i32)])
}

/// The connection still belongs to the owner of the listener. Its socket has ended, so it has no
/// event when the server later gets the dead socket from `accept`.
fn reset_before_accept() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    let client = pair.client.connect(pair.listener.local)?;
    pair.client.send(&client, 9)?;
    pair.client.abort(&client)?;
    // Some kernels return the dead socket, some report that the connection was aborted.
    let _ = pair.server.accept(&pair.listener);
    let expected =
        ExpectedTcp::of_actor(&pair.client, &client, &[Close, SynSent, Established, Close])?;
    let child = ExpectedTcp::of_child(
        &pair.server.identity()?,
        &client,
        &[Listen, SynRecv, Established, Close],
    );
    pair.finish(&[expected, child.bytes(0, 9).error(Errno::ECONNRESET as i32)])
}

fn listener_closed_before_accept() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    let client = pair.client.connect(pair.listener.local)?;
    let expected = ExpectedTcp::of(
        &pair.client.identity()?,
        &client,
        &[Close, SynSent, Established, Close],
    );
    let child = ExpectedTcp::of_child(
        &pair.server.identity()?,
        &client,
        &[Listen, SynRecv, Established, Close],
    );
    pair.finish(&[expected.error(Errno::ECONNRESET as i32), child])
}

fn connect_refused() -> anyhow::Result<()> {
    for v6 in [false, true] {
        let mut client = Actor::spawn("client")?;
        let collector = Collector::start()?;
        let closed = SocketAddr::new(loopback(v6).ip(), 1);
        let failed = fail_to_connect(&mut client, loopback(v6), closed, Errno::ECONNREFUSED)?.1;
        let mut observed = collector.finish(1)?;
        observed.check(&failed)?;
        observed.nothing_else()?;
    }
    Ok(())
}

/// Lets a client connect to an address without a listener. Returns its socket, and its expected
/// events. The socket is bound, because otherwise its address would be unknown afterwards.
fn fail_to_connect(
    client: &mut Actor,
    from: SocketAddr,
    to: SocketAddr,
    errno: Errno,
) -> anyhow::Result<(Endpoint, ExpectedTcp)> {
    let bound = client.bind(from)?;
    ensure!(client.fail(Command::Connect(bound.fd, to))? == errno as i32);
    let socket = Endpoint {
        remote: Some(to),
        ..bound
    };
    let expected = ExpectedTcp::of(&client.identity()?, &socket, &[Close, SynSent, Close]);
    Ok((socket, expected.error(errno as i32)))
}

fn reconnect_on_the_same_socket_begins_anew() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    let closed = SocketAddr::new(loopback(false).ip(), 1);
    let (socket, failed) = fail_to_connect(
        &mut pair.client,
        loopback(false),
        closed,
        Errno::ECONNREFUSED,
    )?;
    let client = pair
        .client
        .socket(Command::Connect(socket.fd, pair.listener.local))?;
    let server = pair.server.accept(&pair.listener)?;
    let connection = Connection { client, server };
    pair.upload(&connection, 77)?;
    pair.close(&connection)?;
    let client = pair.expected_client(&connection, ACTIVE_CLIENT)?;
    let server = pair.expected_server(&connection, PASSIVE_SERVER)?;
    pair.finish(&[failed, client, server])
}

/// Connects to a machine that does not answer: the packets leave by one end of a veth pair, and the
/// other end drops them because they are for another hardware address.
fn connect_timed_out() -> anyhow::Result<()> {
    let _far = veth()?;
    misdirect(FAR, "near0")?;
    // One retransmission: 1 s + 2 s.
    fs::write("/proc/sys/net/ipv4/tcp_syn_retries", "1")?;
    let mut client = Actor::spawn("client")?;
    let collector = Collector::start()?;
    let (from, to) = (
        SocketAddr::new(NEAR.parse()?, 0),
        SocketAddr::new(FAR.parse()?, 80),
    );
    let failed = fail_to_connect(&mut client, from, to, Errno::ETIMEDOUT)?.1;
    let mut observed = collector.finish(1)?;
    observed.check(&failed)?;
    observed.nothing_else()
}

/// Sends packets for `address` to a hardware address that no device has.
fn misdirect(address: &str, device: &str) -> anyhow::Result<()> {
    ip(&format!(
        "neigh replace {address} lladdr 02:00:00:00:00:99 dev {device} nud permanent"
    ))
}

/// Undoes [`misdirect`].
fn redirect(address: &str, device: &str) -> anyhow::Result<()> {
    ip(&format!("neigh del {address} dev {device}"))
}

/// Both ends close while no packet passes, so neither has received the other's FIN when it sends
/// its own. Whether the acknowledgement or the FIN of the peer comes first is a matter of
/// retransmissions, but at least one end must have received the FIN first.
fn simultaneous_close() -> anyhow::Result<()> {
    let (mut pair, far) = TcpPair::over_veth()?;
    let connection = pair.connect()?;
    pair.upload(&connection, 300)?;
    pair.download(&connection, 200)?;
    misdirect(FAR, "near0")?;
    far.run(|| misdirect(NEAR, "far0"))?;
    pair.client.shutdown(&connection.client)?;
    pair.server.shutdown(&connection.server)?;
    redirect(FAR, "near0")?;
    far.run(|| redirect(NEAR, "far0"))?;
    ensure!(pair.client.receive_all(&connection.client)? == 0);
    ensure!(pair.server.receive_all(&connection.server)? == 0);

    let is_closing = |kind: &_| matches!(kind, EventKind::StateChange { to: Closing, .. });
    let third = |is_closing| if is_closing { Closing } else { FinWait2 };
    let client = |closing| {
        pair.expected_client(
            &connection,
            &[Close, SynSent, Established, FinWait1, third(closing), Close],
        )
    };
    let server = |closing| {
        pair.expected_server(
            &connection,
            &[
                Listen,
                SynRecv,
                Established,
                FinWait1,
                third(closing),
                Close,
            ],
        )
    };
    let clients = [client(false)?, client(true)?];
    let servers = [server(false)?, server(true)?];
    pair.finish_with(2, |observed| {
        let rest = observed.rest();
        let closing = |socket: &Endpoint| {
            let mut events = rest
                .iter()
                .flatten()
                .filter(|event| event.socket.local == socket.local);
            events.any(|event| is_closing(&event.kind))
        };
        let (client, server) = (closing(&connection.client), closing(&connection.server));
        ensure!(
            client || server,
            "no end was simultaneous:{}",
            show(&rest.concat())
        );
        observed.check(&clients[usize::from(client)])?;
        observed.check(&servers[usize::from(server)]).map(drop)
    })
}

/// A socket that connects to its own address: the one simultaneous open that is easy to make.
fn simultaneous_open_with_itself() -> anyhow::Result<()> {
    let mut actor = Actor::spawn("narcissus")?;
    let collector = Collector::start()?;
    let bound = actor.bind(loopback(false))?;
    let socket = actor.socket(Command::Connect(bound.fd, bound.local))?;
    actor.send(&socket, 12_345)?;
    actor.receive(&socket, 12_345)?;
    actor.close(&socket)?;
    let states = [
        Close,
        SynSent,
        SynRecv,
        Established,
        FinWait1,
        Closing,
        Close,
    ];
    let mut observed = collector.finish(1)?;
    observed.check(&ExpectedTcp::of_actor(&actor, &socket, &states)?)?;
    observed.nothing_else()
}

fn listen_and_its_end() -> anyhow::Result<()> {
    for address in [
        loopback(false),
        loopback(true),
        "0.0.0.0:0".parse()?,
        "[::]:0".parse()?,
    ] {
        TcpPair::at(address)?.finish(&[])?;
    }
    Ok(())
}

/// The first event has the port that the kernel chose, and comes while the socket listens.
fn listen_without_bind_has_its_port() -> anyhow::Result<()> {
    for domain in [Domain::IPV4, Domain::IPV6] {
        let collector = Collector::start()?;
        // Sockets of Multipath TCP have a socket of TCP below them.
        for protocol in [None, Some(socket2::Protocol::MPTCP)] {
            let Ok(socket) = Socket::new(domain, Type::STREAM, protocol) else {
                continue;
            };
            // The second call changes only the backlog.
            socket.listen(1)?;
            socket.listen(2)?;
            let port = socket
                .local_addr()?
                .as_socket()
                .context("no address")?
                .port();
            collector.wait_for("listener", |event| event.socket.local.port() == port)?;
            // The next `listen` begins again, with another port.
            socket.shutdown(Shutdown::Both)?;
            collector.wait_for("end", |e| e.is_end() && e.socket.local.port() == port)?;
            let events = collector.events();
            let of_it = |event: &&Event| event.socket.local.port() == port;
            let changes: Vec<_> = events.iter().filter(of_it).collect();
            let [listens, ended] = changes[..] else {
                bail!("{}", show(&events));
            };
            let change = |from, to| EventKind::StateChange {
                from,
                to,
                error: None,
                summary: None,
            };
            ensure!(listens.kind == change(Close, Listen), "{listens}");
            ensure!(ended.kind == change(Listen, Close), "{ended}");
            let process = listens.process.as_ref().context("no process")?;
            ensure!(
                process.pid == process::id() && process.tid == gettid().as_raw() as u32,
                "{process:?}"
            );
            ensure!(listens.socket.id == ended.socket.id, "{ended:?}");
        }
        let events = collector.finish_all()?;
        ensure!(
            events.iter().all(|event| event.socket.local.port() != 0),
            "{}",
            show(&events)
        );
    }
    Ok(())
}

/// The namespace has only the port that the filter names.
fn listen_without_bind_passes_a_filter_of_its_port() -> anyhow::Result<()> {
    fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40123 40123")?;
    let collector = Collector::start_with(|builder| builder.filter(Filter::new().port(40123)))?;
    for domain in [Domain::IPV4, Domain::IPV6] {
        for _ in 0..2 {
            Socket::new(domain, Type::STREAM, None)?.listen(1)?;
        }
    }
    let events = collector.finish_in_order(4)?;
    let changes: Vec<_> = events.iter().filter_map(state).collect();
    let expected = [(Close, Listen), (Listen, Close)].repeat(4);
    ensure!(changes == expected, "{}", show(&events));
    ensure!(
        events
            .iter()
            .all(|event| event.socket.local.port() == 40123),
        "{}",
        show(&events)
    );
    Ok(())
}

/// Returns the states that an event is about.
fn state(event: &Event) -> Option<(TcpState, TcpState)> {
    match event.kind {
        EventKind::StateChange { from, to, .. } => Some((from, to)),
        _ => None,
    }
}

/// A Multipath TCP connection is two kinds of socket with the same addresses. Only its TCP subflows
/// are reported, each once.
fn mptcp_sockets_are_kept_out() -> anyhow::Result<()> {
    let (mut server, mut client) = (Actor::spawn("server")?, Actor::spawn("client")?);
    let collector = Collector::start()?;
    let open = Command::Open {
        v6: false,
        mptcp: true,
    };
    let Ok(socket) = server.socket(open.clone()) else {
        return skip("this kernel has no MPTCP");
    };
    server.run(Command::Bind(socket.fd, loopback(false)))?;
    let listener = server.socket(Command::Listen(socket.fd))?;
    let socket = client.socket(open)?;
    let socket = client.socket(Command::Connect(socket.fd, listener.local))?;
    let accepted = server.accept(&listener)?;
    client.send(&socket, 1_000)?;
    server.receive(&accepted, 1_000)?;
    client.close(&socket)?;
    ensure!(server.receive_all(&accepted)? == 0);
    server.close(&accepted)?;
    server.close(&listener)?;

    let observed = collector.finish(3)?.rest();
    ensure!(
        observed.len() == 3,
        "a listener and two ends expected:{}",
        show(&observed.concat())
    );
    for events in &observed {
        let context = || show(events);
        let changes: Vec<(TcpState, TcpState)> = events.iter().filter_map(state).collect();
        let is_continuous = changes.windows(2).all(|pair| pair[0].1 == pair[1].0);
        ensure!(
            is_continuous && changes.iter().all(|(from, to)| from != to),
            "wrong states:{}",
            context()
        );
        let last = events.last().unwrap();
        ensure!(last.is_end(), "not closed:{}", context());
        // From here on, the port identifies the process.
        let (sent, received, pid) = match last.socket.local.port() {
            port if port == socket.local.port() => (1_000, 0, client.pid()),
            _ if last.socket.remote.port() == 0 => (0, 0, server.pid()),
            _ => (0, 1_000, server.pid()),
        };
        ensure!(
            (last.traffic.tx_bytes, last.traffic.rx_bytes) == (sent, received),
            "wrong bytes:{}",
            context()
        );
        let pids = events
            .iter()
            .filter_map(|event| event.process.as_ref())
            .map(|process| process.pid);
        ensure!(
            pids.into_iter().all(|owner| owner == pid),
            "not owned by {pid}:{}",
            context()
        );
    }
    Ok(())
}
