//! `cargo xtask soak`: runs all kinds of load at once for long, or opens very many sockets, and
//! checks the sums.

use std::process::Command;

use anyhow::Result;

use crate::{deps, process, workspace};

/// Make connections, floods of datagrams, changes of filters, starts and stops of tracers, and
/// check that all events are accounted for.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long to run.
    #[arg(long, default_value_t = 20)]
    minutes: u64,
    /// Instead, open and close this many sockets under both tracers.
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
    let (mode, count) = match args.sockets {
        Some(sockets) => ("sockets", sockets),
        None => ("minutes", args.minutes),
    };
    process::run(process::as_root(program).args([mode, &count.to_string()]))
}
