//! `cargo xtask miri`: the library's unit tests, in an interpreter that notices undefined behaviour.
//!
//! The library has no unsafe code, but what it gives bytes of others to has. What asks the kernel cannot run there, and says so.

use anyhow::{Context as _, Result};

use crate::process;

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
            .current_dir(crate::workspace::root())
            .args(["miri", "test", "--package", "tcp-udp-trace", "--lib", "--"])
            .args(&args.filter),
    )
}
