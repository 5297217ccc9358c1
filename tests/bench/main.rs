//! Measures the cost of tracing: the same traffic without a tracer, under ours, under other tools,
//! and under programs that do nearly nothing. Run by `cargo xtask bench`, as root; prints tables in
//! Markdown.
//!
//! Each round measures every subject once, one after the other, so that other load on the machine
//! affects all of them. The tables have the medians over the rounds, and the least and the most. A
//! subject is a process of its own, so its CPU time and its memory are the kernel's own figures.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark fails by panicking, its tables go to stdout, its progress to stderr"
)]

mod child;
mod figures;
mod gate;
mod rest;
mod subject;
mod table;
mod workload;

use std::{
    env, fs,
    path::PathBuf,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use aya::sys::{Stats, enable_stats};
use integration_tests::{actor, netns::Netns};

use self::{
    figures::{Figures, Measured},
    subject::{Running, Subject},
    workload::Workload,
};

/// The options of the command line.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) quick: bool,
    gate: bool,
    rounds: usize,
    only: Option<String>,
    /// The object of the floor.
    pub(crate) floor: Option<PathBuf>,
    plot: Option<PathBuf>,
}

fn main() -> ExitCode {
    let done = match actor::run_if_asked() {
        Some(code) => return code,
        None => child::run_if_requested().unwrap_or_else(|| bench(&options()?)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> anyhow::Result<Options> {
    let mut options = Options {
        quick: false,
        gate: false,
        rounds: 5,
        only: None,
        floor: None,
        plot: None,
    };
    let mut args = env::args().skip(1);
    while let Some(flag) = args.next() {
        let mut value = || args.next().with_context(|| format!("{flag} needs a value"));
        match flag.as_str() {
            "--quick" => (options.quick, options.rounds) = (true, 1),
            "--gate" => options.gate = true,
            "--rounds" => options.rounds = value()?.parse()?,
            "--only" => options.only = Some(value()?),
            "--floor" => options.floor = Some(value()?.into()),
            "--plot" => options.plot = Some(value()?.into()),
            _ => bail!(
                "{flag}? --quick, --gate, --rounds N, --only NAME, --floor OBJECT, --plot FILE"
            ),
        }
    }
    Ok(options)
}

fn bench(options: &Options) -> anyhow::Result<()> {
    Netns::enter_new()?;
    // A setting of this namespace. Otherwise the ends of connections keep the ports for a minute,
    // and later connections search long for one.
    fs::write("/proc/sys/net/ipv4/tcp_max_tw_buckets", "1024")?;
    table::machine()?;
    if options.gate {
        return gate::run(options);
    }
    let is_selected = |name: &str| options.only.as_ref().is_none_or(|only| name.contains(only));
    let mut plotted = Vec::new();
    for workload in workload::all(options.quick) {
        if !is_selected(workload.name) {
            continue;
        }
        let subjects = subject::of(&workload, options);
        let mut figures: Vec<_> = subjects.iter().map(|_| Figures::default()).collect();
        for round in 0..options.rounds {
            let mut untraced = None;
            for (subject, figures) in subjects.iter().zip(&mut figures) {
                let measured = measure(subject, &workload, options)
                    .with_context(|| format!("{}: {}", workload.name, subject.name()))?;
                eprintln!(
                    "{} {}/{}: {}: {:.0}/s",
                    workload.name,
                    round + 1,
                    options.rounds,
                    subject.name(),
                    measured.rate
                );
                figures.add(&measured, *untraced.get_or_insert(measured.rate));
            }
        }
        table::workload(&workload, &subjects, &figures);
        if workload.events_each > 0 {
            plotted.push((workload, subjects, figures));
        }
    }
    if let Some(path) = &options.plot {
        fs::write(path, table::svg(&plotted)).with_context(|| path.display().to_string())?;
    }
    if is_selected("drain") {
        rest::drain(options)?;
    }
    if is_selected("latency") {
        rest::latency(options)?;
    }
    if is_selected("memory") {
        rest::memory(options)?;
    }
    if is_selected("idle") {
        rest::idle(options)?;
    }
    Ok(())
}

/// Makes one run of a workload under one subject: first the rate, then, with less traffic, the
/// times of each program by the kernel's clock.
///
/// The two are apart because that clock costs about as much as an empty program.
fn measure(subject: &Subject, workload: &Workload, options: &Options) -> anyhow::Result<Measured> {
    let field = workload.prepare()?;
    let mut running = Running::start(subject, workload.is_pinned, options)?;
    let before = running.cpu()?;
    let took = field.run(workload.units)?;
    let units = workload.units as f64;
    let rate = units / took.as_secs_f64();
    running.settle()?;
    let cpu = running.cpu()?.since(&before);

    let programs = {
        let _clock = enable_stats(Stats::RunTime).context("bpf_stats")?;
        let before = running.programs()?;
        field.run(workload.timed_units())?;
        running.settle()?;
        running.programs()?.since(&before)
    };
    let events = (workload.events_each as f64 * units).max(1.0);
    let timed_events = (workload.timed_units() * workload.events_each.max(1)) as f64;
    let ready = running.ready;
    let rss_kb = running.peak_rss_kb()?;
    let report = running.stop(field.port)?;
    let truth = subject.truth(workload) * (workload.units + workload.timed_units());
    Ok(Measured {
        rate,
        ns_per_event: programs.run_time.as_nanos() as f64 / timed_events,
        runs_per_event: programs.runs as f64 / timed_events,
        cpu_us_per_event: cpu.total.as_secs_f64() * 1e6 / events,
        user_us_per_event: cpu.user.as_secs_f64() * 1e6 / events,
        rss_kb,
        ready,
        start: report.start,
        seen: report
            .seen
            .filter(|_| truth > 0)
            .map(|seen| seen as f64 / truth as f64),
        lost: report.lost,
    })
}

/// Waits until a value no longer changes; at most for 10 s.
pub(crate) fn until_still<T: PartialEq>(
    every: Duration,
    mut look: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut last = look()?;
    loop {
        thread::sleep(every);
        let now = look()?;
        if now == last || Instant::now() > deadline {
            return Ok(now);
        }
        last = now;
    }
}
