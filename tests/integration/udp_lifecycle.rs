//! The beginning and the end of UDP sockets, their owners, and the start and the end of their
//! tracer.

use std::{
    ffi::OsStr,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::ensure;
use futures_util::{StreamExt as _, stream};
use integration_tests::{
    actor::{Actor, Operation, ReceiveCall, SendCall},
    cgroup::{self, Cgroup},
    collector::{self, Collector, check_conservation},
    hooks_page,
    kernel::{BpfObjects, is_at_least, is_emulated, open_files},
    suite::{Test, skip},
    tcp_pair::loopback,
    udp_actor::UdpActor,
    udp_pair::{Family, UdpCollectors, UdpPair, connected},
};
use nix::sched::{CloneFlags, unshare};
use tcp_udp_trace::{EventKind, Protocol};
use tokio::runtime::{Builder, Runtime};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            socket_that_never_sends,
            socket_that_is_only_connected,
            killed_process,
            socket_passed_to_another_process,
            socket_inherited_by_a_child,
            socket_closed_by_its_maker_first,
            another_user,
            many_sockets_one_after_the_other,
            socket_older_than_the_tracer,
            socket_older_than_the_tracer_with_an_heir,
            tracers_of_both_protocols_merge,
            every_signal_has_a_hook,
        ],
        Solitude: [
            start_and_stop_over_and_over,
        ],
        Process: [
            in_a_cgroup_namespace,
        ],
    ]
}

fn runtime() -> anyhow::Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}

/// The close of such a socket is its only event.
fn socket_that_never_sends() -> anyhow::Result<()> {
    let collectors = UdpCollectors::start()?;
    let mut expected = Vec::new();
    for family in Family::ALL {
        expected.push(UdpActor::open("silent", family.loopback())?.close()?);
        expected.push(UdpActor::bind("bound", family.loopback())?.close()?);
    }
    collectors.finish(&expected)
}

fn socket_that_is_only_connected() -> anyhow::Result<()> {
    connected(|_| Ok(()))
}

fn killed_process() -> anyhow::Result<()> {
    let collectors = UdpCollectors::start()?;
    let mut expected = Vec::new();
    for family in Family::ALL {
        let mut pair = UdpPair::new(family, true)?;
        pair.sender.send(SendCall::SendTo, None, &[10, 0, 20])?;
        pair.receiver.receive(ReceiveCall::RecvFrom, 2)?;
        expected.push(pair.receiver.kill()?);
        expected.push(pair.sender.kill()?);
        expected.push(UdpActor::open("silent", family.loopback())?.kill()?);
    }
    collectors.finish(&expected)
}

/// The socket remains that of the process that made it. The datagrams that the other process sends
/// through it count.
fn socket_passed_to_another_process() -> anyhow::Result<()> {
    let collectors = UdpCollectors::start()?;
    let mut expected = Vec::new();
    for family in Family::ALL {
        for is_connected in [false, true] {
            let mut pair = UdpPair::new(family, is_connected)?;
            let to = pair.to();
            pair.sender.send(SendCall::SendTo, to, &[10])?;
            let mut heir = pair.sender.passed_to("heir")?;
            heir.send(SendCall::SendTo, to, &[20, 30])?;
            let mut receiving_heir = pair.receiver.passed_to("other-heir")?;
            receiving_heir.receive(ReceiveCall::RecvFrom, 3)?;
            // The makers close first, but the sockets remain open.
            pair.sender.leave()?;
            pair.receiver.leave()?;
            heir.send(SendCall::SendMsg, to, &[40])?;
            receiving_heir.receive(ReceiveCall::RecvMsg, 1)?;
            expected.extend([heir.close()?, receiving_heir.close()?]);
        }
    }
    collectors.finish(&expected)
}

fn socket_inherited_by_a_child() -> anyhow::Result<()> {
    connected(|pair| {
        pair.sender.send(SendCall::SendTo, None, &[10])?;
        pair.sender.run(Operation::SendByChild { size: 200 })?;
        pair.sender.send(SendCall::SendTo, None, &[30])?;
        pair.receiver.receive(ReceiveCall::RecvFrom, 3)
    })
}

/// The socket belongs to a process that has ended.
fn socket_closed_by_its_maker_first() -> anyhow::Result<()> {
    let collectors = UdpCollectors::start()?;
    let mut pair = UdpPair::new(Family::V4, true)?;
    let mut heir = pair.sender.passed_to("heir")?;
    pair.sender.kill()?;
    heir.send(SendCall::SendTo, None, &[10])?;
    pair.receiver.receive(ReceiveCall::RecvFrom, 1)?;
    collectors.finish(&[heir.kill()?, pair.receiver.close()?])
}

fn another_user() -> anyhow::Result<()> {
    let collectors = UdpCollectors::start()?;
    let address = Family::V4.loopback();
    let mut receiver = UdpActor::bind("receiver", address)?;
    let user = Actor::spawn_as(OsStr::new("user"), Some(1234))?;
    let mut sender = UdpActor::with(user, address)?;
    ensure!(sender.identity()?.uid == 1234);
    sender.send(SendCall::SendTo, Some(receiver.local()), &[10])?;
    receiver.receive(ReceiveCall::RecvFrom, 1)?;
    collectors.finish(&[sender.close()?, receiver.close()?])
}

/// The kernel uses the memory of a socket again at once. Each socket is reported as one of its own
/// all the same.
fn many_sockets_one_after_the_other() -> anyhow::Result<()> {
    let collectors = UdpCollectors::start()?;
    let address = Family::V4.loopback();
    let mut receiver = UdpActor::bind("receiver", address)?;
    let (mut left, mut right) = (Actor::spawn("left")?, Actor::spawn("right")?);
    let mut sockets = Vec::new();
    for turn in 0..200 {
        let mut sender = UdpActor::with(left, address)?;
        sender.send(SendCall::SendTo, Some(receiver.local()), &[turn])?;
        receiver.receive(ReceiveCall::RecvFrom, 1)?;
        let (expected, actor) = sender.close_socket()?;
        sockets.push(expected);
        (left, right) = (right, actor);
    }
    drop((left, right));
    sockets.push(receiver.close()?);
    collectors.finish(&sockets)
}

/// Only later traffic is reported. The creator is unknown, but the tracer knows the process that
/// had the socket open.
fn socket_older_than_the_tracer() -> anyhow::Result<()> {
    let mut pairs = Vec::new();
    for family in Family::ALL {
        for is_connected in [false, true] {
            let mut pair = UdpPair::new(family, is_connected)?;
            pair.sender.send(SendCall::SendTo, pair.to(), &[10])?;
            pair.receiver.receive(ReceiveCall::RecvFrom, 1)?;
            // Older, and never used again.
            pairs.push((pair, UdpActor::bind("silent", family.loopback())?));
        }
    }
    let collectors = UdpCollectors::start()?;
    let mut sockets = Vec::new();
    for (mut pair, mut silent) in pairs {
        for actor in [&mut pair.sender, &mut pair.receiver, &mut silent] {
            let identity = actor.identity()?;
            actor.expected.older_than_the_tracer(&identity);
        }
        pair.sender.send(SendCall::SendTo, pair.to(), &[20, 0])?;
        pair.receiver.receive(ReceiveCall::RecvFrom, 2)?;
        sockets.extend(pair.close()?);
        sockets.push(silent.close()?);
    }
    collectors.finish(&sockets)
}

/// The socket belongs to the older of the two processes, whichever uses it.
fn socket_older_than_the_tracer_with_an_heir() -> anyhow::Result<()> {
    let mut pair = UdpPair::new(Family::V4, false)?;
    let mut heir = pair.sender.passed_to("heir")?;
    let collectors = UdpCollectors::start()?;
    heir.expected
        .older_than_the_tracer(&pair.sender.identity()?);
    let receiver_is = pair.receiver.identity()?;
    pair.receiver.expected.older_than_the_tracer(&receiver_is);
    heir.send(SendCall::SendTo, Some(pair.receiver.local()), &[20, 0])?;
    pair.receiver.receive(ReceiveCall::RecvFrom, 2)?;
    pair.sender.leave()?;
    collectors.finish(&[heir.close()?, pair.receiver.close()?])
}

/// The tracers are two streams of the same event type.
fn tracers_of_both_protocols_merge() -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let tcp = collector::tcp().start().await?;
        let udp = collector::udp().start().await?;
        let handles = [tcp.handle(), udp.handle()];

        let listener = TcpListener::bind("127.0.0.1:0")?;
        let client = TcpStream::connect(listener.local_addr()?)?;
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.send_to(b"hello", "127.0.0.1:9")?;
        let addresses: [SocketAddr; 2] = [client.local_addr()?, socket.local_addr()?];
        drop((client, listener, socket));

        let mut merged = stream::select(tcp, udp);
        let mut closed = Vec::new();
        let both = async {
            while closed.len() < addresses.len() {
                let event = merged.next().await.expect("it was not stopped");
                if event.is_end() && addresses.contains(&event.socket.local) {
                    closed.push(event.socket.protocol);
                }
            }
        };
        let in_time = tokio::time::timeout(Duration::from_secs(60), both).await;
        ensure!(in_time.is_ok(), "closed: {closed:?}");
        let has = |protocol| closed.contains(&protocol);
        ensure!(has(Protocol::Tcp) && has(Protocol::Udp), "{closed:?}");
        for handle in &handles {
            handle.stop();
        }
        while merged.next().await.is_some() {}
        let (tcp, udp) = merged.into_inner();
        check_conservation(&tcp.close().await?)?;
        check_conservation(&udp.close().await?)
    })
}

fn every_signal_has_a_hook() -> anyhow::Result<()> {
    let collector = Collector::start_udp()?;
    let hooks = collector.handle().hooks();
    for hook in &hooks {
        eprintln!("{hook}");
        // Before 5.18, the kernel does not report why it drops a packet.
        let may_lack = hook.signal == "drop" && !is_at_least(5, 18)?;
        ensure!(may_lack || !hook.programs.is_empty(), "{hook}");
    }
    ensure!(
        hooks.iter().any(|hook| hook.signal == "receive"),
        "{hooks:?}"
    );
    // A note reports the cost of the worse hook.
    let receive = hooks.iter().find(|hook| hook.signal == "receive");
    let has_note = receive.is_some_and(|hook| hook.note.is_some());
    ensure!(collector.names_every_peer() != has_note, "{hooks:?}");
    hooks_page::check(&hooks)
}

/// Tracers are closed and dropped by turns, with a socket open all the time. Nothing is left.
fn start_and_stop_over_and_over() -> anyhow::Result<()> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let address = socket.local_addr()?;
    let files = open_files()?;
    let mut seen = BpfObjects::default();
    let runtime = runtime()?;
    // In an emulated guest, each turn takes a second.
    let turns = if is_emulated()? { 10 } else { 40 };
    for turn in 0..turns {
        // Small, to save time.
        let builder = collector::udp().max_sockets(1_024).max_flows(1_024);
        let mut tracer = runtime.block_on(builder.start())?;
        seen.extend(BpfObjects::of_this_process()?);
        ensure!(!seen.is_empty());
        socket.send_to(b"hello", "127.0.0.1:9")?;
        runtime.block_on(async {
            while let Some(event) = tracer.next().await {
                let is_flow = matches!(event.kind, EventKind::Flow { .. });
                if is_flow && event.socket.local.port() == address.port() {
                    return Ok(());
                }
            }
            anyhow::bail!("the stream ended")
        })?;
        match turn % 2 {
            0 => drop(runtime.block_on(tracer.close())?),
            _ => drop(tracer),
        }
    }
    drop(runtime);
    ensure!(open_files()? == files);
    seen.await_freed()
}

/// In a container with the machine's cgroups mounted, sockets of other cgroups are reported, too.
/// Without that mount only the container's own are, and the hooks report so.
fn in_a_cgroup_namespace() -> anyhow::Result<()> {
    let Some(cgroup) = Cgroup::new("namespace")? else {
        return skip("no cgroup v2");
    };
    let mut outside = Actor::spawn("outside")?;
    outside.open(loopback(false))?;
    let home = cgroup.enter()?;
    unshare(CloneFlags::CLONE_NEWCGROUP)?;
    let collector = Collector::start_udp()?;
    ensure!(!is_partial(&collector), "{:?}", collector.handle().hooks());
    let pid = outside.pid();
    let mut actor = UdpActor::with(outside, loopback(false))?;
    actor.bind_to(loopback(false))?;
    actor.send(SendCall::SendTo, Some(actor.local()), &[100])?;
    actor.receive(ReceiveCall::RecvFrom, 1)?;
    actor.close()?;
    collector.wait_for("a socket of another cgroup", |event| {
        let owner = event.process.as_ref().map(|process| process.pid);
        event.is_end() && owner == Some(pid) && event.traffic.rx_bytes == 100
    })?;
    collector.finish_all()?;

    let partial = || {
        cgroup::mount_own()?;
        let collector = Collector::start_udp()?;
        ensure!(is_partial(&collector), "{:?}", collector.handle().hooks());
        collector.finish_all().map(drop)
    };
    // Only that thread, and the threads of its tracer, do not see the machine's cgroups any more.
    thread::scope(|scope| scope.spawn(partial).join().unwrap())?;
    drop(home);
    Ok(())
}

fn is_partial(collector: &Collector) -> bool {
    let hooks = collector.handle().hooks();
    let mut notes = hooks.iter().filter_map(|hook| hook.note.as_deref());
    notes.any(|note| note.contains("cgroup namespace"))
}
