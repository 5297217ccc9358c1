//! What a thread sees of the file system, where it must not be what the rest of the process sees.
//!
//! aya looks for some things in fixed places, and there is no other way to tell it what is there. So a thread takes a mount namespace of its own,
//! in which they are as they should be. Call these functions from a thread that ends soon.

use std::{fs, io};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// Where aya looks for tracefs, which tells the numbers of classic tracepoints, and is often not mounted: in containers, on fresh machines.
const TRACEFS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// The folder of the kernel's BTF.
const BTF: &str = "/sys/kernel/btf";

/// Makes tracefs visible to the calling thread, and only to it: if nobody has mounted it, the thread gets a mount
/// namespace of its own and mounts it there.
///
/// # Errors
///
/// It is there, but may not be read: that takes root or `CAP_DAC_READ_SEARCH`; or it cannot be mounted: that takes `CAP_SYS_ADMIN`.
pub(super) fn make_tracefs_visible() -> io::Result<()> {
    if is_tracefs_visible()? {
        return Ok(());
    }
    mount_privately("tracefs", TRACEFS[0])?;
    is_tracefs_visible().map(drop)
}

/// Hides the kernel's BTF from the calling thread, and only from it.
///
/// # Errors
///
/// That takes `CAP_SYS_ADMIN`.
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

fn mount_privately(what: &str, place: &str) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    // Keeps our mount from propagating to the namespace we came from.
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
    let flags = MsFlags::empty();
    Ok(mount(
        Some("nodev"),
        place,
        Some(what),
        flags,
        None::<&str>,
    )?)
}
