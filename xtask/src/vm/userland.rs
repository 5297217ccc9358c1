//! The programs of a guest, and the libraries that they need.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{apt::Archive, arch::Arch, process, workspace};

pub(super) enum Userland {
    /// The programs of this machine.
    Host,
    /// Unpacked packages of another architecture.
    Unpacked { root: PathBuf, arch: &'static Arch },
}

/// The packages of the programs.
const PACKAGES: &[&str] = &[
    "busybox-static",
    "dash",
    "iproute2",
    "libbpf-tools",
    "nftables",
    "strace",
];
const SUITE: &str = "trixie";

impl Userland {
    pub(super) fn of(arch: &'static Arch) -> Result<Self> {
        if arch.is_host() {
            return Ok(Self::Host);
        }
        let root = workspace::cache_dir()
            .join("userland")
            .join(arch.to_string());
        if !root.is_dir() {
            eprintln!("fetching programs for {arch}");
            let archive = Archive::of_suite(SUITE, arch)?;
            archive.unpack(&archive.with_dependencies(PACKAGES)?, &root)?;
        }
        Ok(Self::Unpacked { root, arch })
    }

    pub(super) fn program(&self, name: &str) -> Result<PathBuf> {
        match self {
            Self::Host => workspace::find_program(name)
                .with_context(|| format!("`{name}` is missing: run `cargo xtask setup`")),
            Self::Unpacked { root, .. } => find(root, &["usr/sbin", "usr/bin"], name),
        }
    }

    /// Returns the shared libraries of a program and its loader, each with its path in the guest. A
    /// static program has none.
    pub(super) fn libraries(&self, program: &Path) -> Result<Vec<(PathBuf, String)>> {
        match self {
            Self::Host => ldd(program),
            Self::Unpacked { root, arch } => {
                let folders = [&*format!("usr/lib/{}", arch.gnu()), "usr/lib"];
                let mut libraries = Vec::new();
                let mut names = needed(program)?;
                while let Some(name) = names.pop() {
                    let destination = format!("/lib/{name}");
                    if !libraries.iter().any(|(_, known)| *known == destination) {
                        let path = find(root, &folders, &name)?;
                        names.extend(needed(&path)?);
                        libraries.push((path, destination));
                    }
                }
                Ok(libraries)
            }
        }
    }
}

fn find(root: &Path, folders: &[&str], name: &str) -> Result<PathBuf> {
    folders
        .iter()
        .map(|folder| root.join(folder).join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "no {name} in {}: remove that folder and try again",
                root.display()
            )
        })
}

/// Returns the absolute paths in the output of `ldd`. It runs the program's loader, so it works
/// only for programs of this machine.
fn ldd(program: &Path) -> Result<Vec<(PathBuf, String)>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("cannot start ldd")?;
    // ldd fails for a static program, which needs no libraries.
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text
        .split_whitespace()
        .filter(|word| word.starts_with('/') && !word.ends_with(':'))
        .map(|word| (PathBuf::from(word), word.to_owned()))
        .collect())
}

/// Returns the names of the libraries that a program or a library needs. The C library needs the
/// loader.
fn needed(object: &Path) -> Result<Vec<String>> {
    let text = process::stdout(Command::new("readelf").arg("--dynamic").arg(object))?;
    Ok(libraries_in(&text))
}

/// Returns the names in lines like `0x… (NEEDED)  Shared library: [libc.so.6]`.
fn libraries_in(dynamic: &str) -> Vec<String> {
    dynamic
        .lines()
        .filter(|line| line.contains("(NEEDED)"))
        .filter_map(|line| Some(line.split_once('[')?.1.split_once(']')?.0.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::libraries_in;

    #[test]
    fn needed_libraries_stand_in_brackets() {
        let text = " 0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]\n \
                     0x000000000000000e (SONAME)             Library soname: [libm.so.6]\n\
                     \nThere is no dynamic section in this file.\n";
        assert_eq!(libraries_in(text), ["libc.so.6"]);
    }
}
