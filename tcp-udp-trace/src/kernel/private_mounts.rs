//! Changes the mounts that one thread sees.
//!
//! aya looks for some files at fixed paths, and has no setting for them. So a thread enters a mount
//! namespace of its own, in which these paths are as needed. Call these functions from a thread
//! that ends soon.

use std::{fs, io};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// The paths at which aya looks for tracefs, which has the numbers of classic tracepoints. tracefs
/// is often not mounted: in containers, on fresh machines.
const TRACEFS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// The folder of the kernel's BTF.
const BTF: &str = "/sys/kernel/btf";

/// Makes tracefs visible to the calling thread only. If tracefs is not mounted, the thread enters a
/// mount namespace of its own and mounts it there.
///
/// # Errors
///
/// tracefs is mounted but may not be read, which needs root or `CAP_DAC_READ_SEARCH`. Or it cannot
/// be mounted, which needs `CAP_SYS_ADMIN`.
pub(super) fn make_tracefs_visible() -> io::Result<()> {
    if is_tracefs_visible()? {
        return Ok(());
    }
    mount_privately("tracefs", TRACEFS[0])?;
    is_tracefs_visible().map(drop)
}

/// Where the calling thread mounts cgroup v2. The folder exists on every machine.
const CGROUP: &str = "/sys/fs/cgroup";

/// Mounts cgroup v2 for the calling thread only.
///
/// # Errors
///
/// The thread lacks `CAP_SYS_ADMIN`.
pub(super) fn mount_cgroup_v2() -> io::Result<()> {
    mount_privately("cgroup2", CGROUP)
}

/// Hides the kernel's BTF from the calling thread only.
///
/// # Errors
///
/// The thread lacks `CAP_SYS_ADMIN`.
pub(super) fn hide_btf() -> io::Result<()> {
    mount_privately("tmpfs", BTF)
}

fn is_tracefs_visible() -> io::Result<bool> {
    for place in TRACEFS {
        if fs::exists(format!("{place}/events"))? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn mount_privately(file_system: &str, place: &str) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    // Keeps the mount from propagating to the previous namespace.
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
    let flags = MsFlags::empty();
    Ok(mount(
        Some("nodev"),
        place,
        Some(file_system),
        flags,
        None::<&str>,
    )?)
}
