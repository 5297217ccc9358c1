//! Tests of the whole program: exit codes, `doctor`, `man`, `completions`, and output to pipes.

use std::{
    fs,
    process::{Command, Output},
};

use anyhow::{Context as _, ensure};

use crate::tool::{Folder, PROGRAM};

fn run(args: &[&str]) -> anyhow::Result<Output> {
    let mut command = Command::new(PROGRAM);
    command
        .args(args)
        .output()
        .context("cannot start the program")
}

fn stdout_of(args: &[&str]) -> anyhow::Result<String> {
    let output = run(args)?;
    ensure!(output.status.success(), "{args:?}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

pub(crate) fn doctor_reports_that_both_tracers_start() -> anyhow::Result<()> {
    let text = stdout_of(&["doctor"])?;
    for expected in [
        "\ntcp: starts",
        "\nudp: starts",
        "\nBTF ",
        "CAP_BPF",
        "  state ",
        "  send ",
    ] {
        ensure!(text.contains(expected), "no {expected:?} in {text}");
    }
    Ok(())
}

/// The exit code shows that a capability is missing, and the message names it.
pub(crate) fn missing_privilege_has_its_exit_code() -> anyhow::Result<()> {
    // Root without capabilities may have no access to the build folder.
    let folder = Folder::new("privilege")?;
    let program = folder.path().join("tcp-udp-trace");
    fs::copy(PROGRAM, &program)?;
    for command in [
        "doctor",
        "trace",
        "life",
        "depmap",
        "slo",
        "prometheus",
        "otlp",
    ] {
        let mut setpriv = Command::new("setpriv");
        setpriv.args(["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]);
        let output = setpriv.arg(&program).arg(command).output()?;
        ensure!(output.status.code() == Some(77), "{command}: {output:?}");
        let errors = String::from_utf8(output.stderr)?;
        ensure!(errors.contains("CAP_BPF"), "{errors}");
        let text = String::from_utf8(output.stdout)?;
        let is_explained = text.contains("tcp: does not start") && text.contains("-> CAP_BPF");
        ensure!(command != "doctor" || is_explained, "{text}");
    }
    Ok(())
}

pub(crate) fn wrong_command_line_has_its_exit_code() -> anyhow::Result<()> {
    for args in [
        &["--no-such-option"] as &[_],
        &["trace", "--filter", "port=x"],
        &["life", "--filter", "pid_tree=4194303"],
        &["depmap", "--json", "--dot"],
        &["man", "no-such-command"],
    ] {
        let output = run(args)?;
        ensure!(output.status.code() == Some(2), "{args:?}: {output:?}");
    }
    Ok(())
}

const COMMANDS: [&str; 11] = [
    "trace",
    "life",
    "top",
    "depmap",
    "slo",
    "ndjson",
    "prometheus",
    "otlp",
    "doctor",
    "man",
    "completions",
];

pub(crate) fn manual_and_completions_are_complete() -> anyhow::Result<()> {
    let (manual, bash) = (stdout_of(&["man"])?, stdout_of(&["completions", "bash"])?);
    ensure!(
        manual.starts_with(".ie") || manual.contains(".TH tcp\\-udp\\-trace"),
        "{manual}"
    );
    for command in COMMANDS {
        ensure!(
            manual.contains(command) && bash.contains(command),
            "{command}"
        );
        ensure!(
            stdout_of(&["man", command])?.contains(".SH SYNOPSIS"),
            "{command}"
        );
    }
    for shell in ["elvish", "fish", "powershell", "zsh"] {
        ensure!(
            stdout_of(&["completions", shell])?.contains("depmap"),
            "{shell}"
        );
    }
    Ok(())
}

pub(crate) fn pipe_gets_no_escapes() -> anyhow::Result<()> {
    for args in [&["--help"] as &[_], &["doctor"], &["no-such-command"]] {
        let output = run(args)?;
        let is_plain = |bytes: &[u8]| !bytes.contains(&0x1b);
        ensure!(
            is_plain(&output.stdout) && is_plain(&output.stderr),
            "{output:?}"
        );
    }
    Ok(())
}
