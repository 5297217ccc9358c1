//! One unprivileged user takes all the room of a tracer, and the sockets and flows of others are
//! still reported. A debugger stops the processes. Other tracers are attached to the same hooks.
//! Another privileged process detaches a program of ours. For a flood of events see
//! `overflow::closes_outlive_a_flood_of_datagrams`.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs, io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::Path,
    process,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use integration_tests::{
    actor::{Actor, Command, ReceiveCall, SendCall},
    collector::{Collector, show},
    expected_tcp::{ACTIVE_CLIENT, ExpectedTcp, PASSIVE_SERVER},
    kernel::{BpfObjects, is_emulated},
    netns::Netns,
    other_tracer::{OtherTracer, SIGN, marked, mount_tracefs},
    privileges::UNPRIVILEGED,
    suite::{Test, skip},
    tcp_pair::{TcpPair, loopback},
    udp_actor::UdpActor,
    udp_pair::{Family, UdpPair},
};
use tcp_udp_trace::{
    DEFAULT_MAX_SOCKETS, ErrorKind, Event, EventKind, Filter, TcpState, UdpTracer,
};
use tokio::{runtime::Builder, time::timeout};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Solitude: [
            a_hundred_thousand_sockets_of_one_user_hide_no_others,
        ],
        Nothing: [
            tcp_sockets_of_one_user_leave_room_for_others,
            udp_sockets_of_one_user_leave_room_for_others,
            flows_of_one_user_make_room_for_each_other,
            tracer_of_another_process_comes_and_is_killed,
        ],
        Process: [
            processes_that_a_debugger_stops,
            libbpf_tools_on_the_same_hooks,
            bpftrace_on_the_same_hooks,
            detached_program_ends_the_tracer,
        ],
    ]
}

/// How many sockets the tracers of these tests remember. Other tests have sockets at the same time.
const ROOM: u32 = 1_024;
/// A user other than root and [`UNPRIVILEGED`].
const BYSTANDER: u32 = 4_242;
/// How long a debugger may take to attach.
const PATIENCE: Duration = Duration::from_secs(60);
/// How many connections the other tracers see.
const EXCHANGES: usize = 20;

fn spawn(name: &str, uid: u32) -> anyhow::Result<Actor> {
    Actor::spawn_as(OsStr::new(name), Some(uid))
}

/// The user connects to a server of another user, so both of them have too many sockets.
fn tcp_sockets_of_one_user_leave_room_for_others() -> anyhow::Result<()> {
    const CONNECTIONS: u32 = ROOM * 6 / 10;
    let collector = Collector::start_with(|builder| builder.max_sockets(ROOM))?;
    let handle = collector.handle().clone();
    let (mut server, mut client) = Netns::new()?.run(|| {
        let server = Actor::spawn("crowded")?;
        Ok((server, spawn("neighbor", UNPRIVILEGED)?))
    })?;
    let listener = server.listen(loopback(false))?;
    for _ in 0..CONNECTIONS {
        client.connect(listener.local)?;
        server.accept(&listener)?;
    }
    ensure!(handle.stats().untracked > 0, "{:?}", handle.stats());
    let (server, client) = (spawn("server", BYSTANDER)?, spawn("client", BYSTANDER)?);
    TcpPair::traced_between(collector, server, loopback(false), client)?
        .check_transfer(3_000, 5_000)
}

fn udp_sockets_of_one_user_leave_room_for_others() -> anyhow::Result<()> {
    let collector = Collector::start_udp_with(|builder| builder.max_sockets(ROOM))?;
    let handle = collector.handle().clone();
    let mut neighbor = Netns::new()?.run(|| spawn("neighbor", UNPRIVILEGED))?;
    for _ in 0..ROOM * 11 / 10 {
        neighbor.socket(Command::OpenUdp { v6: false })?;
    }
    ensure!(handle.stats().untracked > 0, "{:?}", handle.stats());
    let mut pair = UdpPair::new(Family::V4, true)?;
    pair.sender.send(SendCall::SendTo, None, &[100, 200])?;
    let expected = pair.close()?;
    collector.finish_udp(2)?.check_all(&expected)
}

/// One user has more sockets than the tracers remember by default. The sockets of others are
/// reported completely, and so are those of the user once there is room.
fn a_hundred_thousand_sockets_of_one_user_hide_no_others() -> anyhow::Result<()> {
    const PROCESSES: u8 = 12;
    const EACH: u32 = 8_334;
    // Room for all events of the crowd.
    const RING: u32 = 64 << 20;
    if is_emulated()? {
        return skip("an emulated machine takes minutes for so many sockets");
    }
    let udp = Collector::start_udp_with(|builder| builder.ring_bytes(RING))?;
    let tcp = Collector::start_with(|builder| builder.ring_bytes(RING))?;
    let handles = [&tcp, &udp].map(|collector| collector.handle().clone());
    let mut crowd = Netns::new()?.run(|| {
        let crowd = (0..PROCESSES).map(|_| spawn("crowd", UNPRIVILEGED));
        crowd.collect::<anyhow::Result<Vec<_>>>()
    })?;
    for (nth, actor) in (1..).zip(&mut crowd) {
        let address = SocketAddr::from(([127, 0, 1, nth], 10_000));
        let (tcp, udp) = (EACH, EACH);
        actor.begin(&Command::Hold { address, tcp, udp })?;
    }
    for actor in &mut crowd {
        actor.finish()?;
    }
    let sockets = u32::from(PROCESSES) * EACH;
    for handle in &handles {
        let least = sockets - DEFAULT_MAX_SOCKETS;
        let stats = handle.stats();
        ensure!(stats.untracked >= least.into(), "{stats:?}");
    }
    let (server, client) = (spawn("server", BYSTANDER)?, spawn("client", BYSTANDER)?);
    let mut pair = TcpPair::traced_between(tcp, server, loopback(false), client)?;
    let mut expected = Vec::new();
    exchange(&mut pair, 3, &mut expected)?;
    let mut datagrams = UdpPair::new(Family::V4, true)?;
    datagrams.sender.send(SendCall::SendTo, None, &[100, 200])?;

    drop(crowd);
    pair.client = spawn("late", UNPRIVILEGED)?;
    exchange(&mut pair, 4, &mut expected)?;
    let mut late = UdpActor::with(spawn("late", UNPRIVILEGED)?, loopback(false))?;
    let to = datagrams.receiver.local();
    late.send(SendCall::SendTo, Some(to), &[300])?;
    pair.finish(&expected)?;
    let [sender, receiver] = datagrams.close()?;
    let expected = [sender, receiver, late.close()?];
    udp.finish_udp(expected.len())?.check_all(&expected)
}

/// A silent flow is kept, though another user has more peers than the tracer remembers.
fn flows_of_one_user_make_room_for_each_other() -> anyhow::Result<()> {
    const FLOWS: u16 = 200;
    let filter = Filter::new().netns(Netns::current()?.inode()?);
    let collector =
        Collector::start_udp_with(move |builder| builder.filter(filter).max_flows(FLOWS.into()))?;
    let handle = collector.handle().clone();
    let silent = UdpSocket::bind(loopback(false))?;
    let local = silent.local_addr()?;
    silent.send_to(b"once", local)?;
    let mut neighbor = UdpActor::with(spawn("neighbor", UNPRIVILEGED)?, loopback(false))?;
    for port in 1..=2 * FLOWS {
        let to = SocketAddr::new(local.ip(), port);
        neighbor.send(SendCall::SendTo, Some(to), &[8])?;
    }
    neighbor.close()?;
    collector.wait_closed(1)?;
    ensure!(handle.stats().flows_evicted > 0, "{:?}", handle.stats());
    let lasts = |events: &[Event]| {
        let is_last = |event: &&Event| {
            event.socket.local == local && matches!(event.kind, EventKind::Flow { last: true, .. })
        };
        events.iter().filter(is_last).count()
    };
    let before = lasts(&collector.events());
    drop(silent);
    let events = collector.finish_in_order(2)?;
    ensure!(
        before == 0 && lasts(&events) == 1,
        "{before}:{}",
        show(&events)
    );
    Ok(())
}

/// Returns the address of the server beside which other tracers run. It is on the loopback. Another
/// test, in a process of its own, has another one of the same length.
fn watched() -> Ipv4Addr {
    let pid = process::id();
    let [third, fourth] = [pid / 100, pid].map(|number| 100 + (number % 100) as u8);
    Ipv4Addr::new(127, 92, third, fourth)
}

/// Makes a connection that carries this many KiB from the client, and twice as many from the
/// server. Adds what our tracer must report of both ends.
fn exchange(pair: &mut TcpPair, kib: usize, expected: &mut Vec<ExpectedTcp>) -> anyhow::Result<()> {
    let bytes = kib as u64 * 1024;
    let connection = pair.connect()?;
    pair.upload(&connection, bytes)?;
    pair.download(&connection, 2 * bytes)?;
    pair.close(&connection)?;
    expected.push(pair.expected_client(&connection, ACTIVE_CLIENT)?);
    expected.push(pair.expected_server(&connection, PASSIVE_SERVER)?);
    Ok(())
}

/// Returns how often each change of a state occurs in [`EXCHANGES`] of [`exchange`].
fn expected_changes() -> BTreeMap<[&'static str; 2], usize> {
    let changes = [ACTIVE_CLIENT, PASSIVE_SERVER];
    let changes = changes.iter().flat_map(|states| states.windows(2));
    changes
        .map(|change| ([change[0].name(), change[1].name()], EXCHANGES))
        .collect()
}

/// A debugger, attached to processes until this value is dropped.
struct Debugger(process::Child);

impl Debugger {
    /// Lets `strace` stop these processes at each system call.
    fn attach(pids: &[u32]) -> anyhow::Result<Self> {
        let mut strace = process::Command::new("strace");
        strace.args(["-f", "-q", "-o", "/dev/null"]);
        for pid in pids {
            strace.args(["-p", &pid.to_string()]);
        }
        let debugger = match strace.spawn() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return skip("no strace"),
            child => Self(child?),
        };
        let deadline = Instant::now() + PATIENCE;
        while !debugger.is_attached(pids)? {
            ensure!(Instant::now() < deadline, "strace is not attached");
            sleep(Duration::from_millis(10));
        }
        Ok(debugger)
    }

    fn is_attached(&self, pids: &[u32]) -> anyhow::Result<bool> {
        let tracer = format!("TracerPid:\t{}\n", self.0.id());
        for pid in pids {
            if !fs::read_to_string(format!("/proc/{pid}/status"))?.contains(&tracer) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Drop for Debugger {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `strace` stops each process at the entry and at the exit of each system call.
fn processes_that_a_debugger_stops() -> anyhow::Result<()> {
    let collector = Collector::start_udp()?;
    let mut pair = TcpPair::new()?;
    let mut datagrams = UdpPair::new(Family::V4, false)?;
    let UdpPair {
        sender, receiver, ..
    } = &datagrams;
    let actors = [&pair.server, &pair.client, &sender.actor, &receiver.actor];
    let pids = actors.map(Actor::pid);
    let debugger = Debugger::attach(&pids)?;
    let mut expected = Vec::new();
    for kib in 1..=3 {
        exchange(&mut pair, kib, &mut expected)?;
    }
    let to = datagrams.to();
    datagrams.sender.send(SendCall::SendTo, to, &[10, 0, 20])?;
    datagrams.receiver.receive(ReceiveCall::RecvFrom, 3)?;
    ensure!(debugger.is_attached(&pids)?, "strace has ended");
    pair.finish(&expected)?;
    let expected = datagrams.close()?;
    collector.finish_udp(expected.len())?.check_all(&expected)
}

/// `tcpstates` prints each change of a state, and `tcplife` the bytes of each end. They come and go
/// while our tracer runs.
fn libbpf_tools_on_the_same_hooks() -> anyhow::Result<()> {
    mount_tracefs()?;
    let mut pair = TcpPair::at((watched(), 0).into())?;
    let mut expected = Vec::new();
    exchange(&mut pair, 1, &mut expected)?;
    let tcpstates = OtherTracer::start("tcpstates", &[])?;
    let tcplife = OtherTracer::start("tcplife", &[])?;
    for kib in 1..=EXCHANGES {
        exchange(&mut pair, kib, &mut expected)?;
    }
    let changes = expected_changes();
    let watched = watched().to_string();
    tcpstates.wait_lines(&watched, changes.values().sum())?;
    tcplife.wait_lines(&watched, 2 * EXCHANGES)?;
    let (tcpstates, tcplife) = (tcpstates.finish()?, tcplife.finish()?);
    exchange(&mut pair, 1, &mut expected)?;
    pair.finish(&expected)?;

    let mut seen = BTreeMap::new();
    for line in marked(&tcpstates, &watched) {
        let words: Vec<_> = line.split_whitespace().collect();
        let arrow = words.iter().position(|word| *word == "->");
        let arrow = arrow.with_context(|| format!("no change: {line}"))?;
        *seen
            .entry([words[arrow - 1], words[arrow + 1]])
            .or_default() += 1;
    }
    ensure!(seen == changes, "{tcpstates:#?}");
    // The server's end and the client's: KiB sent and received.
    let mut carried: Vec<_> = (1..=EXCHANGES)
        .flat_map(|kib| [[kib, 2 * kib], [2 * kib, kib]])
        .map(|kib| kib.map(|kib| format!("{kib}.00")))
        .collect();
    carried.sort();
    let mut seen = Vec::new();
    for line in marked(&tcplife, &watched) {
        let mut words = line.split_whitespace().rev().skip(1);
        let (Some(received), Some(sent)) = (words.next(), words.next()) else {
            bail!("no bytes: {line}");
        };
        seen.push([sent, received].map(str::to_owned));
    }
    seen.sort();
    ensure!(seen == carried, "{tcplife:#?}");
    Ok(())
}

/// `bpftrace` counts changes of states, connects and datagrams, and both of our tracers run. It
/// comes and goes while they run.
fn bpftrace_on_the_same_hooks() -> anyhow::Result<()> {
    const DATAGRAMS: [usize; 5] = [100, 0, 1_000, 10, 1];
    mount_tracefs()?;
    if !Path::new("/sys/kernel/tracing/events/sock/sock_send_length").exists() {
        return skip("no tracepoint of datagrams");
    }
    let collector = Collector::start_udp()?;
    let mut pair = TcpPair::at((watched(), 0).into())?;
    let mut datagrams = UdpPair::new(Family::V4, true)?;
    let mut expected = Vec::new();
    exchange(&mut pair, 1, &mut expected)?;
    datagrams.sender.send(SendCall::SendTo, None, &DATAGRAMS)?;
    datagrams
        .receiver
        .receive(ReceiveCall::RecvFrom, DATAGRAMS.len())?;

    let (client, sender) = (pair.client.pid(), datagrams.sender.actor.pid());
    let receiver = datagrams.receiver.actor.pid();
    let [_, second, third, fourth] = watched().octets();
    let is_watched = ["saddr", "daddr"].map(|end| {
        format!(
            "args->{end}[1] == {second} && args->{end}[2] == {third} && args->{end}[3] == {fourth}"
        )
    });
    let is_watched = is_watched.join(" || ");
    let script = format!(
        "tracepoint:sock:inet_sock_set_state /args->saddr[1] == 91 || args->daddr[1] == 91/ {{
            printf(\"{SIGN}\\n\");
        }}
        tracepoint:sock:inet_sock_set_state /{is_watched}/ {{
            @change[args->oldstate, args->newstate] = count();
        }}
        tracepoint:syscalls:sys_exit_connect /pid == {client}/ {{ @connects = count(); }}
        tracepoint:sock:sock_send_length /pid == {sender}/ {{
            @sends = count(); @sent = sum(args->ret);
        }}
        tracepoint:sock:sock_recv_length /pid == {receiver}/ {{
            @receives = count(); @received = sum(args->ret);
        }}"
    );
    let bpftrace = OtherTracer::start("bpftrace", &["-e", &script])?;
    for kib in 1..=EXCHANGES {
        exchange(&mut pair, kib, &mut expected)?;
    }
    datagrams.sender.send(SendCall::SendTo, None, &DATAGRAMS)?;
    datagrams
        .receiver
        .receive(ReceiveCall::RecvFrom, DATAGRAMS.len())?;
    // Their last changes may happen a little later than the calls.
    pair.collector.wait_closed(expected.len())?;
    let counts = bpftrace.finish()?;
    exchange(&mut pair, 1, &mut expected)?;
    datagrams.sender.send(SendCall::SendTo, None, &DATAGRAMS)?;
    pair.finish(&expected)?;
    let expected = datagrams.close()?;
    collector.finish_udp(expected.len())?.check_all(&expected)?;

    let mut should_be: Vec<_> = expected_changes()
        .into_iter()
        .map(|(change, count)| {
            let [from, to] = change.map(number);
            format!("@change[{from}, {to}]: {count}")
        })
        .collect();
    let bytes: usize = DATAGRAMS.iter().sum();
    should_be.extend([
        format!("@connects: {EXCHANGES}"),
        format!("@received: {bytes}"),
        format!("@receives: {}", DATAGRAMS.len()),
        format!("@sends: {}", DATAGRAMS.len()),
        format!("@sent: {bytes}"),
    ]);
    should_be.sort();
    let mut counted = marked(&counts, "@");
    counted.sort_unstable();
    ensure!(counted == should_be, "{counts:#?}");
    Ok(())
}

/// Returns the kernel's number of a state.
fn number(name: &str) -> u8 {
    let is_it = |number: &u8| TcpState::from_number(*number).is_some_and(|it| it.name() == name);
    (0..=u8::MAX).find(is_it).expect("a name of a state")
}

/// Tracers of another process start on the same hooks, and end by `kill -9`. Ours stay exact.
fn tracer_of_another_process_comes_and_is_killed() -> anyhow::Result<()> {
    let collector = Collector::start_udp()?;
    let mut pair = TcpPair::new()?;
    let mut datagrams = UdpPair::new(Family::V4, true)?;
    let mut expected = Vec::new();
    let mut carry = |kib| {
        exchange(&mut pair, kib, &mut expected)?;
        datagrams.sender.send(SendCall::SendTo, None, &[kib, 0])?;
        datagrams.receiver.receive(ReceiveCall::RecvFrom, 2)
    };
    carry(1)?;
    let mut other = Actor::spawn("other")?;
    other.run(Command::Trace)?;
    carry(2)?;
    other.kill()?;
    carry(3)?;
    pair.finish(&expected)?;
    let expected = datagrams.close()?;
    collector.finish_udp(expected.len())?.check_all(&expected)
}

/// Another privileged process may detach a program from the cgroup. The numbers would be wrong from
/// then on, so the stream ends with an error.
fn detached_program_ends_the_tracer() -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut tracer = UdpTracer::builder().start().await?;
        let detached = BpfObjects::of_this_process()?.links.into_iter().find(|id| {
            let mut bpftool = process::Command::new("bpftool");
            let done = bpftool
                .args(["link", "detach", "id", &id.to_string()])
                .output();
            done.is_ok_and(|output| output.status.success())
        });
        if detached.is_none() {
            return skip("no bpftool");
        }
        let ends = async { while tracer.next().await.is_some() {} };
        timeout(Duration::from_secs(30), ends).await?;
        let Err(error) = tracer.close().await else {
            bail!("no error");
        };
        eprintln!("{error}");
        ensure!(error.kind() == ErrorKind::Attach && error.to_string().contains("detached"));
        Ok(())
    })
}
