//! `cargo xtask fuzz`: runs libFuzzer on the library's decoders.
//!
//! The fuzzer needs a nightly compiler. On stable, the unit tests of `tcp-udp-trace/src/fuzzing/`
//! replay the seeds and inputs near them.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};

use crate::{deps, process, workspace};

/// Fuzz all decoders of untrusted bytes, or one target. Needs a nightly compiler.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// One of the programs in `fuzz/fuzz_targets`.
    target: Option<String>,
    /// The time for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let folder = workspace::root().join("fuzz");
    let mut targets = targets(&folder.join("fuzz_targets"))?;
    if let Some(wanted) = &args.target {
        ensure!(
            targets.contains(wanted),
            "no target {wanted:?}: there are {}",
            targets.join(", ")
        );
        targets = vec![wanted.clone()];
    }
    process::stdout(process::nightly("rustc").arg("--version"))
        .context("the fuzzer needs a nightly compiler: `rustup toolchain install nightly`")?;
    deps::ensure(&deps::FUZZ)?;
    deps::ensure_subcommand("cargo-fuzz")?;
    // The fuzzed library has the same dependencies as the tested one; cargo adds the fuzzer's own.
    fs::copy(
        workspace::root().join("Cargo.lock"),
        folder.join("Cargo.lock"),
    )
    .context("cannot copy Cargo.lock to the fuzzers")?;
    targets
        .iter()
        .try_for_each(|target| fuzz(target, args.seconds))
}

/// Runs one target until the time is over or an input fails, which libFuzzer saves in
/// `fuzz/artifacts`.
fn fuzz(target: &str, seconds: u32) -> Result<()> {
    // libFuzzer keeps new inputs in the first folder, for the next run, and only reads the seeds.
    let grown = workspace::cache_dir().join("fuzz").join(target);
    fs::create_dir_all(&grown).with_context(|| format!("cannot create {}", grown.display()))?;
    process::run(
        process::nightly("cargo")
            .current_dir(workspace::root())
            .args(["fuzz", "run", "--target-dir"])
            .arg(workspace::target_dir().join("fuzz"))
            .arg(target)
            .arg(grown)
            .arg(Path::new("fuzz/corpus").join(target))
            .args(["--", "-timeout=10", "-print_final_stats=1"])
            .arg(format!("-max_total_time={seconds}")),
    )
}

fn targets(folder: &Path) -> Result<Vec<String>> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut targets = entries
        .map(|entry| {
            let path = entry?.path();
            Ok(path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned())
        })
        .collect::<Result<Vec<_>>>()?;
    targets.sort();
    Ok(targets)
}
