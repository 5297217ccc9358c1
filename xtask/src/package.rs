//! `cargo xtask package`: checks that the packages contain all that a user needs.
//!
//! The packages are made as for publishing. A crate outside of the workspace depends on them, and
//! is compiled with each combination of features. Its search path has a C linker and no other
//! program. The package's own example is compiled too. Its README must not link to files that the
//! package lacks, and the source of the eBPF objects must be in it.

mod dependencies;

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{
    lint::links,
    process,
    workspace::{self, LIBRARY},
};

const COMMON: &str = "tcp-udp-trace-common";

/// The programs that Rust links with, which every user has.
const LINKER: &[&str] = &["cc", "ld", "as", "ar"];

/// Make the packages, and compile a user's crate with them.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Include uncommitted changes.
    #[arg(long)]
    allow_dirty: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let metadata = metadata_of(&workspace::root().join("Cargo.toml"))?;
    let library = package(&metadata, LIBRARY)?;
    let packages = pack(library, args.allow_dirty)?;
    let user_crate = UserCrate::new(&packages, text(library, "rust_version")?)?;
    for features in subsets(&features(library)?) {
        user_crate.check(&features)?;
    }
    user_crate.check_example(&packages.join(LIBRARY))?;
    links::check_page(&packages.join(LIBRARY).join("README.md"))?;
    dependencies::check(
        &metadata_of(&user_crate.folder.join("Cargo.toml"))?,
        text(library, "rust_version")?,
    )?;
    eprintln!("a user's crate compiles with the packages");
    Ok(())
}

/// Makes the packages of both crates and unpacks them; returns their folder.
fn pack(library: &Value, allow_dirty: bool) -> Result<PathBuf> {
    let mut command = Command::new(workspace::cargo());
    command
        .current_dir(workspace::root())
        // cargo would compile the packages to verify them, but they are compiled below, too.
        .args(["package", "--no-verify", "--quiet"])
        .args(["--package", COMMON, "--package", LIBRARY])
        .args(allow_dirty.then_some("--allow-dirty"));
    process::run(&mut command)?;
    let folder = workspace::target_dir().join("package");
    let version = text(library, "version")?;
    for name in [COMMON, LIBRARY] {
        let unpacked = folder.join(name);
        workspace::recreate(&unpacked)?;
        process::run(
            Command::new("tar")
                .args(["--extract", "--touch", "--strip-components=1", "--file"])
                .arg(folder.join(format!("{name}-{version}.crate")))
                .arg("--directory")
                .arg(&unpacked),
        )?;
    }
    let objects = Path::new(LIBRARY).join("bpf");
    contains(&folder.join(&objects), &workspace::root().join(&objects))?;
    Ok(folder)
}

/// Checks that a folder of the package has all files of the folder of the tree. In the tree, the
/// source of the objects is a symbolic link to that of the eBPF crate.
fn contains(packaged: &Path, committed: &Path) -> Result<()> {
    let entries =
        fs::read_dir(committed).with_context(|| format!("cannot list {}", committed.display()))?;
    for entry in entries {
        let path = entry?.path();
        let packaged = packaged.join(path.file_name().unwrap_or_default());
        if path.is_dir() {
            contains(&packaged, &path)?;
            continue;
        }
        let same = fs::read(&packaged).ok() == fs::read(&path).ok();
        ensure!(same, "the package lacks {}", path.display());
    }
    Ok(())
}

/// A user's crate, which depends on the packages and is outside of the workspace.
struct UserCrate {
    folder: PathBuf,
    path: PathBuf,
}

impl UserCrate {
    fn new(packages: &Path, rust_version: &str) -> Result<Self> {
        // The folder is inside of that of the workspace, but the crate is a workspace of its own.
        let folder = workspace::target_dir().join("user_crate");
        let path = folder.join("path");
        workspace::recreate(&path)?;
        fs::create_dir_all(folder.join("src"))
            .context("cannot create the folder of the user's crate")?;
        for tool in LINKER {
            let found = workspace::find_program(tool)
                .with_context(|| format!("{tool} is missing, and Rust needs it to link"))?;
            symlink(found, path.join(tool)).context("cannot link to the linker")?;
        }
        let packages = packages.display();
        let manifest = format!(
            "[workspace]\n\
             [package]\nname = \"user_crate\"\nversion = \"0.0.0\"\nedition = \"2024\"\nrust-version = \"{rust_version}\"\n\
             [features]\nreplay = [\"tcp-udp-trace/replay\"]\nserde = [\"tcp-udp-trace/serde\"]\n\
             [dependencies]\n\
             anyhow = \"1\"\n\
             tcp-udp-trace = {{ path = \"{packages}/{LIBRARY}\" }}\n\
             tokio = {{ version = \"1\", features = [\"macros\", \"rt-multi-thread\"] }}\n\
             [patch.crates-io]\n\
             {COMMON} = {{ path = \"{packages}/{COMMON}\" }}\n"
        );
        fs::write(folder.join("Cargo.toml"), manifest).context("cannot write the manifest")?;
        fs::write(folder.join("src/main.rs"), first_example()?)
            .context("cannot write the program")?;
        Ok(Self { folder, path })
    }

    fn check(&self, features: &[&str]) -> Result<()> {
        let mut command = self.cargo(&["build", "--no-default-features", "--features"]);
        process::run(command.arg(features.join(",")))
    }

    /// Compiles the example of the package, with the development dependencies that it needs.
    fn check_example(&self, library: &Path) -> Result<()> {
        let common = library.with_file_name(COMMON);
        let patch = format!(
            "patch.crates-io.{COMMON}.path={:?}",
            common.display().to_string()
        );
        let mut command = self.cargo(&["build", "--example", "trace", "--features", "serde"]);
        // Without this, the package would be a part of the workspace around it.
        let manifest = library.join("Cargo.toml");
        let mut text = fs::read_to_string(&manifest).context("cannot read the manifest")?;
        text.push_str("\n[workspace]\n");
        fs::write(&manifest, text).context("cannot write the manifest")?;
        process::run(
            command
                .args(["--config", &patch, "--manifest-path"])
                .arg(manifest),
        )
    }

    fn cargo(&self, args: &[&str]) -> Command {
        let mut command = Command::new(workspace::cargo());
        command
            .current_dir(&self.folder)
            .args(args)
            .env("RUSTC", workspace::cargo().with_file_name("rustc"))
            .env("PATH", &self.path)
            .env("CARGO_TARGET_DIR", self.folder.join("target"))
            // The programs do not run, and are not compiled a second time.
            .env("CARGO_PROFILE_DEV_DEBUG", "none")
            .env("CARGO_INCREMENTAL", "0")
            .env("RUSTFLAGS", "-D warnings");
        command
    }
}

/// Returns the first example of README.md.
fn first_example() -> Result<String> {
    let path = workspace::root().join("README.md");
    let readme = fs::read_to_string(&path).context("cannot read README.md")?;
    let example = readme
        .split_once("```rust\n")
        .and_then(|(_, rest)| rest.split_once("```"))
        .map(|(example, _)| example.to_owned());
    example.context("README.md has no example")
}

fn metadata_of(manifest: &Path) -> Result<Value> {
    let output = process::stdout(
        Command::new(workspace::cargo())
            .args([
                "metadata",
                "--format-version=1",
                "--filter-platform",
                &host()?,
                "--manifest-path",
            ])
            .arg(manifest),
    )?;
    serde_json::from_str(&output).context("cargo's metadata is not JSON")
}

fn host() -> Result<String> {
    let version = process::stdout(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc names no host")
}

fn package<'a>(metadata: &'a Value, name: &str) -> Result<&'a Value> {
    let mut packages = metadata["packages"].as_array().into_iter().flatten();
    packages
        .find(|package| package["name"] == name)
        .with_context(|| format!("no package {name} in the metadata"))
}

fn text<'a>(package: &'a Value, key: &str) -> Result<&'a str> {
    package[key]
        .as_str()
        .with_context(|| format!("the package has no {key}"))
}

fn features(library: &Value) -> Result<Vec<&str>> {
    let features = library["features"]
        .as_object()
        .context("no features in the metadata")?;
    Ok(features
        .keys()
        .map(String::as_str)
        .filter(|name| *name != "default")
        .collect())
}

/// Returns every combination of features.
fn subsets<'a>(features: &[&'a str]) -> Vec<Vec<&'a str>> {
    features.iter().fold(vec![vec![]], |subsets, feature| {
        let with = subsets
            .iter()
            .map(|subset| [&subset[..], &[*feature]].concat());
        subsets.iter().cloned().chain(with).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_once() {
        assert_eq!(subsets(&[]), [vec![""; 0]]);
        let expected: [&[&str]; 4] = [&[], &["a"], &["b"], &["a", "b"]];
        assert_eq!(subsets(&["a", "b"]), expected);
    }
}
