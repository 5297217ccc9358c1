//! Installs the Debian package in a clean root file system, and uses it there.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::{program::PROGRAM, traffic};
use crate::{apt, process, workspace};

/// Verifies the unit.
const PACKAGES: &str = "systemd";
const UNIT: &str = "tcp-udp-trace-otlp.service";

/// Installs `package`, checks its files, its unit and its program, and removes it.
pub(super) fn test(package: &Path, version: &str) -> Result<()> {
    let cache = workspace::cache_dir().join("package-root");
    fs::create_dir_all(&cache).context("cannot create the cache")?;
    let archive = cache.join("root.tar");
    apt::root_file_system(PACKAGES, &archive)?;
    let root = Root(cache.join("root"));
    workspace::recreate(&root.0)?;
    process::stdout(
        Command::new("tar")
            .arg("-xf")
            .arg(&archive)
            .arg("-C")
            .arg(&root.0),
    )?;
    fs::copy(package, root.0.join("package.deb")).context("cannot copy the package")?;

    root.run("dpkg --install /package.deb")?;
    root.run(&format!("dpkg --verify {PROGRAM}"))?;
    let shown = root.run(&format!("{PROGRAM} --version"))?;
    ensure!(shown.trim() == format!("{PROGRAM} {version}"), "{shown}");
    for file in [
        "/usr/share/man/man1/tcp-udp-trace.1.gz",
        "/usr/share/man/man1/tcp-udp-trace-doctor.1.gz",
        "/usr/share/bash-completion/completions/tcp-udp-trace",
        "/usr/share/doc/tcp-udp-trace/copyright",
    ] {
        root.run(&format!("test -s {file}"))?;
    }
    root.run(&format!(
        "systemd-analyze verify /usr/lib/systemd/system/{UNIT}"
    ))?;
    // The machine's administrator decides where the data goes, and enables it then.
    root.run(&format!("! systemctl is-enabled {UNIT}"))?;
    root.run(&format!("systemctl enable {UNIT}"))?;
    root.run(&format!("{PROGRAM} doctor"))?;
    traffic::is_traced(root.command(&format!("exec {PROGRAM} \"$@\"")))
        .context("the installed program does not trace")?;
    root.run(&format!("dpkg --purge {PROGRAM}"))?;
    let left = root.run(&format!(
        "find / -xdev -name '*{PROGRAM}*' -not -path '/var/log/*'"
    ))?;
    ensure!(
        left.is_empty(),
        "after the removal of the package there is:\n{left}"
    );
    eprintln!("the Debian package works in a clean root file system");
    Ok(())
}

/// A root file system, which is removed in the end.
struct Root(PathBuf);

impl Root {
    /// Returns a command that runs a line of shell. Its mounts and processes end with it.
    fn command(&self, line: &str) -> Command {
        let mut command = process::isolated(RUN);
        command.arg(&self.0).arg(line);
        command
    }

    fn run(&self, line: &str) -> Result<String> {
        eprintln!("# {line}");
        process::stdout(&mut self.command(line))
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        // The next run removes the rest.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// `$0` root file system, `$1` line of shell, then its arguments.
const RUN: &str = r#"
root=$0
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
line=$1
shift
exec chroot "$root" sh -euc "$line" sh "$@"
"#;
