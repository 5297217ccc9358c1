//! Checks the requirements of a start in the process, before any request to the kernel.
//!
//! The errors are better, and there are two other reasons. aya probes the features of the kernel
//! once in the life of a process. Without these checks, it would mistake missing privileges or
//! descriptors for missing features, also at the next start. And aya raises the limit on locked
//! memory for the whole process if it takes that for the cause of an error.

use std::{fs::File, io};

use aya::util::KernelVersion;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::privileges::{Privileges, SYS_ADMIN};
use crate::{
    error::{Error, ErrorKind, ResultExt as _},
    event::Protocol,
};

/// More descriptors than a tracer has open at any time.
const DESCRIPTORS: usize = 80;

/// Checks all requirements.
pub(super) fn check(protocol: Protocol) -> Result<(), Error> {
    check_capabilities(protocol)?;
    check_locked_memory()?;
    check_descriptors()
}

fn check_capabilities(protocol: Protocol) -> Result<(), Error> {
    let privileges = Privileges::of_this_thread();
    match privileges.missing(protocol) {
        // Most kernels accept CAP_SYS_ADMIN instead of the others.
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
    let message =
        format!("a tracer needs {DESCRIPTORS} file descriptors: raise the limit (`ulimit -n`)");
    all.map(drop).or_error(ErrorKind::Load, message)
}
