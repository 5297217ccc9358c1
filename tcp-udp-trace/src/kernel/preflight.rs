//! What a start needs of the process, looked at before the kernel is asked for anything.
//!
//! It makes the better error, and more: aya tries once in the life of a process what the kernel can do, and would take
//! a want of privileges or descriptors for a want of the kernel, also at the next start. And it raises the limit on locked memory of the
//! whole process where it believes that to be in the way.

use std::{fs::File, io};

use aya::util::KernelVersion;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::privileges::{Privileges, SYS_ADMIN};
use crate::{
    error::{Error, ErrorKind, ResultExt as _},
    event::Protocol,
};

/// More than a tracer has open at any time.
const DESCRIPTORS: usize = 80;

/// Whether everything is there.
pub(super) fn check(protocol: Protocol) -> Result<(), Error> {
    check_capabilities(protocol)?;
    check_locked_memory()?;
    check_descriptors()
}

fn check_capabilities(protocol: Protocol) -> Result<(), Error> {
    let privileges = Privileges::of_this_thread();
    match privileges.missing(protocol) {
        // Most kernels take it for the others.
        Some(missing) if !privileges.has(SYS_ADMIN) => {
            Err(Error::new(ErrorKind::Permission, missing))
        }
        _ => Ok(()),
    }
}

fn check_locked_memory() -> Result<(), Error> {
    if KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(5, 11, 0)) {
        return Ok(());
    }
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((limit, _)) if limit != RLIM_INFINITY => Err(Error::new(
            ErrorKind::Permission,
            format!(
                "before Linux 5.11 maps count as locked memory, of which this process may have {limit} bytes: raise the limit \
                 (`ulimit -l unlimited`)"
            ),
        )),
        _ => Ok(()),
    }
}

fn check_descriptors() -> Result<(), Error> {
    let all: io::Result<Vec<_>> = (0..DESCRIPTORS).map(|_| File::open("/")).collect();
    let what =
        format!("a tracer needs {DESCRIPTORS} file descriptors: raise the limit (`ulimit -n`)");
    all.map(drop).or_error(ErrorKind::Load, what)
}
