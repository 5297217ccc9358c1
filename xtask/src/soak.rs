//! `cargo xtask soak`: runs all kinds of load at once for long, or opens very many sockets, and
//! checks the sums.

use std::{ffi::OsString, num::NonZeroUsize, process::Command};

use anyhow::Result;

use crate::{arch::Arch, deps, process, report, test, vm, workspace};

/// Make connections, floods of datagrams, changes of filters, starts and stops of tracers, network
/// namespaces and killed processes, and check that all events are accounted for.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long to run.
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    /// Instead, open and close this many sockets under both tracers.
    #[arg(long, value_name = "N")]
    sockets: Option<u64>,
    /// Run on these kernels in VMs, one after the other: `7.2`, or `all`. There, a CPU also goes
    /// offline and comes back.
    #[arg(long, value_name = "KERNELS", value_delimiter = ',')]
    vm: Vec<String>,
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
    let options = [mode.to_owned(), count.to_string()];
    if args.vm.is_empty() {
        return process::run(process::as_root(program).args(options));
    }
    let job = vm::Job {
        arch: Arch::host()?,
        program: &program,
        args: &options.map(OsString::from),
        only_default_tests: false,
        parameters: "mitigations=off",
        files: &[],
        qemu: &[],
    };
    let kernels = test::kernels(&args.vm, false)?;
    if !report::print(&vm::run(&kernels, &job, NonZeroUsize::MIN)) {
        std::process::exit(1);
    }
    Ok(())
}
