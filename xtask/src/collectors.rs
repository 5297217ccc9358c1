//! `cargo xtask collectors`: tests the command with real collectors, and the queries of the page.

use std::{path::PathBuf, process::Command};

use anyhow::Result;

use crate::{deps, process, test, workspace};

/// Test `prometheus` with Prometheus, `otlp` with the collector Rotel, and docs/queries.md with
/// DuckDB, as root.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only tests whose names contain this.
    #[arg(default_value = "collectors::")]
    filter: String,
}

/// The Python packages. Rotel, which its package calls a pre-release, has its agent in it.
const PACKAGES: &[&str] = &["rotel==0.0.1a15", "duckdb==2.0.1"];
/// The variable that the tests read.
const VARIABLE: &str = "TUT_COLLECTORS";

pub(crate) fn run(args: &Args) -> Result<()> {
    deps::ensure(&deps::COLLECTORS)?;
    test::command(&args.filter, VARIABLE, &environment()?)
}

/// Makes a Python environment with the packages in the cache, and returns its folder.
fn environment() -> Result<PathBuf> {
    let folder = workspace::cache_dir().join("collectors");
    let python = folder.join("bin/python");
    if !python.exists() {
        process::run(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
    }
    let mut pip = Command::new(python);
    // This does nothing if they are installed.
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ])
    .args(PACKAGES);
    process::run(&mut pip)?;
    Ok(folder)
}
