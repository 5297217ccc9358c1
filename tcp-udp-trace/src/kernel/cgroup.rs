//! The root of cgroup v2, where programs see every socket of the machine.

use std::{
    fs::{self, File},
    io,
};

/// Opens the root of the cgroup v2 hierarchy, wherever it is mounted.
///
/// Inside a cgroup namespace this is the namespace's root: only its sockets are seen there.
///
/// # Errors
///
/// It is not mounted.
pub(super) fn root() -> io::Result<File> {
    // Fields: id, parent, device, root, mount point, options, …, "-", type, … (proc(5)).
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo")?;
    mounts
        .lines()
        .filter_map(|line| {
            let (mount, kind) = line.split_once(" - ")?;
            let mut fields = mount.split(' ').skip(3);
            let (root, point) = (fields.next()?, fields.next()?);
            (root == "/" && kind.starts_with("cgroup2 ")).then_some(point)
        })
        .find_map(|point| File::open(point).ok())
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                "cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup",
            )
        })
}
