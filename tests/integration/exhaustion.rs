//! Shortages: of room for sockets, descriptors, threads and memory.

use std::{
    collections::HashSet,
    fs::File,
    net::UdpSocket,
    thread,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure};
use integration_tests::{
    actor::Actor,
    cgroup::MemoryCgroup,
    collector::Collector,
    kernel::{is_at_least, is_emulated, open_files},
    privileges::{Capability, become_unprivileged},
    suite::{Test, skip},
    tcp_pair::loopback,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tcp_udp_trace::{Error, ErrorKind, Event, Hook, Protocol, Stats, TcpTracer, UdpTracer};
use tokio::runtime::{Builder, Runtime};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            tcp_sockets_beyond_the_limit_are_counted,
            udp_sockets_beyond_the_limit_are_counted,
            maps_larger_than_the_machine,
        ],
        Process: [
            start_with_too_few_descriptors,
            descriptors_run_out_under_a_tracer,
            start_without_a_thread,
            start_with_too_little_memory,
        ],
    ]
}

fn runtime() -> anyhow::Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}

/// Each state change is reported once. Only the owner is forgotten after the first, and that is
/// counted.
fn tcp_sockets_beyond_the_limit_are_counted() -> anyhow::Result<()> {
    const ROOM: u32 = 4;
    const SOCKETS: u32 = 40;
    let collector = Collector::start_with(|builder| builder.max_sockets(ROOM))?;
    let mut server = Actor::spawn("server")?;
    let listeners = (0..SOCKETS)
        .map(|_| server.listen(loopback(false)))
        .collect::<Result<Vec<_>, _>>()?;
    for listener in &listeners {
        server.close(listener)?;
    }
    let handle = collector.handle().clone();
    let events = collector.finish_in_order(SOCKETS as usize)?;
    let (opens, closes): (Vec<_>, Vec<_>) = events.iter().partition(|event| !event.is_end());
    let of_all: HashSet<_> = listeners.iter().map(|listener| listener.local).collect();
    for events in [&opens, &closes] {
        let addresses: HashSet<_> = events.iter().map(|event| event.socket.local).collect();
        ensure!(
            addresses == of_all && events.len() == of_all.len(),
            "{}",
            show_all(events)
        );
    }
    let is_owned = |event: &&&Event| event.process.as_ref().map(|it| it.pid) == Some(server.pid());
    ensure!(
        opens.iter().filter(is_owned).count() == opens.len(),
        "{}",
        show_all(&opens)
    );
    let owned = closes.iter().filter(is_owned).count();
    let unknown = closes
        .iter()
        .filter(|event| event.process.is_none())
        .count();
    ensure!(
        owned <= ROOM as usize && owned + unknown == closes.len(),
        "{}",
        show_all(&closes)
    );
    let untracked = handle.stats().untracked;
    ensure!(untracked >= unknown as u64, "{untracked} of {unknown}");
    Ok(())
}

fn show_all(events: &[&Event]) -> String {
    events.iter().map(|event| format!("\n  {event}")).collect()
}

/// The sockets are not reported while there is no room, and that is counted.
fn udp_sockets_beyond_the_limit_are_counted() -> anyhow::Result<()> {
    const ROOM: u32 = 4;
    const SOCKETS: u32 = 40;
    let collector = Collector::start_udp_with(|builder| builder.max_sockets(ROOM))?;
    let sockets = (0..SOCKETS)
        .map(|_| UdpSocket::bind("127.0.0.1:0"))
        .collect::<Result<Vec<_>, _>>()?;
    let untracked = collector.handle().stats().untracked;
    // Each CPU has room for one more socket, in which its programs build the entry.
    let cpus = thread::available_parallelism()?.get() as u64;
    let least = u64::from(SOCKETS - ROOM) - cpus;
    ensure!(untracked >= least, "{untracked}");
    drop(sockets);
    collector.finish_in_order(0).map(drop)
}

/// Returns the hooks of each signal.
fn hooks(protocol: Protocol) -> anyhow::Result<Result<Vec<Hook>, Error>> {
    runtime()?.block_on(async {
        Ok(match protocol {
            Protocol::Tcp => {
                let tracer = TcpTracer::builder().start().await;
                tracer.map(|tracer| tracer.handle().hooks())
            }
            _ => {
                let tracer = UdpTracer::builder().start().await;
                tracer.map(|tracer| tracer.handle().hooks())
            }
        })
    })
}

/// Checks that the error is of this kind, that its message has all these parts, and that nothing is
/// left in the kernel.
fn ensure_refused<T>(
    started: Result<T, Error>,
    kind: ErrorKind,
    named: &str,
) -> anyhow::Result<()> {
    let Err(error) = started else {
        bail!("started without {named}")
    };
    let message = error.to_string();
    eprintln!("{message}");
    ensure!(error.kind() == kind && message.contains(named), "{error:?}");
    let files = open_files()?;
    let is_ours = |file: &&String| file.contains("bpf") || file.contains("perf_event");
    let left: Vec<_> = files.iter().filter(is_ours).collect();
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// Allows the process as many open files as it has now, and this many more.
fn spare_descriptors(spare: usize) -> anyhow::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let limit = (open_files()?.len() + spare) as u64;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, limit, most)?)
}

/// With too few descriptors the start fails, instead of attaching worse hooks. With enough, it
/// attaches the best ones, though it failed before.
fn start_with_too_few_descriptors() -> anyhow::Result<()> {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        // The runtime has some descriptors of its own.
        for spare in [10, 40, 80] {
            spare_descriptors(spare)?;
            ensure_refused(hooks(protocol)?, ErrorKind::Load, "ulimit -n")?;
        }
        // The number that the error message names, and those of the runtime.
        spare_descriptors(80 + 10)?;
        let with_few = hooks(protocol)??;
        spare_descriptors(1_000)?;
        ensure!(hooks(protocol)?? == with_few, "{with_few:?}");
    }
    Ok(())
}

/// Events go on. Samples that cannot be taken are counted, until there are descriptors again.
fn descriptors_run_out_under_a_tracer() -> anyhow::Result<()> {
    let mut server = Actor::spawn("server")?;
    let collector = Collector::start_sampling()?;
    let handle = collector.handle().clone();
    let mut listen = |collector: &Collector| {
        let listener = server.listen(loopback(false))?;
        server.close(&listener)?;
        collector.wait_for("a close", |event| {
            event.is_end() && event.socket.local == listener.local
        })
    };
    let until = |what: &str, is_so: &dyn Fn(&Stats) -> bool| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_so(&handle.stats()) {
            ensure!(Instant::now() < deadline, "no {what}: {:?}", handle.stats());
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    };
    listen(&collector)?;
    until("round", &|stats| stats.sample_rounds > 0)?;
    spare_descriptors(2)?;
    let mut taken = Vec::new();
    while let Ok(file) = File::open("/") {
        taken.push(file);
    }
    let faults = handle.stats().sample_faults;
    until("fault", &|stats| stats.sample_faults > faults)?;
    listen(&collector)?;
    drop(taken);
    spare_descriptors(100)?;
    let before = handle.stats();
    until("round", &|stats| {
        stats.sample_rounds > before.sample_rounds + 1
    })?;
    let after = handle.stats();
    listen(&collector)?;
    // One round may have been under way.
    ensure!(after.sample_faults <= before.sample_faults + 1, "{after:?}");
    collector.finish_in_order(3).map(drop)
}

/// A process at its limit of threads gets an error, not a panic.
fn start_without_a_thread() -> anyhow::Result<()> {
    // A privileged process may exceed the limit.
    become_unprivileged(&[Capability::CAP_BPF, Capability::CAP_PERFMON])?;
    let runtime = runtime()?;
    // A thread that the start may have.
    runtime.block_on(runtime.spawn_blocking(|| ()))?;
    let (_, most) = getrlimit(Resource::RLIMIT_NPROC)?;
    setrlimit(Resource::RLIMIT_NPROC, 1, most)?;
    let started = runtime.block_on(TcpTracer::builder().start());
    ensure_refused(started, ErrorKind::Load, "no thread")?;
    setrlimit(Resource::RLIMIT_NPROC, most, most)?;
    runtime.block_on(TcpTracer::builder().start()).map(drop)?;
    Ok(())
}

/// The cgroup has a memory limit below the size of the ring.
fn start_with_too_little_memory() -> anyhow::Result<()> {
    const MIB: u64 = 1 << 20;
    if !is_at_least(5, 11)? {
        return skip("maps do not count as memory of the cgroup before Linux 5.11");
    }
    let runtime = runtime()?;
    let start = |bytes| runtime.block_on(TcpTracer::builder().ring_bytes(bytes).start());
    let cgroup = MemoryCgroup::enter(64 * MIB)?;
    ensure_refused(start(128 << 20), ErrorKind::Load, "no memory")?;
    drop(start(1 << 20)?);
    drop(cgroup);
    drop(start(128 << 20)?);
    Ok(())
}

/// Three gigabytes, on a machine with two.
fn maps_larger_than_the_machine() -> anyhow::Result<()> {
    if !is_emulated()? {
        return skip("might take the memory of this machine; only in a VM");
    }
    if is_at_least(6, 1)? {
        return skip("the map of sockets allocates on demand since Linux 6.1");
    }
    let started = runtime()?.block_on(TcpTracer::builder().max_sockets(1 << 24).start());
    let Err(error) = started else {
        bail!("started")
    };
    ensure!(error.kind() == ErrorKind::Load, "{error:?}");
    ensure!(error.to_string().contains("no memory"), "{error:?}");
    Ok(())
}
