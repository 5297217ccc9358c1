//! What to say when the kernel refuses.

use std::{error::Error as StdError, io};

use aya::EbpfError;
use nix::errno::Errno;

use super::privileges::Privileges;
use crate::{Error, ErrorKind, Protocol};

/// The object could not be loaded.
pub(super) fn of_map(error: &EbpfError, protocol: Protocol) -> Error {
    let errno = match errno(error) {
        // So says SELinux.
        Some(Errno::EACCES) => Some(Errno::EPERM),
        errno => errno,
    };
    refusal(errno, "a map", protocol, ErrorKind::Load)
}

/// A program could not be loaded.
pub(super) fn of_program(
    error: &(dyn StdError + 'static),
    what: &str,
    protocol: Protocol,
) -> Error {
    refusal(errno(error), what, protocol, ErrorKind::Load)
}

/// The buffer of a CPU could not be made.
pub(super) fn of_perf_buffer(error: &io::Error) -> Error {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EACCES) => Error::new(
            ErrorKind::Permission,
            "the kernel refused a perf buffer: grant CAP_PERFMON",
        ),
        // The event was allowed, its memory is not.
        Some(Errno::EPERM) => Error::new(
            ErrorKind::Permission,
            "the perf buffers are over the limit on locked memory: lower ring_bytes, raise `ulimit -l` or \
             kernel.perf_event_mlock_kb, or grant CAP_IPC_LOCK",
        ),
        _ => Error::new(ErrorKind::Load, "the kernel refused a perf buffer"),
    }
}

/// A signal has no hook that there is no tracing without, or there was a want of something.
pub(super) fn of_signal(
    error: &(dyn StdError + 'static),
    signal: &str,
    protocol: Protocol,
) -> Error {
    let what = format!("hooks for the signal `{signal}`");
    refusal(errno(error), &what, protocol, ErrorKind::Attach)
}

/// Whether it is no answer to what was asked: at another time it may be granted.
pub(super) fn is_want(error: &(dyn StdError + 'static)) -> bool {
    matches!(
        errno(error),
        Some(Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE)
    )
}

fn refusal(errno: Option<Errno>, what: &str, protocol: Protocol, otherwise: ErrorKind) -> Error {
    let privileges = Privileges::of_this_thread();
    let (kind, why) = match errno {
        Some(Errno::ENOMEM) => (
            ErrorKind::Load,
            "no memory: lower max_sockets, max_flows or ring_bytes, or raise the memory limit of the cgroup".to_owned(),
        ),
        Some(Errno::EMFILE | Errno::ENFILE) => (
            ErrorKind::Load,
            "too many files are open: raise the limit (`ulimit -n`)".to_owned(),
        ),
        Some(Errno::ENOSYS) if !privileges.has_seccomp_filter() => (
            ErrorKind::Unsupported,
            "it has no bpf(2): a kernel with CONFIG_BPF_SYSCALL=y is needed".to_owned(),
        ),
        // Not EACCES: that is the verifier's answer to a program that it does not like.
        Some(Errno::EPERM | Errno::ENOSYS) => (ErrorKind::Permission, privileges.causes(protocol)),
        // The verifier knows no function then that reads the kernel's memory.
        _ if privileges.is_confidential() => (ErrorKind::Permission, privileges.causes(protocol)),
        _ => return Error::new(otherwise, format!("the kernel refused {what}")),
    };
    Error::new(kind, format!("the kernel refused {what}: {why}"))
}

/// What the operating system said at the end of the chain.
fn errno(error: &(dyn StdError + 'static)) -> Option<Errno> {
    let mut error = Some(error);
    while let Some(e) = error {
        if let Some(io) = e.downcast_ref::<io::Error>() {
            return io.raw_os_error().map(Errno::from_raw);
        }
        error = e.source();
    }
    None
}
