//! Counts the instructions of our programs, in a guest whose clock counts instructions.
//!
//! `cargo xtask gate` starts such a guest and reads the lines that [`run`] prints.

use std::collections::BTreeMap;

use anyhow::Context as _;
use aya::{
    programs::loaded_programs,
    sys::{Stats, enable_stats},
};

use crate::{
    Options,
    subject::{Protocol, Running, Subject},
    workload::{self, Workload},
};

/// Prints a line for each program that ran: the event whose cost it adds to, its name, instructions
/// per event, runs per event, and the number of instructions that the verifier processed.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    for (workload, setup) in workload::of_gate() {
        let events = (workload.units * workload.events_each) as f64;
        for (name, program) in measure(&workload, setup, options)? {
            println!(
                "@@program {}_{} {name} {:.2} {:.3} {}",
                workload.name,
                event(workload.protocol, &name),
                program.instructions as f64 / events,
                program.runs as f64 / events,
                program.verified,
            );
        }
    }
    Ok(())
}

/// Returns the kind of event whose cost a program adds to.
fn event(protocol: Protocol, program: &str) -> &'static str {
    let receives = program.starts_with("udp_consume") || program.starts_with("udp_recv");
    match protocol {
        Protocol::Tcp => "state_event",
        Protocol::Udp if receives => "receive",
        Protocol::Udp => "send",
    }
}

#[derive(Debug, Default)]
struct Program {
    instructions: u64,
    runs: u64,
    verified: u32,
}

/// Runs a workload under our tracer with these settings, and returns the programs that ran, by
/// name.
fn measure(
    workload: &Workload,
    setup: &'static str,
    options: &Options,
) -> anyhow::Result<BTreeMap<String, Program>> {
    let field = workload.prepare()?;
    let mut running = Running::start(&Subject::Ours(setup), workload.is_pinned, options)?;
    let clock = enable_stats(Stats::RunTime).context("bpf_stats")?;
    field.run(workload.units)?;
    running.settle()?;
    drop(clock);
    let mut programs = BTreeMap::<_, Program>::new();
    for info in loaded_programs() {
        let info = info?;
        if info.run_count() > 0 {
            let name = info.name_as_str().context("a program without a name")?;
            let program = programs.entry(name.to_owned()).or_default();
            // The guest's clock advances by one nanosecond with each instruction.
            program.instructions += u64::try_from(info.run_time().as_nanos())?;
            program.runs += info.run_count();
            program.verified += info.verified_instruction_count().unwrap_or(0);
        }
    }
    Ok(programs)
}
