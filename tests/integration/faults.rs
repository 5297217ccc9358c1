//! Faults around a tracer: of its consumer, its runtime, its process, its clock, its CPUs.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    net::{TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use fork::Fork;
use futures_util::{StreamExt as _, stream::select};
use integration_tests::{
    actor::{Actor, Command, ReceiveCall, SendCall},
    collector::{Collector, SAMPLE_INTERVAL, check_conservation, without_summary},
    expected_tcp::{ACTIVE_CLIENT, CLOCK_ERROR, PASSIVE_SERVER},
    kernel::{BpfObjects, await_threads, is_at_least, is_emulated, open_files, open_files_of},
    suite::{Test, skip},
    tcp_pair::{TcpPair, loopback},
    udp_pair::{Family, UdpPair},
};
use nix::{
    libc,
    sched::{CloneFlags, setns, unshare},
    sys::{
        signal::{SIGKILL, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    time::{ClockId, clock_gettime},
    unistd::Pid,
};
use tcp_udp_trace::{ErrorKind, Event, EventKind, TcpTracer, UdpTracer};
use tokio::{
    runtime::{Builder, Runtime},
    sync::mpsc,
    time::timeout,
};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            killed_process_leaves_nothing,
        ],
        Solitude: [
            cpu_that_goes_and_comes,
        ],
        Process: [
            consumer_dropped_in_the_middle_of_a_poll,
            runtime_shut_down_under_two_tracers,
            dropped_on_a_thread_of_its_own,
            started_programs_inherit_nothing,
            fork_that_drops_the_tracer,
            time_namespace_a_day_ahead,
            twenty_tracers_at_once,
        ],
    ]
}

/// Far longer than any step takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Returns a runtime with threads of its own.
fn runtime() -> anyhow::Result<Runtime> {
    let mut builder = Builder::new_multi_thread();
    Ok(builder.worker_threads(2).enable_all().build()?)
}

/// The state of a process before a test, to which it must return.
struct Before {
    files: BTreeSet<String>,
}

impl Before {
    fn new() -> anyhow::Result<Self> {
        await_threads(1)?;
        let files = open_files()?;
        Ok(Self { files })
    }

    /// Checks that there is no additional descriptor or thread, and that the kernel has freed the
    /// objects.
    fn ensure_nothing_left(&self, objects: &BpfObjects) -> anyhow::Result<()> {
        ensure!(!objects.is_empty(), "the tracer has no BPF objects");
        let left: Vec<_> = open_files()?.difference(&self.files).cloned().collect();
        ensure!(left.is_empty(), "{left:?}");
        objects.await_freed()?;
        await_threads(1)
    }
}

/// Makes a connection within this process. Returns the end that connected, and the one that
/// accepted.
fn connection() -> anyhow::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let (server, _) = listener.accept()?;
    Ok((client, server))
}

/// A cancelled poll loses nothing. A task that is ended in a poll ends the tracer, which leaves
/// nothing behind.
fn consumer_dropped_in_the_middle_of_a_poll() -> anyhow::Result<()> {
    let before = Before::new()?;
    let runtime = runtime()?;
    let mut tracer = runtime.block_on(TcpTracer::builder().start())?;
    let objects = BpfObjects::of_this_process()?;
    let handle = tracer.handle();
    let (mut delivered, mut given_up) = (0_u64, 0);
    let mut next = runtime.block_on(async {
        while given_up < 20 {
            match timeout(Duration::from_millis(1), tracer.next()).await {
                Ok(Some(event)) => delivered += is_no_gap(&event),
                Ok(None) => bail!("the stream has ended"),
                Err(_) => given_up += 1,
            }
        }
        Ok(tracer)
    })?;
    // The stream is not polled meanwhile.
    let (client, server) = connection()?;
    let local = client.local_addr()?;
    let (send, mut receive) = mpsc::unbounded_channel();
    let consumer = runtime.spawn(async move {
        while let Some(event) = next.next().await {
            send.send(event)?;
        }
        anyhow::Ok(())
    });
    let close = runtime.block_on(async {
        drop((client, server));
        loop {
            let event = timeout(PATIENCE, receive.recv()).await?;
            let event = event.context("the stream has ended")?;
            delivered += is_no_gap(&event);
            if event.socket.local == local && event.is_end() {
                return anyhow::Ok(event);
            }
        }
    })?;
    ensure!(close.traffic.tx_bytes == 0, "{close}");
    consumer.abort();
    let aborted = runtime.block_on(async { timeout(PATIENCE, consumer).await })?;
    ensure!(aborted.is_err_and(|error| error.is_cancelled()));
    while let Ok(event) = receive.try_recv() {
        delivered += is_no_gap(&event);
    }
    let stats = handle.stats();
    ensure!(stats.delivered == delivered, "{delivered} came: {stats:?}");
    handle.stop();
    drop(runtime);
    before.ensure_nothing_left(&objects)
}

fn is_no_gap(event: &Event) -> u64 {
    u64::from(!matches!(event.kind, EventKind::Lost { .. }))
}

/// The runtime ends while events come, samples are taken, processes are looked up and consumers
/// wait. The streams end, `close` returns the reason, and nothing is left.
fn runtime_shut_down_under_two_tracers() -> anyhow::Result<()> {
    let before = Before::new()?;
    let doomed = runtime()?;
    let (mut tcp, mut udp) = doomed.block_on(async {
        let every = Duration::from_millis(100);
        let tcp = TcpTracer::builder()
            .process_details(true)
            .sample_interval(every);
        let udp = UdpTracer::builder()
            .process_details(true)
            .sample_interval(every);
        anyhow::Ok((tcp.start().await?, udp.start().await?))
    })?;
    let objects = BpfObjects::of_this_process()?;
    let other = runtime()?;
    other.block_on(async {
        let traffic = thread::spawn(|| (0..100).try_for_each(|_| connection().map(drop)));
        let consumer = tokio::spawn(async move {
            while udp.next().await.is_some() {}
            udp
        });
        timeout(PATIENCE, tcp.next()).await?;
        doomed.shutdown_background();
        let end = async { while tcp.next().await.is_some() {} };
        timeout(PATIENCE, end)
            .await
            .context("the stream does not end")?;
        traffic.join().unwrap()?;
        let udp = timeout(PATIENCE, consumer)
            .await
            .context("the stream does not end")??;
        let handle = tcp.handle();
        for error in [tcp.close().await.err(), udp.close().await.err()] {
            let kind = error.as_ref().map(tcp_udp_trace::Error::kind);
            ensure!(kind == Some(ErrorKind::NoRuntime), "{error:?}");
        }
        ensure!(handle.stats().delivered > 0 && !handle.hooks().is_empty());
        handle.stop();
        Ok(())
    })?;
    drop(other);
    before.ensure_nothing_left(&objects)
}

/// The runtime goes on.
fn dropped_on_a_thread_of_its_own() -> anyhow::Result<()> {
    let before = Before::new()?;
    let runtime = runtime()?;
    let mut objects = BpfObjects::default();
    for _ in 0..2 {
        let tracers = runtime.block_on(async {
            let tcp = TcpTracer::builder().start().await?;
            anyhow::Ok((tcp, UdpTracer::builder().start().await?))
        })?;
        objects.extend(BpfObjects::of_this_process()?);
        let connections = thread::spawn(|| (0..100).try_for_each(|_| connection().map(drop)));
        let dropped = thread::spawn(move || {
            drop(tracers);
            // Without waiting.
            BpfObjects::of_this_process()
        });
        let held = dropped.join().unwrap()?;
        ensure!(held.is_empty(), "{held:?}");
        connections.join().unwrap()?;
    }
    drop(runtime);
    before.ensure_nothing_left(&objects)
}

/// They inherit neither programs, maps and hooks nor the sockets and files of samples, whenever
/// they are started.
fn started_programs_inherit_nothing() -> anyhow::Result<()> {
    let runtime = runtime()?;
    let (tcp, udp) = runtime.block_on(async {
        let every = Duration::from_millis(100);
        let tcp = TcpTracer::builder().sample_interval(every).start().await?;
        let udp = UdpTracer::builder().sample_interval(every).start().await?;
        anyhow::Ok((tcp, udp))
    })?;
    let handle = tcp.handle();
    runtime.spawn(select(tcp, udp).for_each(async |_| {}));
    let deadline = Instant::now() + PATIENCE;
    let mut children = 0;
    while children < 20 || handle.stats().sample_rounds < 3 {
        ensure!(Instant::now() < deadline, "{:?}", handle.stats());
        let mut child = Actor::spawn("child")?;
        // Before its answer, the process may still be this program.
        child.listen(loopback(false))?;
        let files = open_files_of(child.pid())?;
        let is_ours = |file: &&String| file.contains("anon_inode") || file.contains("/proc/");
        let inherited: Vec<_> = files.iter().filter(is_ours).collect();
        ensure!(inherited.is_empty(), "{inherited:?}");
        children += 1;
    }
    Ok(())
}

/// A fork that remains this program drops its copies. It ends as usual, and the tracer loses
/// nothing.
fn fork_that_drops_the_tracer() -> anyhow::Result<()> {
    let before = Before::new()?;
    let runtime = runtime()?;
    let mut tracer = runtime.block_on(
        TcpTracer::builder()
            .sample_interval(SAMPLE_INTERVAL)
            .start(),
    )?;
    let objects = BpfObjects::of_this_process()?;
    // A socket of a round of samples, whose thread the fork does not have.
    runtime.block_on(async {
        let deadline = Instant::now() + PATIENCE;
        while tracer.handle().stats().sample_rounds == 0 {
            ensure!(Instant::now() < deadline, "no round of samples");
            // There may be no socket to sample.
            let _ = timeout(Duration::from_millis(50), tracer.next()).await;
        }
        anyhow::Ok(())
    })?;
    let (client, server) = connection()?;
    let local = client.local_addr()?;
    let child = match fork::fork()? {
        Fork::Child => {
            drop(tracer);
            std::process::exit(7);
        }
        Fork::Parent(pid) => Pid::from_raw(pid),
    };
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG))? {
            WaitStatus::StillAlive if Instant::now() > deadline => {
                kill(child, SIGKILL)?;
                bail!("the fork hangs");
            }
            WaitStatus::StillAlive => thread::sleep(Duration::from_millis(10)),
            status => break status,
        }
    };
    ensure!(status == WaitStatus::Exited(child, 7), "{status:?}");
    drop((client, server));
    let stats = runtime.block_on(async {
        loop {
            let event = timeout(PATIENCE, tracer.next()).await?;
            let event = event.context("the stream has ended")?;
            if event.socket.local == local && event.is_end() {
                break;
            }
        }
        anyhow::Ok(tracer.close().await?)
    })?;
    check_conservation(&stats)?;
    ensure!(stats.missed == 0, "{stats:?}");
    drop(runtime);
    before.ensure_nothing_left(&objects)
}

/// After `kill -9`, no code of the tracer runs any more.
fn killed_process_leaves_nothing() -> anyhow::Result<()> {
    for _ in 0..2 {
        let mut victim = Actor::spawn("victim")?;
        victim.run(Command::Trace)?;
        let objects = BpfObjects::of_process(victim.pid())?;
        ensure!(!objects.programs.is_empty() && !objects.maps.is_empty());
        victim.kill()?;
        objects.await_freed()?;
    }
    TcpPair::new()?.check_transfer(1_000, 2_000)
}

/// A clock of the process that is a day ahead of the kernel's own, as after a long sleep of the
/// machine. The events have the time of that clock.
fn time_namespace_a_day_ahead() -> anyhow::Result<()> {
    const DAY: u64 = 86_400;
    let uptime = || clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from);
    let new_time = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);
    let own = uptime()?;
    if unshare(new_time).is_err() {
        return skip("no time namespaces");
    }
    fs::write(
        "/proc/self/timens_offsets",
        format!("boottime {DAY} 500000000"),
    )?;
    setns(File::open("/proc/self/ns/time_for_children")?, new_time)?;
    ensure!(uptime()? > own + Duration::from_secs(DAY));

    // The dates of flows are by that clock.
    let flows = Collector::start_udp_with(|builder| builder.interval(Duration::from_millis(100)))?;
    let collector = Collector::start_with(|builder| builder.process_details(true))?;
    let began = uptime()?;
    let mut pair = UdpPair::new(Family::V4, true)?;
    pair.sender.send(SendCall::SendTo, None, &[10, 0, 20])?;
    let is_reported = |event: &Event| event.traffic.tx_packets == 3 && !event.is_end();
    flows.wait_for("totals of the flow", is_reported)?;
    pair.receiver.receive(ReceiveCall::RecvFrom, 3)?;
    let expected = pair.close()?;
    flows.finish_udp(expected.len())?.check_all(&expected)?;

    let mut server = Actor::spawn("server")?;
    let end = if is_at_least(5, 11)? {
        // The details of a process depend on its start time.
        collector.details_of(&mut server)?
    } else {
        // On these kernels, /proc does not know of time namespaces.
        let listener = server.listen(loopback(false))?;
        server.close(&listener)?;
        collector.wait_for("the end of a listener", Event::is_end)?;
        collector
            .events()
            .pop()
            .context("an earlier wait found it")?
    };
    let moment = server.moment();
    let window = moment.began - CLOCK_ERROR..=moment.ended + CLOCK_ERROR;
    ensure!(window.contains(&end.time), "not in {window:?}: {end:?}");
    let window = began - CLOCK_ERROR..=uptime()?;
    ensure!(window.contains(&end.uptime), "not in {window:?}: {end:?}");
    let process = end.process.as_ref().context("no process")?;
    ensure!(window.contains(&process.started), "{process:?}");
    ensure!(end.socket.age < PATIENCE, "{end:?}");
    drop(collector);
    TcpPair::new()?.check_transfer(1_000, 2_000)
}

/// CPU 1 goes offline while connections are open, and comes back. No event is missing of the
/// connections made with CPU 1, without it, and with it again, also by a tracer that was started
/// meanwhile.
fn cpu_that_goes_and_comes() -> anyhow::Result<()> {
    if !is_emulated()? {
        return skip("would take a CPU from this machine; only in a VM");
    }
    let mut pair = TcpPair::new()?;
    let mut connections = vec![pair.connect()?, pair.connect()?];
    let mut exchange = |pair: &mut TcpPair| {
        let connection = pair.connect()?;
        pair.upload(&connection, 100_000)?;
        connections.push(connection);
        anyhow::Ok(())
    };
    exchange(&mut pair)?;
    let offline = Offline::new()?;
    exchange(&mut pair)?;
    let meanwhile = Collector::start()?;
    exchange(&mut pair)?;
    drop(offline);
    exchange(&mut pair)?;
    let mut expected = Vec::new();
    for connection in &connections {
        pair.close(connection)?;
        expected.push(pair.expected_client(connection, ACTIVE_CLIENT)?);
        expected.push(pair.expected_server(connection, PASSIVE_SERVER)?);
    }
    pair.finish(&expected)?;
    meanwhile.finish_in_order(expected.len() + 1).map(drop)
}

/// Keeps CPU 1 offline until it is dropped.
struct Offline;

impl Offline {
    const SWITCH: &str = "/sys/devices/system/cpu/cpu1/online";

    fn new() -> anyhow::Result<Self> {
        fs::write(Self::SWITCH, "0").context(Self::SWITCH)?;
        Ok(Self)
    }
}

impl Drop for Offline {
    fn drop(&mut self) {
        fs::write(Self::SWITCH, "1").unwrap();
    }
}

/// Ten tracers of each protocol: each reports everything, the same as the others, and all detach.
fn twenty_tracers_at_once() -> anyhow::Result<()> {
    const EACH: usize = 10;
    let before = Before::new()?;
    let mut tcp = Vec::new();
    let mut udp = Vec::new();
    for _ in 0..EACH {
        // Small, to save time.
        tcp.push(Collector::start_with(|builder| {
            builder.max_sockets(1_024).ring_bytes(1 << 20)
        })?);
        udp.push(Collector::start_udp_with(|builder| {
            builder
                .max_sockets(1_024)
                .max_flows(1_024)
                .ring_bytes(1 << 20)
        })?);
    }
    let objects = BpfObjects::of_this_process()?;
    let mut pair = UdpPair::new(Family::V4, true)?;
    pair.sender.send(SendCall::SendTo, None, &[10, 0, 20])?;
    pair.receiver.receive(ReceiveCall::RecvFrom, 3)?;
    let expected_udp = pair.close()?;
    // One of the tracers also compares the events.
    TcpPair::traced_by(tcp.pop().expect("ten"), loopback(false))?.check_transfer(1_000, 2_000)?;
    // On two CPUs, each tracer may see another event first.
    let what = |event: &Event| {
        let Event {
            process,
            socket,
            traffic,
            ..
        } = event;
        let kind = without_summary(event);
        let addresses = (socket.local, socket.remote);
        format!("{addresses:?} {kind:?} {process:?} {traffic:?}")
    };
    let mut reports = Vec::new();
    for collector in tcp {
        let events = collector.finish_in_order(3)?;
        reports.push(events.iter().map(what).collect::<BTreeSet<_>>());
    }
    // Two ends of a connection, and the listener.
    ensure!(reports[0].len() == 5 + 6 + 2, "{:#?}", reports[0]);
    ensure!(
        reports.iter().all(|events| *events == reports[0]),
        "{reports:#?}"
    );
    for collector in udp {
        collector
            .finish_udp(expected_udp.len())?
            .check_all(&expected_udp)?;
    }
    before.ensure_nothing_left(&objects)
}
