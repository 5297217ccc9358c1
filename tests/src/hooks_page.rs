//! Compares hooks with the table in docs/kernels.md.

use std::{collections::BTreeSet, env::consts::ARCH, fs, path::Path};

use anyhow::{Context as _, ensure};
use tcp_udp_trace::Hook;

const PAGE: &str = include_str!("../../docs/kernels.md");
/// The kernels follow after these columns: signal, hooks and cost.
const FIRST_KERNEL: usize = 3;

/// Checks that these hooks, attached to the running kernel, are those in the table.
pub fn check(hooks: &[Hook]) -> anyhow::Result<()> {
    let table: Vec<Vec<&str>> = PAGE
        .lines()
        .filter(|line| line.starts_with("| `") || line.starts_with("| signal |"))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    let (header, rows) = table.split_first().context("no table in the page")?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let version: Vec<_> = release.split('.').take(2).collect();
    let has_kprobes = Path::new("/sys/bus/event_source/devices/kprobe").exists();
    let flavour = match (has_kprobes, release.contains("-rt-")) {
        (false, _) => " hardened",
        (true, true) => "-rt",
        (true, false) => "",
    };
    let kernel = version.join(".") + flavour;
    let columns = || header.iter().skip(FIRST_KERNEL);
    let position = |of: &str| {
        columns().position(|names| {
            let (names, arch) = names.split_once(" on ").unwrap_or((names, ""));
            arch == of && names.split(", ").any(|name| name == kernel)
        })
    };
    // An architecture has a column only for the kernels that differ there.
    let Some(column) = position(ARCH).or_else(|| position("")) else {
        eprintln!("docs/kernels.md has no column for {kernel}: nothing is compared");
        return Ok(());
    };
    let column = FIRST_KERNEL + column;
    let mut compared = 0;
    for Hook {
        signal, programs, ..
    } in hooks
    {
        let name = format!("`{signal}`");
        let choices: Vec<Vec<String>> = rows
            .iter()
            .filter(|row| row[0].starts_with(&name) && row.get(column) == Some(&"●"))
            .map(|row| {
                row[1]
                    .split(", ")
                    .map(|hook| hook.replace('`', ""))
                    .collect()
            })
            .collect();
        // The table leaves out the hooks that are the same everywhere.
        if choices.is_empty() && ["snapshot", "sample", "buffer"].contains(&signal.as_str()) {
            continue;
        }
        let taken: BTreeSet<_> = programs.iter().collect();
        let firsts: BTreeSet<_> = choices.iter().filter_map(|choice| choice.first()).collect();
        let all: BTreeSet<_> = choices.iter().flatten().collect();
        ensure!(
            firsts.is_subset(&taken) && taken.is_subset(&all),
            "docs/kernels.md says of {signal} on {kernel}: {choices:?}, but it is {programs:?}"
        );
        compared += 1;
    }
    ensure!(compared >= 4, "only {compared} signals were compared");
    Ok(())
}
