//! tracefs tells the numbers of classic tracepoints, and is often not mounted: in containers, on fresh machines.

use std::{fs, io};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// Where aya looks for it.
const PLACES: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// Makes tracefs visible to the calling thread, and only to it: if nobody has mounted it, the thread gets a mount
/// namespace of its own and mounts it there. So call it from a thread that ends soon.
///
/// # Errors
///
/// It is there, but may not be read: that takes root or `CAP_DAC_READ_SEARCH`; or it cannot be mounted: that takes `CAP_SYS_ADMIN`.
pub(super) fn make_visible() -> io::Result<()> {
    if is_visible()? {
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNS)?;
    // Keeps our mount from propagating to the namespace we came from.
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
    mount(
        Some("nodev"),
        PLACES[0],
        Some("tracefs"),
        MsFlags::empty(),
        None::<&str>,
    )?;
    is_visible().map(drop)
}

fn is_visible() -> io::Result<bool> {
    for place in PLACES {
        if fs::exists(format!("{place}/events"))? {
            return Ok(true);
        }
    }
    Ok(false)
}
