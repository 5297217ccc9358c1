//! `cargo xtask api`: compares the library's public API with a snapshot.
//!
//! The snapshot is committed, so each change of the API is a line in a review. rustdoc's JSON has
//! another format in each version. The `public-api` crate reads that of the pinned compiler.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};

use crate::{
    process,
    workspace::{self, LIBRARY},
};

const SNAPSHOT: &str = "tcp-udp-trace/public-api.txt";

/// Crates whose types must not be public: they have breaking releases more often than this library,
/// or are an implementation detail.
const PRIVATE: &[&str] = &["aya", "netlink", "nix::", "tcp_udp_trace_common"];

/// Compare the library's public API with the committed snapshot.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Write a new snapshot.
    #[arg(long)]
    bless: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let api = public_api::Builder::from_rustdoc_json(document()?)
        .omit_blanket_impls(true)
        .omit_auto_trait_impls(true)
        .build()
        .context("cannot read rustdoc's JSON; it must come from the compiler that rust-toolchain.toml pins")?
        .to_string();
    let seen: Vec<_> = api
        .lines()
        .filter(|line| PRIVATE.iter().any(|name| line.contains(name)))
        .collect();
    ensure!(
        seen.is_empty(),
        "types that must not be in the public API:\n{}",
        seen.join("\n")
    );

    let path = workspace::root().join(SNAPSHOT);
    if args.bless {
        return fs::write(&path, api).with_context(|| format!("cannot write {SNAPSHOT}"));
    }
    let agreed = fs::read_to_string(&path).with_context(|| format!("cannot read {SNAPSHOT}"))?;
    let only_in = |one: &str, other: &str, sign: char| -> Vec<String> {
        one.lines()
            .filter(|line| !other.lines().any(|known| known == *line))
            .map(|line| format!("{sign}{line}"))
            .collect()
    };
    let difference = [only_in(&agreed, &api, '-'), only_in(&api, &agreed, '+')].concat();
    ensure!(
        difference.is_empty(),
        "the public API differs from {SNAPSHOT}:\n{}\nIf the change is intended, run \
             `cargo xtask api --bless`, add a line to CHANGELOG.md, and choose the version by \
             CONTRIBUTING.md",
        difference.join("\n")
    );
    eprintln!("the public API matches {SNAPSHOT}");
    Ok(())
}

/// Writes rustdoc's JSON of the library, an unstable feature, and returns its path.
fn document() -> Result<PathBuf> {
    process::run(
        Command::new(workspace::cargo())
            .current_dir(workspace::root())
            .args(["rustdoc", "--package", LIBRARY, "--lib", "--all-features"])
            .args(["--", "-Z", "unstable-options", "--output-format", "json"])
            .env("RUSTDOC", workspace::unstable_rustdoc()?),
    )?;
    Ok(workspace::target_dir().join("doc/tcp_udp_trace.json"))
}
