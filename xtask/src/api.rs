//! `cargo xtask api`: is the library's public API what was agreed on?
//!
//! The snapshot is committed, so a change of the API is a line in a review. Made by the pinned compiler, whose form of rustdoc's JSON
//! the reader of it knows.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};

use crate::{
    process,
    workspace::{self, LIBRARY},
};

const SNAPSHOT: &str = "tcp-udp-trace/public-api.txt";

/// Crates that move faster than we promise to, or that are nobody's business: none of their types may be seen.
const PRIVATE: &[&str] = &["aya", "netlink", "nix::", "tcp_udp_trace_common"];

/// Compare the library's public API with the committed snapshot.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Write the snapshot anew.
    #[arg(long)]
    bless: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let api = public_api::Builder::from_rustdoc_json(document()?)
        .omit_blanket_impls(true)
        .omit_auto_trait_impls(true)
        .build()
        .context("cannot read rustdoc's JSON: is this the compiler that rust-toolchain.toml pins?")?
        .to_string();
    let seen: Vec<_> = api
        .lines()
        .filter(|line| PRIVATE.iter().any(|name| line.contains(name)))
        .collect();
    ensure!(
        seen.is_empty(),
        "what must not be in the public API:\n{}",
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
        "the public API is not that of {SNAPSHOT}:\n{}\nIf it shall be: `cargo xtask api --bless`, a line in CHANGELOG.md, and what \
             CONTRIBUTING.md says of versions",
        difference.join("\n")
    );
    eprintln!("the public API is that of {SNAPSHOT}");
    Ok(())
}

/// What rustdoc knows of the library, as JSON; which it tells only if unstable options are allowed.
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
