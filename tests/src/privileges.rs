//! Giving up privileges.

use caps::CapSet;
pub use caps::Capability;
use nix::{
    sys::prctl,
    unistd::{Gid, Uid, setgroups, setresgid, setresuid},
};

/// An unprivileged user.
pub const NOBODY: u32 = 65_534;

/// The process is another user's from now on and has these capabilities, no more: as a program that a file's
/// capabilities (`setcap`) gave them. Those of its other threads go, too, but they get none of these.
pub fn become_nobody(capabilities: &[Capability]) -> anyhow::Result<()> {
    prctl::set_keepcaps(true)?;
    let (gid, uid) = (Gid::from_raw(NOBODY), Uid::from_raw(NOBODY));
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    keep(capabilities)
}

/// The calling thread, and those that it starts from now on, have no more than these capabilities.
pub fn keep(capabilities: &[Capability]) -> anyhow::Result<()> {
    let few = capabilities.iter().copied().collect();
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &few)?;
    }
    Ok(())
}
