//! `cargo xtask lint`: checks formatting, clippy, documentation, and rules of this project.

mod files;
mod layers;
pub(crate) mod links;
mod off_linux;
mod prose;

use std::process::Command;

use anyhow::{Result, bail};

use crate::{
    deps, process,
    workspace::{self, LIBRARY},
};

const EBPF: &str = "tcp-udp-trace-ebpf";

/// Files that must not be in the tree, by the end of their path, and why.
const FORBIDDEN: &[(&str, &str)] = &[
    (
        "tcp-udp-trace/build.rs",
        "users of the library must not need a BPF toolchain: the objects are committed",
    ),
    (
        "tcp-udp-trace-common/build.rs",
        "the library depends on it, see tcp-udp-trace/build.rs",
    ),
    ("vmlinux.h", "offsets come from the running kernel's BTF"),
    (".orig", "left over from a merge"),
    (".rej", "left over from a patch"),
];

pub(crate) fn run() -> Result<()> {
    forbidden_files()?;
    links::check()?;
    layers::check()?;
    prose::check()?;
    spelling()?;
    cargo(&["fmt", "--all", "--check"])?;
    cargo(&["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"])?;
    clippy(&[
        "--workspace",
        "--exclude",
        EBPF,
        "--all-targets",
        "--all-features",
    ])?;
    // The library alone, because another member of the workspace can enable its features.
    clippy(&[
        "--package",
        LIBRARY,
        "--all-targets",
        "--no-default-features",
    ])?;
    for features in [&[] as &[_], &["--features", "perf"]] {
        ebpf_clippy(features)?;
    }
    off_linux::check()?;
    document()
}

/// Checks the spelling of all files that git tracks; `typos.toml` has the exceptions.
fn spelling() -> Result<()> {
    let typos = deps::typos()?;
    process::run(
        Command::new(typos)
            .current_dir(workspace::root())
            .args(["--format", "brief"]),
    )
}

fn clippy(args: &[&str]) -> Result<()> {
    process::run(cargo_command(&["clippy"]).args(args).args(DENY_WARNINGS))
}

const DENY_WARNINGS: &[&str] = &["--", "-D", "warnings"];

/// Runs clippy on the eBPF programs, compiled for this machine, because the compiler that has the
/// BPF target has no clippy.
///
/// A program without `std` does not compile unless it aborts on panics, which the profile `bpf`
/// does. `RUSTC_BOOTSTRAP` makes the stable compiler accept the unstable features of the programs.
fn ebpf_clippy(features: &[&str]) -> Result<()> {
    let mut command = cargo_command(&["clippy", "--package", EBPF, "--profile", "bpf"]);
    // The variable changes cargo's fingerprints: in the common target directory, each run would
    // discard the artifacts of the other.
    command
        .args(features)
        .arg("--target-dir")
        .arg(workspace::target_dir().join("ebpf-clippy"))
        .args(DENY_WARNINGS)
        .env("RUSTC_BOOTSTRAP", "1");
    process::run(&mut command)
}

/// Builds the documentation of the workspace, and that of the library as docs.rs does.
fn document() -> Result<()> {
    let mut others = cargo_command(&["doc", "--no-deps", "--workspace", "--all-features"]);
    others
        .args(["--exclude", EBPF, "--exclude", LIBRARY])
        .env("RUSTDOCFLAGS", "-D warnings");
    process::run(&mut others)?;
    let mut library = cargo_command(&["doc", "--no-deps", "--package", LIBRARY, "--all-features"]);
    library
        .env("RUSTDOC", workspace::unstable_rustdoc()?)
        .env("RUSTDOCFLAGS", "-D warnings --cfg docsrs");
    process::run(&mut library)
}

fn cargo(args: &[&str]) -> Result<()> {
    process::run(&mut cargo_command(args))
}

fn cargo_command(args: &[&str]) -> Command {
    let mut command = Command::new(workspace::cargo());
    command.current_dir(workspace::root()).args(args);
    command
}

fn forbidden_files() -> Result<()> {
    let files = files::tracked(&[])?;
    let found: Vec<_> = files
        .iter()
        .flat_map(|file| {
            FORBIDDEN
                .iter()
                .map(move |(end, reason)| (file, end, reason))
        })
        .filter(|(file, end, _)| file.ends_with(*end))
        .map(|(file, _, reason)| format!("{file}: {reason}"))
        .collect();
    if !found.is_empty() {
        bail!("these files must not be in the tree:\n{}", found.join("\n"));
    }
    Ok(())
}
