//! `cargo xtask gate`: compares the number of instructions per event with the committed numbers.
//!
//! QEMU advances the clock of the guest by one nanosecond with each instruction. The run time that
//! the kernel keeps for each program (`bpf_stats`) is then a number of instructions, which depends
//! neither on the machine nor on its load. It includes the two reads of the clock for each run.

use std::{collections::BTreeMap, ffi::OsString, fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    arch::Arch,
    bench,
    report::{self, Outcome},
    test, vm, workspace,
};

/// Compare the number of kernel instructions per event with the committed numbers.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Write the measured numbers to the file of committed numbers.
    #[arg(long)]
    bless: bool,
    /// On these kernels in emulated VMs: `6.12,7.2`, or `all`.
    #[arg(
        long,
        value_name = "KERNELS",
        value_delimiter = ',',
        default_value = "6.12"
    )]
    vm: Vec<String>,
}

const FILE: &str = "tcp-udp-trace-ebpf/cost.json";

/// The growth that fails, in percent. It leaves room for updates within a kernel series.
const TOLERANCE: f64 = 10.0;

/// One CPU whose clock counts instructions, and which skips idle time.
const QEMU: &[&str] = &["-smp", "1", "-icount", "shift=0,sleep=off"];

/// Instructions per event by name, of each kernel.
type Costs = BTreeMap<String, BTreeMap<String, f64>>;

pub(crate) fn run(args: &Args) -> Result<()> {
    let kernels = test::kernels(&args.vm, false)?;
    let arch = Arch::host()?;
    ensure!(
        arch.to_string() == "x86_64",
        "the committed numbers are for x86_64"
    );
    let program = bench::build()?;
    let job = vm::Job {
        arch,
        program: &program,
        args: &[OsString::from("--gate")],
        only_default_tests: false,
        parameters: "",
        files: &[],
        qemu: QEMU,
    };
    let rows = vm::run(&kernels, &job, vm::default_jobs());
    let all_ran = rows
        .iter()
        .all(|row| matches!(row.outcome, Outcome::Passed(_)));
    if !all_ran {
        report::print(&rows);
        bail!("the instructions were not counted on each kernel");
    }
    let mut measured = Costs::new();
    for (kernel, row) in kernels.iter().zip(&rows) {
        println!("\n{}:\n{}", row.name, table(&row.programs));
        let costs = costs(&row.programs)?;
        ensure!(!costs.is_empty(), "{}: no program ran", kernel.name);
        measured.insert(kernel.name.to_owned(), costs);
    }

    let path = workspace::root().join(FILE);
    if args.bless {
        // Kernels that were not measured keep their numbers.
        let mut committed = if path.exists() {
            read(&path)?
        } else {
            Costs::new()
        };
        committed.extend(measured);
        fs::write(&path, write(&committed)?).with_context(|| path.display().to_string())?;
        eprintln!("wrote {FILE}");
        return Ok(());
    }
    let (lines, failures) = compare(&read(&path)?, &measured);
    print!("{lines}");
    ensure!(
        failures.is_empty(),
        "{}\nIf that is on purpose: `cargo xtask gate --bless`, and commit {FILE}",
        failures.join("\n")
    );
    Ok(())
}

/// Splits the line of each program into its fields.
fn fields(programs: &[String]) -> impl Iterator<Item = Vec<&str>> {
    programs
        .iter()
        .map(|program| program.split_whitespace().collect())
}

fn table(programs: &[String]) -> String {
    let mut table = format!(
        "{:26} {:16} {:>12} {:>8} {:>10}\n",
        "event", "program", "instructions", "runs", "verified"
    );
    for fields in fields(programs) {
        if let [event, program, instructions, runs, verified] = *fields {
            let _ = writeln!(
                table,
                "{event:26} {program:16} {instructions:>12} {runs:>8} {verified:>10}"
            );
        }
    }
    table
}

/// Adds up what the programs cost for each event.
fn costs(programs: &[String]) -> Result<BTreeMap<String, f64>> {
    let mut costs = BTreeMap::new();
    for fields in fields(programs) {
        let [event, _, instructions, ..] = *fields else {
            bail!("an incomplete line of a program: {fields:?}");
        };
        *costs.entry(event.to_owned()).or_insert(0.0) += instructions.parse::<f64>()?;
    }
    Ok(costs)
}

/// Returns a line for each number, and one for each that grew too much or is on one side only.
fn compare(committed: &Costs, measured: &Costs) -> (String, Vec<String>) {
    let (mut lines, mut failures) = (String::new(), Vec::new());
    for (kernel, after) in measured {
        let Some(before) = committed.get(kernel) else {
            let _ = writeln!(lines, "{kernel}: no committed numbers");
            continue;
        };
        for event in before.keys().filter(|event| !after.contains_key(*event)) {
            failures.push(format!("{kernel}: {event}: no program ran"));
        }
        for (event, after) in after {
            let Some(before) = before.get(event) else {
                failures.push(format!("{kernel}: {event}: no committed number"));
                continue;
            };
            let percent = 100.0 * (after / before - 1.0);
            let line = format!(
                "{kernel}: {event}: {before:.0} instructions before, {after:.0} now: {percent:+.1} %"
            );
            let _ = writeln!(lines, "{line}");
            if percent > TOLERANCE {
                failures.push(format!("{line}, more than {TOLERANCE} %"));
            }
        }
    }
    (lines, failures)
}

fn read(path: &Path) -> Result<Costs> {
    let text = fs::read_to_string(path)
        .with_context(|| format!("cannot read {FILE}: `cargo xtask gate --bless` writes it"))?;
    parse(&text).with_context(|| format!("{FILE} is not as `cargo xtask gate --bless` writes it"))
}

fn parse(text: &str) -> Result<Costs> {
    Ok(serde_json::from_str(text)?)
}

/// Rounds the numbers, and returns the text of the file.
fn write(costs: &Costs) -> Result<String> {
    let mut costs = costs.clone();
    for number in costs.values_mut().flat_map(BTreeMap::values_mut) {
        *number = number.round();
    }
    Ok(serde_json::to_string_pretty(&costs)? + "\n")
}

#[cfg(test)]
mod tests {
    use super::{Costs, compare, costs, parse, write};

    fn measured() -> Costs {
        let programs = [
            "send a 100.50 1.000 5",
            "send b 9.50 0.100 5",
            "receive c 50.00 1.000 5",
        ];
        let costs = costs(&programs.map(str::to_owned)).unwrap();
        Costs::from([("6.12".to_owned(), costs)])
    }

    #[test]
    fn programs_of_an_event_are_added_up() {
        let [(_, costs)] = <[_; 1]>::try_from(measured().into_iter().collect::<Vec<_>>()).unwrap();
        let costs: Vec<_> = costs.iter().map(|(name, cost)| (&**name, *cost)).collect();
        assert_eq!(costs, [("receive", 50.0), ("send", 110.0)]);
    }

    #[test]
    fn the_file_is_read_as_it_was_written() {
        assert_eq!(parse(&write(&measured()).unwrap()).unwrap(), measured());
    }

    #[test]
    fn growth_fails_beyond_the_tolerance_only() {
        let failures = |file: &str| compare(&parse(file).unwrap(), &measured()).1;
        let none: [&str; 0] = [];
        assert_eq!(failures(r#"{"6.12": {"receive": 46, "send": 300}}"#), none);
        assert_eq!(failures(r#"{"7.2": {"receive": 1}}"#), none);
        assert_eq!(
            failures(r#"{"6.12": {"receive": 45, "send": 110}}"#),
            ["6.12: receive: 45 instructions before, 50 now: +11.1 %, more than 10 %"]
        );
        assert_eq!(
            failures(r#"{"6.12": {"connect": 1, "receive": 50}}"#),
            [
                "6.12: connect: no program ran",
                "6.12: send: no committed number"
            ]
        );
    }
}
