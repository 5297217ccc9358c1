//! The process that uses a socket which another process owns, and the cgroup of an owner.

use std::{
    fs,
    io::Write as _,
    net::{TcpStream, UdpSocket},
};

use anyhow::{Context as _, ensure};
use integration_tests::{
    actor::{Actor, Command, Heir, Identity, Inheritance, Operation, ReceiveCall, SendCall},
    cgroup::{self, Cgroup},
    collector::{Collector, show},
    suite::{Test, skip},
    tcp_pair::loopback,
    udp_actor::UdpActor,
};
use tcp_udp_trace::{Event, EventKind, Protocol, TcpState, User};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            udp_daemon,
            tcp_daemon,
            udp_exec,
            udp_socket_of_a_broker_that_ends,
            udp_receiver_and_connector,
            udp_users_by_turns_are_never_mixed,
            tcp_prefork,
            socket_activation,
            sockets_older_than_the_tracer,
        ],
    ]
}

/// Returns the identity of a process as the field `user` must name it.
fn identity(pid: u32) -> anyhow::Result<Identity> {
    let comm = fs::read(format!("/proc/{pid}/comm"))?;
    Ok(Identity {
        pid,
        uid: 0,
        comm: comm.trim_ascii_end().to_vec(),
        netns: 0,
        netns_cookie: None,
        cgroup: cgroup::of_process(pid),
    })
}

fn is(user: &User, identity: &Identity) -> bool {
    let is_cgroup = identity
        .cgroup
        .is_none_or(|cgroup| user.cgroup == Some(cgroup));
    let started = !user.started.is_zero();
    (user.pid, user.uid) == (identity.pid, identity.uid)
        && user.comm.as_bytes() == identity.comm
        && is_cgroup
        && started
}

/// Whether an event names this owner and this user.
fn names(event: &Event, owner: u32, user: Option<&Identity>) -> bool {
    let is_owner = event.process.as_ref().is_some_and(|it| it.pid == owner);
    let is_user = match (&event.user, user) {
        (Some(found), Some(identity)) => is(found, identity),
        (None, None) => true,
        _ => false,
    };
    is_owner && is_user
}

/// Checks that all of the selected events name them, and that there are some.
fn all_name(
    events: &[Event],
    which: impl Fn(&Event) -> bool,
    owner: u32,
    user: Option<&Identity>,
) -> anyhow::Result<()> {
    let found: Vec<_> = events
        .iter()
        .filter(|event| which(event))
        .cloned()
        .collect();
    let is_right = !found.is_empty() && found.iter().all(|event| names(event, owner, user));
    ensure!(
        is_right,
        "not all of {owner}, used by {user:?}:{}\nof{}",
        details(&found),
        show(events)
    );
    Ok(())
}

/// Whether an event is of a listener. On some kernels its children show no peer at first.
fn is_listener(event: &Event) -> bool {
    use TcpState::{Close, Listen};
    let EventKind::StateChange { from, to, .. } = event.kind else {
        return false;
    };
    matches!((from, to), (Close, Listen) | (Listen, Close))
}

/// Formats the events with every field.
fn details(events: &[Event]) -> String {
    events.iter().map(|event| format!("\n{event:?}")).collect()
}

/// A daemon makes its socket, forks, and lets the parent end.
fn udp_daemon() -> anyhow::Result<()> {
    let collector = Collector::start_udp()?;
    let daemon = Heir::start(Inheritance::Daemon, Protocol::Udp)?;
    let user = identity(daemon.pid)?;
    let client = UdpSocket::bind(loopback(false))?;
    let mut buffer = [0; 10];
    for size in [4, 5] {
        client.send_to(&buffer[..size], daemon.address)?;
        ensure!(client.recv(&mut buffer)? == size);
    }
    client.send_to(&[], daemon.address)?;
    let local = client.local_addr()?;
    drop(client);
    let events = collector.finish_in_order(2)?;
    let is_server = |event: &Event| event.socket.local == daemon.address;
    all_name(&events, is_server, daemon.maker, Some(&user))?;
    let is_client = |event: &Event| event.socket.local == local;
    all_name(&events, is_client, std::process::id(), None)
}

/// The same for TCP: the accepts name the daemon.
fn tcp_daemon() -> anyhow::Result<()> {
    let collector = Collector::start()?;
    let daemon = Heir::start(Inheritance::Daemon, Protocol::Tcp)?;
    let user = identity(daemon.pid)?;
    let connect = |bytes: &[u8]| -> anyhow::Result<_> {
        let mut client = TcpStream::connect(daemon.address)?;
        client.write_all(bytes)?;
        Ok(client.local_addr()?)
    };
    let first = connect(b"something")?;
    collector.wait_for("accept", |event| event.kind == EventKind::Accept)?;
    let second = connect(b"")?;
    // Two connections, each with two ends, and the listener.
    let events = collector.finish_in_order(5)?;
    let is_end = |event: &Event| is_listener(event) && event.is_end();
    let is_begin = |event: &Event| is_listener(event) && !event.is_end();
    all_name(&events, is_begin, daemon.maker, None)?;
    all_name(&events, is_end, daemon.maker, Some(&user))?;
    for client in [first, second] {
        let is_child = |event: &Event| event.socket.remote == client;
        // A connection may be accepted at any time once it is established.
        let waits = |event: &Event| {
            is_child(event)
                && matches!(
                    event.kind,
                    EventKind::StateChange {
                        to: TcpState::Established,
                        ..
                    }
                )
                && event
                    .process
                    .as_ref()
                    .is_some_and(|it| it.pid == daemon.maker)
        };
        all_name(&events, waits, daemon.maker, None)?;
        let is_end = |event: &Event| is_child(event) && event.is_end();
        all_name(&events, is_end, daemon.pid, None)?;
    }
    Ok(())
}

/// The process stays the same, whatever program it executes.
fn udp_exec() -> anyhow::Result<()> {
    let collector = Collector::start_udp()?;
    let heir = Heir::start(Inheritance::Exec, Protocol::Udp)?;
    ensure!(heir.pid == heir.maker);
    let client = UdpSocket::bind(loopback(false))?;
    client.send_to(&[1, 2], heir.address)?;
    ensure!(client.recv(&mut [0; 10])? == 2);
    client.send_to(&[], heir.address)?;
    drop(client);
    let events = collector.finish_in_order(2)?;
    let is_server = |event: &Event| event.socket.local == heir.address;
    all_name(&events, is_server, heir.pid, None)
}

/// A broker passes its socket on and ends.
fn udp_socket_of_a_broker_that_ends() -> anyhow::Result<()> {
    let collector = Collector::start_udp()?;
    let mut peer = UdpActor::bind("peer", loopback(false))?;
    let mut broker = UdpActor::bind("broker", loopback(false))?;
    let (to, local, maker) = (Some(peer.local()), broker.local(), broker.identity()?.pid);
    broker.send(SendCall::SendTo, to, &[10])?;
    peer.receive(ReceiveCall::RecvFrom, 1)?;
    let mut heir = broker.passed_to("heir")?;
    let user = heir.identity()?;
    broker.kill()?;
    heir.send(SendCall::SendMsg, to, &[20])?;
    peer.receive(ReceiveCall::RecvFrom, 1)?;
    // User space reports the flow when its interval is over.
    let is_flow =
        |event: &Event| event.socket.local == local && matches!(event.kind, EventKind::Flow { .. });
    collector.wait_for("second report of the flow", |event| {
        is_flow(event) && event.traffic.tx_packets == 2
    })?;
    heir.close()?;
    peer.close()?;
    let events = collector.finish_in_order(2)?;
    let first = |event: &Event| is_flow(event) && event.traffic.tx_packets == 1;
    all_name(&events, first, maker, None)?;
    let rest = |event: &Event| event.socket.local == local && !first(event);
    all_name(&events, rest, maker, Some(&user))
}

/// Each way to use a socket is reported, also when the owner uses it again.
fn udp_receiver_and_connector() -> anyhow::Result<()> {
    let collector = Collector::start_udp_with(|builder| builder.per_datagram(true))?;
    let mut peer = UdpActor::bind("peer", loopback(false))?;
    let mut maker = UdpActor::bind("maker", loopback(false))?;
    let (to, local, owner) = (peer.local(), maker.local(), maker.identity()?.pid);
    let mut receiver = maker.passed_to("receiver")?;
    let mut connector = maker.passed_to("connector")?;
    let mut sender = maker.passed_to("sender")?;
    let [receives, connects, sends] = [&receiver, &connector, &sender].map(UdpActor::identity);
    let (receives, connects, sends) = (receives?, connects?, sends?);
    peer.send(SendCall::SendTo, Some(local), &[1, 2])?;
    receiver.receive(ReceiveCall::RecvFrom, 2)?;
    connector.connect(to)?;
    sender.send(SendCall::Write, None, &[3])?;
    maker.send(SendCall::Write, None, &[4])?;
    for actor in [receiver, connector, sender] {
        actor.leave()?;
    }
    maker.close()?;
    peer.close()?;
    let events = collector.finish_in_order(2)?;
    let of =
        |kind: EventKind| move |event: &Event| event.socket.local == local && event.kind == kind;
    all_name(
        &events,
        of(EventKind::Receive { bytes: 1 }),
        owner,
        Some(&receives),
    )?;
    all_name(
        &events,
        of(EventKind::Receive { bytes: 2 }),
        owner,
        Some(&receives),
    )?;
    all_name(&events, of(EventKind::Connect), owner, Some(&connects))?;
    all_name(
        &events,
        of(EventKind::Send { bytes: 3 }),
        owner,
        Some(&sends),
    )?;
    all_name(&events, of(EventKind::Send { bytes: 4 }), owner, None)
}

/// Three processes send at the same time. All fields of the user in an event are of the same
/// process.
fn udp_users_by_turns_are_never_mixed() -> anyhow::Result<()> {
    const EACH: usize = 400;
    for per_datagram in [false, true] {
        let collector =
            Collector::start_udp_with(move |builder| builder.per_datagram(per_datagram))?;
        let peer = UdpActor::bind("peer", loopback(false))?;
        let mut maker = UdpActor::bind("maker", loopback(false))?;
        let (to, local, owner) = (peer.local(), maker.local(), maker.identity()?.pid);
        let mut heirs = [maker.passed_to("one")?, maker.passed_to("another-of-them")?];
        let users = [heirs[0].identity()?, heirs[1].identity()?];
        let sizes = vec![1; EACH];
        let send = || Operation::Send {
            by: SendCall::SendTo,
            to: Some(to),
            sizes: sizes.clone(),
        };
        maker.begin(send())?;
        for heir in &mut heirs {
            heir.begin(send())?;
        }
        maker.finish()?;
        for mut heir in heirs {
            heir.finish()?;
            heir.leave()?;
        }
        maker.close()?;
        peer.close()?;
        let events = collector.finish_in_order(2)?;
        for event in events.iter().filter(|event| event.socket.local == local) {
            let is_one = names(event, owner, None)
                || users.iter().any(|user| names(event, owner, Some(user)));
            ensure!(is_one, "of none of {users:?}: {event:?}");
        }
    }
    Ok(())
}

/// The parent listens, its children accept.
fn tcp_prefork() -> anyhow::Result<()> {
    let collector = Collector::start()?;
    let (mut parent, mut client) = (Actor::spawn("parent")?, Actor::spawn("client")?);
    let listener = parent.listen(loopback(false))?;
    let mut users = Vec::new();
    for name in ["child-1", "child-2", "child-3"] {
        let mut child = Actor::spawn(name)?;
        let inherited = child.take(&parent, listener.fd)?;
        let connected = client.connect(listener.local)?;
        let accepted = child.accept(&inherited)?;
        client.close(&connected)?;
        ensure!(child.receive_all(&accepted)? == 0);
        child.close(&accepted)?;
        child.close(&inherited)?;
        users.push((child.identity()?, connected.local, child));
    }
    let own = client.connect(listener.local)?;
    let accepted = parent.accept(&listener)?;
    client.close(&own)?;
    parent.receive_all(&accepted)?;
    parent.close(&accepted)?;
    parent.close(&listener)?;
    let events = collector.finish_in_order(9)?;
    let owner = parent.pid();
    for (user, remote, _) in &users {
        let is_child = |event: &Event| event.socket.remote == *remote;
        let waits = |event: &Event| {
            is_child(event)
                && matches!(
                    event.kind,
                    EventKind::StateChange {
                        to: TcpState::Established,
                        ..
                    }
                )
        };
        all_name(&events, waits, owner, None)?;
        let is_end = |event: &Event| is_child(event) && event.is_end();
        all_name(&events, is_end, user.pid, None)?;
    }
    let waits = |event: &Event| {
        event.socket.remote == own.local
            && matches!(
                event.kind,
                EventKind::StateChange {
                    to: TcpState::Established,
                    ..
                }
            )
    };
    all_name(&events, waits, owner, None)?;
    // The last process to accept was the parent itself.
    all_name(&events, is_listener, owner, None)
}

/// A manager makes the sockets of a service, which is in another cgroup.
fn socket_activation() -> anyhow::Result<()> {
    let (Some(of_manager), Some(of_service)) = (Cgroup::new("manager")?, Cgroup::new("service")?)
    else {
        return skip("no cgroup2 is mounted");
    };
    let (tcp, udp) = (Collector::start()?, Collector::start_udp()?);
    let (mut manager, mut client) = (Actor::spawn("manager")?, Actor::spawn("client")?);
    of_manager.adopt(manager.pid())?;
    let listener = manager.listen(loopback(false))?;
    let datagrams = manager.socket(Command::OpenUdp { v6: false })?.fd;
    let datagrams = manager.socket(Command::Bind(datagrams, loopback(false)))?;
    let mut service = Actor::spawn("service")?;
    of_service.adopt(service.pid())?;
    let (inherited, accepts) = (
        service.take(&manager, datagrams.fd)?,
        service.take(&manager, listener.fd)?,
    );
    let connected = client.connect(listener.local)?;
    let accepted = service.accept(&accepts)?;
    client.close(&connected)?;
    service.receive_all(&accepted)?;
    let (to, sizes) = (Some(connected.local), vec![7]);
    let by = SendCall::SendTo;
    service.run(Command::Udp(
        inherited.fd,
        Operation::Send { by, to, sizes },
    ))?;
    for socket in [accepted, accepts, inherited] {
        service.close(&socket)?;
    }
    manager.close(&listener)?;
    manager.close(&datagrams)?;

    let (manager_group, service_group) = (Some(of_manager.id()?), Some(of_service.id()?));
    let user = service.identity()?;
    ensure!(user.cgroup == service_group);
    let cgroups = |event: &Event| {
        let process = event.process.as_ref().and_then(|process| process.cgroup);
        (Some(event.socket.cgroup), process)
    };
    let events = tcp.finish_in_order(3)?;
    let is_server = |event: &&Event| event.socket.remote == connected.local;
    let mut accepts = events.iter().filter(is_server);
    let end = accepts.next_back().context("no connection")?;
    ensure!(names(end, service.pid(), None), "{end:?}");
    ensure!(cgroups(end) == (manager_group, service_group), "{end:?}");
    let events = udp.finish_in_order(1)?;
    all_name(&events, |_| true, manager.pid(), Some(&user))?;
    for event in &events {
        ensure!(
            cgroups(event) == (manager_group, manager_group),
            "{event:?}"
        );
    }
    // The processes end before their cgroups do.
    drop((manager, service));
    Ok(())
}

/// The owner and its cgroup are found in the snapshot, the user from then on.
fn sockets_older_than_the_tracer() -> anyhow::Result<()> {
    let mut peer = UdpActor::bind("peer", loopback(false))?;
    let maker = UdpActor::bind("maker", loopback(false))?;
    let (local, owner) = (maker.local(), maker.identity()?);
    let mut heir = maker.passed_to("heir")?;
    let user = heir.identity()?;
    let collector = Collector::start_udp()?;
    peer.send(SendCall::SendTo, Some(local), &[1])?;
    heir.receive(ReceiveCall::RecvFrom, 1)?;
    heir.leave()?;
    maker.close()?;
    peer.close()?;
    let events = collector.finish_in_order(2)?;
    let is_it = |event: &Event| event.socket.local == local;
    all_name(&events, is_it, owner.pid, Some(&user))?;
    for event in events.iter().filter(|event| is_it(event)) {
        let cgroup = event.process.as_ref().and_then(|process| process.cgroup);
        ensure!(
            owner.cgroup.is_none() || cgroup == owner.cgroup,
            "{event:?}"
        );
    }
    Ok(())
}
