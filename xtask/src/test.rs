//! `cargo xtask test`: runs the unit tests, then the integration tests on this kernel and on others
//! in VMs.

mod cross;
mod suite;

use std::{ffi::OsString, num::NonZeroUsize, path::Path};

use anyhow::{Result, ensure};

use crate::{
    arch::Arch,
    deps,
    report::{self, Row},
    vm::{self, KERNELS, Kernel},
};

/// Run the tests: all of them, or those that the options name.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run the unit and documentation tests.
    #[arg(long)]
    unit: bool,
    /// Run the integration tests and those of the command on this kernel, as root.
    #[arg(long)]
    local: bool,
    /// Run the integration tests on these kernels in VMs: `5.10,6.1`, or `all`. `extra` names
    /// real-time kernels and the newest one, which `all` leaves out.
    #[arg(long, value_name = "KERNELS", value_delimiter = ',')]
    vm: Vec<String>,
    /// Run a few integration tests on odd machines (xtask/src/vm/machine.rs): `one-cpu,small`, or
    /// `all`. The kernel is 6.12 unless `--vm` names others.
    #[arg(long, value_name = "MACHINES", value_delimiter = ',', conflicts_with_all = ["unit", "local"])]
    machine: Vec<String>,
    /// Run the integration tests on kernels of this architecture, `aarch64` or `x86_64`, in VMs.
    /// The kernel is 6.12 unless `--vm` names others.
    #[arg(long, value_parser = Arch::named, conflicts_with_all = ["unit", "local"])]
    arch: Option<&'static Arch>,
    /// In a VM, run all tests, and not only those that the kernel has by default (docs/tests.md).
    #[arg(long)]
    all: bool,
    /// Only update the cached kernels.
    #[arg(long)]
    fetch_only: bool,
    /// How many VMs run at a time. The default is one for each core.
    #[arg(long, env = "XTASK_JOBS")]
    jobs: Option<NonZeroUsize>,
    /// Run only tests whose names contain this.
    filter: Option<String>,
    /// Further arguments of the integration test program, such as `--test-threads 1`.
    #[arg(last = true)]
    rest: Vec<OsString>,
}

impl Args {
    fn arch(&self) -> Result<&'static Arch> {
        self.arch.map_or_else(Arch::host, Ok)
    }
}

/// The kernel for `--arch` or `--machine` without `--vm`. One is enough, because the differences
/// between architectures, or between machines, are almost the same on all kernels.
const ONE_KERNEL: &str = "6.12";

pub(crate) fn run(args: &Args) -> Result<()> {
    let has_one_kernel = args.arch.is_some() || !args.machine.is_empty();
    let everything = !args.unit && !args.local && args.vm.is_empty() && !has_one_kernel;
    let kernels = if has_one_kernel && args.vm.is_empty() {
        kernels(&[ONE_KERNEL.to_owned()], false)?
    } else {
        kernels(&args.vm, everything)?
    };
    if args.fetch_only {
        let all: Vec<_> = KERNELS.iter().collect();
        return vm::fetch(
            if kernels.is_empty() { &all } else { &kernels },
            args.arch()?,
        );
    }

    let mut rows = Vec::new();
    if args.unit || everything {
        rows.push(suite::unit(args.filter.as_deref())?);
    }
    if args.local || everything || !kernels.is_empty() {
        rows.extend(integration(args, everything, &kernels)?);
    }
    if !report::print(&rows) {
        std::process::exit(1);
    }
    Ok(())
}

fn integration(args: &Args, everything: bool, kernels: &[&'static Kernel]) -> Result<Vec<Row>> {
    deps::ensure(&deps::TESTS)?;
    let arch = args.arch()?;
    let program = suite::build(&suite::INTEGRATION, arch)?;
    let program_args: Vec<OsString> = args
        .filter
        .iter()
        .map(OsString::from)
        .chain(args.rest.iter().cloned())
        .collect();

    let mut rows = Vec::new();
    if args.local || everything {
        let cli = suite::build(&suite::CLI, arch)?;
        rows.push(suite::local(&program, &program_args)?);
        rows.push(suite::run("command", &cli, &program_args)?);
    }
    // The guests start after the local run has ended, because the tests measure time.
    let jobs = args.jobs.unwrap_or_else(vm::default_jobs);
    let machines = vm::machines(&args.machine)?;
    let job = vm::Job {
        arch,
        program: &program,
        args: &program_args,
        // The mitigations of faults of CPUs cost a fifth of the time under emulation.
        parameters: "mitigations=off",
        // The table is for the kernels of this architecture.
        only_default_tests: !args.all && args.filter.is_none() && arch.is_host(),
        files: &[],
        qemu: &[],
    };
    rows.extend(vm::run_on(kernels, &machines, &job, jobs));
    Ok(rows)
}

/// Runs the tests of the command that have `filter` in their names, with this variable set.
pub(crate) fn command(filter: &str, variable: &str, value: &Path) -> Result<()> {
    deps::ensure(&deps::TESTS)?;
    let program = suite::build(&suite::CLI, Arch::host()?)?;
    let mut env = OsString::from(format!("{variable}="));
    env.push(value);
    let args = [env, program.into(), filter.into()];
    let row = suite::run(filter, Path::new("env"), &args)?;
    ensure!(report::print(&[row]), "a test of {filter} failed");
    Ok(())
}

/// Returns the kernels of the table that `names` selects. Everything means `all`.
pub(crate) fn kernels(names: &[String], everything: bool) -> Result<Vec<&'static Kernel>> {
    let has = |group: &str| names.iter().any(|name| name == group);
    let (all, extra) = (everything || has("all"), has("extra"));
    let is_of_group = |kernel: &Kernel| if kernel.is_extra { extra } else { all };
    let is_group = |name: &str| name == "all" || name == "extra";
    for name in names.iter().filter(|name| !is_group(name)) {
        let known: Vec<_> = KERNELS.iter().map(|kernel| kernel.name).collect();
        ensure!(
            known.contains(&&**name),
            "unknown kernel {name:?}: choose from {}, or `all`, or `extra`",
            known.join(", ")
        );
    }
    let is_selected = |kernel: &&Kernel| is_of_group(kernel) || has(kernel.name);
    Ok(KERNELS.iter().filter(is_selected).collect())
}
