//! The inside of a subject: our tracer, or a program of the floor, in a process of its own that
//! answers queries.

use std::{
    env,
    fs::File,
    io::{self, BufRead as _, LineWriter, Write as _},
    os::unix::process::CommandExt as _,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use aya::{
    Ebpf,
    maps::{Array, RingBuf},
    programs::{CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, Program, RawTracePoint},
};
use futures_util::{Stream, StreamExt as _};
use integration_tests::{cgroup, netns::Netns, other_tracer::mount_tracefs};
use nix::sys::resource::{UsageWho, getrusage};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use tcp_udp_trace::{Event, EventKind, Filter, TcpTracer, TracerHandle, UdpTracer};

use crate::subject::Protocol;

/// The first argument of such a process.
pub(crate) const OURS: &str = "--ours";
pub(crate) const FLOOR: &str = "--floor-program";
pub(crate) const PEER: &str = "--peer";
/// The line that the process prints when it is ready.
pub(crate) const READY: &str = "ready\n";

pub(crate) const TCP: &str = "ours";
/// Everything at its default, on the runtime of `#[tokio::main]`, and each event printed.
const TCP_README: &str = "ours: README's program";
const TCP_EVERYTHING: &str = "ours: everything, samples each second";
const TCP_QUEUE: &str = "ours, queue of 262,144";
pub(crate) const TCP_SUMMARIES: &str = "ours: summaries only";
/// No event passes, because no socket has this port.
pub(crate) const TCP_REJECTED: &str = "ours: a filter that rejects everything";
pub(crate) const UDP: &str = "ours: flows";
const UDP_EVERYTHING: &str = "ours: each datagram, samples each second";
/// Room for all records that come while the reader is stopped.
pub(crate) const DRAIN: &str = "ours, a large ring";

/// Returns the settings of our tracer for a comparison.
pub(crate) fn setups(protocol: Protocol) -> impl Iterator<Item = &'static str> {
    let setups: &[_] = match protocol {
        Protocol::Tcp => &[
            TCP,
            TCP_README,
            TCP_QUEUE,
            TCP_EVERYTHING,
            TCP_SUMMARIES,
            TCP_REJECTED,
        ],
        Protocol::Udp => &[UDP, UDP_EVERYTHING],
    };
    setups.iter().copied()
}

/// Returns the setup with everything at its default.
pub(crate) const fn default(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => TCP,
        Protocol::Udp => UDP,
    }
}

/// Returns how many events a connection has with this setup, if that is not the number of its state
/// changes.
pub(crate) fn truth(setup: &str) -> Option<u64> {
    match setup {
        TCP_SUMMARIES => Some(2),
        TCP_REJECTED => Some(0),
        _ => None,
    }
}

/// The counts that a subject reports.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    /// All events, of any kind.
    pub(crate) events: u64,
    /// The events of the benchmark's traffic, in the unit of its true count.
    pub(crate) seen: Option<u64>,
    pub(crate) lost: Option<u64>,
    /// How long `start` took.
    pub(crate) start: Option<Duration>,
    /// See [`Running::sleeps`](crate::subject::Running::sleeps).
    pub(crate) sleeps: Option<u64>,
}

/// Runs as a subject if this process was started as one.
pub(crate) fn run_if_requested() -> Option<anyhow::Result<()>> {
    let mut args = env::args().skip(1);
    let (what, which) = (args.next()?, args.next());
    match (what.as_str(), which) {
        (OURS, Some(setup)) => Some(ours(&setup)),
        (FLOOR, Some(program)) => Some(floor(&program, args.next().as_deref())),
        (PEER, Some(program)) => Some(be_peer(&program, args)),
        _ => None,
    }
}

/// Executes another tool. Most of them need tracefs, which may not be mounted here.
fn be_peer(program: &str, args: impl Iterator<Item = String>) -> anyhow::Result<()> {
    const TRACEFS: &str = "/sys/kernel/tracing";
    if !std::fs::exists(format!("{TRACEFS}/events"))? {
        mount_tracefs()?;
    }
    Err(Command::new(program).args(args).exec().into())
}

#[derive(Debug, Default)]
struct Count {
    events: AtomicU64,
    seen: AtomicU64,
}

fn ours(setup: &str) -> anyhow::Result<()> {
    let mut runtime = match setup {
        TCP_README => tokio::runtime::Builder::new_multi_thread(),
        _ => tokio::runtime::Builder::new_current_thread(),
    };
    let runtime = runtime.enable_all().build()?;
    // Like standard output, it is flushed at the end of each line.
    let mut output = LineWriter::new(File::options().write(true).open("/dev/null")?);
    let second = Duration::from_secs(1);
    runtime.block_on(async {
        let began = Instant::now();
        let tcp = TcpTracer::builder();
        let udp = UdpTracer::builder();
        match setup {
            TCP | TCP_README | TCP_QUEUE | TCP_EVERYTHING | TCP_SUMMARIES | TCP_REJECTED => {
                let tcp = match setup {
                    TCP_QUEUE => tcp.queue(1 << 18),
                    TCP_SUMMARIES => tcp.summaries_only(true),
                    TCP_REJECTED => tcp.filter(Filter::new().port(1)),
                    TCP_EVERYTHING => tcp
                        .retransmits(true)
                        .resets(true)
                        .sample_interval(second)
                        .queue(1 << 18),
                    _ => tcp,
                };
                let tracer = tcp.start().await?;
                let handle = tracer.handle();
                read(tracer, handle, began.elapsed(), |event| {
                    if setup == TCP_README {
                        // Like `println!`, which can fail only by a panic.
                        let _ = writeln!(output, "{event}");
                    }
                    u64::from(matches!(event.kind, EventKind::StateChange { .. }))
                })
                .await
            }
            UDP => {
                let tracer = udp.start().await?;
                let handle = tracer.handle();
                let sent = |event: &Event| match event.kind {
                    EventKind::Close { .. } => event.traffic.tx_packets,
                    _ => 0,
                };
                read(tracer, handle, began.elapsed(), sent).await
            }
            UDP_EVERYTHING | DRAIN => {
                let udp = udp
                    .per_datagram(true)
                    .sample_interval(second)
                    .queue(1 << 20);
                let tracer = udp.ring_bytes(1 << 26).start().await?;
                let handle = tracer.handle();
                let sent = |event: &Event| u64::from(matches!(event.kind, EventKind::Send { .. }));
                read(tracer, handle, began.elapsed(), sent).await
            }
            _ => bail!("no settings named {setup}"),
        }
    })
}

/// Reads a tracer until standard input ends.
async fn read(
    mut tracer: impl Stream<Item = Event> + Unpin,
    handle: TracerHandle,
    start: Duration,
    mut weigh: impl FnMut(&Event) -> u64,
) -> anyhow::Result<()> {
    let netns = Netns::current()?.inode()?;
    let count = Arc::new(Count::default());
    let shared = (handle.clone(), Arc::clone(&count));
    thread::spawn(move || {
        let (handle, count) = shared;
        let report = || {
            let stats = handle.stats();
            Report {
                events: count.events.load(Relaxed),
                seen: Some(count.seen.load(Relaxed)),
                lost: Some(stats.ring_lost + stats.queue_shed + stats.missed),
                start: Some(start),
                sleeps: sleeps().ok(),
            }
        };
        let done = answer(report);
        handle.stop();
        done
    });
    while let Some(event) = tracer.next().await {
        // This thread is the only writer.
        count.events.store(count.events.load(Relaxed) + 1, Relaxed);
        if event.socket.netns == netns {
            let seen = count.seen.load(Relaxed) + weigh(&event);
            count.seen.store(seen, Relaxed);
        }
    }
    Ok(())
}

/// Runs programs of the floor, whose names have a `+` between them.
fn floor(names: &str, object: Option<&str>) -> anyhow::Result<()> {
    let mut ebpf = Ebpf::load_file(object.context("no object")?)?;
    for name in names.split('+') {
        match ebpf.program_mut(name).context("no such program")? {
            Program::RawTracePoint(program) => attach_raw(program)?,
            Program::CgroupSkb(program) => attach_to_cgroup(program)?,
            _ => bail!("{name} is of another type"),
        }
    }
    let mut ring = RingBuf::try_from(ebpf.take_map("RECORDS").context("no ring")?)?;
    let lost = Array::<_, u64>::try_from(ebpf.take_map("LOST").context("no map")?)?;
    let records = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&records);
    let is_record = names == "tcp_record";
    thread::spawn(move || -> anyhow::Result<()> {
        loop {
            let timeout = Timespec {
                tv_sec: 0,
                tv_nsec: 50_000_000,
            };
            poll(&mut [PollFd::new(&ring, PollFlags::IN)], Some(&timeout))?;
            while ring.next().is_some() {
                counted.fetch_add(1, Relaxed);
            }
        }
    });
    answer(|| Report {
        events: records.load(Relaxed),
        seen: is_record.then(|| records.load(Relaxed)),
        lost: is_record.then(|| lost.get(&0, 0).unwrap_or(0)),
        sleeps: sleeps().ok(),
        ..Report::default()
    })
}

fn attach_raw(program: &mut RawTracePoint) -> anyhow::Result<()> {
    program.load()?;
    program.attach("inet_sock_set_state")?;
    Ok(())
}

fn attach_to_cgroup(program: &mut CgroupSkb) -> anyhow::Result<()> {
    let root = File::open(cgroup::mount_point().context("no cgroup v2")?)?;
    program.load()?;
    let attach_type = program
        .expected_attach_type()
        .unwrap_or(CgroupSkbAttachType::Egress);
    program.attach(root, attach_type, CgroupAttachMode::Single)?;
    Ok(())
}

/// Prints that it is ready, then a report for each line of standard input.
fn answer(report: impl Fn() -> Report) -> anyhow::Result<()> {
    let mut output = io::stdout();
    output.write_all(READY.as_bytes())?;
    for query in io::stdin().lock().lines() {
        query?;
        let mut line = serde_json::to_vec(&report())?;
        line.push(b'\n');
        output.write_all(&line)?;
    }
    Ok(())
}

/// Returns how often this process has gone to sleep by itself, including threads that have ended.
fn sleeps() -> anyhow::Result<u64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    Ok(usage.voluntary_context_switches().unsigned_abs())
}
