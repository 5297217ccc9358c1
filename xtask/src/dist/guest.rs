//! Runs the static program on the kernels of the test matrix.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};

use crate::{arch::Arch, report, test, vm, workspace};

const SCRIPT: &str = include_str!("guest.sh");

/// Runs `doctor` and `trace` of `program` in a guest of each kernel.
pub(super) fn test(program: &Path, kernels: &[String]) -> Result<()> {
    let script = workspace::target_dir().join("release-guest.sh");
    fs::write(&script, format!("#!/bin/sh\n{SCRIPT}")).context("cannot write the script")?;
    let job = vm::Job {
        arch: Arch::host()?,
        program: &script,
        args: &[],
        files: &[(program, "/tests/tcp-udp-trace")],
        qemu: &[],
        only_default_tests: false,
        parameters: "",
    };
    let rows = vm::run(&test::kernels(kernels, false)?, &job, vm::default_jobs());
    ensure!(report::print(&rows), "the program fails on a kernel");
    Ok(())
}
