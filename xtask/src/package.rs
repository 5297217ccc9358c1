//! `cargo xtask package`: is what would be published all that a stranger needs?
//!
//! The packages are made as for publishing. Then a crate of nobody's, outside of the workspace, depends on what is in them, and is compiled with
//! each combination of features; on its search path are a C linker and nothing else.

mod dependencies;

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{process, workspace};

const LIBRARY: &str = "tcp-udp-trace";
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
    let committed = workspace::root().join(LIBRARY).join("bpf");
    for entry in fs::read_dir(&committed).context("cannot list the eBPF objects")? {
        let name = entry?.file_name();
        ensure!(
            folder.join(LIBRARY).join("bpf").join(&name).is_file(),
            "the package lacks bpf/{}",
            name.display()
        );
    }
    Ok(folder)
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
        let mut command = Command::new(workspace::cargo());
        command
            .current_dir(&self.folder)
            .args(["build", "--no-default-features", "--features"])
            .arg(features.join(","))
            .env("RUSTC", workspace::cargo().with_file_name("rustc"))
            .env("PATH", &self.path)
            .env("CARGO_TARGET_DIR", self.folder.join("target"))
            .env("RUSTFLAGS", "-D warnings");
        process::run(&mut command)
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
