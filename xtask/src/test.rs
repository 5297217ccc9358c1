//! `cargo xtask test`: unit tests, then the integration tests on the kernel that runs here and on others in VMs.

pub(crate) mod report;
mod suite;

use std::{ffi::OsString, num::NonZeroUsize, time::Duration};

use anyhow::{Context as _, Result};

use self::report::Row;
use crate::{
    deps,
    vm::{self, KERNELS, Kernel},
};

/// How long the integration tests may take on one kernel.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(25 * 60);

/// Run the tests: all of them, or those that options name.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The unit and documentation tests.
    #[arg(long)]
    unit: bool,
    /// The integration tests and those of the examples on the kernel that runs here, as root.
    #[arg(long)]
    local: bool,
    /// The integration tests on these kernels in VMs: `5.10,6.1`, or `all`.
    #[arg(long, value_name = "KERNELS", value_delimiter = ',')]
    vm: Vec<String>,
    /// Only bring the cached kernels up to date.
    #[arg(long)]
    fetch_only: bool,
    /// How many VMs at a time; one for each core, unless given.
    #[arg(long, env = "XTASK_JOBS")]
    jobs: Option<NonZeroUsize>,
    /// Only tests whose names contain this.
    filter: Option<String>,
    /// Further arguments of the integration test program, such as `--test-threads 1`.
    #[arg(last = true)]
    rest: Vec<OsString>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let everything = !args.unit && !args.local && args.vm.is_empty();
    let kernels = kernels(&args.vm, everything)?;
    if args.fetch_only {
        let all: Vec<_> = KERNELS.iter().collect();
        return vm::fetch(if kernels.is_empty() { &all } else { &kernels });
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
    let program = suite::build(&suite::INTEGRATION)?;
    let program_args: Vec<OsString> = args
        .filter
        .iter()
        .map(OsString::from)
        .chain(args.rest.iter().cloned())
        .collect();

    let mut rows = Vec::new();
    if args.local || everything {
        let examples = suite::build(&suite::EXAMPLES)?;
        rows.push(suite::local(&program, &program_args)?);
        rows.push(suite::run("examples", &examples, &program_args)?);
    }
    // After the local run, not beside it: the tests measure time.
    let jobs = args.jobs.unwrap_or_else(vm::default_jobs);
    let job = vm::Job {
        program: &program,
        args: &program_args,
        files: &[],
    };
    rows.extend(vm::run(kernels, &job, jobs));
    Ok(rows)
}

/// The kernels that `names` select from the table.
pub(crate) fn kernels(names: &[String], everything: bool) -> Result<Vec<&'static Kernel>> {
    if everything || names.iter().any(|name| name == "all") {
        return Ok(KERNELS.iter().collect());
    }
    names
        .iter()
        .map(|name| {
            KERNELS
                .iter()
                .find(|kernel| kernel.name == name)
                .with_context(|| {
                    let known: Vec<_> = KERNELS.iter().map(|kernel| kernel.name).collect();
                    format!(
                        "no kernel {name:?}: there are {}, and `all`",
                        known.join(", ")
                    )
                })
        })
        .collect()
}
