//! Checks that the library compiles on systems other than Linux.
//!
//! A machine rarely has the standard library of another system. But only the library's own
//! conditional code matters. So the library is copied, Linux is renamed in the conditions, and the
//! copy is checked: all code that is conditional on Linux is absent.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result};

use super::files;
use crate::{
    process,
    workspace::{self, LIBRARY},
};

/// The files and folders of the library.
const PARTS: &[&str] = &[
    "Cargo.toml",
    "Cargo.lock",
    "README.md",
    "tcp-udp-trace",
    "tcp-udp-trace-common",
];
/// A system that has a Unix standard library, and for which this workspace is never compiled.
const ELSEWHERE: &str = "haiku";

pub(super) fn check() -> Result<()> {
    let copy = workspace::target_dir().join("off-linux");
    let files = files::tracked(PARTS)?;
    // Files that are no longer in the tree must not be in the copy. The target directory stays.
    for part in PARTS.iter().map(|part| copy.join(part)) {
        if part.is_dir() {
            fs::remove_dir_all(&part)
                .with_context(|| format!("cannot remove {}", part.display()))?;
        }
    }
    for file in &files {
        // A symbolic link to a folder, whose files are no part of the library's code.
        if workspace::root().join(file).is_dir() {
            continue;
        }
        let to = copy.join(file);
        let folder = to.parent().context("a file of the tree has no folder")?;
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        copy_renamed(&workspace::root().join(file), &to)?;
    }
    let mut command = Command::new(workspace::cargo());
    command
        .args([
            "check",
            "--package",
            LIBRARY,
            "--lib",
            "--all-features",
            "--manifest-path",
        ])
        .arg(copy.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(copy.join("target"))
        .env("RUSTFLAGS", "-D warnings");
    process::run(&mut command)
}

/// Copies a file, renaming Linux.
fn copy_renamed(from: &Path, to: &Path) -> Result<()> {
    let mut bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if let Ok(text) = std::str::from_utf8(&bytes) {
        bytes = text
            .replace(
                "target_os = \"linux\"",
                &format!("target_os = \"{ELSEWHERE}\""),
            )
            .replace(
                ", \"tcp-udp-trace-ebpf\", \"xtask\", \"tests\", \"tcp-udp-trace-cli\"]",
                "]",
            )
            .replace(", \"xtask\", \"tests\"]", "]")
            .into_bytes();
    }
    fs::write(to, bytes).with_context(|| format!("cannot write {}", to.display()))
}
