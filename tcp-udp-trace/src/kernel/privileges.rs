//! The privileges of the calling thread, and the mechanisms that restrict them.

use std::fs;

use crate::event::Protocol;

/// A capability and its purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capability {
    /// Its number in `capability.h`.
    number: u32,
    pub(super) name: &'static str,
    purpose: &'static str,
}

#[rustfmt::skip]
pub(super) const NET_ADMIN: Capability =
    Capability { number: 12, name: "CAP_NET_ADMIN", purpose: "for programs at the cgroup" };
#[rustfmt::skip]
pub(super) const SYS_PTRACE: Capability =
    Capability { number: 19, name: "CAP_SYS_PTRACE", purpose: "to look into other users' processes" };
#[rustfmt::skip]
pub(super) const SYS_ADMIN: Capability =
    Capability { number: 21, name: "CAP_SYS_ADMIN", purpose: "for everything" };
#[rustfmt::skip]
const PERFMON: Capability =
    Capability { number: 38, name: "CAP_PERFMON", purpose: "for programs that read the kernel's memory" };
#[rustfmt::skip]
const BPF: Capability =
    Capability { number: 39, name: "CAP_BPF", purpose: "for eBPF at all" };

impl Capability {
    /// Returns the rule of an AppArmor profile that allows it, in quotes.
    fn apparmor_rule(&self) -> String {
        let name = self.name.trim_start_matches("CAP_").to_lowercase();
        format!("`capability {name}`")
    }
}

/// Returns the required capabilities.
fn needed(protocol: Protocol) -> &'static [Capability] {
    match protocol {
        Protocol::Tcp => &[BPF, PERFMON],
        Protocol::Udp => &[BPF, PERFMON, NET_ADMIN],
    }
}

/// The privileges of a thread.
#[derive(Debug)]
pub(super) struct Privileges {
    /// One bit for each effective capability.
    effective: u64,
    has_seccomp_filter: bool,
    is_in_user_namespace: bool,
    /// Kernel lockdown is in confidentiality mode.
    is_confidential: bool,
    /// The AppArmor profile that is enforced.
    apparmor_profile: Option<String>,
}

impl Privileges {
    pub(super) fn of_this_thread() -> Self {
        // Not every kernel has all these files.
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        Self::parse(
            &read("/proc/thread-self/status"),
            &read("/proc/thread-self/uid_map"),
            &read("/sys/kernel/security/lockdown"),
            &read("/proc/thread-self/attr/apparmor/current"),
        )
    }

    fn parse(status: &str, uid_map: &str, lockdown: &str, apparmor: &str) -> Self {
        let field = |name| {
            let mut values = status.lines().filter_map(|line| line.strip_prefix(name));
            values.next().map(str::trim)
        };
        let is_whole = |map: &str| map.split_whitespace().eq(["0", "0", "4294967295"]);
        Self {
            // If it cannot be read, let the kernel decide.
            effective: field("CapEff:")
                .and_then(|set| u64::from_str_radix(set, 16).ok())
                .unwrap_or(u64::MAX),
            has_seccomp_filter: field("Seccomp:") == Some("2"),
            is_in_user_namespace: !uid_map.is_empty() && !is_whole(uid_map),
            is_confidential: lockdown.contains("[confidentiality]"),
            apparmor_profile: apparmor
                .trim_end()
                .strip_suffix(" (enforce)")
                .map(str::to_owned),
        }
    }

    /// Returns all privileges.
    #[cfg(test)]
    pub(super) fn of_root() -> Self {
        Self::parse("CapEff:\t000001ffffffffff\n", "", "", "")
    }

    /// Returns no privileges.
    #[cfg(test)]
    pub(super) fn none() -> Self {
        Self::parse("CapEff:\t0000000000000000\n", "", "", "")
    }

    pub(super) fn has(&self, capability: Capability) -> bool {
        self.effective & (1 << capability.number) != 0
    }

    /// Returns a message that names the missing capabilities of a protocol.
    pub(super) fn missing(&self, protocol: Protocol) -> Option<String> {
        let needed = needed(protocol);
        let missing: Vec<_> = needed.iter().filter(|it| !self.has(**it)).collect();
        if missing.is_empty() {
            return None;
        }
        let missing = missing
            .iter()
            .map(|it| format!("{} ({})", it.name, it.purpose));
        let (missing, needed) = (join(missing), join(needed.iter().map(|it| it.name.into())));
        Some(format!(
            "{missing} missing: to trace {protocol}, run as root or grant {needed}"
        ))
    }

    /// Returns the possible causes if the kernel does not permit an operation.
    pub(super) fn causes(&self, protocol: Protocol) -> String {
        if let Some(missing) = self.missing(protocol) {
            return missing;
        }
        let mut causes = Vec::new();
        if self.is_confidential {
            causes.push(
                "kernel lockdown (confidentiality) keeps programs from reading the kernel's memory"
                    .to_owned(),
            );
        }
        if self.is_in_user_namespace {
            causes.push("capabilities of a user namespace do not count".to_owned());
        }
        if self.has_seccomp_filter {
            causes.push(
                "a seccomp filter, perhaps of a container, must allow bpf(2) and perf_event_open(2)"
                    .to_owned(),
            );
        }
        if let Some(profile) = &self.apparmor_profile {
            let rules: Vec<_> = needed(protocol)
                .iter()
                .map(Capability::apparmor_rule)
                .collect();
            causes.push(format!(
                "the AppArmor profile `{profile}` may forbid it: it must have the rules {}",
                rules.join(", ")
            ));
        }
        if causes.is_empty() {
            causes
                .push("a security module of the kernel may forbid it, such as SELinux".to_owned());
        }
        causes.join("; ")
    }

    pub(super) fn has_seccomp_filter(&self) -> bool {
        self.has_seccomp_filter
    }

    /// Returns whether lockdown keeps programs from reading the kernel's memory.
    pub(super) fn is_confidential(&self) -> bool {
        self.is_confidential
    }
}

fn join(names: impl Iterator<Item = String>) -> String {
    names.collect::<Vec<_>>().join(" and ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "Name:\tx\nCapEff:\t000001ffffffffff\nSeccomp:\t0\nSeccomp_filters:\t0\n";
    const ALL_USERS: &str = "         0          0 4294967295\n";
    const INTEGRITY: &str = "none [integrity] confidentiality\n";

    #[test]
    fn missing_capabilities_are_named_with_their_purpose() {
        // CAP_BPF alone.
        let few = Privileges::parse("CapEff:\t0000008000000000\n", ALL_USERS, "", "");
        assert_eq!(
            few.missing(Protocol::Udp).expect("two are"),
            "CAP_PERFMON (for programs that read the kernel's memory) and CAP_NET_ADMIN (for programs at the cgroup) \
             missing: to trace udp, run as root or grant CAP_BPF and CAP_PERFMON and CAP_NET_ADMIN"
        );
        let most = Privileges::parse("CapEff:\t000000c000000000\n", ALL_USERS, "", "");
        assert_eq!(most.missing(Protocol::Tcp), None);
        assert!(most.missing(Protocol::Udp).is_some());
        // If nothing can be read, the kernel decides.
        assert_eq!(
            Privileges::parse("", "", "", "").missing(Protocol::Udp),
            None
        );
    }

    #[test]
    fn refusals_despite_capabilities_have_other_causes() {
        let check = |status: &str, uid_map, lockdown, expected: &[&str]| {
            let causes = Privileges::parse(status, uid_map, lockdown, "").causes(Protocol::Udp);
            assert_eq!(causes.split("; ").count(), expected.len(), "{causes}");
            for (cause, expected) in causes.split("; ").zip(expected) {
                assert!(cause.contains(expected), "{causes}");
            }
        };
        check(ROOT, ALL_USERS, "", &["security module"]);
        check(ROOT, ALL_USERS, INTEGRITY, &["security module"]);
        let confidentiality = "none integrity [confidentiality]\n";
        check(ROOT, ALL_USERS, confidentiality, &["lockdown"]);
        let filtered = &ROOT.replace("Seccomp:\t0", "Seccomp:\t2");
        check(filtered, ALL_USERS, INTEGRITY, &["seccomp"]);
        let own = "         0     100000      65536\n";
        check(filtered, own, "", &["user namespace", "seccomp"]);
        check("CapEff:\t0\n", own, confidentiality, &["CAP_BPF"]);
    }

    #[test]
    fn an_enforced_apparmor_profile_is_named_with_its_missing_rules() {
        let causes =
            |current| Privileges::parse(ROOT, ALL_USERS, "", current).causes(Protocol::Udp);
        assert_eq!(
            causes("/usr/bin/service (enforce)\n"),
            "the AppArmor profile `/usr/bin/service` may forbid it: it must have the rules \
             `capability bpf`, `capability perfmon`, `capability net_admin`"
        );
        for current in ["unconfined\n", "service (complain)\n"] {
            assert!(causes(current).contains("security module"), "{current}");
        }
    }
}
