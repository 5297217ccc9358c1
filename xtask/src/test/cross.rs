//! Compiles the tests for another architecture.

use std::{path::PathBuf, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    apt::Archive,
    arch::Arch,
    deps::{self, DEBIAN_RUSTC},
    process, workspace,
};

/// Makes a cargo command compile for `arch`.
///
/// The compiler is the pinned one if it has a standard library for `arch`, else Debian's.
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
    if !deps::has_std(&target)? {
        let std = debian_std(arch).with_context(|| {
            format!("no standard library for {arch}: install Debian's, or run `rustup target add {target}`")
        })?;
        // Because cargo has a target, these flags are not for build scripts and macros.
        cargo
            .env("RUSTC", DEBIAN_RUSTC)
            .env("CARGO_ENCODED_RUSTFLAGS", format!("-L{}", std.display()));
    }
    Ok(())
}

/// Returns the folder of the standard library for `arch` of Debian's compiler.
///
/// The package is unpacked into the cache. To install it, dpkg would need the other architecture.
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
