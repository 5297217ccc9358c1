//! Paths: the workspace, its cache, cargo's folders, programs on the search path.

use std::{
    env,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use anyhow::{Context as _, Result};

/// The name of the package that is the library.
pub(crate) const LIBRARY: &str = "tcp-udp-trace";

/// Returns the root of the workspace, from the package's path that `cargo run` sets.
///
/// It is not fixed at compile time, because worktrees that share a target directory share the
/// program as well.
pub(crate) fn root() -> &'static Path {
    static ROOT: LazyLock<PathBuf> = LazyLock::new(|| {
        let package = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        package.parent().map(Path::to_owned).unwrap_or_default()
    });
    &ROOT
}

/// Returns the folder for downloads and logs, which git ignores.
pub(crate) fn cache_dir() -> PathBuf {
    root().join(".cache")
}

/// Returns cargo's target directory.
pub(crate) fn target_dir() -> PathBuf {
    // A relative one is relative to cargo's working directory, which is the root.
    root().join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// Writes a program that runs the pinned rustdoc with unstable options allowed, and returns its
/// path.
///
/// `RUSTC_BOOTSTRAP` in the environment of cargo would do the same. But the build scripts of many
/// dependencies depend on that variable, so cargo would compile all of them anew.
pub(crate) fn unstable_rustdoc() -> Result<PathBuf> {
    let path = target_dir().join("unstable-rustdoc");
    let rustdoc = cargo().with_file_name("rustdoc");
    let script = format!(
        "#!/bin/sh\nRUSTC_BOOTSTRAP=1 exec '{}' \"$@\"\n",
        rustdoc.display()
    );
    fs::write(&path, script).with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(&path, Permissions::from_mode(0o755))
        .with_context(|| format!("cannot make {} executable", path.display()))?;
    Ok(path)
}

/// Returns the cargo that runs this program. Through rustup it is the one that
/// `rust-toolchain.toml` pins.
pub(crate) fn cargo() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}

/// Returns cargo's home, which has registry sources and installed programs.
pub(crate) fn cargo_home() -> Result<PathBuf> {
    if let Some(home) = env::var_os("CARGO_HOME") {
        return Ok(PathBuf::from(home));
    }
    let home = env::var_os("HOME").context("neither CARGO_HOME nor HOME is set: set one")?;
    Ok(Path::new(&home).join(".cargo"))
}

/// Finds `program` on the search path, or in the folders of root's programs and of cargo's, which a
/// search path may lack.
pub(crate) fn find_program(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let cargo_bin = cargo_home().ok().map(|home| home.join("bin"));
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .chain(cargo_bin)
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}

/// Makes an empty folder.
pub(crate) fn recreate(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))
}
