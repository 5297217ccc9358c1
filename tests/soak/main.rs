//! Runs everything at once, for long: connections churn, datagrams flood, filters change, tracers
//! start and stop, network namespaces come and go, processes are killed, and in a guest a CPU goes
//! offline and comes back. At the end the numbers must add up, and memory, descriptors, threads and
//! BPF objects must not have grown. Run by `cargo xtask soak`, as root.
//!
//! `soak minutes N` runs all of that for this long. `soak sockets N` opens and closes this many
//! sockets under both tracers.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "it fails by panicking, and its figures go to stdout"
)]

mod interrupted;
mod sockets;
mod upheaval;
mod work;

use std::{
    env, fs,
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use integration_tests::{
    actor::{self, Actor},
    collector::check_conservation,
    kernel::{self, BpfObjects},
    netns::Netns,
    tcp_pair::loopback,
};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use tcp_udp_trace::{Filter, Kind, Stats, TcpTracer, UdpTracer};

use self::{
    interrupted::Interruptions,
    upheaval::Upheavals,
    work::{Clock, Counted, Truth, count_tcp, count_udp},
};

fn main() -> ExitCode {
    if let Some(code) = actor::run_if_asked() {
        return code;
    }
    // Before Linux 5.11, maps count against this limit.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    let mut args = env::args().skip(1);
    let (what, count) = (args.next(), args.next().and_then(|n| n.parse().ok()));
    let done = match (what.as_deref(), count) {
        (Some("minutes"), Some(minutes)) => soak(Duration::from_secs(60 * minutes)),
        (Some("sockets"), Some(count)) => sockets::run(count),
        _ => Err(anyhow::anyhow!("soak minutes N | soak sockets N")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The size of this process, and its descriptors and threads.
#[derive(Debug)]
pub(crate) struct Footprint {
    resident_kb: u64,
    threads: u64,
    files: usize,
}

impl Footprint {
    pub(crate) fn now() -> anyhow::Result<Self> {
        let status = fs::read_to_string("/proc/self/status")?;
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse().ok()
        };
        Ok(Self {
            resident_kb: number("VmRSS:").context("no VmRSS")?,
            threads: number("Threads:").context("no Threads")?,
            files: kernel::open_files()?.len(),
        })
    }
}

fn soak(time: Duration) -> anyhow::Result<()> {
    Netns::enter_new()?;
    let truth = Truth::default();
    let changes = AtomicU64::new(0);
    let started = AtomicU64::new(0);
    let upheavals = Upheavals::default();
    let before = kernel::open_files()?.len();
    let objects_before = BpfObjects::loaded();

    let mut server = Actor::spawn("server")?;
    let listener = server.listen(loopback(false))?;
    let mut survivor = Actor::spawn("survivor")?;
    let of_victims = survivor.listen(loopback(false))?;
    let all_ports = || {
        let filter = Filter::new().port(listener.local.port());
        let filter = filter.port(of_victims.local.port());
        filter.port(upheaval::VISITED_PORT)
    };
    // The default queue is for a service that keeps up; this machine is busier than that.
    let tcp = || TcpTracer::builder().queue(1 << 16).ring_bytes(16 << 20);
    let here = Netns::current()?.inode()?;
    let (plain, plain_handle) = count_tcp(tcp(), here)?;
    let filtered = tcp().filter(all_ports()).sample_interval(None);
    let (filtered, filtered_handle) = count_tcp(filtered, here)?;
    let datagrams = UdpTracer::builder().per_datagram(true);
    let (udp, udp_handle) = count_udp(datagrams, here)?;
    let mut interruptions = Interruptions::start()?;
    let clock = Clock::start(time);
    let mut workers = work::begin(&clock, &truth, &server, &listener)?;
    workers.extend(upheaval::begin(
        &clock, &truth, &upheavals, survivor, of_victims,
    )?);

    let mut early = None;
    thread::scope(|scope| {
        scope.spawn(|| {
            while !clock.is_over() {
                let other = 1 + changes.fetch_add(1, Ordering::Relaxed) % 1000;
                let filter = all_ports().port(u16::try_from(other).unwrap());
                work::block_on(filtered_handle.set_filter(filter)).unwrap();
                thread::sleep(Duration::from_millis(20));
            }
        });
        scope.spawn(|| {
            while !clock.is_over() {
                work::start_and_stop(started.fetch_add(1, Ordering::Relaxed)).unwrap();
            }
        });
        let began = Instant::now();
        let mut reported = began;
        while !clock.is_over() {
            thread::sleep(Duration::from_secs(1));
            if early.is_none() && began.elapsed() > time / 10 {
                early = Some((Footprint::now().unwrap(), BpfObjects::loaded()));
            }
            // A guest without output counts as stuck.
            if reported.elapsed() > Duration::from_secs(60) {
                reported = Instant::now();
                println!(
                    "after {:>4} s         {} connections",
                    began.elapsed().as_secs(),
                    truth.connections.load(Ordering::Relaxed)
                );
            }
        }
    });
    let (late, objects_late) = (Footprint::now()?, BpfObjects::loaded());
    for worker in workers {
        worker.join().unwrap()?;
    }
    // The closes of the last connections come a moment after their actors have ended them.
    let expected = 2 * truth.connections.load(Ordering::Relaxed);
    let mut seen = Vec::new();
    for (thread, handle) in [(plain, plain_handle), (filtered, filtered_handle)] {
        seen.push(work::finish(thread, &handle, expected)?);
    }
    let interrupted = interruptions.end()?;
    let of_udp = work::finish(udp, &udp_handle, truth.udp_sockets.load(Ordering::Relaxed))?;

    let (early, objects_early) = early.context("the soak was too short")?;
    println!("minutes              {}", time.as_secs() / 60);
    println!("connections          {}", expected / 2);
    println!(
        "datagrams sent       {}",
        truth.datagrams.load(Ordering::Relaxed)
    );
    println!(
        "UDP sockets          {}",
        truth.udp_sockets.load(Ordering::Relaxed)
    );
    println!("filter changes       {}", changes.load(Ordering::Relaxed));
    println!("tracers started      {}", started.load(Ordering::Relaxed));
    for (name, count) in [
        ("namespaces", &upheavals.namespaces),
        ("processes killed", &upheavals.killed),
        ("CPU hotplugs", &upheavals.hotplugs),
    ] {
        println!("{name:20} {}", count.load(Ordering::Relaxed));
    }
    for (name, counted) in [
        ("TCP", &seen[0]),
        ("TCP, filtered", &seen[1]),
        ("UDP", &of_udp),
    ] {
        print(name, &counted.stats);
    }
    println!("softirqs over pid 1  {} closes", interrupted.len());
    println!(
        "after a tenth        {early:?}, {} BPF objects",
        objects_early.len()
    );
    println!(
        "at the end           {late:?}, {} BPF objects",
        objects_late.len()
    );

    // Such a kernel may skip all programs of a transition, and of the socket's end.
    let preempts = kernel::is_at_least(7, 0)?;
    for Counted {
        closes,
        tx,
        rx,
        unclosed,
        stats,
    } in &seen
    {
        check_conservation(stats)?;
        let counts = stats.kinds[Kind::StateChange];
        let lost = counts.ring_lost + counts.queue_shed;
        ensure!(stats.untracked == 0, "{stats:?}");
        let missing = expected.saturating_sub(*closes);
        let interrupted = unclosed.explained_by(&interrupted);
        // Only samples find a socket whose close and end were skipped.
        let skipped = match stats.recursion_misses {
            Some(skipped) if preempts && stats.sample_rounds == 0 => skipped,
            _ => 0,
        };
        println!(
            "closes missing       {missing}: lost {lost}, in softirqs over pid 1 {interrupted}, runs skipped {skipped}"
        );
        // On a busier machine, a reader may come too late. All resulting losses are counted.
        ensure!(
            *closes <= expected && missing <= lost + interrupted + skipped,
            "{closes} closes of {expected}: {stats:?}; without a close: {unclosed:?}"
        );
        let bytes = truth.bytes.load(Ordering::Relaxed);
        ensure!(
            missing + lost + stats.missed > 0 || (*tx, *rx) == (bytes, bytes),
            "{tx} and {rx} bytes of {bytes}"
        );
    }
    check_conservation(&of_udp.stats)?;
    ensure!(
        of_udp.closes == truth.udp_sockets.load(Ordering::Relaxed),
        "{} closes: {:?}",
        of_udp.closes,
        of_udp.stats
    );
    ensure!(
        of_udp.stats.queue_shed > 0,
        "the flood sent nothing: {:?}",
        of_udp.stats
    );
    ensure!(
        late.resident_kb < early.resident_kb + early.resident_kb / 2,
        "the process has grown"
    );
    ensure!(
        late.threads <= early.threads + 2 && late.files <= early.files + 16,
        "it leaks"
    );
    // The tracer that starts and stops has objects at one of these times, perhaps.
    ensure!(
        objects_late.len() < 2 * objects_early.len(),
        "the kernel's BPF objects have grown"
    );
    drop(server);
    let after = kernel::open_files()?.len();
    if after > before {
        bail!("{before} files were open, {after} are");
    }
    objects_before.await_no_more()?;
    println!("all of it adds up");
    Ok(())
}

fn print(name: &str, stats: &Stats) {
    println!(
        "{name:20} emitted {} delivered {} ring_lost {} queue_shed {} filtered {} rejected {} samples {}",
        stats.emitted,
        stats.delivered,
        stats.ring_lost,
        stats.queue_shed,
        stats.reader_filtered,
        stats.kernel_filtered,
        stats.kinds.sample.emitted,
    );
}
