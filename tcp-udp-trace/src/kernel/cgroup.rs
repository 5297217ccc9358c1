//! Finds the root of cgroup v2, where programs see every socket of the machine, and the ids of
//! cgroups.

use std::{
    collections::{HashMap, VecDeque},
    ffi::OsStr,
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
            "cgroup v2 is not mounted: grant CAP_SYS_ADMIN, or mount it at a folder of its own \
             (mkdir /run/cgroup2 && mount -t cgroup2 none /run/cgroup2)",
        )
    })
}

/// Returns the id of a cgroup, by the path of its folder or the one that `/proc/PID/cgroup` shows.
///
/// # Errors
///
/// A message that says why there is no such cgroup.
pub(super) fn id_of(path: &Path) -> Result<u64, String> {
    find(path).map(|(_, id)| id)
}

/// Opens the folder of a cgroup, as [`id_of`] finds it. Returns the id as well.
///
/// # Errors
///
/// The same.
pub(super) fn open(path: &Path) -> Result<(File, u64), String> {
    let (path, _) = find(path)?;
    let folder = File::open(path).and_then(|folder| Ok((folder.metadata()?.ino(), folder)));
    let (id, folder) = folder.map_err(|error| format!("its folder cannot be opened: {error}"))?;
    Ok((folder, id))
}

/// Returns the folder of the cgroup with this id.
///
/// # Errors
///
/// A message that says why there is no such cgroup.
pub(super) fn path_of(id: u64) -> Result<PathBuf, String> {
    let mounts = mounts().map_err(|error| format!("the mounts cannot be read: {error}"))?;
    let mut mounts = mounts.into_iter().filter(|mount| mount.is_v2);
    let path = mounts.find_map(|Mount { point, .. }| {
        let mut ids = HashMap::from([(id, None)]);
        search(&point, &mut ids);
        let path = ids.into_values().next()??;
        Some(folder_of(&point, &path))
    });
    path.ok_or_else(|| format!("there is no such cgroup{}", where_v2_is()))
}

/// Returns the folder of a cgroup and its id, by the path of its folder or the one that
/// `/proc/PID/cgroup` shows.
fn find(path: &Path) -> Result<(PathBuf, u64), String> {
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        return Err("not an absolute path without `..`".into());
    }
    match statfs(path).map(|system| system.filesystem_type()) {
        Ok(CGROUP2_SUPER_MAGIC) => {
            let id = folder_id(path).ok_or(NO_FOLDER)?;
            return Ok((path.to_owned(), id));
        }
        Ok(CGROUP_SUPER_MAGIC) => return Err(of_v1(path)),
        _ => {}
    }
    let (v2, v1): (Vec<_>, Vec<_>) = mounts()
        .map_err(|error| format!("the mounts cannot be read: {error}"))?
        .into_iter()
        .filter(|mount| mount.root == "/")
        .partition(|mount| mount.is_v2);
    let below = |mount: &Mount| folder_of(&mount.point, path);
    if v2.is_empty() {
        return Err(
            "cgroup v2 is not mounted, or not at the root of this cgroup namespace: \
                    then a cgroup is named by its folder, below the mount point"
                .into(),
        );
    }
    let mut folders = v2.iter().map(below);
    if let Some(found) = folders.find_map(|path| folder_id(&path).map(|id| (path, id))) {
        return Ok(found);
    }
    match v1.iter().map(below).find(|path| path.is_dir()) {
        Some(path) => Err(of_v1(&path)),
        None => Err(format!("there is no such cgroup{}", where_v2_is())),
    }
}

/// The hierarchies of cgroups that `/proc/PID/cgroup` shows: each with its controllers or its name,
/// and the path of the process's cgroup.
fn hierarchies(shown: &[u8]) -> impl Iterator<Item = (&[u8], &Path)> {
    shown.split(|&byte| byte == b'\n').filter_map(|line| {
        let mut fields = line.splitn(3, |&byte| byte == b':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        Some((controllers, Path::new(OsStr::from_bytes(path))))
    })
}

/// Returns whether a hierarchy has this name or controller. That of cgroup v2 has an empty one.
fn is_of(hierarchy: &[u8], wanted: &[u8]) -> bool {
    hierarchy.split(|&byte| byte == b',').any(|of| of == wanted)
}

/// Finds the paths of cgroups.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Paths {
    /// The machine uses cgroup v1, where a process has a cgroup in each hierarchy. Only
    /// `/proc/PID/cgroup` has their paths.
    ByProcess,
    /// The machine uses cgroup v2 only. This is its first folder, if it is mounted.
    ById(Option<PathBuf>),
}

/// The hierarchies of cgroup v1 that assign processes to containers and services.
const SYSTEMD: &[u8] = b"name=systemd";
const MEMORY: &[u8] = b"memory";

/// The maximum number of folders that one search visits.
const MAX_FOLDERS: usize = 65_536;

impl Paths {
    /// Finds the hierarchies that this machine uses.
    pub(crate) fn find() -> Self {
        let own = fs::read("/proc/thread-self/cgroup").unwrap_or_default();
        let is_v1 = |(of, _): (&[u8], _)| is_of(of, SYSTEMD) || is_of(of, MEMORY);
        if hierarchies(&own).any(is_v1) {
            return Self::ByProcess;
        }
        let v2 = mounts().unwrap_or_default();
        let mut v2 = v2.into_iter().filter(|mount| mount.is_v2);
        Self::ById(v2.find_map(|Mount { root, point, .. }| {
            (root == "/" || is_machines_root(&point)).then_some(point)
        }))
    }

    /// Returns the path of a process's cgroup on a machine that uses cgroup v1, from its
    /// `/proc/PID/cgroup`.
    pub(crate) fn of_process(shown: &[u8]) -> Option<PathBuf> {
        let path_in = |wanted: &[u8]| {
            let mut all = hierarchies(shown);
            all.find_map(|(of, path)| is_of(of, wanted).then_some(path))
        };
        let paths = [SYSTEMD, b"", MEMORY].map(path_in);
        let mut known = paths.into_iter().flatten().filter(|path| is_inside(path));
        // A process is often at the root of a hierarchy that is not used.
        let first = known.clone().find(|&path| path != Path::new("/"));
        first.or_else(|| known.next()).map(Path::to_owned)
    }

    /// Returns the paths of the cgroups of cgroup v2 that have these ids, without those of cgroups
    /// that have been removed. Each id has the `/proc/PID/cgroup` of a process that was in the
    /// cgroup, or nothing.
    pub(crate) fn of_ids(&self, ids: HashMap<u64, Vec<u8>>) -> HashMap<u64, Option<PathBuf>> {
        let root = match self {
            Self::ById(root) => root.as_deref(),
            Self::ByProcess => None,
        };
        let paths = ids.into_iter().map(|(id, shown)| {
            let mut paths = hierarchies(&shown).filter(|(of, _)| of.is_empty());
            let path = paths.find_map(|(_, path)| {
                let folder = folder_of(root?, path);
                (is_inside(path) && folder_id(&folder) == Some(id)).then_some(path)
            });
            (id, path.map(Path::to_owned))
        });
        let mut paths = paths.collect();
        if let Some(root) = root {
            search(root, &mut paths);
        }
        paths
    }
}

/// Returns the folder of a cgroup in the hierarchy that is mounted at `root`.
fn folder_of(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// Returns whether a path begins at the root that this process sees, and the cgroup still exists.
fn is_inside(path: &Path) -> bool {
    path.is_absolute()
        && !path.starts_with("/..")
        && !path.as_os_str().as_bytes().ends_with(b" (deleted)")
}

/// Visits the folders of a hierarchy until the paths of all cgroups are found.
fn search(root: &Path, ids: &mut HashMap<u64, Option<PathBuf>>) {
    let mut unknown = ids.values().filter(|path| path.is_none()).count();
    let mut folders = VecDeque::from([PathBuf::from("/")]);
    let mut visited = 0;
    while let Some(path) = folders.pop_front() {
        visited += 1;
        if unknown == 0 || visited > MAX_FOLDERS {
            return;
        }
        let folder = folder_of(root, &path);
        let Ok(metadata) = fs::metadata(&folder) else {
            continue;
        };
        if let Some(found @ None) = ids.get_mut(&metadata.ino()) {
            *found = Some(path.clone());
            unknown -= 1;
        }
        /// The links of a folder that has none below it.
        const NONE_BELOW: u64 = 2;
        if metadata.nlink() <= NONE_BELOW {
            continue;
        }
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push_back(path.join(entry.file_name()));
            }
        }
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
