//! Finds the root of cgroup v2, where programs see every socket of the machine, and the ids of
//! cgroups.

use std::{
    fs::{self, File},
    io,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Component, Path, PathBuf},
};

use nix::sys::statfs::{CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, statfs};

use crate::event::escape::Escaped;

/// The note of hooks that may not see all sockets of the machine.
pub(super) const PARTIAL: &str = "in a cgroup namespace: only the sockets of its cgroups";

/// The root of the cgroup v2 hierarchy, as far as this process can see it.
pub(super) struct Root {
    pub(super) folder: File,
    /// This is the root of the machine. Inside a cgroup namespace, such as that of a container, the
    /// mounted hierarchy begins at the namespace's root, unless it was mounted outside.
    pub(super) is_whole: bool,
}

/// A mounted hierarchy of cgroups.
struct Mount {
    /// Its first folder, as the cgroup namespace of this process names it.
    root: String,
    point: PathBuf,
    is_v2: bool,
}

/// Returns the mounted hierarchies of cgroups, of both versions.
fn mounts() -> io::Result<Vec<Mount>> {
    // Fields: id, parent, device, root, mount point, options, …, "-", type, … (proc(5)).
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo")?;
    let mounts = mounts.lines().filter_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let is_v2 = kind.starts_with("cgroup2 ");
        (is_v2 || kind.starts_with("cgroup ")).then(|| Mount {
            root: root.into(),
            point: point.into(),
            is_v2,
        })
    });
    Ok(mounts.collect())
}

/// Opens the root at any mount point.
///
/// # Errors
///
/// cgroup v2 is not mounted.
pub(super) fn root() -> io::Result<Root> {
    let mut own = None;
    for Mount { root, point, .. } in mounts()?.into_iter().filter(|mount| mount.is_v2) {
        let Ok(folder) = File::open(&point) else {
            continue;
        };
        let is_whole = is_machines_root(&point);
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

/// Returns the id of a cgroup, by the path of its folder or the one that `/proc/PID/cgroup` shows.
///
/// # Errors
///
/// A message that says why there is no such cgroup.
pub(super) fn id_of(path: &Path) -> Result<u64, String> {
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        return Err("not an absolute path without `..`".into());
    }
    match statfs(path).map(|system| system.filesystem_type()) {
        Ok(CGROUP2_SUPER_MAGIC) => return folder_id(path).ok_or_else(|| NO_FOLDER.into()),
        Ok(CGROUP_SUPER_MAGIC) => return Err(of_v1(path)),
        _ => {}
    }
    let (v2, v1): (Vec<_>, Vec<_>) = mounts()
        .map_err(|error| format!("the mounts cannot be read: {error}"))?
        .into_iter()
        .filter(|mount| mount.root == "/")
        .partition(|mount| mount.is_v2);
    let below = |mount: &Mount| mount.point.join(path.strip_prefix("/").unwrap_or(path));
    if v2.is_empty() {
        return Err(
            "cgroup v2 is not mounted, or not at the root of this cgroup namespace: \
                    then a cgroup is named by its folder, below the mount point"
                .into(),
        );
    }
    if let Some(id) = v2.iter().map(below).find_map(|path| folder_id(&path)) {
        return Ok(id);
    }
    match v1.iter().map(below).find(|path| path.is_dir()) {
        Some(path) => Err(of_v1(&path)),
        None => Err(format!("there is no such cgroup{}", where_v2_is())),
    }
}

const NO_FOLDER: &str = "a cgroup is a folder";

fn of_v1(path: &Path) -> String {
    format!(
        "{} is of a cgroup v1 hierarchy, by which sockets are not known{}",
        Escaped(path.as_os_str().as_bytes()),
        where_v2_is()
    )
}

fn where_v2_is() -> String {
    let mounts = mounts().unwrap_or_default();
    match mounts.iter().find(|mount| mount.is_v2) {
        Some(mount) => format!("; cgroup v2 is mounted at {}", mount.point.display()),
        None => "; cgroup v2 is not mounted".into(),
    }
}

/// Returns the inode number of a folder, which is the id of its cgroup.
fn folder_id(path: &Path) -> Option<u64> {
    let metadata = fs::metadata(path).ok()?;
    metadata.is_dir().then(|| metadata.ino())
}

/// Returns whether a folder is the root of all cgroups, the only one without this file
/// (`Documentation/admin-guide/cgroup-v2.rst`).
fn is_machines_root(folder: &Path) -> bool {
    fs::exists(folder.join("cgroup.type")).is_ok_and(|exists| !exists)
}
