//! Control groups.

use std::{
    env,
    fs::{self, File},
    io::Write as _,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process,
    thread::sleep,
    time::Duration,
};

use anyhow::Context as _;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::{mounts, suite::skip};

/// A cgroup made for a test. Dropping it removes the cgroup, whose processes must have ended.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes a cgroup. Returns `None` where cgroup2 is not mounted.
    pub fn new(name: &str) -> anyhow::Result<Option<Self>> {
        let Some(root) = mount_point() else {
            return Ok(None);
        };
        let path = root.join(format!("tut-{}-{name}", process::id()));
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Some(Self { path }))
    }

    /// Makes a cgroup below this one.
    pub fn below(&self, name: &str) -> anyhow::Result<Self> {
        let path = self.path.join(name);
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Self { path })
    }

    /// Moves a process here.
    pub fn adopt(&self, pid: u32) -> anyhow::Result<()> {
        Ok(fs::write(self.path.join("cgroup.procs"), pid.to_string())?)
    }

    /// Moves this process here until the returned value is dropped.
    pub fn enter(self) -> anyhow::Result<Entered> {
        let root = mount_point().context("no cgroup v2")?;
        self.adopt(process::id())?;
        let home = File::options()
            .write(true)
            .open(root.join("cgroup.procs"))?;
        Ok(Entered { home, cgroup: self })
    }

    /// Returns the path of the cgroup's directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the id of the cgroup, which is the inode number of its directory.
    pub fn id(&self) -> anyhow::Result<u64> {
        Ok(self.path.metadata()?.ino())
    }
}

/// Keeps this process in a cgroup. Dropping it moves the process to the root, and removes the
/// cgroup.
#[derive(Debug)]
pub struct Entered {
    /// An open file, because the path may have no cgroup2 mount when this is dropped.
    home: File,
    cgroup: Cgroup,
}

impl Entered {
    /// Returns the cgroup.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        write!(self.home, "{}", process::id()).unwrap();
    }
}

/// Gives the calling thread a mount namespace whose only cgroup v2 begins at the root of its cgroup
/// namespace.
pub fn mount_own() -> anyhow::Result<()> {
    mounts::make_private()?;
    while let Some(point) = mount_point() {
        umount2(&point, MntFlags::MNT_DETACH)?;
    }
    let (own, flags) = (env::temp_dir(), MsFlags::empty());
    Ok(mount(
        Some("none"),
        &own,
        Some("cgroup2"),
        flags,
        None::<&str>,
    )?)
}

/// A hybrid layout of cgroups in a mount namespace of the calling thread: cgroup v2 at [`UNIFIED`],
/// and a v1 hierarchy without controllers at [`V1`]. Dropping it removes the layout.
#[derive(Debug)]
pub struct Hybrid {
    /// Prevents other modules from making the value.
    _private: (),
}

/// The mount point of cgroup v2 in the hybrid layout.
pub const UNIFIED: &str = "/sys/fs/cgroup/unified";
/// The mount point of the v1 hierarchy.
pub const V1: &str = "/sys/fs/cgroup/tut";

impl Hybrid {
    /// Mounts the layout. Skips the test where the kernel has no cgroup v1.
    pub fn mount() -> anyhow::Result<Self> {
        const PLACE: &str = "/sys/fs/cgroup";
        mounts::make_private()?;
        let mount = |what, place: &str, kind: &str, flags, options: Option<&str>| {
            mount(Some("none"), place, what, flags, options).with_context(|| kind.to_string())
        };
        let none = MsFlags::empty();
        // Detaches the mounts that are there already.
        while umount2(PLACE, MntFlags::MNT_DETACH).is_ok() {}
        mount(Some("tmpfs"), PLACE, "tmpfs", none, None)?;
        for place in [UNIFIED, V1] {
            fs::create_dir(place)?;
        }
        mount(Some("cgroup2"), UNIFIED, "cgroup2", none, None)?;
        let options = format!("none,name=tut-{}", process::id());
        let v1 = mount(Some("cgroup"), V1, "cgroup v1", none, Some(&options));
        if let Err(error) = v1 {
            return skip(format_args!("no cgroup v1: {error:#}"));
        }
        Ok(Self { _private: () })
    }
}

impl Drop for Hybrid {
    fn drop(&mut self) {
        // The hierarchy ends with its last mount.
        umount2(V1, MntFlags::empty()).unwrap();
    }
}

/// A cgroup of either version with a memory limit. This process is in it until the value is
/// dropped.
#[derive(Debug)]
pub struct MemoryCgroup {
    cgroup: Option<Cgroup>,
    /// The cgroup that the process came from.
    home: PathBuf,
}

impl MemoryCgroup {
    /// Makes the cgroup and moves this process there. Skips the test where memory cannot be
    /// limited.
    pub fn enter(bytes: u64) -> anyhow::Result<Self> {
        const V1: &str = "/sys/fs/cgroup/memory";
        let (root, limit) = match mount_point() {
            _ if fs::exists(format!("{V1}/memory.limit_in_bytes"))? => {
                (PathBuf::from(V1), "memory.limit_in_bytes")
            }
            Some(root) => (root, "memory.max"),
            None => return skip("no cgroups"),
        };
        let groups = fs::read_to_string("/proc/self/cgroup")?;
        let mut paths = groups.lines().filter_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(":/")?;
            let expected = if limit == "memory.max" { "" } else { "memory" };
            (controllers == expected).then_some(path)
        });
        let home = root.join(paths.next().context("in no cgroup")?);
        let path = root.join(format!("tut-{}-memory", process::id()));
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        let cgroup = Cgroup { path };
        let limit = cgroup.path.join(limit);
        if !limit.exists() {
            return skip("cgroup v2 without memory");
        }
        fs::write(limit, bytes.to_string())?;
        cgroup.adopt(process::id())?;
        Ok(Self {
            cgroup: Some(cgroup),
            home,
        })
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        fs::write(self.home.join("cgroup.procs"), process::id().to_string()).unwrap();
        self.cgroup = None;
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // For a moment, a process that was just reaped may still count as a member.
        for _ in 0..100 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            sleep(Duration::from_millis(20));
        }
        eprintln!("could not remove {}", self.path.display());
    }
}

/// Returns the id of the cgroup that a process is in; `None` where it cannot be read.
#[must_use]
pub fn of_process(pid: u32) -> Option<u64> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(mount_point()?.join(path).metadata().ok()?.ino())
}

/// Returns the mount point of cgroup v2.
#[must_use]
pub fn mount_point() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/thread-self/mounts").ok()?;
    mounts
        .lines()
        .find_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
            [_, path, "cgroup2", ..] => Some(Path::new(path).to_owned()),
            _ => None,
        })
}
