//! The files that the rules read.

use std::process::Command;

use anyhow::Result;

use crate::{process, workspace};

/// Returns the files that git tracks and that match `patterns`, relative to the workspace; all
/// files if there are no patterns.
pub(super) fn tracked(patterns: &[&str]) -> Result<Vec<String>> {
    let files = process::stdout(
        Command::new("git")
            .arg("ls-files")
            .args(patterns)
            .current_dir(workspace::root()),
    )?;
    Ok(files.lines().map(str::to_owned).collect())
}
