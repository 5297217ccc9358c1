//! How UDP sockets begin and end, whose they are, and how their tracer does.

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
    kernel::{BpfObjects, is_at_least, is_emulated, open_files},
    page,
    scene::loopback,
    suite::{Test, skip},
    talker::Talker,
    trace::{self, Trace, check_conservation},
    udp_scene::{Family, Site, UdpTraces, connected},
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

/// Its close is all there is to see.
fn socket_that_never_sends() -> anyhow::Result<()> {
    let traces = UdpTraces::start()?;
    let mut lives = Vec::new();
    for family in Family::ALL {
        lives.push(Talker::open("silent", family.loopback())?.close()?);
        lives.push(Talker::bind("bound", family.loopback())?.close()?);
    }
    traces.finish(&lives)
}

fn socket_that_is_only_connected() -> anyhow::Result<()> {
    connected(|_| Ok(()))
}

fn killed_process() -> anyhow::Result<()> {
    let traces = UdpTraces::start()?;
    let mut lives = Vec::new();
    for family in Family::ALL {
        let mut site = Site::new(family, true)?;
        site.sender.send(SendCall::SendTo, None, &[10, 0, 20])?;
        site.receiver.receive(ReceiveCall::RecvFrom, 2)?;
        lives.push(site.receiver.kill()?);
        lives.push(site.sender.kill()?);
        lives.push(Talker::open("silent", family.loopback())?.kill()?);
    }
    traces.finish(&lives)
}

/// It stays the socket of the process that made it, and what the other one sends through it counts.
fn socket_passed_to_another_process() -> anyhow::Result<()> {
    let traces = UdpTraces::start()?;
    let mut lives = Vec::new();
    for family in Family::ALL {
        for is_connected in [false, true] {
            let mut site = Site::new(family, is_connected)?;
            let to = site.to();
            site.sender.send(SendCall::SendTo, to, &[10])?;
            let mut heir = site.sender.passed_to("heir")?;
            heir.send(SendCall::SendTo, to, &[20, 30])?;
            let mut receiving_heir = site.receiver.passed_to("other-heir")?;
            receiving_heir.receive(ReceiveCall::RecvFrom, 3)?;
            // The makers close first: the sockets live on.
            site.sender.leave()?;
            site.receiver.leave()?;
            heir.send(SendCall::SendMsg, to, &[40])?;
            receiving_heir.receive(ReceiveCall::RecvMsg, 1)?;
            lives.extend([heir.close()?, receiving_heir.close()?]);
        }
    }
    traces.finish(&lives)
}

fn socket_inherited_by_a_child() -> anyhow::Result<()> {
    connected(|site| {
        site.sender.send(SendCall::SendTo, None, &[10])?;
        site.sender.run(Operation::SendByChild { size: 200 })?;
        site.sender.send(SendCall::SendTo, None, &[30])?;
        site.receiver.receive(ReceiveCall::RecvFrom, 3)
    })
}

/// Of a process that is gone.
fn socket_closed_by_its_maker_first() -> anyhow::Result<()> {
    let traces = UdpTraces::start()?;
    let mut site = Site::new(Family::V4, true)?;
    let mut heir = site.sender.passed_to("heir")?;
    site.sender.kill()?;
    heir.send(SendCall::SendTo, None, &[10])?;
    site.receiver.receive(ReceiveCall::RecvFrom, 1)?;
    traces.finish(&[heir.kill()?, site.receiver.close()?])
}

fn another_user() -> anyhow::Result<()> {
    let traces = UdpTraces::start()?;
    let address = Family::V4.loopback();
    let mut receiver = Talker::bind("receiver", address)?;
    let user = Actor::spawn_as(OsStr::new("user"), Some(1234))?;
    let mut sender = Talker::with(user, address)?;
    ensure!(sender.who()?.uid == 1234);
    sender.send(SendCall::SendTo, Some(receiver.local()), &[10])?;
    receiver.receive(ReceiveCall::RecvFrom, 1)?;
    traces.finish(&[sender.close()?, receiver.close()?])
}

/// The kernel uses the memory of a socket again at once; each is a life of its own all the same.
fn many_sockets_one_after_the_other() -> anyhow::Result<()> {
    let traces = UdpTraces::start()?;
    let address = Family::V4.loopback();
    let mut receiver = Talker::bind("receiver", address)?;
    let (mut left, mut right) = (Actor::spawn("left")?, Actor::spawn("right")?);
    let mut lives = Vec::new();
    for turn in 0..200 {
        let mut sender = Talker::with(left, address)?;
        sender.send(SendCall::SendTo, Some(receiver.local()), &[turn])?;
        receiver.receive(ReceiveCall::RecvFrom, 1)?;
        let (life, actor) = sender.close_socket()?;
        lives.push(life);
        (left, right) = (right, actor);
    }
    drop((left, right));
    lives.push(receiver.close()?);
    traces.finish(&lives)
}

/// Only what happens from now on is seen, and nobody saw who made it; but it was seen who had it open.
fn socket_older_than_the_tracer() -> anyhow::Result<()> {
    let mut sites = Vec::new();
    for family in Family::ALL {
        for is_connected in [false, true] {
            let mut site = Site::new(family, is_connected)?;
            site.sender.send(SendCall::SendTo, site.to(), &[10])?;
            site.receiver.receive(ReceiveCall::RecvFrom, 1)?;
            // Older, and never used again.
            sites.push((site, Talker::bind("silent", family.loopback())?));
        }
    }
    let traces = UdpTraces::start()?;
    let mut lives = Vec::new();
    for (mut site, mut silent) in sites {
        for talker in [&mut site.sender, &mut site.receiver, &mut silent] {
            let who = talker.who()?;
            talker.life.older_than_the_tracer(&who);
        }
        site.sender.send(SendCall::SendTo, site.to(), &[20, 0])?;
        site.receiver.receive(ReceiveCall::RecvFrom, 2)?;
        lives.extend(site.close()?);
        lives.push(silent.close()?);
    }
    traces.finish(&lives)
}

/// It belongs to the older of the two processes, whoever uses it.
fn socket_older_than_the_tracer_with_an_heir() -> anyhow::Result<()> {
    let mut site = Site::new(Family::V4, false)?;
    let mut heir = site.sender.passed_to("heir")?;
    let traces = UdpTraces::start()?;
    heir.life.older_than_the_tracer(&site.sender.who()?);
    let receiver_is = site.receiver.who()?;
    site.receiver.life.older_than_the_tracer(&receiver_is);
    heir.send(SendCall::SendTo, Some(site.receiver.local()), &[20, 0])?;
    site.receiver.receive(ReceiveCall::RecvFrom, 2)?;
    site.sender.leave()?;
    traces.finish(&[heir.close()?, site.receiver.close()?])
}

/// Two streams of the same event.
fn tracers_of_both_protocols_merge() -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let tcp = trace::tcp().start().await?;
        let udp = trace::udp().start().await?;
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
    let trace = Trace::start_udp()?;
    let hooks = trace.handle().hooks();
    for hook in &hooks {
        eprintln!("{hook}");
        // Before 5.18, the kernel does not say why it drops a packet.
        let may_lack = hook.signal == "drop" && !is_at_least(5, 18)?;
        ensure!(may_lack || !hook.programs.is_empty(), "{hook}");
    }
    ensure!(
        hooks.iter().any(|hook| hook.signal == "receive"),
        "{hooks:?}"
    );
    // What it costs not to see it is told.
    let receive = hooks.iter().find(|hook| hook.signal == "receive");
    let has_note = receive.is_some_and(|hook| hook.note.is_some());
    ensure!(trace.names_every_peer() != has_note, "{hooks:?}");
    page::check(&hooks)
}

/// By turns closed and dropped, with a socket open all the time. Nothing is left.
fn start_and_stop_over_and_over() -> anyhow::Result<()> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let address = socket.local_addr()?;
    let files = open_files()?;
    let mut seen = BpfObjects::default();
    let runtime = runtime()?;
    // In an emulated guest each takes a second.
    let turns = if is_emulated()? { 10 } else { 40 };
    for turn in 0..turns {
        // Small, for the sake of the time that this takes.
        let builder = trace::udp().max_sockets(1_024).max_flows(1_024);
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

/// As in a container into which the machine's cgroups are mounted: sockets of other cgroups are seen, too. Without them only its own are, and
/// the hooks say so.
fn in_a_cgroup_namespace() -> anyhow::Result<()> {
    let Some(cgroup) = Cgroup::new("namespace")? else {
        return skip("no cgroup v2");
    };
    let mut outside = Actor::spawn("outside")?;
    outside.open(loopback(false))?;
    let home = cgroup.enter()?;
    unshare(CloneFlags::CLONE_NEWCGROUP)?;
    let trace = Trace::start_udp()?;
    ensure!(!is_partial(&trace), "{:?}", trace.handle().hooks());
    let pid = outside.pid();
    let mut talker = Talker::with(outside, loopback(false))?;
    talker.bind_to(loopback(false))?;
    talker.send(SendCall::SendTo, Some(talker.local()), &[100])?;
    talker.receive(ReceiveCall::RecvFrom, 1)?;
    talker.close()?;
    trace.wait_for("what is outside", |event| {
        let owner = event.process.as_ref().map(|process| process.pid);
        event.is_end() && owner == Some(pid) && event.traffic.rx_bytes == 100
    })?;
    trace.finish_all()?;

    let partial = || {
        cgroup::mount_own()?;
        let trace = Trace::start_udp()?;
        ensure!(is_partial(&trace), "{:?}", trace.handle().hooks());
        trace.finish_all().map(drop)
    };
    // Only that thread, and those of its tracer, do not see the machine's any more.
    thread::scope(|scope| scope.spawn(partial).join().unwrap())?;
    drop(home);
    Ok(())
}

fn is_partial(trace: &Trace) -> bool {
    let hooks = trace.handle().hooks();
    let mut notes = hooks.iter().filter_map(|hook| hook.note.as_deref());
    notes.any(|note| note.contains("cgroup namespace"))
}
