//! Compiling the tests for another architecture.

use std::{path::PathBuf, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    apt::Archive,
    arch::Arch,
    deps::{self, DEBIAN_RUSTC},
    process, workspace,
};

/// Lets a cargo command compile for `arch`: by the compiler that compiles everything else, if it has a standard library for that, else by
/// Debian's.
pub(super) fn target(cargo: &mut Command, arch: &'static Arch) -> Result<()> {
    if arch.is_host() {
        return Ok(());
    }
    deps::ensure(arch.linker)?;
    let target = arch.target();
    let linker = format!(
        "CARGO_TARGET_{}_LINKER",
        target.to_uppercase().replace('-', "_")
    );
    cargo
        .args(["--target", &target])
        .env(linker, format!("{}-gcc", arch.gnu()));
    if !has_std(&target)? {
        let std = debian_std(arch).with_context(|| {
            format!("no standard library for {arch}: if not Debian's, `rustup target add {target}`")
        })?;
        // With a target, these are not for what is run here.
        cargo
            .env("RUSTC", DEBIAN_RUSTC)
            .env("CARGO_ENCODED_RUSTFLAGS", format!("-L{}", std.display()));
    }
    Ok(())
}

fn has_std(target: &str) -> Result<bool> {
    let mut rustc = Command::new("rustc");
    rustc
        .current_dir(workspace::root())
        .args(["--print", "target-libdir", "--target", target]);
    let folder = process::stdout(&mut rustc)?;
    Ok(PathBuf::from(folder.trim()).is_dir())
}

/// The folder of the standard library for `arch` of Debian's compiler.
///
/// Unpacked, not installed: that would take another architecture in this machine's package management.
fn debian_std(arch: &'static Arch) -> Result<PathBuf> {
    deps::ensure(&deps::CROSS_RUSTC)?;
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat=${Version}", "rustc-web"]);
    let version = process::stdout(&mut query)?;
    let root = workspace::cache_dir()
        .join("std")
        .join(format!("{arch}-{version}"));
    if !root.is_dir() {
        eprintln!("fetching Rust's standard library for {arch}");
        let package = format!("libstd-rust-web-dev={version}");
        Archive::of_this_machine(arch)?.unpack(&[package], &root)?;
    }
    Ok(root.join("usr/lib/rustlib").join(arch.target()).join("lib"))
}
