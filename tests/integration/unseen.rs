//! The ends of sockets that no hook saw.

use std::{
    fs::File,
    mem,
    net::Ipv4Addr,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use integration_tests::{
    collector::{Collector, show},
    kernel::open_files,
    suite::Test,
    tcp_pair::{TcpPair, loopback},
};
use nix::{
    fcntl::{FcntlArg, fcntl},
    unistd::close,
};
use tcp_udp_trace::{Event, TracerHandle, Traffic};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Process: [
            ends_come_with_a_round_of_samples,
        ],
    ]
}

/// Far longer than the rounds of two searches take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Longer than it takes to detach the hooks.
const INTERVAL: Duration = Duration::from_secs(3);

const UP: u64 = 10_000;
const DOWN: u64 = 300;

fn ends_come_with_a_round_of_samples() -> anyhow::Result<()> {
    let collector = Collector::start_with(|builder| builder.sample_interval(INTERVAL))?;
    let mut pair = TcpPair::traced_by(collector, loopback(false))?;
    let result = check(&mut pair);
    // The tracer cannot detach hooks that it no longer has. The end of this process does.
    mem::forget(pair);
    result
}

fn check(pair: &mut TcpPair) -> anyhow::Result<()> {
    let (gone, kept) = (pair.connect()?, pair.connect()?);
    pair.upload(&gone, UP)?;
    pair.download(&gone, DOWN)?;
    // A listener, and two connections with two ends each.
    let ids = [
        gone.client.local,
        gone.server.local,
        pair.listener.local,
        kept.client.local,
    ];
    let remotes = [Some(gone.server.local), Some(gone.client.local), None, None];
    let mut found = Vec::new();
    for (local, remote) in ids.into_iter().zip(remotes) {
        let is_it = |event: &Event| {
            event.socket.local == local && remote.is_none_or(|at| event.socket.remote == at)
        };
        pair.collector.wait_for("socket", is_it)?;
        let events = pair.collector.events();
        let event = events.iter().find(|event| is_it(event));
        found.push(event.context("an earlier wait found it")?.socket.id);
    }
    let handle = pair.collector.handle().clone();
    // No other thread may open files meanwhile.
    await_rounds(&handle, 1)?;
    detach_hooks()?;
    pair.close(&gone)?;
    pair.server.close(&pair.listener)?;
    let (traffic, other) = ((UP, DOWN), (DOWN, UP));
    for (&id, (tx, rx)) in found.iter().zip([traffic, other, (0, 0)]) {
        let is_it = |event: &Event| event.is_end() && event.socket.id == id;
        pair.collector.wait_for("end", is_it)?;
        let events = pair.collector.events();
        let end = events.iter().find(|event| is_it(event));
        let end = end.context("an earlier wait found it")?;
        // Another process of the machine may use the memory of the socket meanwhile.
        let is_lost = end.socket.local.ip() == Ipv4Addr::UNSPECIFIED
            && end.socket.remote.ip() == Ipv4Addr::UNSPECIFIED
            && end.traffic == Traffic::default();
        let Traffic {
            tx_bytes, rx_bytes, ..
        } = end.traffic;
        ensure!(is_lost || (tx_bytes, rx_bytes) == (tx, rx), "{end}");
        if is_lost {
            println!("lost: {end}");
        }
        ensure!(end.process.is_some(), "{end}");
    }
    ensure!(handle.stats().missed >= 3, "{:?}", handle.stats());
    // One more search.
    await_rounds(&handle, 4)?;
    let events = pair.collector.events();
    let ends: Vec<_> = events.iter().filter(|event| event.is_end()).collect();
    ensure!(
        ends.len() == 3 && ends.iter().all(|end| end.socket.id != found[3]),
        "{}",
        show(&events)
    );
    Ok(())
}

/// Waits until this many more rounds have ended.
fn await_rounds(handle: &TracerHandle, more: u64) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let until = handle.stats().sample_rounds + more;
    while handle.stats().sample_rounds < until {
        ensure!(Instant::now() < deadline, "{:?}", handle.stats());
        sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Replaces the descriptors of this process's hooks, so that the kernel detaches them.
fn detach_hooks() -> anyhow::Result<()> {
    let null = File::open("/dev/null")?;
    let mut detached = 0;
    for file in open_files()? {
        let (fd, target) = file.split_once(" -> ").context("a descriptor")?;
        if ["bpf_link", "bpf-link", "bpf-raw-tracepoint", "perf_event"]
            .iter()
            .any(|kind| target.contains(kind))
        {
            let fd = fd.parse()?;
            close(fd)?;
            ensure!(fcntl(&null, FcntlArg::F_DUPFD_CLOEXEC(fd))? == fd);
            detached += 1;
        }
    }
    ensure!(detached >= 4, "{detached} hooks");
    Ok(())
}
