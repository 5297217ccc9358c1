//! Odd machines: parameters of the kernel, options of QEMU, and commands that change the usual
//! guest.

use anyhow::{Context as _, Result};

use super::kernel::Kernel;
use crate::arch::Arch;

/// One machine of the table.
pub(crate) struct Machine {
    /// The name for `--machine`.
    pub(super) name: &'static str,
    /// Parameters of the kernel that add to the usual ones.
    pub(super) parameters: &'static str,
    /// Options of QEMU that override the usual ones.
    pub(super) qemu: &'static [&'static str],
    /// Programs that the commands need, each with its path in the guest.
    pub(super) programs: &'static [(&'static str, &'static str)],
    /// Shell commands that run before the tests. The first one that fails ends the guest.
    pub(super) commands: &'static str,
    /// The tests that run there, or their topics, unless a word selects others.
    pub(super) tests: &'static [&'static str],
}

/// A kernel, and the machine that it runs on.
#[derive(Clone, Copy)]
pub(super) struct Guest {
    pub(super) kernel: &'static Kernel,
    /// `None` is the usual machine.
    pub(super) machine: Option<&'static Machine>,
}

impl Guest {
    /// Returns the name of its results, logs and files.
    pub(super) fn name(self, arch: &Arch) -> String {
        let kernel = self.kernel.name_on(arch);
        match self.machine {
            None => kernel,
            Some(machine) => format!("{kernel}-{}", machine.name),
        }
    }
}

/// The usual machine, which the others change.
const USUAL: Machine = Machine {
    name: "usual",
    parameters: "",
    qemu: &[],
    programs: &[],
    commands: "",
    tests: EXACT,
};

/// Both protocols with default settings.
const EXACT: &[&str] = &["machines::starts_and_is_exact"];

/// [`EXACT`], and both hooks of a state change under load. A preemptible kernel may interrupt them.
const UNDER_LOAD: &[&str] = &[
    "machines::starts_and_is_exact",
    "udp_numbers::eight_sockets_at_full_speed_under_load",
    "delivery::churn_across_namespaces_under_load",
];

/// [`EXACT`], and both protocols with few capabilities.
const UNPRIVILEGED: &[&str] = &[
    "machines::starts_and_is_exact",
    "privileges::tcp_needs_bpf_and_perfmon",
    "privileges::udp_needs_net_admin_too",
];

const MACHINES: &[Machine] = &[
    Machine {
        name: "cgroup-v1",
        commands: "\
umount /sys/fs/cgroup
mount -t tmpfs cgroup /sys/fs/cgroup
mkdir /sys/fs/cgroup/freezer /sys/fs/cgroup/systemd
mount -t cgroup -o freezer cgroup /sys/fs/cgroup/freezer
mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd",
        tests: &[
            "machines::starts_and_is_exact",
            "privileges::cgroup_v2_that_is_not_mounted",
        ],
        ..USUAL
    },
    Machine {
        name: "cgroup-hybrid",
        commands: "\
umount /sys/fs/cgroup
mount -t tmpfs cgroup /sys/fs/cgroup
mkdir /sys/fs/cgroup/freezer /sys/fs/cgroup/systemd /sys/fs/cgroup/unified
mount -t cgroup -o freezer cgroup /sys/fs/cgroup/freezer
mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified",
        ..USUAL
    },
    Machine {
        name: "no-bpf-for-users",
        commands: "echo 2 > /proc/sys/kernel/unprivileged_bpf_disabled",
        tests: UNPRIVILEGED,
        ..USUAL
    },
    // Debian's kernels have the levels 3 and 4, which leave nothing to users.
    Machine {
        name: "paranoid",
        commands: "echo 4 > /proc/sys/kernel/perf_event_paranoid",
        tests: UNPRIVILEGED,
        ..USUAL
    },
    Machine {
        name: "integrity",
        parameters: "lockdown=integrity",
        commands: "mount -t securityfs securityfs /sys/kernel/security",
        ..USUAL
    },
    Machine {
        name: "confidentiality",
        parameters: "lockdown=confidentiality",
        commands: "mount -t securityfs securityfs /sys/kernel/security",
        tests: &["privileges::lockdown_is_named"],
        ..USUAL
    },
    // Without a profile, AppArmor confines no process. Without a policy, SELinux denies nothing.
    Machine {
        name: "apparmor",
        parameters: "security=apparmor apparmor=1",
        commands: "\
mount -t securityfs securityfs /sys/kernel/security
grep -q apparmor /sys/kernel/security/lsm",
        ..USUAL
    },
    // A test puts itself under this profile. CAP_SYS_ADMIN would include CAP_BPF.
    Machine {
        name: "apparmor-profile",
        parameters: "security=apparmor apparmor=1",
        programs: &[("apparmor_parser", "/usr/sbin/apparmor_parser")],
        commands: "\
mount -t securityfs securityfs /sys/kernel/security
apparmor_parser --add --skip-cache <<PROFILE
profile tcp-udp-trace-test {
  file,
  network,
  signal,
  ptrace,
  unix,
  capability,
  deny capability bpf,
  deny capability sys_admin,
}
PROFILE",
        tests: &["privileges::apparmor_profile_is_named"],
        ..USUAL
    },
    Machine {
        name: "selinux",
        parameters: "security=selinux selinux=1",
        commands: "\
mount -t securityfs securityfs /sys/kernel/security
grep -q selinux /sys/kernel/security/lsm",
        ..USUAL
    },
    Machine {
        name: "interpreter",
        commands: "echo 0 > /proc/sys/net/core/bpf_jit_enable",
        ..USUAL
    },
    Machine {
        name: "hardened-jit",
        commands: "echo 2 > /proc/sys/net/core/bpf_jit_harden",
        ..USUAL
    },
    Machine {
        name: "one-cpu",
        qemu: &["-smp", "1"],
        ..USUAL
    },
    Machine {
        name: "eight-cpus",
        qemu: &["-smp", "8"],
        ..USUAL
    },
    // The second CPU is there, but comes online in the test.
    Machine {
        name: "hotplug",
        parameters: "maxcpus=1",
        tests: &[
            "machines::cpu_that_comes_and_goes",
            "machines::cpu_that_comes_and_goes_during_starts",
            "perf::machines::cpu_that_comes_and_goes",
            "perf::machines::cpu_that_comes_and_goes_during_starts",
        ],
        ..USUAL
    },
    Machine {
        name: "small",
        commands: "\
mkdir /sys/fs/cgroup/small
echo 64M > /sys/fs/cgroup/small/memory.max
echo $$ > /sys/fs/cgroup/small/cgroup.procs",
        ..USUAL
    },
    Machine {
        name: "no-ipv6",
        parameters: "ipv6.disable=1",
        ..USUAL
    },
    Machine {
        name: "preempt-none",
        parameters: "preempt=none",
        ..USUAL
    },
    Machine {
        name: "preempt-voluntary",
        parameters: "preempt=voluntary",
        ..USUAL
    },
    Machine {
        name: "preempt-full",
        parameters: "preempt=full",
        tests: UNDER_LOAD,
        ..USUAL
    },
];

/// Returns the machines of the table that `names` selects.
pub(crate) fn machines(names: &[String]) -> Result<Vec<&'static Machine>> {
    if names.iter().any(|name| name == "all") {
        return Ok(MACHINES.iter().collect());
    }
    names
        .iter()
        .map(|name| {
            let named = MACHINES.iter().find(|machine| machine.name == name);
            named.with_context(|| {
                let known: Vec<_> = MACHINES.iter().map(|machine| machine.name).collect();
                format!(
                    "unknown machine {name:?}: choose from {}, or `all`",
                    known.join(", ")
                )
            })
        })
        .collect()
}
