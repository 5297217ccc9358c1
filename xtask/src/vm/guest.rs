//! One boot of one guest: starts QEMU, and reads on its console how the tests or the guest end.

use std::{
    fs::File,
    io::Write as _,
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::RecvTimeoutError,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{initramfs::Job, machine::Guest};
use crate::{
    process,
    report::{Output, PATIENCE},
};

/// How long a guest may take until the tests begin. On an idle machine it takes about three
/// seconds.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);

/// How old the last [`ALIVE`] of a guest may be. The guest writes one every 30 seconds.
const ALIVE_TIMEOUT: Duration = Duration::from_secs(60);

/// How long QEMU may take to exit after the tests have ended.
const POWEROFF_TIMEOUT: Duration = Duration::from_secs(10);

const BEGIN: &str = "@@begin";
const END: &str = "@@end ";
const ALIVE: &str = "@@alive";

/// Messages that the kernel writes when it crashes.
const CRASH_SIGNS: &[&str] = &[
    "Kernel panic",
    "BUG:",
    "Oops",
    "general protection fault",
    "kernel BUG at",
];

/// One thread of the host emulates all CPUs in turn. With one thread for each CPU, two guests on
/// two cores take a third longer, and the kernel sometimes crashes when it changes its own code.
const EMULATION: &[&str] = &["-accel", "tcg,thread=single"];

/// The guest's hardware, whatever its architecture.
const HARDWARE: &[&str] = &[
    "-smp",
    "2",
    "-m",
    "2048",
    "-display",
    "none",
    "-monitor",
    "none",
    "-serial",
    "stdio",
    "-nic",
    "none",
    "-no-reboot",
];

/// The kernel's parameters. An oops becomes a panic, and a panic ends QEMU, so that a crash is
/// found at once and not by a timeout.
const PARAMETERS: &str = "quiet oops=panic softlockup_panic=1 panic=-1 tut_vm";

/// How a boot ended.
pub(super) enum Ended {
    /// The test program ended, with this exit code.
    Finished { code: i32, output: Output },
    /// The kernel crashed, or the tests never began. With the output of the tests until then.
    Crashed { cause: String, output: Output },
    /// The tests began, and then made no progress for [`PATIENCE`]. The guest itself may live on.
    Stuck { lives: bool, output: Output },
}

/// Boots a guest and waits for its end.
///
/// Copies the console to `log`, and the output of the tests also to standard output, each line
/// after the guest's name.
pub(super) fn boot(
    job: &Job<'_>,
    guest: Guest,
    vmlinuz: &Path,
    initrd: &Path,
    log: &Path,
) -> Result<Ended> {
    let arch = job.arch;
    let name = guest.name(arch);
    let (parameters, options) = guest
        .machine
        .map_or(("", &[][..]), |machine| (machine.parameters, machine.qemu));
    let emulation = if job.qemu.contains(&EMULATION[0]) {
        &[]
    } else {
        EMULATION
    };
    let mut qemu = Qemu(
        Command::new(arch.qemu)
            .args(arch.machine)
            .args(emulation)
            .args(HARDWARE)
            .args(job.qemu)
            .args(options)
            .arg("-append")
            .arg(format!(
                "console={} {PARAMETERS} {} {parameters}",
                arch.console, job.parameters
            ))
            .arg("-kernel")
            .arg(vmlinuz)
            .arg("-initrd")
            .arg(initrd)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| format!("cannot start {}: run `cargo xtask setup`", arch.qemu))?,
    );
    let console = qemu
        .0
        .stdout
        .take()
        .context("QEMU's console is not piped")?;
    let mut log = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let lines = process::lines(console, move |line| {
        // A full disk must not end the tests, which need no log.
        let _ = writeln!(log, "{line}");
    });

    let mut console = Console::default();
    let mut deadline = Instant::now() + BOOT_TIMEOUT;
    let mut alive = Instant::now();
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                if line.contains(ALIVE) {
                    alive = Instant::now();
                    continue;
                }
                let had_begun = console.begun;
                if let Some(code) = console.line(&line) {
                    qemu.wait(POWEROFF_TIMEOUT);
                    return Ok(Ended::Finished {
                        code,
                        output: console.output,
                    });
                }
                if console.begun && !(had_begun && is_of_the_kernel(&line)) {
                    deadline = Instant::now() + PATIENCE;
                }
                if had_begun && console.shows {
                    println!("[{name}] {line}");
                }
            }
            Err(RecvTimeoutError::Disconnected) => {
                let cause = console
                    .crash
                    .unwrap_or_else(|| "QEMU exited before the tests had ended".to_owned());
                let output = console.output;
                return Ok(Ended::Crashed { cause, output });
            }
            Err(RecvTimeoutError::Timeout) => {
                return Ok(match console {
                    Console {
                        crash: Some(cause),
                        output,
                        ..
                    } => Ended::Crashed { cause, output },
                    Console {
                        begun: false,
                        output,
                        ..
                    } => {
                        let cause =
                            format!("the tests did not begin in {} s", BOOT_TIMEOUT.as_secs());
                        Ended::Crashed { cause, output }
                    }
                    Console { output, .. } => Ended::Stuck {
                        lives: alive.elapsed() < ALIVE_TIMEOUT,
                        output,
                    },
                });
            }
        }
    }
}

/// Whether the kernel wrote the line. A kernel may repeat a warning for ever, and that is no
/// progress of the tests.
fn is_of_the_kernel(line: &str) -> bool {
    let time = line.strip_prefix('[').and_then(|rest| rest.split_once(']'));
    time.is_some_and(|(time, _)| time.trim().parse::<f64>().is_ok())
}

/// The state of a boot, from the lines of the console so far.
#[derive(Default)]
struct Console {
    begun: bool,
    output: Output,
    /// The first sign of a crash.
    crash: Option<String>,
    /// Whether to show the last line.
    shows: bool,
}

impl Console {
    /// Reads a line; returns the exit code of the tests if the line has it.
    ///
    /// The kernel writes to the same console, so a mark may be anywhere in a line.
    fn line(&mut self, line: &str) -> Option<i32> {
        if line.contains(BEGIN) {
            self.begun = true;
        }
        if let Some(at) = line.find(END) {
            return line[at + END.len()..].trim().parse().ok();
        }
        if self.crash.is_none() && CRASH_SIGNS.iter().any(|sign| line.contains(sign)) {
            self.crash = Some(line.trim().to_owned());
        }
        self.shows = self.output.line(line);
        None
    }
}

/// A running QEMU, which ends with this process.
struct Qemu(Child);

impl Qemu {
    /// Waits for the end of the process, but not longer than `timeout`.
    fn wait(&mut self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only if QEMU has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::{Console, is_of_the_kernel};

    #[test]
    fn only_the_tests_make_progress() {
        assert!(is_of_the_kernel("[  812.034512] watchdog: stalled"));
        assert!(!is_of_the_kernel("test udp::[::1] ... ok"));
        assert!(!is_of_the_kernel("[::1] connected"));
    }

    #[test]
    fn the_end_is_found_after_other_output() {
        let mut console = Console::default();
        assert_eq!(console.line("[    1.2] x: @@begin"), None);
        assert!(console.begun);
        assert_eq!(console.line("test a ... @@end 101"), Some(101));
    }

    #[test]
    fn the_first_sign_of_a_crash_is_kept() {
        let mut console = Console::default();
        console.line("BUG: unable to handle page fault");
        console.line("Kernel panic - not syncing: Fatal exception");
        assert_eq!(
            console.crash.as_deref(),
            Some("BUG: unable to handle page fault")
        );
    }
}
