//! The figures that are not rates: how fast a consumer drains gathered events, and the cost of a
//! tracer on an idle machine.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use integration_tests::actor::{Actor, Command};
use nix::{
    sys::signal::Signal,
    time::{ClockId, clock_gettime},
};
use tcp_udp_trace::{DEFAULT_LATENCY, EventKind, TcpTracer};

use crate::{
    Options, child,
    figures::Series,
    subject::{self, Protocol, Running, Subject},
    workload,
};

/// The process is stopped while events gather in its ring; then it reads them.
pub(crate) fn drain(options: &Options) -> anyhow::Result<()> {
    const DATAGRAMS: u64 = 150_000;
    let flood = workload::all(false)
        .into_iter()
        .find(|workload| workload.protocol == Protocol::Udp);
    let flood = flood.unwrap().prepare()?;
    let (mut rate, mut lost, mut cpu) = <(Series, Series, Series)>::default();
    for _ in 0..options.rounds {
        let mut running = Running::start(&Subject::Ours(child::DRAIN), false, options)?;
        running.settle()?;
        let before = (running.query()?, running.cpu()?);
        running.signal(Signal::SIGSTOP)?;
        let flooded = flood.run(DATAGRAMS);
        running.signal(Signal::SIGCONT)?;
        flooded?;
        running.settle()?;
        let after = running.query()?;
        let spent = running.cpu()?.since(&before.1);
        let events = (after.events - before.0.events) as f64;
        rate.add(events / spent.total.as_secs_f64() / 1e6);
        cpu.add(spent.total.as_secs_f64() * 1e6 / events);
        lost.add(after.lost.unwrap_or(0) as f64);
    }
    println!("\n### Draining\n");
    println!(
        "The process was stopped while {DATAGRAMS} datagrams were sent and received, then continued. One thread\n\
         drained the events.\n\n\
         - from the ring to the consumer, in million events a second of its CPU time: {rate:.1}\n\
         - CPU time for each event: {cpu:.2} µs\n\
         - lost events: {lost}",
    );
    Ok(())
}

/// Measures how long it takes until the consumer has an event, at a low rate.
pub(crate) fn latency(options: &Options) -> anyhow::Result<()> {
    let connections = if options.quick { 20 } else { 200 };
    println!("\n### Latency, 40 connections a second\n");
    println!("| `latency` | median, ms | 99 of 100, ms | longest, ms |\n|---|---|---|---|");
    for gather in [DEFAULT_LATENCY, Duration::ZERO] {
        let mut late = late(gather, connections)?;
        late.sort_unstable();
        let at = |percent: usize| late[(late.len() - 1) * percent / 100].as_secs_f64() * 1e3;
        let name = if gather == DEFAULT_LATENCY {
            "default"
        } else {
            "none"
        };
        println!(
            "| {} ms ({name}) | {:.2} | {:.2} | {:.2} |",
            gather.as_millis(),
            at(50),
            at(99),
            at(100),
        );
    }
    Ok(())
}

/// Returns, for each state change of this many connections, how late the consumer has it.
fn late(gather: Duration, connections: u32) -> anyhow::Result<Vec<Duration>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let builder = TcpTracer::builder().sample_interval(None).latency(gather);
        let mut tracer = builder.start().await?;
        let handle = tracer.handle();
        let traffic = thread::spawn(move || -> anyhow::Result<()> {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            for _ in 0..connections {
                let client = TcpStream::connect(listener.local_addr()?)?;
                drop((listener.accept()?, client));
                // This keeps to the rate.
                thread::sleep(Duration::from_millis(25));
            }
            handle.stop();
            Ok(())
        });
        let mut late = Vec::new();
        while let Some(event) = tracer.next().await {
            let now = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME)?);
            if matches!(event.kind, EventKind::StateChange { .. }) {
                late.push(now.saturating_sub(event.uptime));
            }
        }
        traffic.join().unwrap()?;
        Ok(late)
    })
}

/// Measures an idle machine, without sockets and with many.
pub(crate) fn idle(options: &Options) -> anyhow::Result<()> {
    // Two rounds of samples.
    let time = Duration::from_secs(if options.quick { 1 } else { 13 });
    println!("\n### Idle, with hardly a socket\n");
    idle_tracers(options, time)?;
    let (tcp, udp) = if options.quick {
        (8_000, 2_000)
    } else {
        (80_000, 20_000)
    };
    let holders = hold(tcp, udp)?;
    println!("\n### Idle, with {tcp} TCP and {udp} UDP sockets\n");
    idle_tracers(options, time)?;
    drop(holders);
    Ok(())
}

/// Starts processes that have this many sockets open.
fn hold(tcp: u32, udp: u32) -> anyhow::Result<Vec<Actor>> {
    const HOLDERS: u32 = 8;
    let mut holders = Vec::new();
    for index in 0..HOLDERS {
        let mut holder = Actor::spawn("holder")?;
        let address = Ipv4Addr::from([127, 0, 1, u8::try_from(index)?]);
        holder.begin(&Command::Hold {
            address: SocketAddr::new(address.into(), 10_000),
            tcp: tcp / HOLDERS,
            udp: udp / HOLDERS,
        })?;
        holders.push(holder);
    }
    for holder in &mut holders {
        holder.finish()?;
    }
    Ok(holders)
}

fn idle_tracers(options: &Options, time: Duration) -> anyhow::Result<()> {
    println!("| tracer | wake-ups a second | CPU, ms a second | peak RSS, MB |\n|---|---|---|---|");
    for workload in workload::all(options.quick) {
        // One of each protocol.
        if !matches!(workload.name, "tcp, one CPU" | "udp, one flow") {
            continue;
        }
        for subject in subject::of(&workload, options) {
            // The floor's programs do nothing, also when idle.
            if matches!(subject, Subject::Nothing | Subject::Floor(..)) {
                continue;
            }
            let mut running = Running::start(&subject, false, options)?;
            // The first round of samples is over.
            running.settle()?;
            let before = (running.sleeps()?, running.cpu()?);
            thread::sleep(time);
            let cpu = running.cpu()?.since(&before.1);
            // The query wakes the process, too.
            let sleeps = (running.sleeps()? - before.0).saturating_sub(1);
            println!(
                "| {:?}: {} | {:.1} | {:.2} | {:.1} |",
                workload.protocol,
                subject.name(),
                sleeps as f64 / time.as_secs_f64(),
                cpu.total.as_secs_f64() * 1e3 / time.as_secs_f64(),
                running.peak_rss_kb()? as f64 / 1024.0,
            );
            running.stop(0)?;
        }
    }
    Ok(())
}
