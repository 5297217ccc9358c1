//! Whose a socket is: the right process, or none.

use std::{ffi::OsStr, fs, os::unix::ffi::OsStrExt as _};

use anyhow::{bail, ensure};
use integration_tests::{
    actor::{Actor, Command, Endpoint, Outcome, errno},
    cgroup::Cgroup,
    life::{ACTIVE_CLIENT, ACTIVE_SERVER, LISTENER, Life, PASSIVE_CLIENT, PASSIVE_SERVER},
    netns::ip,
    scene::{Connection, Scene, loopback},
    suite::{Test, skip},
    trace::{Trace, show},
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

/// The parent listens, its children accept: the connection is the parent's until a child has it.
fn inherited_listener_prefork() -> anyhow::Result<()> {
    let mut scene = Scene::new()?;
    let parent = scene.server.who()?;
    let mut lives = Vec::new();
    for name in ["child-1", "child-2", "child-3"] {
        let mut child = Actor::spawn(name)?;
        let listener = child.take(&scene.server, scene.listener.fd)?;
        let client = scene.client.connect(scene.listener.local)?;
        let server = child.accept(&listener)?;
        scene.client.close(&client)?;
        ensure!(child.receive_all(&server)? == 0);
        child.close(&server)?;
        lives.push(Life::of(&scene.client.who()?, &client, ACTIVE_CLIENT));
        lives.push(
            Life::of_child(&parent, &client, PASSIVE_SERVER).accepted(&child.who()?, &server),
        );
        // The listener closes with its last descriptor.
        child.close(&listener)?;
    }
    scene.finish(&lives)
}

/// A connection of Multipath TCP is one process's at each end, though a worker of the kernel makes
/// the second subflow at the one end, and nobody accepts it at the other one.
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
    let trace = Trace::start()?;
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
        trace.wait_for("second subflow", is_there)?;
    }
    client.close(&socket)?;
    ensure!(worker.receive_all(&accepted)? == 0);
    worker.close(&accepted)?;
    worker.close(&shared)?;
    parent.close(&listener)?;

    // A listener, and two ends of two subflows.
    let lives = trace.finish(5)?.rest();
    let accepts = lives.concat().into_iter();
    let accepts: Vec<_> = accepts
        .filter(|event| event.kind == EventKind::Accept)
        .collect();
    ensure!(
        accepts.len() == 1 && !is_second(&accepts[0]),
        "{}",
        show(&accepts)
    );
    for events in &lives {
        let last = events.last().unwrap();
        let pid = match last.socket.local.port() {
            _ if last.socket.remote.port() == 0 => parent.pid(),
            port if port == listener.local.port() => worker.pid(),
            _ => client.pid(),
        };
        let owner = last.process.as_ref().map(|process| process.pid);
        ensure!(owner == Some(pid), "not of {pid}:{}", show(events));
        let workers = events.iter().filter_map(|event| event.process.as_ref());
        let workers = workers.filter(|process| process.comm.to_string().starts_with("kworker"));
        ensure!(workers.count() == 0, "{}", show(events));
    }
    Ok(())
}

/// Three processes listen at one address: a connection belongs to the one whose listener the kernel has chosen, before
/// that one knows of it.
fn reuseport_three_processes() -> anyhow::Result<()> {
    const CONNECTIONS: usize = 30;
    let mut client = Actor::spawn("client")?;
    let mut servers = ["server-1", "server-2", "server-3"].map(|name| Actor::spawn(name).unwrap());
    let trace = Trace::start()?;
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
        let who = server.who()?;
        for socket in accepted {
            ensure!(server.receive_all(socket)? == 0);
            server.close(socket)?;
            let client_end = clients
                .iter()
                .find(|client| Some(client.local) == socket.remote)
                .unwrap();
            expected.push(Life::of(&client.who()?, client_end, ACTIVE_CLIENT));
            expected.push(Life::of_child(&who, client_end, PASSIVE_SERVER).accepted(&who, socket));
        }
        server.close(listener)?;
        expected.push(Life::of(&who, listener, LISTENER));
    }
    let mut lives = trace.finish(expected.len())?;
    for life in &expected {
        lives.check(life)?;
    }
    lives.nothing_else()
}

/// An accept that is no system call of its own.
fn io_uring_accept() -> anyhow::Result<()> {
    let mut scene = Scene::new()?;
    scene
        .server
        .begin(&Command::AcceptByUring(scene.listener.fd))?;
    let client = scene.client.connect(scene.listener.local)?;
    let server = match scene.server.finish_socket() {
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
    scene.upload(&connection, 100)?;
    scene.close(&connection)?;
    let client = scene.client_life(&connection, ACTIVE_CLIENT)?.bytes(100, 0);
    // The kernel may do it on a worker thread.
    let server = scene
        .server_life(&connection, PASSIVE_SERVER)?
        .bytes(0, 100)
        .thread(None);
    scene.finish(&[client, server])
}

fn connection_passed_to_another_process_keeps_its_connector() -> anyhow::Result<()> {
    let mut scene = Scene::new()?;
    let connection = scene.connect()?;
    let mut heir = Actor::spawn("heir")?;
    let inherited = heir.take(&scene.client, connection.client.fd)?;
    scene.client.close(&connection.client)?;
    heir.send(&inherited, 500)?;
    scene.server.receive(&connection.server, 500)?;
    heir.close(&inherited)?;
    ensure!(scene.server.receive_all(&connection.server)? == 0);
    scene.server.close(&connection.server)?;
    let client = scene.client_life(&connection, ACTIVE_CLIENT)?.bytes(500, 0);
    let server = scene
        .server_life(&connection, PASSIVE_SERVER)?
        .bytes(0, 500);
    scene.finish(&[client, server])
}

fn connection_passed_to_another_process_keeps_its_acceptor() -> anyhow::Result<()> {
    let mut scene = Scene::new()?;
    let connection = scene.connect()?;
    let mut heir = Actor::spawn("heir")?;
    let inherited = heir.take(&scene.server, connection.server.fd)?;
    scene.server.close(&connection.server)?;
    heir.send(&inherited, 500)?;
    scene.client.receive(&connection.client, 500)?;
    scene.client.close(&connection.client)?;
    ensure!(heir.receive_all(&inherited)? == 0);
    heir.close(&inherited)?;
    let client = scene.client_life(&connection, ACTIVE_CLIENT)?.bytes(0, 500);
    let server = scene
        .server_life(&connection, PASSIVE_SERVER)?
        .bytes(500, 0);
    scene.finish(&[client, server])
}

fn killed_client() -> anyhow::Result<()> {
    let mut scene = Scene::new()?;
    let connection = scene.connect()?;
    scene.upload(&connection, 200_000)?;
    scene.download(&connection, 300_000)?;
    let client = scene
        .client_life(&connection, ACTIVE_CLIENT)?
        .bytes(200_000, 300_000);
    std::mem::replace(&mut scene.client, Actor::spawn("another")?).kill()?;
    ensure!(scene.server.receive_all(&connection.server)? == 0);
    scene.server.close(&connection.server)?;
    let server = scene
        .server_life(&connection, PASSIVE_SERVER)?
        .bytes(300_000, 200_000);
    scene.finish(&[client, server])
}

/// Its listener ends with it, and so does its connection, which its last moments must not give to anyone else.
fn killed_server() -> anyhow::Result<()> {
    let mut scene = Scene::new()?;
    let connection = scene.connect()?;
    scene.upload(&connection, 1_000)?;
    let Scene {
        trace,
        server,
        listener,
        mut client,
    } = scene;
    let who = server.who()?;
    server.kill()?;
    ensure!(client.receive_all(&connection.client)? == 0);
    client.close(&connection.client)?;
    let client = Life::of(&client.who()?, &connection.client, PASSIVE_CLIENT).bytes(1_000, 0);
    let server = Life::of_child(&who, &connection.client, ACTIVE_SERVER).bytes(0, 1_000);
    let server = server.accepted(&who, &connection.server);
    let mut lives = trace.finish(3)?;
    for life in [client, server, Life::of(&who, &listener, LISTENER)] {
        lives.check(&life)?;
    }
    lives.nothing_else()
}

fn another_user() -> anyhow::Result<()> {
    let [server, client] = [("server", 1234), ("client", 4321)]
        .map(|(name, uid)| Actor::spawn_as(OsStr::new(name), Some(uid)));
    let scene = Scene::between(server?, loopback(false), client?)?;
    ensure!((scene.server.who()?.uid, scene.client.who()?.uid) == (1234, 4321));
    exchange(scene)
}

fn another_cgroup() -> anyhow::Result<()> {
    let (Some(one), Some(other)) = (Cgroup::new("server")?, Cgroup::new("client")?) else {
        return skip("no cgroup2 is mounted");
    };
    let (server, client) = (Actor::spawn("server")?, Actor::spawn("client")?);
    one.adopt(server.pid())?;
    other.adopt(client.pid())?;
    let scene = Scene::between(server, loopback(false), client)?;
    ensure!(
        (scene.server.who()?.cgroup, scene.client.who()?.cgroup)
            == (Some(one.id()?), Some(other.id()?))
    );
    exchange(scene)
}

/// One connection, with everything checked.
fn exchange(mut scene: Scene) -> anyhow::Result<()> {
    let connection = scene.connect()?;
    scene.upload(&connection, 42)?;
    scene.close(&connection)?;
    let client = scene.client_life(&connection, ACTIVE_CLIENT)?.bytes(42, 0);
    let server = scene.server_life(&connection, PASSIVE_SERVER)?.bytes(0, 42);
    // The actors live until the events are compared, and end before their cgroups do.
    scene.finish(&[client, server])
}

/// The thread is named by its id; the name is the process's.
fn thread_of_a_process() -> anyhow::Result<()> {
    let mut scene = Scene::new()?;
    let on_thread = |command| Command::OnThread("worker".into(), Box::new(command));
    let fd = scene.client.open(scene.listener.local)?.fd;
    let client = scene
        .client
        .socket(on_thread(Command::Connect(fd, scene.listener.local)))?;
    let client_tid = scene.client.moment().tid;
    let server = scene
        .server
        .socket(on_thread(Command::Accept(scene.listener.fd)))?;
    let server_tid = scene.server.moment().tid;
    ensure!(client_tid != scene.client.pid() && server_tid != scene.server.pid());
    let connection = Connection { client, server };
    scene.close(&connection)?;
    let client = scene
        .client_life(&connection, ACTIVE_CLIENT)?
        .thread(Some(client_tid));
    let server = scene
        .server_life(&connection, PASSIVE_SERVER)?
        .thread(Some(server_tid));
    ensure!(scene.client.who()?.comm == b"client");
    scene.finish(&[client, server])
}

/// A name that would clear the screen of whoever prints it.
fn hostile_name() -> anyhow::Result<()> {
    let name = OsStr::from_bytes(b"\x1b[2J\nok\xff\x7f\\");
    let scene = Scene::between(
        Actor::spawn_as(name, None)?,
        loopback(false),
        Actor::spawn_as(name, None)?,
    )?;
    ensure!(scene.server.who()?.comm == name.as_bytes());
    let second = Trace::start()?;
    exchange(scene)?;
    for event in second.finish_in_order(2)? {
        let line = event.to_string();
        ensure!(!line.contains(char::is_control), "{line:?}");
    }
    Ok(())
}

/// The kernel uses the memory of a socket again at once. Two processes take turns, so an owner that outlives its socket
/// would be the wrong one.
fn address_reuse_by_two_thousand_sockets() -> anyhow::Result<()> {
    const SOCKETS: u32 = 2_000;
    let mut scene = Scene::new()?;
    let to = scene.listener.local;
    let mut clients = [Actor::spawn("left")?, Actor::spawn("right")?];
    scene
        .server
        .begin(&Command::Serve(scene.listener.fd, SOCKETS))?;
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
    let server_ends = scene.server.finish_exchanges()?;
    let server = scene.server.who()?;
    let clients = [clients[0].who()?, clients[1].who()?];
    let client_lives = ends
        .iter()
        .map(|(turn, end)| Life::of_client_exchange(&clients[*turn], end));
    let server_lives = server_ends
        .iter()
        .map(|end| Life::of_server_exchange(&server, &server, end));
    scene.finish(&client_lives.chain(server_lives).collect::<Vec<_>>())
}

fn listener_older_than_the_tracer() -> anyhow::Result<()> {
    let (mut server, mut client) = (Actor::spawn("server")?, Actor::spawn("client")?);
    let listener = server.listen(loopback(false))?;
    let trace = Trace::start()?;
    let connected = client.connect(listener.local)?;
    let accepted = server.accept(&listener)?;
    client.close(&connected)?;
    ensure!(server.receive_all(&accepted)? == 0);
    server.close(&accepted)?;
    let who = server.who()?;
    let mut lives = trace.finish(2)?;
    lives.check(&Life::of(&client.who()?, &connected, ACTIVE_CLIENT))?;
    lives.check(
        &Life::of_child(&who, &connected, PASSIVE_SERVER)
            .accepted(&who, &accepted)
            .older_than_the_tracer(),
    )?;
    lives.nothing_else()
}

/// Only its end is seen: its bytes are exact all the same, and its owner had it open when the tracer started.
fn connection_older_than_the_tracer() -> anyhow::Result<()> {
    let (mut server, mut client) = (Actor::spawn("server")?, Actor::spawn("client")?);
    let listener = server.listen(loopback(false))?;
    let connected = client.connect(listener.local)?;
    let accepted = server.accept(&listener)?;
    client.send(&connected, 10_000)?;
    server.receive(&accepted, 10_000)?;
    let trace = Trace::start()?;
    server.send(&accepted, 20_000)?;
    client.receive(&connected, 20_000)?;
    client.close(&connected)?;
    ensure!(server.receive_all(&accepted)? == 0);
    server.close(&accepted)?;
    let mut lives = trace.finish(2)?;
    let client = Life::of(
        &client.who()?,
        &connected,
        &[Established, FinWait1, FinWait2, Close],
    );
    lives.check(&client.bytes(10_000, 20_000).older_than_the_tracer())?;
    let server = Life::of(
        &server.who()?,
        &accepted,
        &[Established, CloseWait, LastAck, Close],
    );
    lives.check(&server.bytes(20_000, 10_000).older_than_the_tracer())?;
    lives.nothing_else()
}
