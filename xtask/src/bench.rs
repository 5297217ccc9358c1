//! `cargo xtask bench`: measures the cost of tracing, of other tools, and of a program that does
//! only the least.

use std::{ffi::OsString, num::NonZeroUsize, path::PathBuf, process::Command};

use anyhow::Result;

use crate::{
    arch::Arch,
    deps, ebpf, process, report, test, vm,
    workspace::{self, LIBRARY},
};

/// Measure the cost of no tracer, of ours, of other tools if they are installed, and of the floor.
/// Prints tables in Markdown.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// One round with little traffic, to check that the benchmark works. Takes under a minute.
    #[arg(long)]
    quick: bool,
    /// How many rounds; each measures everything once.
    #[arg(long)]
    rounds: Option<usize>,
    /// Only workloads with this in their name.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Draw the rates that were sustained.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// On these kernels in emulated VMs, one after the other: `6.12,7.2`, or `all`. Little traffic;
    /// only the ratios are meaningful.
    #[arg(
        long,
        value_name = "KERNELS",
        value_delimiter = ',',
        conflicts_with = "plot"
    )]
    vm: Vec<String>,
    /// The number of emulated CPUs, each on a thread of its own.
    #[arg(long, value_name = "N", requires = "vm")]
    cpus: Option<u32>,
    /// Run the micro-benchmarks of decoding and of the queue.
    #[arg(long, conflicts_with_all = ["vm", "plot", "quick", "rounds"])]
    micro: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.micro {
        return micro(args.only.as_deref());
    }
    deps::ensure(&deps::TESTS)?;
    let floor = ebpf::floor();
    let floor = floor.inspect_err(|error| eprintln!("skipping the floor: {error:#}"));
    let floor = floor.ok();
    let program = build()?;
    let mut options: Vec<OsString> = Vec::new();
    if args.quick || !args.vm.is_empty() {
        options.push("--quick".into());
    }
    if let Some(rounds) = args.rounds {
        options.extend(["--rounds".into(), rounds.to_string().into()]);
    }
    if let Some(only) = &args.only {
        options.extend(["--only".into(), only.into()]);
    }
    if let Some(plot) = &args.plot {
        options.extend(["--plot".into(), plot.into()]);
    }
    if args.vm.is_empty() {
        if let Some(object) = floor {
            options.extend(["--floor".into(), object.into()]);
        }
        return process::run(process::as_root(program).args(options));
    }
    let files: Vec<_> = floor
        .iter()
        .map(|path| (path.as_path(), FLOOR_IN_GUEST))
        .collect();
    if floor.is_some() {
        options.extend(["--floor".into(), FLOOR_IN_GUEST.into()]);
    }
    let cpus = args.cpus.map(|cpus| cpus.to_string());
    let qemu = cpus
        .as_ref()
        .map(|cpus| ["-smp", cpus, "-accel", "tcg,thread=multi"]);
    let job = vm::Job {
        arch: Arch::host()?,
        program: &program,
        args: &options,
        only_default_tests: false,
        parameters: "",
        files: &files,
        qemu: qemu.as_ref().map_or(&[], |options| &options[..]),
    };
    let kernels = test::kernels(&args.vm, false)?;
    if !report::print(&vm::run(&kernels, &job, NonZeroUsize::MIN)) {
        std::process::exit(1);
    }
    Ok(())
}

/// Builds the program that measures, and returns where it is.
pub(crate) fn build() -> Result<PathBuf> {
    process::run(
        Command::new(workspace::cargo())
            .current_dir(workspace::root())
            .args(["build", "--release", "--package", "integration-tests"])
            .args(["--bin", "bench"]),
    )?;
    Ok(workspace::target_dir().join("release/bench"))
}

const FLOOR_IN_GUEST: &str = "/tests/floor.o";

/// Runs the micro-benchmarks. `cfg(micro_bench)` makes private items of the library visible to
/// them.
fn micro(only: Option<&str>) -> Result<()> {
    process::run(
        Command::new(workspace::cargo())
            .current_dir(workspace::root())
            .env("RUSTFLAGS", "--cfg micro_bench")
            .args(["bench", "--package", LIBRARY, "--bench", "micro"])
            .arg("--target-dir")
            .arg(workspace::target_dir().join("micro"))
            .args(only),
    )
}
