//! Builds the tests, and runs them on this machine.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc::RecvTimeoutError,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::cross;
use crate::{
    arch::Arch,
    process,
    report::{Outcome, Output, PATIENCE, Row},
    workspace,
};

/// A program of tests that runs as root.
pub(super) struct Program {
    package: &'static str,
    target: &'static str,
    profile: &'static str,
}

/// Optimized, because emulated guests run this program too.
pub(super) const INTEGRATION: Program = Program {
    package: "integration-tests",
    target: "integration",
    profile: "release",
};

/// Not optimized, because that would take several times as long as the tests.
pub(super) const CLI: Program = Program {
    package: "tcp-udp-trace-cli",
    target: "cli",
    profile: "dev",
};

/// Runs the unit and documentation tests of the crates that compile for this machine.
pub(super) fn unit(filter: Option<&str>) -> Result<Row> {
    let mut command = Command::new(workspace::cargo());
    command
        .current_dir(workspace::root())
        .args(["test", "--workspace", "--all-features", "--no-fail-fast"])
        .args([
            "--exclude",
            "tcp-udp-trace-ebpf",
            "--exclude",
            INTEGRATION.package,
        ])
        .arg("--")
        .args(filter);
    // The compiler may take long.
    counted("unit tests", &mut command, Duration::MAX)
}

/// Runs the integration tests on this kernel.
pub(super) fn local(program: &Path, args: &[OsString]) -> Result<Row> {
    let release = process::stdout(Command::new("uname").arg("-r"))?;
    run(&format!("local ({})", release.trim()), program, args)
}

/// Runs a program of tests as root.
pub(super) fn run(name: &str, program: &Path, args: &[OsString]) -> Result<Row> {
    let mut command = process::as_root(program);
    command.args(args);
    counted(name, &mut command, PATIENCE)
}

/// Builds a program of tests for `arch` and returns its path.
pub(super) fn build(program: &Program, arch: &'static Arch) -> Result<PathBuf> {
    let Program {
        package,
        target,
        profile,
    } = program;
    let mut command = Command::new(workspace::cargo());
    command
        .current_dir(workspace::root())
        .args(["test", "--profile", profile, "--package", package])
        .args(["--test", target])
        .args(["--no-run", "--message-format=json-render-diagnostics"])
        .stderr(Stdio::inherit());
    cross::target(&mut command, arch)?;
    eprintln!("$ {}", process::shell_line(&command));
    let messages = process::stdout(&mut command)?;
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| {
            message["target"]["name"] == *target && message["target"]["kind"][0] == "test"
        })
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| {
            format!("cargo has built no program for the test target {target} of {package}")
        })
}

/// Runs `command`, shows its output, and collects the results. Ends it if it writes nothing for
/// longer than `patience`.
fn counted(name: &str, command: &mut Command, patience: Duration) -> Result<Row> {
    let line = process::shell_line(command);
    eprintln!("$ {line}");
    let started = Instant::now();
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{line}`"))?;
    let Some(stdout) = child.stdout.take() else {
        bail!("the output of `{line}` is not piped");
    };
    let lines = process::lines(stdout, |_| {});
    let mut output = Output::default();
    let stuck = loop {
        match lines.recv_timeout(patience) {
            Ok(line) => {
                if output.line(&line) {
                    println!("{line}");
                }
            }
            Err(RecvTimeoutError::Disconnected) => break None,
            Err(RecvTimeoutError::Timeout) => {
                // As root, because sudo may have started it. sudo passes the signal on.
                process::run(process::as_root("kill").arg(child.id().to_string()))?;
                break Some(format!(
                    "slow or hung: no test began or ended for {} s; running: {}",
                    patience.as_secs(),
                    output.running()
                ));
            }
        }
    };
    let status = child
        .wait()
        .with_context(|| format!("cannot wait for `{line}`"))?;
    let Output {
        counts,
        failures,
        flaky,
        ..
    } = output;
    let outcome = match (stuck, status.success()) {
        (Some(stuck), _) => Outcome::Broken(stuck),
        (None, true) => Outcome::Passed(counts),
        (None, false) => Outcome::Failed(counts),
    };
    Ok(Row {
        elapsed: started.elapsed(),
        failures,
        flaky,
        ..Row::new(name, outcome)
    })
}
