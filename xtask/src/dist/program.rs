//! Builds a static program.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{arch::Arch, deps, process, workspace};

pub(super) const PACKAGE: &str = "tcp-udp-trace-cli";
pub(super) const PROGRAM: &str = "tcp-udp-trace";
pub(super) const PROFILE: &str = "dist";

/// Returns the target of a static program.
pub(super) fn target(arch: &Arch) -> String {
    format!("{arch}-unknown-linux-musl")
}

pub(super) fn path(arch: &Arch) -> PathBuf {
    workspace::target_dir()
        .join(target(arch))
        .join(PROFILE)
        .join(PROGRAM)
}

/// Builds a static program without symbols. `.cargo/config.toml` names the linker.
pub(super) fn build(arch: &Arch) -> Result<()> {
    let target = target(arch);
    deps::ensure_std(&target)?;
    process::run(
        Command::new(workspace::cargo())
            .current_dir(workspace::root())
            .args([
                "build",
                "--locked",
                "--profile",
                PROFILE,
                "--package",
                PACKAGE,
            ])
            .args(["--target", &target]),
    )?;
    let program = path(arch);
    let headers = process::stdout(
        Command::new("readelf")
            .args(["--wide", "--program-headers", "--section-headers"])
            .arg(&program),
    )?;
    for part in ["INTERP", ".symtab"] {
        ensure!(
            !headers.contains(part),
            "{} has {part}: it is not static, or not stripped",
            program.display()
        );
    }
    Ok(())
}

pub(super) fn version(program: &Path) -> Result<String> {
    let line = process::stdout(Command::new(program).arg("--version"))?;
    let version = line.trim().rsplit(' ').next();
    version
        .map(str::to_owned)
        .context("the program has no version")
}
