//! `cargo xtask package`: is what would be published all that a stranger needs?
//!
//! The packages are made as for publishing. Then a crate of nobody's, outside of the workspace, depends on what is in them, and is compiled with
//! each combination of features; on its search path are a C linker and nothing else. The package's own example is compiled too, its
//! README must not link to files that the package lacks, and the source of the eBPF objects must be in it.

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

/// What a stranger's machine has for Rust to link with.
const LINKER: &[&str] = &["cc", "ld", "as", "ar"];

/// Make the packages, and compile a stranger's crate with them.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Make packages of uncommitted changes too.
    #[arg(long)]
    allow_dirty: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let metadata = metadata_of(&workspace::root().join("Cargo.toml"))?;
    let library = package(&metadata, LIBRARY)?;
    let packages = pack(library, args.allow_dirty)?;
    let stranger = Stranger::new(&packages, text(library, "rust_version")?)?;
    for features in subsets(&features(library)?) {
        stranger.check(&features)?;
    }
    stranger.check_example(&packages.join(LIBRARY))?;
    links::check_page(&packages.join(LIBRARY).join("README.md"))?;
    dependencies::check(
        &metadata_of(&stranger.folder.join("Cargo.toml"))?,
        text(library, "rust_version")?,
    )?;
    eprintln!("a stranger's crate compiles with what would be published");
    Ok(())
}

/// Makes the packages of both crates and unpacks them; returns the folder that they are in.
fn pack(library: &Value, allow_dirty: bool) -> Result<PathBuf> {
    let mut command = Command::new(workspace::cargo());
    command
        .current_dir(workspace::root())
        // What it compiles to verify them is compiled below, too.
        .args(["package", "--no-verify", "--quiet"])
        .args(["--package", COMMON, "--package", LIBRARY])
        .args(allow_dirty.then_some("--allow-dirty"));
    process::run(&mut command)?;
    let folder = workspace::target_dir().join("package");
    let version = text(library, "version")?;
    for name in [COMMON, LIBRARY] {
        let unpacked = folder.join(name);
        recreate(&unpacked)?;
        process::run(
            Command::new("tar")
                .args(["--extract", "--strip-components=1", "--file"])
                .arg(folder.join(format!("{name}-{version}.crate")))
                .arg("--directory")
                .arg(&unpacked),
        )?;
    }
    let objects = Path::new(LIBRARY).join("bpf");
    contains(&folder.join(&objects), &workspace::root().join(&objects))?;
    Ok(folder)
}

/// Whether a folder of the package has all that the folder of the tree has. In the tree, the source of
/// the objects is a link to that of the eBPF crate.
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

/// A crate that depends on the packages, and nothing of ours around it.
struct Stranger {
    folder: PathBuf,
    path: PathBuf,
}

impl Stranger {
    fn new(packages: &Path, rust_version: &str) -> Result<Self> {
        // Below the folder of the workspace, but a workspace of its own.
        let folder = workspace::target_dir().join("stranger");
        let path = folder.join("path");
        recreate(&path)?;
        fs::create_dir_all(folder.join("src")).context("cannot create the stranger's folder")?;
        for tool in LINKER {
            let found = workspace::find_program(tool)
                .with_context(|| format!("{tool} is missing: Rust links with it"))?;
            symlink(found, path.join(tool)).context("cannot link to the linker")?;
        }
        let packages = packages.display();
        let manifest = format!(
            "[workspace]\n\
             [package]\nname = \"stranger\"\nversion = \"0.0.0\"\nedition = \"2024\"\nrust-version = \"{rust_version}\"\n\
             [features]\nserde = [\"tcp-udp-trace/serde\"]\n\
             [dependencies]\n\
             anyhow = \"1\"\n\
             futures-util = {{ version = \"0.3\", default-features = false }}\n\
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

    /// Compiles the example of the package itself, which takes its development dependencies too.
    fn check_example(&self, library: &Path) -> Result<()> {
        let common = library.with_file_name(COMMON);
        let patch = format!(
            "patch.crates-io.{COMMON}.path={:?}",
            common.display().to_string()
        );
        let mut command = self.cargo(&["build", "--example", "trace", "--features", "serde"]);
        // Without this, it would be a part of the workspace around it.
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

/// The first example of README.md, as somebody would paste it.
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

/// Every combination.
fn subsets<'a>(features: &[&'a str]) -> Vec<Vec<&'a str>> {
    features.iter().fold(vec![vec![]], |subsets, feature| {
        let with = subsets
            .iter()
            .map(|subset| [&subset[..], &[*feature]].concat());
        subsets.iter().cloned().chain(with).collect()
    })
}

fn recreate(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))
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
