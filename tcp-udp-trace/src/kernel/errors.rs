//! The errors for refusals of the kernel.

use std::{error::Error as StdError, io};

use aya::{EbpfError, programs::ProgramError};
use nix::errno::Errno;

use super::{
    plan::HookPoint,
    privileges::{NET_ADMIN, Privileges},
};
use crate::{
    error::{Error, ErrorKind},
    event::Protocol,
};

/// Returns the error of an object that could not be loaded.
pub(super) fn of_map(error: &EbpfError, protocol: Protocol) -> Error {
    let errno = match errno(error) {
        // SELinux returns this errno.
        Some(Errno::EACCES) => Some(Errno::EPERM),
        errno => errno,
    };
    refusal(errno, "a map", protocol, ErrorKind::Load)
}

/// Returns the error of a program that could not be loaded.
pub(super) fn of_program(
    error: &(dyn StdError + 'static),
    refused: &str,
    protocol: Protocol,
) -> Error {
    refusal(errno(error), refused, protocol, ErrorKind::Load)
}

/// Returns the error of a perf buffer that could not be created.
pub(super) fn of_perf_buffer(error: &io::Error) -> Error {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EACCES) => Error::new(
            ErrorKind::Permission,
            "the kernel refused a perf buffer: grant CAP_PERFMON",
        ),
        // The kernel allowed the event, but not its memory.
        Some(Errno::EPERM) => Error::new(
            ErrorKind::Permission,
            "the perf buffers are over the limit on locked memory: lower ring_bytes, raise `ulimit -l` or \
             kernel.perf_event_mlock_kb, or grant CAP_IPC_LOCK",
        ),
        _ => Error::new(ErrorKind::Load, "the kernel refused a perf buffer"),
    }
}

/// Returns the error if a required signal could not be attached, or a resource ran out.
pub(super) fn of_signal(
    error: &(dyn StdError + 'static),
    signal: &str,
    protocol: Protocol,
) -> Error {
    let hooks = format!("hooks for the signal `{signal}`");
    refusal(errno(error), &hooks, protocol, ErrorKind::Attach)
}

/// Returns the same error, with the hook that the kernel refused.
pub(super) fn of_hook(
    error: &ProgramError,
    signal: &str,
    point: HookPoint,
    protocol: Protocol,
) -> Error {
    if !is_taken(point, error, &Privileges::of_this_thread()) {
        return of_signal(error, signal, protocol);
    }
    taken(signal, point)
}

fn taken(signal: &str, point: HookPoint) -> Error {
    let message = format!(
        "the kernel refused hooks for the signal `{signal}`: another program has {point} alone, attached with \
         flags 0 (`bpftool cgroup tree` shows it): attach that one with BPF_F_ALLOW_MULTI, or detach it"
    );
    Error::new(ErrorKind::Attach, message)
}

/// Returns whether another program holds this hook exclusively.
///
/// The kernel has loaded the program, and returns EPERM for the attachment. There are two reasons
/// for that: another program (`__cgroup_bpf_attach`), and a missing CAP_NET_ADMIN
/// (`bpf_prog_attach_check_attach_type`).
pub(super) fn is_taken(point: HookPoint, error: &ProgramError, privileges: &Privileges) -> bool {
    let is_link =
        matches!(error, ProgramError::SyscallError(error) if error.call == "bpf_link_create");
    matches!(point, HookPoint::Cgroup(_))
        && is_link
        && errno(error) == Some(Errno::EPERM)
        && privileges.has(NET_ADMIN)
}

/// Returns the cost of a hook that another program holds exclusively.
pub(super) fn cost_of_taken(point: HookPoint) -> String {
    let cost = match point {
        HookPoint::Cgroup("recvmsg4") => {
            "from which IPv4 peer an unconnected socket receives is unknown"
        }
        HookPoint::Cgroup("recvmsg6") => {
            "from which IPv6 peer an unconnected socket receives is unknown"
        }
        HookPoint::Cgroup("connect4") => "connects of IPv4 sockets are not seen",
        HookPoint::Cgroup("connect6") => "connects of IPv6 sockets are not seen",
        _ => "not all is seen",
    };
    format!("another program has {point} alone, attached with flags 0: {cost}")
}

/// Returns whether the error is a transient shortage (memory, file descriptors) instead of a
/// refusal.
pub(super) fn is_resource_exhaustion(error: &(dyn StdError + 'static)) -> bool {
    matches!(
        errno(error),
        Some(Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE)
    )
}

fn refusal(errno: Option<Errno>, refused: &str, protocol: Protocol, otherwise: ErrorKind) -> Error {
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
        // Not EACCES, because the verifier returns it for a program that it rejects.
        Some(Errno::EPERM | Errno::ENOSYS) => (ErrorKind::Permission, privileges.causes(protocol)),
        // Under lockdown, the verifier has no function that reads the kernel's memory.
        _ if privileges.is_confidential() => (ErrorKind::Permission, privileges.causes(protocol)),
        _ => return Error::new(otherwise, format!("the kernel refused {refused}")),
    };
    Error::new(kind, format!("the kernel refused {refused}: {why}"))
}

/// Returns the errno at the end of the chain of sources.
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

/// Returns an error and its sources, in one line.
pub(super) fn chain(error: &dyn StdError) -> String {
    let mut line = error
        .to_string()
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned();
    let mut source = error.source();
    while let Some(error) = source {
        line.push_str(": ");
        line.push_str(error.to_string().lines().next().unwrap_or_default());
        source = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use aya::sys::SyscallError;

    use super::*;

    fn refused(call: &'static str, errno: Errno) -> ProgramError {
        ProgramError::SyscallError(SyscallError {
            call,
            io_error: io::Error::from_raw_os_error(errno as i32),
        })
    }

    #[test]
    fn a_hook_held_exclusively_is_named() {
        let egress = HookPoint::Cgroup("egress");
        let refused = refused("bpf_link_create", Errno::EPERM);
        assert!(is_taken(egress, &refused, &Privileges::of_root()));
        let error = taken("send", egress);
        assert_eq!(error.kind(), ErrorKind::Attach);
        let message = error.to_string();
        assert!(
            message.contains("another program has cgroup:egress alone"),
            "{message}"
        );
        let connect = cost_of_taken(HookPoint::Cgroup("connect6"));
        assert!(connect.contains("IPv6"), "{connect}");
    }

    #[test]
    fn other_refusals_name_no_exclusive_hook() {
        let egress = HookPoint::Cgroup("egress");
        let kprobe = HookPoint::Kprobe("security_sock_graft");
        for (point, call, errno) in [
            (kprobe, "bpf_link_create", Errno::EPERM),
            (egress, "bpf_prog_load", Errno::EPERM),
            (egress, "bpf_link_create", Errno::ENOMEM),
        ] {
            let is_taken = is_taken(point, &refused(call, errno), &Privileges::of_root());
            assert!(!is_taken, "{call} {errno}");
        }
        // Linux 5.10 accepts CAP_SYS_ADMIN for the program, but not for its attachment.
        let refused = refused("bpf_link_create", Errno::EPERM);
        assert!(!is_taken(egress, &refused, &Privileges::none()));
    }
}
