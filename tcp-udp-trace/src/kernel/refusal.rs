//! What to say when the kernel refuses.

use std::{error::Error as StdError, fs, io};

use aya::{EbpfError, maps::MapError};

use crate::{Error, ErrorKind, Protocol};

const EPERM: i32 = 1;
const ENOMEM: i32 = 12;
const EACCES: i32 = 13;

/// A capability, by its number in `capability.h`.
type Capability = (u32, &'static str);
const SYS_ADMIN: u32 = 21;
const BPF: Capability = (39, "CAP_BPF");
const PERFMON: Capability = (38, "CAP_PERFMON");
/// For programs at a cgroup.
const NET_ADMIN: Capability = (12, "CAP_NET_ADMIN");

fn needed(protocol: Protocol) -> &'static [Capability] {
    match protocol {
        Protocol::Tcp => &[BPF, PERFMON],
        Protocol::Udp => &[BPF, PERFMON, NET_ADMIN],
    }
}

/// The object could not be loaded.
pub(super) fn of_map(error: &EbpfError, protocol: Protocol) -> Error {
    let errno = match error {
        EbpfError::MapError(MapError::CreateError { io_error, .. }) => io_error.raw_os_error(),
        _ => None,
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
    match error.raw_os_error() {
        Some(EACCES) => Error::new(
            ErrorKind::Permission,
            "the kernel refused a perf buffer: grant CAP_PERFMON",
        ),
        // The event was allowed, its memory is not.
        Some(EPERM) => Error::new(
            ErrorKind::Permission,
            "the perf buffers are over the limit on locked memory: lower ring_bytes, raise `ulimit -l` or \
             kernel.perf_event_mlock_kb, or grant CAP_IPC_LOCK",
        ),
        _ => Error::new(ErrorKind::Load, "the kernel refused a perf buffer"),
    }
}

/// No hook of a signal could be attached that there is no tracing without.
pub(super) fn of_signal(
    error: &(dyn StdError + 'static),
    signal: &str,
    protocol: Protocol,
) -> Error {
    let what = format!("every hook for the signal `{signal}`");
    refusal(errno(error), &what, protocol, ErrorKind::Attach)
}

fn refusal(errno: Option<i32>, what: &str, protocol: Protocol, otherwise: ErrorKind) -> Error {
    match errno {
        // Not EACCES: that is the verifier's answer to a program that it does not like.
        Some(EPERM) => Error::new(ErrorKind::Permission, permission(what, needed(protocol))),
        Some(ENOMEM) => Error::new(
            ErrorKind::Load,
            format!(
                "the kernel has no memory for {what}: lower max_sockets, max_flows or ring_bytes, or raise the memory \
                 limit of the cgroup"
            ),
        ),
        _ => Error::new(otherwise, format!("the kernel refused {what}")),
    }
}

/// What permission is missing, as far as it can be told.
fn permission(what: &str, needed: &[Capability]) -> String {
    let effective = effective_capabilities();
    let has = |capability: u32| effective.is_none_or(|set| set & (1_u64 << capability) != 0);
    let missing: Vec<_> = needed
        .iter()
        .filter(|(capability, _)| !has(*capability) && !has(SYS_ADMIN))
        .map(|(_, name)| *name)
        .collect();
    let all: Vec<_> = needed.iter().map(|(_, name)| *name).collect();
    let all = all.join(" and ");
    if missing.is_empty() {
        format!(
            "the kernel refused {what} although {all} are there: before Linux 5.11 raise the limit on locked memory \
             (`ulimit -l unlimited`); otherwise a container's seccomp filter or kernel lockdown forbids it"
        )
    } else {
        let missing = missing.join(" and ");
        format!("the kernel refused {what}: {missing} missing; run as root, or grant {all}")
    }
}

/// The calling thread's effective capabilities, as a set of bits.
fn effective_capabilities() -> Option<u64> {
    let status = fs::read_to_string("/proc/thread-self/status").ok()?;
    let hex = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(hex.trim(), 16).ok()
}

/// What the operating system said at the end of the chain.
fn errno(error: &(dyn StdError + 'static)) -> Option<i32> {
    let mut error = Some(error);
    while let Some(e) = error {
        if let Some(io) = e.downcast_ref::<io::Error>() {
            return io.raw_os_error();
        }
        error = e.source();
    }
    None
}
