//! Functions that give up privileges.

use caps::CapSet;
pub use caps::Capability;
use nix::{
    sys::prctl,
    unistd::{Gid, Uid, setgroups, setresgid, setresuid},
};

/// The user id of an unprivileged user.
pub const UNPRIVILEGED: u32 = 65_534;

/// Makes the process another user's, with these capabilities only, like a program that has them
/// from its file (`setcap`). Its other threads lose theirs, and get none of these.
pub fn become_unprivileged(capabilities: &[Capability]) -> anyhow::Result<()> {
    prctl::set_keepcaps(true)?;
    let (gid, uid) = (Gid::from_raw(UNPRIVILEGED), Uid::from_raw(UNPRIVILEGED));
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    keep(capabilities)
}

/// Limits the calling thread, and the threads that it starts later, to these capabilities.
pub fn keep(capabilities: &[Capability]) -> anyhow::Result<()> {
    let few = capabilities.iter().copied().collect();
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &few)?;
    }
    Ok(())
}
