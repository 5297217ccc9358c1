//! `cargo xtask bench`: what tracing costs, beside other tools and beside the least that it could cost.

use std::{ffi::OsString, num::NonZeroUsize, path::PathBuf, process::Command};

use anyhow::Result;

use crate::{arch::Arch, deps, ebpf, process, test, vm, workspace};

/// Measure what tracing costs: no tracer, ours, other tools if they are installed, and the floor. Prints tables in Markdown.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// One round, little traffic: under a minute, to see that it works.
    #[arg(long)]
    quick: bool,
    /// How many rounds; each measures everything once.
    #[arg(long)]
    rounds: Option<usize>,
    /// Only workloads with this in their name.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Draw the rates that were kept.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// On these kernels in emulated VMs, one after the other: `6.12,7.2`, or `all`. Little traffic; only the ratios tell something.
    #[arg(
        long,
        value_name = "KERNELS",
        value_delimiter = ',',
        conflicts_with = "plot"
    )]
    vm: Vec<String>,
    /// The micro-benchmarks of decoding and of the queue.
    #[arg(long, conflicts_with_all = ["vm", "plot", "quick", "rounds"])]
    micro: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.micro {
        return micro(args.only.as_deref());
    }
    deps::ensure(&deps::TESTS)?;
    let floor = ebpf::floor();
    let floor = floor.inspect_err(|error| eprintln!("without the floor: {error:#}"));
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
    let job = vm::Job {
        arch: Arch::host()?,
        program: &program,
        args: &options,
        files: &files,
        qemu: &[],
    };
    let kernels = test::kernels(&args.vm, false)?;
    if !test::report::print(&vm::run(&kernels, &job, NonZeroUsize::MIN)) {
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

/// They see what is private of the library, which is made visible for them only, as it is for the fuzzers.
fn micro(only: Option<&str>) -> Result<()> {
    process::run(
        Command::new(workspace::cargo())
            .current_dir(workspace::root())
            .env("RUSTFLAGS", "--cfg micro_bench")
            .args(["bench", "--package", "tcp-udp-trace", "--bench", "micro"])
            .arg("--target-dir")
            .arg(workspace::target_dir().join("micro"))
            .args(only),
    )
}
