//! The root of cgroup v2, where programs see every socket of the machine.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

/// Why less than the machine's sockets may be seen.
pub(super) const PARTIAL: &str = "in a cgroup namespace: only the sockets of its cgroups";

/// The root of the cgroup v2 hierarchy, as far as this process can see it.
pub(super) struct Root {
    pub(super) folder: File,
    /// It is the machine's. Inside a cgroup namespace, as containers have one, what is mounted begins at the namespace's root, unless it
    /// was mounted outside.
    pub(super) is_whole: bool,
}

/// Finds the root, wherever it is mounted.
///
/// # Errors
///
/// It is not mounted.
pub(super) fn root() -> io::Result<Root> {
    // Fields: id, parent, device, root, mount point, options, …, "-", type, … (proc(5)).
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo")?;
    let mounts = mounts.lines().filter_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        kind.starts_with("cgroup2 ").then_some((root, point))
    });
    let mut own = None;
    for (root, point) in mounts {
        let Ok(folder) = File::open(point) else {
            continue;
        };
        let is_whole = is_machines_root(Path::new(point));
        if is_whole {
            return Ok(Root { folder, is_whole });
        }
        if root == "/" {
            own.get_or_insert(Root { folder, is_whole });
        }
    }
    own.ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            "cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup",
        )
    })
}

/// Every cgroup has this file, but for the root of them all (`Documentation/admin-guide/cgroup-v2.rst`).
fn is_machines_root(folder: &Path) -> bool {
    fs::exists(folder.join("cgroup.type")).is_ok_and(|exists| !exists)
}
