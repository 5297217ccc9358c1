//! Pid namespaces.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    panic::{AssertUnwindSafe, catch_unwind},
    process::exit,
};

use anyhow::{Context as _, anyhow, bail};
use fork::Fork;
use nix::{
    sched::{CloneFlags, unshare},
    sys::wait::waitpid,
    unistd::Pid,
};

use crate::suite::{Skip, skip};

/// The message of the namespace's first process that `f` succeeded.
const PASSED: &str = "passed";
const SKIPPED: &str = "skipped: ";

/// Runs `f` as the first process of a new pid namespace, below the calling thread's, and waits for
/// its end. The calling process must have no other thread. `/proc` stays that of the outer
/// namespace.
pub fn run_in_new(f: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    unshare(CloneFlags::CLONE_NEWPID)?;
    let (mut verdict, mut to) = io::pipe()?;
    let child = match fork::fork()? {
        Fork::Child => {
            drop(verdict);
            let text = match catch_unwind(AssertUnwindSafe(f)) {
                Ok(Ok(())) => PASSED.to_owned(),
                Ok(Err(error)) => match error.downcast_ref::<Skip>() {
                    Some(Skip(reason)) => format!("{SKIPPED}{reason}"),
                    None => format!("{error:#}"),
                },
                Err(_) => "panicked".to_owned(),
            };
            to.write_all(text.as_bytes()).unwrap();
            exit(0)
        }
        Fork::Parent(pid) => Pid::from_raw(pid),
    };
    drop(to);
    let mut text = String::new();
    verdict.read_to_string(&mut text)?;
    waitpid(child, None)?;
    match text.strip_prefix(SKIPPED) {
        Some(reason) => skip(reason),
        None if text == PASSED => Ok(()),
        None => Err(anyhow!("in the pid namespace: {text}")),
    }
}

/// Returns the pid in the initial namespace of a process, given its pid in the namespace of the
/// calling process.
pub fn initial(pid: u32) -> anyhow::Result<u32> {
    let namespace = |of: &str| fs::read_link(format!("/proc/{of}/ns/pid"));
    let ours = namespace("self")?;
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(number) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // Other processes come and go.
        let Ok(status) = fs::read(format!("/proc/{number}/status")) else {
            continue;
        };
        let status = String::from_utf8_lossy(&status);
        let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        let last = numbers.and_then(|numbers| numbers.split_whitespace().next_back());
        if last == Some(pid.to_string().as_str())
            && namespace(&number.to_string()).is_ok_and(|theirs| theirs == ours)
        {
            return Ok(number);
        }
    }
    bail!("no process {pid} in this pid namespace")
}

/// Gives the next process of the calling process's namespace this pid, which must be free. Skips
/// the test where the kernel cannot do that.
pub fn number_next(pid: u32) -> anyhow::Result<()> {
    let last = (pid - 1).to_string();
    let file = "/proc/sys/kernel/ns_last_pid";
    match fs::write(file, last) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            skip("no CONFIG_CHECKPOINT_RESTORE, by which a pid can be chosen")
        }
        written => written.context(file),
    }
}
