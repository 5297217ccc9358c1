//! Odd machines. `cargo xtask test --machine all` makes them (xtask/src/vm/machine.rs).

use std::{
    fs,
    net::TcpListener,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use integration_tests::{
    collector::{self, Collector},
    kernel::is_emulated,
    suite::{Test, buffer, skip},
    tcp_pair::{TcpPair, loopback},
    udp_pair::{self, Family},
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use tcp_udp_trace::{Buffer, DEFAULT_QUEUE, DEFAULT_RING_BYTES, TcpTracer};
use tokio::{runtime::Builder, time::timeout};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            starts_and_is_exact,
        ],
        Solitude: [
            cpu_that_comes_and_goes,
            cpu_that_comes_and_goes_during_starts,
        ],
    ]
}

/// Tracers with default settings, and IPv4.
fn starts_and_is_exact() -> anyhow::Result<()> {
    let tcp = Collector::start_with(|builder| {
        builder.queue(DEFAULT_QUEUE).ring_bytes(DEFAULT_RING_BYTES)
    })?;
    let udp = Collector::start_udp_with(|builder| {
        builder.queue(DEFAULT_QUEUE).ring_bytes(DEFAULT_RING_BYTES)
    })?;
    for collector in [&tcp, &udp] {
        for hook in collector.handle().hooks() {
            eprintln!("{hook}");
        }
    }
    TcpPair::traced_by(tcp, loopback(false))?.check_transfer(100_000, 200_000)?;
    udp_pair::check_transfer(Family::V4, udp)
}

/// The second CPU, which this test switches on and off.
const SECOND: &str = "/sys/devices/system/cpu/cpu1/online";

/// Makes a listener on a CPU, closes it, and returns its port.
fn listen_on(cpu: usize) -> anyhow::Result<u16> {
    let thread = Pid::from_raw(0);
    let allowed = sched_getaffinity(thread)?;
    let mut only = CpuSet::new();
    only.set(cpu)?;
    sched_setaffinity(thread, &only)?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    sched_setaffinity(thread, &allowed)?;
    Ok(port)
}

/// Returns whether the tracer reports the end of a listener on this CPU.
async fn is_delivered(tracer: &mut TcpTracer, cpu: usize) -> anyhow::Result<bool> {
    let port = listen_on(cpu)?;
    let end = async {
        loop {
            let event = tracer.next().await.context("the stream has ended")?;
            if event.is_end() && event.socket.local.port() == port {
                return anyhow::Ok(());
            }
        }
    };
    timeout(Duration::from_secs(2), end)
        .await
        .ok()
        .transpose()
        .map(|end| end.is_some())
}

/// A CPU comes online after the start, goes, and comes again. With perf buffers, its first events
/// are lost and counted.
fn cpu_that_comes_and_goes() -> anyhow::Result<()> {
    const SOCKETS: usize = 20;
    const MOST_LOST: u64 = 20;
    if !is_emulated()? || !Path::new(SECOND).exists() {
        return skip("no second CPU that may be switched off");
    }
    fs::write(SECOND, "0")?;
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut tracer = collector::tcp().sample_interval(None).start().await?;
        let mut lost = 0;
        for round in 0..3 {
            fs::write(SECOND, "1")?;
            while !is_delivered(&mut tracer, 1).await? {
                lost += 1;
                ensure!(
                    lost < MOST_LOST,
                    "round {round}: nothing comes from the CPU"
                );
            }
            for _ in 0..SOCKETS {
                ensure!(is_delivered(&mut tracer, 1).await?, "round {round}");
            }
            fs::write(SECOND, "0")?;
            for _ in 0..SOCKETS {
                ensure!(is_delivered(&mut tracer, 0).await?, "round {round}");
            }
        }
        fs::write(SECOND, "1")?;
        let stats = tracer.close().await?;
        eprintln!("{lost} sockets lost; {stats:?}");
        let has_perf = buffer() == Some(Buffer::Perf);
        // Each socket has two events.
        ensure!((lost > 0) == has_perf && stats.ring_lost == 2 * lost);
        collector::check_conservation(&stats)
    })
}

/// Tracers start while a CPU goes offline and comes back. None fails.
fn cpu_that_comes_and_goes_during_starts() -> anyhow::Result<()> {
    const STARTS: usize = 30;
    if !is_emulated()? || !Path::new(SECOND).exists() {
        return skip("no second CPU that may be switched off");
    }
    let is_over = AtomicBool::new(false);
    let runtime = Builder::new_current_thread().enable_all().build()?;
    thread::scope(|scope| {
        let switches = scope.spawn(|| {
            let mut switches = 0;
            while !is_over.load(Ordering::Relaxed) {
                fs::write(SECOND, "0")?;
                fs::write(SECOND, "1")?;
                switches += 1;
            }
            anyhow::Ok(switches)
        });
        let started = runtime.block_on(async {
            for _ in 0..STARTS {
                collector::tcp().start().await?.close().await?;
            }
            anyhow::Ok(())
        });
        is_over.store(true, Ordering::Relaxed);
        let switches = switches.join().unwrap()?;
        eprintln!("{switches} switches during {STARTS} starts");
        started
    })
}
