//! The command `doctor`: kernel, privileges, limits, and the hooks that each tracer can attach.

use std::{
    env::consts::ARCH,
    fs,
    io::{self, Write},
    path::Path,
};

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use tcp_udp_trace::{Error, Hook, TcpTracer, UdpTracer};

/// Check whether the tracers can start on this machine, and print advice.
///
/// The command prints the kernel, the privileges and limits of this process, and the hooks that
/// each tracer attaches. A line with `note:` names a cost of a hook. A line with `->` is advice.
///
/// The exit code is 0 if both tracers start. Otherwise it is the exit code of the first error.
#[derive(clap::Args)]
pub(crate) struct Args {}

/// Capabilities: the number in `capability.h`, the name, and the consequence of its absence.
#[rustfmt::skip]
const CAPABILITIES: &[(u32, &str, &str)] = &[
    (39, "CAP_BPF", "no tracer starts"),
    (38, "CAP_PERFMON", "no tracer starts"),
    (12, "CAP_NET_ADMIN", "the UDP tracer does not start"),
    (21, "CAP_SYS_ADMIN", "sockets of other network namespaces are not sampled; tracefs must be \
                           mounted already; with kernel.perf_event_paranoid over 2 there are no \
                           kprobes and no classic tracepoints"),
    (19, "CAP_SYS_PTRACE", "network namespaces of other users' processes are not sampled; their \
                            process details may be absent"),
    (2, "CAP_DAC_READ_SEARCH", "only root can read tracefs, which enables better hooks"),
];

/// A check of the machine: its name, its result, and advice.
struct Check {
    name: &'static str,
    result: String,
    advice: Vec<String>,
}

impl Check {
    fn new(name: &'static str, result: impl Into<String>) -> Self {
        Self {
            name,
            result: result.into(),
            advice: Vec::new(),
        }
    }

    fn advise(mut self, is_needed: bool, advice: impl Into<String>) -> Self {
        self.advice.extend(is_needed.then(|| advice.into()));
        self
    }
}

pub(crate) async fn run(Args {}: Args) -> anyhow::Result<()> {
    let tcp = tcp_hooks().await;
    let udp = udp_hooks().await;
    let mut out = io::stdout().lock();
    for check in checks() {
        writeln!(out, "{:15} {}", check.name, check.result)?;
        for advice in check.advice {
            writeln!(out, "{:15} -> {advice}", "")?;
        }
    }
    print_hooks(&mut out, "tcp", &tcp)?;
    print_hooks(&mut out, "udp", &udp)?;
    tcp.and(udp)?;
    Ok(())
}

async fn tcp_hooks() -> Result<Vec<Hook>, Error> {
    let builder = TcpTracer::builder().retransmits(true).resets(true);
    let builder = builder.listen_overflows(true).process_details(true);
    let tracer = builder.start().await?;
    let hooks = tracer.handle().hooks();
    tracer.close().await.map(|_| hooks)
}

async fn udp_hooks() -> Result<Vec<Hook>, Error> {
    let tracer = UdpTracer::builder().process_details(true).start().await?;
    let hooks = tracer.handle().hooks();
    tracer.close().await.map(|_| hooks)
}

fn print_hooks(
    out: &mut impl Write,
    protocol: &str,
    hooks: &Result<Vec<Hook>, Error>,
) -> io::Result<()> {
    let hooks = match hooks {
        Ok(hooks) => hooks,
        Err(error) => {
            let error = crate::trace::describe(error);
            return writeln!(out, "\n{protocol}: does not start: {error}");
        }
    };
    writeln!(out, "\n{protocol}: starts")?;
    for hook in hooks {
        let programs = match &hook.programs[..] {
            [] => "none".to_owned(),
            programs => programs.join(", "),
        };
        writeln!(out, "  {:14} {programs}", hook.signal)?;
        let Some(note) = &hook.note else { continue };
        writeln!(out, "  {:14} note: {note}", "")?;
        for (word, advice) in ADVICE {
            if note.contains(word) {
                writeln!(out, "  {:14} -> {advice}", "")?;
            }
        }
    }
    Ok(())
}

/// A word of a note, and the advice for notes that contain the word.
const ADVICE: &[(&str, &str)] = &[
    (
        "no kprobes",
        "kprobes need CONFIG_KPROBES, and CAP_SYS_ADMIN if kernel.perf_event_paranoid is over 2",
    ),
    ("tracefs", MOUNT_TRACEFS),
    (
        "CAP_",
        "run as root, or grant the capability if you need this",
    ),
];

const MOUNT_TRACEFS: &str = "mount -t tracefs nodev /sys/kernel/tracing, and let this user read it";

fn checks() -> Vec<Check> {
    // An absent file counts as empty.
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let status = read("/proc/self/status");
    let lockdown = read("/sys/kernel/security/lockdown");
    let paranoid = read("/proc/sys/kernel/perf_event_paranoid");
    let paranoid = paranoid.trim();
    let mounts = read("/proc/self/mounts");
    let release = read("/proc/sys/kernel/osrelease");
    let is_whole_range = read("/proc/self/uid_map")
        .split_whitespace()
        .eq(["0", "0", "4294967295"]);
    let has_btf = Path::new("/sys/kernel/btf/vmlinux").exists();
    let has_seccomp = field(&status, "Seccomp:") == Some("2");
    let is_confidential = lockdown.contains("[confidentiality]");
    vec![
        Check::new("program", concat!("tcp-udp-trace ", env!("CARGO_PKG_VERSION"))),
        Check::new("kernel", format!("Linux {} on {ARCH}", release.trim())).advise(
            version(&release) < (5, 10),
            "tracing needs Linux 5.10 or newer",
        ),
        Check::new("BTF", if has_btf { "/sys/kernel/btf/vmlinux" } else { "absent" }).advise(
            !has_btf,
            "tracing needs a mounted /sys, and a kernel with CONFIG_DEBUG_INFO_BTF (most distributions), or its BTF in a \
             file (trace --btf)",
        ),
        capabilities(&status),
        Check::new("user namespace", if is_whole_range { "initial" } else { "not the initial one" })
            .advise(
                !is_whole_range,
                "capabilities of a user namespace do not count: run outside of the rootless container",
            ),
        Check::new("seccomp", if has_seccomp { "a filter" } else { "no filter" }).advise(
            has_seccomp,
            "if a tracer does not start: the filter must allow bpf(2) and perf_event_open(2)",
        ),
        Check::new("lockdown", if is_confidential { "confidentiality" } else { "no obstacle" }).advise(
            is_confidential,
            "the kernel forbids reading its memory: boot with lockdown=integrity or without lockdown",
        ),
        Check::new("perf events", format!("kernel.perf_event_paranoid is {paranoid}")).advise(
            paranoid.parse().is_ok_and(|level: i32| level > 2) && !has_capability(&status, 21),
            "sysctl kernel.perf_event_paranoid=2, or grant CAP_SYS_ADMIN, for kprobes and classic tracepoints",
        ),
        locked_memory(&release),
        open_files(),
        mount("cgroup v2", &mounts, "cgroup2", "the UDP tracer needs cgroup v2: grant CAP_SYS_ADMIN, or mkdir /run/cgroup2 && mount -t cgroup2 none /run/cgroup2"),
        mount("tracefs", &mounts, "tracefs", tracefs_advice(&status)),
    ]
}

fn tracefs_advice(status: &str) -> &'static str {
    if has_capability(status, 21) {
        "nothing to do: with CAP_SYS_ADMIN a tracer mounts it for itself"
    } else {
        MOUNT_TRACEFS
    }
}

/// Returns the value of a field of `/proc/self/status`.
fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    let mut values = status.lines().filter_map(|line| line.strip_prefix(name));
    values.next().map(str::trim)
}

fn has_capability(status: &str, number: u32) -> bool {
    field(status, "CapEff:")
        .and_then(|set| u64::from_str_radix(set, 16).ok())
        .is_some_and(|set| set & (1 << number) != 0)
}

fn capabilities(status: &str) -> Check {
    let (has, lacks): (Vec<_>, Vec<_>) = CAPABILITIES
        .iter()
        .partition(|(number, ..)| has_capability(status, *number));
    let names: Vec<_> = has.iter().map(|(_, name, _)| *name).collect();
    let names = if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(" ")
    };
    let check = Check::new("capabilities", names);
    lacks.iter().fold(check, |check, (_, name, without)| {
        check.advise(true, format!("{name} is missing: {without}"))
    })
}

/// Returns the major and the minor version of a kernel release.
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release
        .split(|letter: char| !letter.is_ascii_digit())
        .map(|number| number.parse().unwrap_or_default());
    (
        numbers.next().unwrap_or_default(),
        numbers.next().unwrap_or_default(),
    )
}

fn limit(resource: Resource) -> Option<u64> {
    getrlimit(resource).ok().map(|(soft, _)| soft)
}

fn amount(limit: Option<u64>) -> String {
    match limit {
        None => "unknown".to_owned(),
        Some(RLIM_INFINITY) => "unlimited".to_owned(),
        Some(limit) => limit.to_string(),
    }
}

fn locked_memory(release: &str) -> Check {
    let limit = limit(Resource::RLIMIT_MEMLOCK);
    let is_too_low = version(release) < (5, 11) && limit != Some(RLIM_INFINITY);
    Check::new("locked memory", amount(limit)).advise(
        is_too_low,
        "before Linux 5.11, tracing needs `ulimit -l unlimited`",
    )
}

fn open_files() -> Check {
    // 80 file descriptors for each tracer, and some for the program.
    const NEEDED: u64 = 200;
    let limit = limit(Resource::RLIMIT_NOFILE);
    Check::new("open files", amount(limit)).advise(
        limit.is_some_and(|limit| limit < NEEDED),
        format!("both tracers together need about {NEEDED} file descriptors: ulimit -n {NEEDED}"),
    )
}

/// Checks whether a file system of this type is mounted.
fn mount(name: &'static str, mounts: &str, kind: &str, advice: &str) -> Check {
    let points = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let point = words.next()?;
        (words.next()? == kind).then_some(point)
    });
    let points: Vec<_> = points.collect();
    let where_it_is = if points.is_empty() {
        "not mounted".to_owned()
    } else {
        points.join(" ")
    };
    Check::new(name, where_it_is).advise(points.is_empty(), advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_numbers() {
        assert_eq!(version("5.10.0-28-cloud-amd64\n"), (5, 10));
        assert_eq!(version("6.18.5"), (6, 18));
        assert!(version("5.9.16") < (5, 10));
        assert_eq!(version(""), (0, 0));
    }

    #[test]
    fn each_missing_capability_is_named() {
        let check = capabilities("CapEff:\t000000c000001000\n");
        assert_eq!(check.result, "CAP_BPF CAP_PERFMON CAP_NET_ADMIN");
        assert_eq!(check.advice.len(), 3);
        assert_eq!(capabilities("").result, "none");
    }

    #[test]
    fn mount_points_are_found() {
        let mounts = "sysfs /sys sysfs rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        let found = mount("cgroup v2", mounts, "cgroup2", "mount it");
        assert_eq!((&*found.result, found.advice.len()), ("/sys/fs/cgroup", 0));
        let absent = mount("tracefs", mounts, "tracefs", "mount it");
        assert_eq!(
            (&*absent.result, &*absent.advice[0]),
            ("not mounted", "mount it")
        );
    }
}
