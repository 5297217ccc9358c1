//! `cargo xtask miri`: runs the library's unit tests in an interpreter that finds undefined
//! behaviour.
//!
//! The library has no unsafe code, but it gives untrusted bytes to dependencies that have some.
//! Tests that make system calls cannot run there. Of the fuzzers' inputs only the seeds run,
//! because Miri is a hundred times slower than the machine.

use anyhow::{Context as _, Result};

use crate::{
    process,
    workspace::{self, LIBRARY},
};

/// Run the unit tests that do no I/O under Miri. Needs a nightly compiler.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only tests whose names contain this.
    filter: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    process::stdout(process::nightly("cargo").args(["miri", "--version"])).context(
        "Miri is missing: `rustup toolchain install nightly --component miri --component rust-src`",
    )?;
    process::run(
        process::nightly("cargo")
            .current_dir(workspace::root())
            .args(["miri", "test", "--package", LIBRARY, "--lib", "--"])
            .args(&args.filter)
            // The seeds are files.
            .env("MIRIFLAGS", "-Zmiri-disable-isolation"),
    )
}
