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
/// Without `CAP_SYS_ADMIN` it cannot be mounted.
pub(super) fn make_visible() -> io::Result<()> {
    if PLACES
        .iter()
        .any(|place| fs::exists(format!("{place}/events")).unwrap_or(false))
    {
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
    Ok(())
}
