//! Runs a test program on other kernels: QEMU boots a packaged kernel with an initramfs that has
//! little besides the program.
//!
//! Emulation is enough: a stock cloud kernel boots in seconds, and the machine needs no KVM.

mod cpio;
mod guest;
mod initramfs;
mod kernel;
mod machine;
mod modules;
mod userland;

use std::{
    fs,
    num::NonZeroUsize,
    sync::{Mutex, PoisonError},
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result};

use self::{
    guest::Ended,
    machine::{Guest, Machine},
    userland::Userland,
};
pub(crate) use self::{
    initramfs::Job,
    kernel::{KERNELS, Kernel},
    machine::machines,
};
use crate::{
    arch::Arch,
    deps,
    report::{Counts, Outcome, PATIENCE, Row},
    workspace,
};

/// Returns how many guests run at a time: one for each core. A guest has two CPUs, but the tests
/// wait more than they compute, so more cores for each would be idle.
pub(crate) fn default_jobs() -> NonZeroUsize {
    thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// Fetches the newest packages of `kernels`. If the mirror no longer has a kernel, the cached one
/// stays.
pub(crate) fn fetch(kernels: &[&Kernel], arch: &'static Arch) -> Result<()> {
    for kernel in kernels {
        let installed = kernel.fetch(arch)?;
        eprintln!("{}: {}", kernel.name_on(arch), installed.release);
    }
    Ok(())
}

/// Runs a job on each of `kernels`, `jobs` guests at a time, and returns one row for each.
///
/// If a kernel cannot run (no QEMU, no mirror), its row says why, and the others still run.
pub(crate) fn run(kernels: &[&'static Kernel], job: &Job<'_>, jobs: NonZeroUsize) -> Vec<Row> {
    run_on(kernels, &[], job, jobs)
}

/// Like [`run`], on each of `machines`, or on the usual one if there are none.
pub(crate) fn run_on(
    kernels: &[&'static Kernel],
    machines: &[&'static Machine],
    job: &Job<'_>,
    jobs: NonZeroUsize,
) -> Vec<Row> {
    let odd = machines.iter().map(|machine| Some(*machine));
    let usual = machines.is_empty().then_some(None);
    let guests: Vec<_> = odd
        .chain(usual)
        .flat_map(|machine| kernels.iter().map(move |kernel| Guest { kernel, machine }))
        .collect();
    let prepared = deps::ensure(&deps::VM)
        .and_then(|()| deps::ensure(job.arch.qemu_package))
        .and_then(|()| Userland::of(job.arch));
    let userland = match prepared {
        Ok(userland) => userland,
        Err(error) => {
            let not_run = |guest: &Guest| {
                let outcome = Outcome::NotRun(format!("{error:#}"));
                Row::new(guest.name(job.arch), outcome)
            };
            return guests.iter().map(not_run).collect();
        }
    };

    let mut queue: Vec<_> = guests.iter().enumerate().collect();
    queue.sort_by_key(|(_, guest)| guest.kernel.seconds);
    let queue = Mutex::new(queue);
    let rows = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..jobs.get().min(guests.len()) {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop();
                    let Some((index, guest)) = next else { break };
                    let row = run_one(*guest, job, &userland);
                    rows.lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push((index, row));
                }
            });
        }
    });
    let mut rows = rows.into_inner().unwrap_or_else(PoisonError::into_inner);
    rows.sort_by_key(|(index, _)| *index);
    rows.into_iter().map(|(_, row)| row).collect()
}

fn run_one(guest: Guest, job: &Job<'_>, userland: &Userland) -> Row {
    let name = guest.name(job.arch);
    let installed = match guest.kernel.cached_or_fetch(job.arch) {
        Ok(installed) => installed,
        Err(error) => return Row::new(name, Outcome::NotRun(format!("{error:#}"))),
    };
    let started = Instant::now();
    let mut row = boot_with_retry(guest, &installed, job, userland)
        .unwrap_or_else(|error| Row::new("", Outcome::Broken(format!("{error:#}"))));
    row.name = format!("{name} ({})", installed.release);
    row.elapsed = started.elapsed();
    row
}

/// The most boots of one guest. Under emulation, a guest sometimes crashes because one CPU executes
/// a breakpoint that another CPU has removed (`Oops: int3`). The kernel sets such breakpoints when
/// hooks are attached and detached.
const BOOTS: usize = 5;

/// Boots the guest. If the guest crashes, boots it again for the tests that had not ended.
///
/// The note of the row reports each crash, because the eBPF programs could be the cause as well.
fn boot_with_retry(
    guest: Guest,
    installed: &kernel::Installed,
    job: &Job<'_>,
    userland: &Userland,
) -> Result<Row> {
    let name = &*guest.name(job.arch);
    let logs = workspace::cache_dir().join("logs");
    fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
    let initrd = logs.join(format!("{name}.initramfs"));
    let log = logs.join(format!("{name}.log"));
    // A filter or a machine selects few tests, so all of them run again.
    let resumes = job.args.is_empty() && guest.machine.is_none();
    let mut args = job.args.to_vec();
    let (mut crashes, mut counts) = (Vec::new(), Counts::default());
    // The tests that failed before a crash.
    let mut failed = Vec::new();
    loop {
        fs::write(
            &initrd,
            initramfs::build(guest, installed, job, &args, userland)?,
        )
        .with_context(|| format!("cannot write {}", initrd.display()))?;
        let ended = guest::boot(job, guest, &installed.vmlinuz, &initrd, &log)?;
        // The image is large, and only the log is of use afterwards.
        fs::remove_file(&initrd).with_context(|| format!("cannot remove {}", initrd.display()))?;
        let (mut failures, mut flaky, mut programs) = (Vec::new(), Vec::new(), Vec::new());
        let outcome = match ended {
            Ended::Finished { code, output } => {
                counts += output.counts;
                failures = output.failures;
                flaky = output.flaky;
                programs = output.programs;
                for (name, count) in output.good {
                    if count.passed == 1 && failed.contains(&name) {
                        counts.passed -= 1;
                        counts.flaky += 1;
                        flaky.push(format!("{name}: failed before the guest crashed"));
                    }
                }
                match code {
                    0 => Outcome::Passed(counts),
                    _ => Outcome::Failed(counts),
                }
            }
            Ended::Crashed { cause, output } => {
                let number = crashes.len() + 1;
                let crash_log = logs.join(format!("{name}.crash{number}.log"));
                fs::rename(&log, &crash_log).context("cannot keep the log of a crashed guest")?;
                let crash = format!(
                    "crashed: {cause}; running: {}; log: {}",
                    output.running(),
                    crash_log.display()
                );
                eprintln!("[{name}] {crash}");
                crashes.push(crash.clone());
                failed.extend(output.failed);
                if number < BOOTS {
                    if resumes {
                        if args.is_empty() {
                            args.push("--exact".into());
                        }
                        for (name, count) in output.good {
                            counts += count;
                            args.extend(["--skip".into(), name.into()]);
                        }
                    }
                    continue;
                }
                Outcome::Broken(crash)
            }
            Ended::Stuck { lives, output } => Outcome::Broken(format!(
                "{}: no test began or ended for {} s; running: {}; log: {}",
                if lives { "slow" } else { "hung" },
                PATIENCE.as_secs(),
                output.running(),
                log.display()
            )),
        };
        return Ok(Row {
            note: (!crashes.is_empty()).then(|| format!("booted again: {}", crashes.join("; "))),
            failures,
            flaky,
            programs,
            ..Row::new("", outcome)
        });
    }
}
