//! `cargo xtask miri`: the library's unit tests, in an interpreter that notices undefined behaviour.
//!
//! The library has no unsafe code, but what it gives bytes of others to has. What asks the kernel cannot run there, and of the fuzzers' seeds it
//! gets only the seeds themselves: it is a hundred times slower than the machine.

use anyhow::{Context as _, Result};

use crate::{
    process,
    workspace::{self, LIBRARY},
};

/// Run the unit tests of what does no I/O under Miri. Needs a nightly compiler.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only tests whose names contain this.
    filter: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    process::stdout(process::nightly("cargo").args(["miri", "--version"])).context(
        "no Miri: `rustup toolchain install nightly --component miri --component rust-src`",
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
