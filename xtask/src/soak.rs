//! `cargo xtask soak`: everything at once for long, or very many sockets; the figures, and whether they add up.

use std::process::Command;

use anyhow::Result;

use crate::{deps, process, workspace};

/// Let connections churn, datagrams flood, filters change, tracers start and stop, and check that it all adds up.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// For so long.
    #[arg(long, default_value_t = 20)]
    minutes: u64,
    /// Instead of that: so many sockets, opened and closed under both tracers.
    #[arg(long, value_name = "N")]
    sockets: Option<u64>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    deps::ensure(&deps::TESTS)?;
    process::run(
        Command::new(workspace::cargo())
            .current_dir(workspace::root())
            .args(["build", "--release", "--package", "integration-tests"])
            .args(["--bin", "soak"]),
    )?;
    let program = workspace::target_dir().join("release/soak");
    let (what, count) = match args.sockets {
        Some(sockets) => ("sockets", sockets),
        None => ("minutes", args.minutes),
    };
    process::run(process::as_root(program).args([what, &count.to_string()]))
}
