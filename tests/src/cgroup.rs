//! Control groups of version 2.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process,
    thread::sleep,
    time::Duration,
};

use anyhow::Context as _;

/// A cgroup made for a test, removed with this value; its processes must have ended by then.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes a cgroup; `None` where cgroup2 is not mounted.
    pub fn new(name: &str) -> anyhow::Result<Option<Self>> {
        let Some(root) = mount_point() else {
            return Ok(None);
        };
        let path = root.join(format!("tut-{}-{name}", process::id()));
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Some(Self { path }))
    }

    /// Moves a process here.
    pub fn adopt(&self, pid: u32) -> anyhow::Result<()> {
        Ok(fs::write(self.path.join("cgroup.procs"), pid.to_string())?)
    }

    /// The id of the cgroup, which is its directory's inode number.
    pub fn id(&self) -> anyhow::Result<u64> {
        Ok(self.path.metadata()?.ino())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that was just reaped may still count as a member for a moment.
        for _ in 0..100 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            sleep(Duration::from_millis(20));
        }
        eprintln!("could not remove {}", self.path.display());
    }
}

/// The id of the cgroup that a process is in; `None` where it cannot be told.
#[must_use]
pub fn of_process(pid: u32) -> Option<u64> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(mount_point()?.join(path).metadata().ok()?.ino())
}

/// Where cgroup v2 is mounted.
#[must_use]
pub fn mount_point() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts
        .lines()
        .find_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
            [_, path, "cgroup2", ..] => Some(Path::new(path).to_owned()),
            _ => None,
        })
}
