//! The files that the rules read.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};

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

/// Returns the text of a tracked file; `None` if it is a symbolic link to another file of the tree.
pub(super) fn read(file: &str) -> Result<Option<String>> {
    let path = workspace::root().join(file);
    if path.is_symlink() {
        return Ok(None);
    }
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {file}"))?;
    Ok(Some(text))
}
