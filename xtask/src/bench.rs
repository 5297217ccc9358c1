//! `cargo xtask bench`: what tracing costs, beside other tools and beside the least that it could cost.

use std::{path::PathBuf, process::Command};

use anyhow::Result;

use crate::{deps, ebpf, process, workspace};

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
}

pub(crate) fn run(args: &Args) -> Result<()> {
    deps::ensure(&deps::TESTS)?;
    let floor = ebpf::floor();
    process::run(
        Command::new(workspace::cargo())
            .current_dir(workspace::root())
            .args(["build", "--release", "--package", "integration-tests"])
            .args(["--bin", "bench"]),
    )?;
    let mut bench = process::as_root(workspace::target_dir().join("release/bench"));
    match floor {
        Ok(object) => {
            bench.arg("--floor").arg(object);
        }
        Err(error) => eprintln!("without the floor: {error:#}"),
    }
    if args.quick {
        bench.arg("--quick");
    }
    if let Some(rounds) = args.rounds {
        bench.args(["--rounds", &rounds.to_string()]);
    }
    if let Some(only) = &args.only {
        bench.args(["--only", only]);
    }
    if let Some(plot) = &args.plot {
        bench.arg("--plot").arg(plot);
    }
    process::run(&mut bench)
}
