//! Packs a program: an archive for any Linux, and a Debian package.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::program::{self, PACKAGE, PROFILE, PROGRAM, target};
use crate::{arch::Arch, deps, process, workspace};

/// The other files of the archive, in the repository.
const FILES: &[&str] = &[
    "tcp-udp-trace-cli/README.md",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "deploy",
];

/// Writes the archive of an architecture into `folder`.
pub(super) fn archive(arch: &Arch, version: &str, shared: &Path, folder: &Path) -> Result<()> {
    let name = format!("{PROGRAM}-{version}-{}", target(arch));
    let staged = workspace::target_dir().join(&name);
    workspace::recreate(&staged)?;
    let mut copy = Command::new("cp");
    copy.args(["--recursive", "--dereference"])
        .arg(program::path(arch))
        .args([shared.join("man"), shared.join("completions")])
        .args(FILES.iter().map(|file| workspace::root().join(file)))
        .arg(&staged);
    process::stdout(&mut copy)?;
    process::stdout(
        Command::new("tar")
            // The owner, the order and the times do not depend on who packs.
            .args(["--owner=0", "--group=0", "--numeric-owner", "--sort=name"])
            .arg(format!("--mtime={}", time_of_commit()?))
            .args(["--create", "--gzip", "--file"])
            .arg(folder.join(format!("{name}.tar.gz")))
            .arg("--directory")
            .arg(workspace::target_dir())
            .arg(&name),
    )?;
    fs::remove_dir_all(&staged).context("cannot remove the staged files")
}

/// Returns the time of the last commit, in a form that `tar` reads.
fn time_of_commit() -> Result<String> {
    let mut git = Command::new("git");
    git.current_dir(workspace::root())
        .args(["log", "-1", "--format=@%ct"]);
    Ok(process::stdout(&mut git)?.trim().to_owned())
}

/// Writes the Debian package of an architecture into `folder`. `Cargo.toml` of the command lists
/// its contents.
pub(super) fn debian(arch: &Arch, folder: &Path) -> Result<()> {
    deps::ensure_subcommand("cargo-deb")?;
    process::run(
        Command::new(workspace::cargo())
            .current_dir(workspace::root())
            .args(["deb", "--no-build", "--no-strip", "--package", PACKAGE])
            .args(["--profile", PROFILE, "--target", &target(arch), "--output"])
            .arg(folder),
    )
}

/// Returns the Debian package of an architecture in `folder`.
pub(super) fn debian_file(arch: &Arch, folder: &Path) -> Result<PathBuf> {
    let end = format!("_{}.deb", arch.debian);
    let files = fs::read_dir(folder).context("cannot list the files of the release")?;
    files
        .filter_map(|file| Some(file.ok()?.path()))
        .find(|path| path.to_string_lossy().ends_with(&end))
        .with_context(|| format!("cargo-deb has written no package for {}", arch.debian))
}
