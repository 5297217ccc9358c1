//! The owner of a socket: the right process, or none.

use std::{ffi::OsStr, fs, os::unix::ffi::OsStrExt as _};

use anyhow::{bail, ensure};
use integration_tests::{
    actor::{Actor, Command, Endpoint, Outcome, errno},
    cgroup::Cgroup,
    collector::{Collector, show},
    expected_tcp::{
        ACTIVE_CLIENT, ACTIVE_SERVER, ExpectedTcp, LISTENER, PASSIVE_CLIENT, PASSIVE_SERVER,
    },
    netns::ip,
    suite::{Test, skip},
    tcp_pair::{Connection, TcpPair, loopback},
};
use nix::errno::Errno;
use tcp_udp_trace::{
    Event, EventKind,
    TcpState::{Close, CloseWait, Established, FinWait1, FinWait2, LastAck},
};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            inherited_listener_prefork,
            reuseport_three_processes,
            io_uring_accept,
            mptcp_subflows,
            connection_passed_to_another_process_keeps_its_connector,
            connection_passed_to_another_process_keeps_its_acceptor,
            killed_client,
            killed_server,
            another_user,
            another_cgroup,
            thread_of_a_process,
            hostile_name,
            address_reuse_by_two_thousand_sockets,
            listener_older_than_the_tracer,
            connection_older_than_the_tracer,
        ],
    ]
}

/// The parent listens, its children accept. The connection is the parent's until a child accepts
/// it.
fn inherited_listener_prefork() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    let parent = pair.server.identity()?;
    let mut expected = Vec::new();
    for name in ["child-1", "child-2", "child-3"] {
        let mut child = Actor::spawn(name)?;
        let listener = child.take(&pair.server, pair.listener.fd)?;
        let client = pair.client.connect(pair.listener.local)?;
        let server = child.accept(&listener)?;
        pair.client.close(&client)?;
        ensure!(child.receive_all(&server)? == 0);
        child.close(&server)?;
        expected.push(ExpectedTcp::of(
            &pair.client.identity()?,
            &client,
            ACTIVE_CLIENT,
        ));
        expected.push(
            ExpectedTcp::of_child(&parent, &client, PASSIVE_SERVER)
                .accepted(&child.identity()?, &server),
        );
        // The listener closes with its last descriptor.
        child.close(&listener)?;
    }
    pair.finish(&expected)
}

/// A connection of Multipath TCP belongs to one process at each end, though a kernel worker makes
/// the second subflow at the one end, and no process accepts that subflow at the other end.
fn mptcp_subflows() -> anyhow::Result<()> {
    const SERVER: &str = "10.9.0.1:0";
    const SECOND: &str = "10.9.1.1";
    let mut parent = Actor::spawn("parent")?;
    let open = Command::Open {
        v6: false,
        mptcp: true,
    };
    let Ok(listener) = parent.socket(open.clone()) else {
        return skip("this kernel has no MPTCP");
    };
    for address in ["10.9.0.1", "10.9.0.2", SECOND] {
        ip(&format!("addr add {address}/24 dev lo"))?;
    }
    ip("mptcp limits set subflow 2 add_addr_accepted 2")?;
    ip(&format!("mptcp endpoint add {SECOND} dev lo subflow"))?;
    let collector = Collector::start()?;
    parent.run(Command::Bind(listener.fd, SERVER.parse()?))?;
    let listener = parent.socket(Command::Listen(listener.fd))?;
    let mut worker = Actor::spawn("worker")?;
    let shared = worker.take(&parent, listener.fd)?;
    let mut client = Actor::spawn("client")?;
    let socket = client.socket(open)?;
    client.run(Command::Bind(socket.fd, "10.9.0.2:0".parse()?))?;
    let socket = client.socket(Command::Connect(socket.fd, listener.local))?;
    let accepted = worker.accept(&shared)?;
    client.send(&socket, 10)?;
    worker.receive(&accepted, 10)?;
    let second = SECOND.parse()?;
    let is_second =
        |event: &Event| [event.socket.local.ip(), event.socket.remote.ip()].contains(&second);
    for is_client in [true, false] {
        let is_there = move |event: &Event| {
            let side = if is_client {
                event.socket.local
            } else {
                event.socket.remote
            };
            side.ip() == second
                && matches!(
                    event.kind,
                    EventKind::StateChange {
                        to: Established,
                        ..
                    }
                )
        };
        collector.wait_for("second subflow", is_there)?;
    }
    client.close(&socket)?;
    ensure!(worker.receive_all(&accepted)? == 0);
    worker.close(&accepted)?;
    worker.close(&shared)?;
    parent.close(&listener)?;

    // The ends of a listener, and two ends of two subflows.
    let observed = collector.finish(5)?.rest();
    let accepts = observed.concat().into_iter();
    let accepts: Vec<_> = accepts
        .filter(|event| event.kind == EventKind::Accept)
        .collect();
    ensure!(
        accepts.len() == 1 && !is_second(&accepts[0]),
        "{}",
        show(&accepts)
    );
    for events in &observed {
        let last = events.last().unwrap();
        // The two ends may have the same port. The server's side may try another subflow, to the
        // client's address, which refuses.
        let (local, remote) = (last.socket.local, last.socket.remote);
        let pid = if remote.port() == 0 {
            parent.pid()
        } else if local == listener.local || remote == socket.local {
            worker.pid()
        } else {
            client.pid()
        };
        let owner = last.process.as_ref().map(|process| process.pid);
        ensure!(owner == Some(pid), "not of {pid}:{}", show(events));
        let workers = events.iter().filter_map(|event| event.process.as_ref());
        let workers = workers.filter(|process| process.comm.to_string().starts_with("kworker"));
        ensure!(workers.count() == 0, "{}", show(events));
    }
    Ok(())
}

/// Three processes listen at one address. A connection belongs to the process whose listener the
/// kernel has chosen, even before that process knows of it.
fn reuseport_three_processes() -> anyhow::Result<()> {
    const CONNECTIONS: usize = 30;
    let mut client = Actor::spawn("client")?;
    let mut servers = ["server-1", "server-2", "server-3"].map(|name| Actor::spawn(name).unwrap());
    let collector = Collector::start()?;
    let mut address = loopback(false);
    let mut listeners = Vec::new();
    for server in &mut servers {
        let fd = server.open(address)?.fd;
        server.run(Command::ReusePort(fd))?;
        address = server.socket(Command::Bind(fd, address))?.local;
        listeners.push(server.socket(Command::Listen(fd))?);
    }
    let clients: Vec<Endpoint> = (0..CONNECTIONS)
        .map(|_| client.connect(address))
        .collect::<Result<_, _>>()?;
    // The last step of a handshake may come a moment after `connect` returns.
    let mut accepted: [Vec<Endpoint>; 3] = Default::default();
    while accepted.iter().map(Vec::len).sum::<usize>() < CONNECTIONS {
        for ((server, listener), accepted) in servers.iter_mut().zip(&listeners).zip(&mut accepted)
        {
            let Outcome::Sockets(sockets) = server.run(Command::AcceptWaiting(listener.fd))? else {
                bail!("?")
            };
            accepted.extend(sockets);
        }
    }
    ensure!(
        accepted
            .iter()
            .filter(|sockets| !sockets.is_empty())
            .count()
            > 1,
        "one server got everything"
    );
    for socket in &clients {
        client.close(socket)?;
    }
    let mut expected = Vec::new();
    for ((server, listener), accepted) in servers.iter_mut().zip(&listeners).zip(&accepted) {
        let identity = server.identity()?;
        for socket in accepted {
            ensure!(server.receive_all(socket)? == 0);
            server.close(socket)?;
            let client_end = clients
                .iter()
                .find(|client| Some(client.local) == socket.remote)
                .unwrap();
            expected.push(ExpectedTcp::of(
                &client.identity()?,
                client_end,
                ACTIVE_CLIENT,
            ));
            expected.push(
                ExpectedTcp::of_child(&identity, client_end, PASSIVE_SERVER)
                    .accepted(&identity, socket),
            );
        }
        server.close(listener)?;
        expected.push(ExpectedTcp::of(&identity, listener, LISTENER));
    }
    let mut observed = collector.finish(expected.len())?;
    for expected in &expected {
        observed.check(expected)?;
    }
    observed.nothing_else()
}

/// An accept without a system call of its own.
fn io_uring_accept() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    pair.server
        .begin(&Command::AcceptByUring(pair.listener.fd))?;
    let client = pair.client.connect(pair.listener.local)?;
    let server = match pair.server.finish_socket() {
        Ok(socket) => socket,
        Err(error) => {
            let refused = [Errno::ENOSYS, Errno::EPERM]
                .iter()
                .any(|&refusal| errno(&error) == Some(refusal as i32));
            let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
            if refused || release.starts_with("5.10.") {
                return skip(format_args!("io_uring on {}: {error:#}", release.trim()));
            }
            return Err(error);
        }
    };
    let connection = Connection { client, server };
    pair.upload(&connection, 100)?;
    pair.close(&connection)?;
    let client = pair.expected_client(&connection, ACTIVE_CLIENT)?;
    // The kernel may accept on a worker thread.
    let server = pair
        .expected_server(&connection, PASSIVE_SERVER)?
        .thread(None);
    pair.finish(&[client, server])
}

fn connection_passed_to_another_process_keeps_its_connector() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    let connection = pair.connect()?;
    let mut heir = Actor::spawn("heir")?;
    let inherited = heir.take(&pair.client, connection.client.fd)?;
    pair.client.close(&connection.client)?;
    heir.send(&inherited, 500)?;
    pair.server.receive(&connection.server, 500)?;
    heir.close(&inherited)?;
    ensure!(pair.server.receive_all(&connection.server)? == 0);
    pair.server.close(&connection.server)?;
    let client = pair
        .expected_client(&connection, ACTIVE_CLIENT)?
        .bytes(500, 0);
    let server = pair.expected_server(&connection, PASSIVE_SERVER)?;
    pair.finish(&[client, server])
}

fn connection_passed_to_another_process_keeps_its_acceptor() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    let connection = pair.connect()?;
    let mut heir = Actor::spawn("heir")?;
    let inherited = heir.take(&pair.server, connection.server.fd)?;
    pair.server.close(&connection.server)?;
    heir.send(&inherited, 500)?;
    pair.client.receive(&connection.client, 500)?;
    pair.client.close(&connection.client)?;
    ensure!(heir.receive_all(&inherited)? == 0);
    heir.close(&inherited)?;
    let client = pair.expected_client(&connection, ACTIVE_CLIENT)?;
    let server = pair
        .expected_server(&connection, PASSIVE_SERVER)?
        .bytes(500, 0);
    pair.finish(&[client, server])
}

fn killed_client() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    let connection = pair.connect()?;
    pair.upload(&connection, 200_000)?;
    pair.download(&connection, 300_000)?;
    let client = pair.expected_client(&connection, ACTIVE_CLIENT)?;
    std::mem::replace(&mut pair.client, Actor::spawn("another")?).kill()?;
    ensure!(pair.server.receive_all(&connection.server)? == 0);
    pair.server.close(&connection.server)?;
    let server = pair.expected_server(&connection, PASSIVE_SERVER)?;
    pair.finish(&[client, server])
}

/// Its listener ends with it, and so does its connection, whose last events must not name another
/// owner.
fn killed_server() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    let connection = pair.connect()?;
    pair.upload(&connection, 1_000)?;
    let TcpPair {
        collector,
        server,
        listener,
        mut client,
    } = pair;
    let identity = server.identity()?;
    server.kill()?;
    ensure!(client.receive_all(&connection.client)? == 0);
    client.close(&connection.client)?;
    let client = ExpectedTcp::of_actor(&client, &connection.client, PASSIVE_CLIENT)?;
    let server =
        ExpectedTcp::of_child(&identity, &connection.client, ACTIVE_SERVER).bytes(0, 1_000);
    let server = server.accepted(&identity, &connection.server);
    let mut observed = collector.finish(3)?;
    for expected in [
        client,
        server,
        ExpectedTcp::of(&identity, &listener, LISTENER),
    ] {
        observed.check(&expected)?;
    }
    observed.nothing_else()
}

fn another_user() -> anyhow::Result<()> {
    let [server, client] = [("server", 1234), ("client", 4321)]
        .map(|(name, uid)| Actor::spawn_as(OsStr::new(name), Some(uid)));
    let pair = TcpPair::between(server?, loopback(false), client?)?;
    ensure!((pair.server.identity()?.uid, pair.client.identity()?.uid) == (1234, 4321));
    exchange(pair)
}

fn another_cgroup() -> anyhow::Result<()> {
    let (Some(one), Some(other)) = (Cgroup::new("server")?, Cgroup::new("client")?) else {
        return skip("no cgroup2 is mounted");
    };
    let (server, client) = (Actor::spawn("server")?, Actor::spawn("client")?);
    one.adopt(server.pid())?;
    other.adopt(client.pid())?;
    let pair = TcpPair::between(server, loopback(false), client)?;
    ensure!(
        (
            pair.server.identity()?.cgroup,
            pair.client.identity()?.cgroup
        ) == (Some(one.id()?), Some(other.id()?))
    );
    exchange(pair)
}

/// Makes one connection, with everything checked.
fn exchange(mut pair: TcpPair) -> anyhow::Result<()> {
    let connection = pair.connect()?;
    pair.upload(&connection, 42)?;
    pair.close(&connection)?;
    let client = pair.expected_client(&connection, ACTIVE_CLIENT)?;
    let server = pair.expected_server(&connection, PASSIVE_SERVER)?;
    // The actors are kept until the events are compared, and end before their cgroups do.
    pair.finish(&[client, server])
}

/// The event has the thread's id, and the name of the process.
fn thread_of_a_process() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    let on_thread = |command| Command::OnThread("worker".into(), Box::new(command));
    let fd = pair.client.open(pair.listener.local)?.fd;
    let client = pair
        .client
        .socket(on_thread(Command::Connect(fd, pair.listener.local)))?;
    let client_tid = pair.client.moment().tid;
    let server = pair
        .server
        .socket(on_thread(Command::Accept(pair.listener.fd)))?;
    let server_tid = pair.server.moment().tid;
    ensure!(client_tid != pair.client.pid() && server_tid != pair.server.pid());
    let connection = Connection { client, server };
    pair.close(&connection)?;
    let client = pair
        .expected_client(&connection, ACTIVE_CLIENT)?
        .thread(Some(client_tid));
    let server = pair
        .expected_server(&connection, PASSIVE_SERVER)?
        .thread(Some(server_tid));
    ensure!(pair.client.identity()?.comm == b"client");
    pair.finish(&[client, server])
}

/// A name that would clear the screen of a terminal.
fn hostile_name() -> anyhow::Result<()> {
    let name = OsStr::from_bytes(b"\x1b[2J\nok\xff\x7f\\");
    let pair = TcpPair::between(
        Actor::spawn_as(name, None)?,
        loopback(false),
        Actor::spawn_as(name, None)?,
    )?;
    ensure!(pair.server.identity()?.comm == name.as_bytes());
    let second = Collector::start()?;
    exchange(pair)?;
    for event in second.finish_in_order(2)? {
        let line = event.to_string();
        ensure!(!line.contains(char::is_control), "{line:?}");
    }
    Ok(())
}

/// The kernel uses the memory of a socket again at once. Two processes take turns, so an owner that
/// outlives its socket would be the wrong one.
fn address_reuse_by_two_thousand_sockets() -> anyhow::Result<()> {
    const SOCKETS: u32 = 2_000;
    let mut pair = TcpPair::new()?;
    let to = pair.listener.local;
    let mut clients = [Actor::spawn("left")?, Actor::spawn("right")?];
    pair.server
        .begin(&Command::Serve(pair.listener.fd, SOCKETS))?;
    let mut ends = Vec::new();
    for turn in 0..SOCKETS {
        let client = &mut clients[turn as usize % 2];
        client.begin(&Command::Churn {
            to,
            connections: 1,
            seed: turn.into(),
        })?;
        ends.extend(
            client
                .finish_exchanges()?
                .into_iter()
                .map(|end| (turn as usize % 2, end)),
        );
    }
    let server_ends = pair.server.finish_exchanges()?;
    let server = pair.server.identity()?;
    let clients = [clients[0].identity()?, clients[1].identity()?];
    let client_lives = ends
        .iter()
        .map(|(turn, end)| ExpectedTcp::of_client_exchange(&clients[*turn], end));
    let server_lives = server_ends
        .iter()
        .map(|end| ExpectedTcp::of_server_exchange(&server, &server, end));
    pair.finish(&client_lives.chain(server_lives).collect::<Vec<_>>())
}

fn listener_older_than_the_tracer() -> anyhow::Result<()> {
    let (mut server, mut client) = (Actor::spawn("server")?, Actor::spawn("client")?);
    let listener = server.listen(loopback(false))?;
    let collector = Collector::start()?;
    let connected = client.connect(listener.local)?;
    let accepted = server.accept(&listener)?;
    client.close(&connected)?;
    ensure!(server.receive_all(&accepted)? == 0);
    server.close(&accepted)?;
    let identity = server.identity()?;
    let mut observed = collector.finish(2)?;
    observed.check(&ExpectedTcp::of(
        &client.identity()?,
        &connected,
        ACTIVE_CLIENT,
    ))?;
    observed.check(
        &ExpectedTcp::of_child(&identity, &connected, PASSIVE_SERVER)
            .accepted(&identity, &accepted)
            .older_than_the_tracer(),
    )?;
    observed.nothing_else()
}

/// Only the end is reported. Its bytes are exact all the same, and its owner is the process that
/// had it open when the tracer started.
fn connection_older_than_the_tracer() -> anyhow::Result<()> {
    let (mut server, mut client) = (Actor::spawn("server")?, Actor::spawn("client")?);
    let listener = server.listen(loopback(false))?;
    let connected = client.connect(listener.local)?;
    let accepted = server.accept(&listener)?;
    client.send(&connected, 10_000)?;
    server.receive(&accepted, 10_000)?;
    let collector = Collector::start()?;
    server.send(&accepted, 20_000)?;
    client.receive(&connected, 20_000)?;
    client.close(&connected)?;
    ensure!(server.receive_all(&accepted)? == 0);
    server.close(&accepted)?;
    let mut observed = collector.finish(2)?;
    let client = ExpectedTcp::of_actor(
        &client,
        &connected,
        &[Established, FinWait1, FinWait2, Close],
    )?;
    observed.check(&client.older_than_the_tracer())?;
    let server = ExpectedTcp::of_actor(
        &server,
        &accepted,
        &[Established, CloseWait, LastAck, Close],
    )?;
    observed.check(&server.older_than_the_tracer())?;
    observed.nothing_else()
}
