//! The figures that are not rates: how fast a consumer drains gathered events, and the cost of a
//! tracer on an idle machine.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    pin::{Pin, pin},
    process::{self, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::ensure;
use futures_util::future::{Either, select};
use integration_tests::actor::{Actor, Command};
use nix::{
    sys::{
        resource::{UsageWho, getrusage},
        signal::Signal,
        time::{TimeVal, TimeValLike as _},
    },
    time::{ClockId, clock_gettime},
};
use tcp_udp_trace::{DEFAULT_LATENCY, DEFAULT_SAMPLE_INTERVAL, EventKind, TcpTracer, UdpTracer};

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
    listing()?;
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

/// Measures `ss -tin` at the interval of the samples, as an alternative to them.
fn listing() -> anyhow::Result<()> {
    const TIMES: u32 = 3;
    let spent = || -> anyhow::Result<(f64, f64)> {
        let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
        let seconds = |time: TimeVal| time.num_microseconds() as f64 / 1e6;
        let cpu = seconds(usage.user_time()) + seconds(usage.system_time());
        Ok((cpu, usage.voluntary_context_switches() as f64))
    };
    let before = spent()?;
    for _ in 0..TIMES {
        let mut ss = process::Command::new("ss");
        let listed = ss.arg("-tin").stdout(Stdio::null()).status();
        let Ok(status) = listed else {
            println!("\nskipped: `ss` is not installed");
            return Ok(());
        };
        ensure!(status.success(), "ss: {status}");
    }
    let after = spent()?;
    let all = f64::from(TIMES) * DEFAULT_SAMPLE_INTERVAL.as_secs_f64();
    println!(
        "| Tcp: `ss -tin` every {:.1} s | {:.1} | {:.2} | |",
        DEFAULT_SAMPLE_INTERVAL.as_secs_f64(),
        (after.1 - before.1) / all,
        (after.0 - before.0) * 1e3 / all,
    );
    Ok(())
}

/// Measures memory, starts and stops.
pub(crate) fn memory(options: &Options) -> anyhow::Result<()> {
    let (tcp, udp) = (8_000, 2_000);
    println!("\n### Memory, start and stop\n");
    println!(
        "| tracer | `start`, ms | peak RSS, MB | kernel memory, MB | with {tcp} TCP and {udp} UDP sockets more | \
         `close`, ms | longest pause of the runtime meanwhile, ms |\n|---|---|---|---|---|---|---|"
    );
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let mut series: [Series; 6] = Default::default();
        for _ in 0..options.rounds {
            let subject = Subject::Ours(child::default(protocol));
            let mut running = Running::start(&subject, false, options)?;
            running.settle()?;
            let mb = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            let start = running.query()?.start.unwrap_or_default();
            let (rss, at_rest) = (running.peak_rss_kb()?, running.kernel_memory()?);
            let holders = hold(tcp, udp)?;
            running.settle()?;
            let with_sockets = running.kernel_memory()?;
            drop(holders);
            running.stop(0)?;
            let (close, pause) = close(protocol)?;
            let figures = [
                start.as_secs_f64() * 1e3,
                mb(rss << 10),
                mb(at_rest),
                mb(with_sockets),
                close.as_secs_f64() * 1e3,
                pause.as_secs_f64() * 1e3,
            ];
            for (series, figure) in series.iter_mut().zip(figures) {
                series.add(figure);
            }
        }
        let [start, rss, at_rest, with_sockets, close, pause] = series;
        println!(
            "| {protocol:?} | {start:.1} | {rss:.1} | {at_rest:.1} | {with_sockets:.1} | {close:.1} | {pause:.1} |"
        );
    }
    Ok(())
}

/// Returns how long a `close` takes, and how long other tasks of the runtime, which has one thread,
/// could not run meanwhile.
fn close(protocol: Protocol) -> anyhow::Result<(Duration, Duration)> {
    const TICK: Duration = Duration::from_millis(1);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let close: Pin<Box<dyn Future<Output = _>>> = match protocol {
            Protocol::Tcp => Box::pin(TcpTracer::builder().start().await?.close()),
            Protocol::Udp => Box::pin(UdpTracer::builder().start().await?.close()),
        };
        let began = Instant::now();
        let mut pause = Duration::ZERO;
        let ticks = async {
            loop {
                let before = Instant::now();
                tokio::time::sleep(TICK).await;
                pause = pause.max(before.elapsed().saturating_sub(TICK));
            }
        };
        let closed = match select(close, pin!(ticks)).await {
            Either::Left((closed, _)) => closed,
            Either::Right((never, _)) => never,
        };
        closed?;
        Ok((began.elapsed(), pause))
    })
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
            if matches!(subject, Subject::Nothing | Subject::Floor(..)) || subject.is_filtered() {
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
