//! The privileges that a tracer needs, their purposes, the time until which it needs them, and the
//! reports of missing ones.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use futures_util::{Stream, StreamExt as _};
use integration_tests::{
    actor::Actor,
    collector::{Collector, SAMPLE_INTERVAL, check_conservation},
    kernel::{captures_images, is_at_least, open_files},
    mounts,
    netns::Netns,
    privileges::{Capability, UNPRIVILEGED, become_unprivileged, keep},
    suite::{Test, skip},
    tcp_pair::{TcpPair, loopback},
    udp_pair::{self, Family, UdpPair},
};
use nix::{
    errno::Errno,
    libc,
    mount::{MntFlags, umount2},
    sched::{CloneFlags, unshare},
    sys::resource::{Resource, getrlimit, setrlimit},
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use tcp_udp_trace::{
    Error, ErrorKind, Event, EventKind, Filter, Hook, Protocol, TcpTracer, UdpTracer,
};
use tokio::{
    runtime::{Builder, Runtime},
    time::timeout,
};

use Capability::{
    CAP_BPF, CAP_DAC_READ_SEARCH, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_ADMIN, CAP_SYS_PTRACE,
};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Process: [
            missing_capabilities_are_named,
            tcp_needs_bpf_and_perfmon,
            udp_needs_net_admin_too,
            other_namespaces_need_sys_admin_and_sys_ptrace,
            filter_names_any_namespace,
            details_of_other_users_need_no_sys_ptrace,
            privileges_given_up_after_the_start,
            tracefs_that_cannot_be_mounted,
            tracefs_needs_sys_admin_and_dac_read_search,
            cgroup_v2_that_is_not_mounted,
            lockdown_is_named,
            seccomp_filter_is_named,
            apparmor_profile_is_named,
            seccomp_filter_of_perf_events_costs_hooks,
            user_namespace_is_named,
            limit_on_locked_memory_is_named,
            nothing_of_the_process_is_changed,
        ],
    ]
}

const LITTLE: &[Capability] = &[CAP_BPF, CAP_PERFMON];

fn runtime() -> anyhow::Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}

/// Starts a tracer on a thread that has these capabilities, and drops it.
fn start_with(
    protocol: Protocol,
    capabilities: &[Capability],
) -> anyhow::Result<Result<(), Error>> {
    on_thread(|| {
        keep(capabilities)?;
        start(protocol)
    })
}

fn start(protocol: Protocol) -> anyhow::Result<Result<(), Error>> {
    runtime()?.block_on(async {
        Ok(match protocol {
            Protocol::Tcp => TcpTracer::builder().start().await.map(drop),
            _ => UdpTracer::builder().start().await.map(drop),
        })
    })
}

fn on_thread<T: Send>(f: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    thread::scope(|scope| scope.spawn(f).join().unwrap())
}

/// Checks that the error is one of permission, and that its message names all of these.
fn ensure_forbidden(started: Result<(), Error>, named: &[&str]) -> anyhow::Result<()> {
    let Err(error) = started else {
        bail!("started without {named:?}")
    };
    let message = error.to_string();
    eprintln!("{message}");
    let is_named = named.iter().all(|name| message.contains(name));
    ensure!(
        error.kind() == ErrorKind::Permission && is_named,
        "{error:?}"
    );
    Ok(())
}

/// Returns the tracer's hook of this signal.
fn hook(collector: &Collector, signal: &str) -> anyhow::Result<Hook> {
    let mut hooks = collector.handle().hooks().into_iter();
    hooks
        .find(|hook| hook.signal == signal)
        .context("no such signal")
}

/// The error names the missing capabilities, and no present one.
fn missing_capabilities_are_named() -> anyhow::Result<()> {
    become_unprivileged(&[CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN, CAP_SYS_ADMIN])?;
    let missing = |protocol, has: &[Capability], names: &[&str]| {
        let started = start_with(protocol, has)?;
        if let Err(error) = &started {
            let message = error.to_string();
            let missing = message.split("missing").next().unwrap_or_default();
            let there = has.iter().find(|it| missing.contains(&it.to_string()));
            ensure!(there.is_none(), "{there:?} is not missing: {message}");
        }
        ensure_forbidden(started, names)
    };
    missing(Protocol::Tcp, &[], &["CAP_BPF", "CAP_PERFMON", "tcp"])?;
    missing(Protocol::Tcp, &[CAP_BPF], &["CAP_PERFMON"])?;
    missing(Protocol::Tcp, &[CAP_PERFMON, CAP_NET_ADMIN], &["CAP_BPF"])?;
    missing(Protocol::Udp, LITTLE, &["CAP_NET_ADMIN", "cgroup", "udp"])?;
    // Most kernels accept this one instead of the others. Linux 5.10 does not accept it for
    // `CAP_NET_ADMIN`.
    start_with(Protocol::Tcp, &[CAP_SYS_ADMIN])??;
    match start_with(Protocol::Udp, &[CAP_SYS_ADMIN])? {
        Ok(()) => {}
        forbidden => ensure_forbidden(forbidden, &["CAP_NET_ADMIN"])?,
    }
    // A failed start does not affect later ones.
    start_with(Protocol::Tcp, LITTLE)??;
    start_with(Protocol::Udp, &[CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN])??;
    Ok(())
}

/// A process of another user with these two traces a connection without a loss.
fn tcp_needs_bpf_and_perfmon() -> anyhow::Result<()> {
    become_unprivileged(LITTLE)?;
    let pair = TcpPair::new()?;
    eprintln!("{:#?}", pair.collector.handle().hooks());
    pair.check_transfer(1_000, 2_000)
}

fn udp_needs_net_admin_too() -> anyhow::Result<()> {
    become_unprivileged(&[CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN])?;
    let collector = Collector::start_udp()?;
    eprintln!("{:#?}", collector.handle().hooks());
    udp_pair::check_transfer(Family::V4, collector)
}

/// Every process may sample its own namespace, and `hooks` reports the namespaces that are not
/// sampled.
fn other_namespaces_need_sys_admin_and_sys_ptrace() -> anyhow::Result<()> {
    let elsewhere = Netns::new()?;
    let mut stranger = elsewhere.run(|| Actor::spawn("stranger"))?;
    let far = stranger.listen(loopback(false))?;
    let mut neighbour = Actor::spawn("neighbour")?;
    let near = neighbour.listen(loopback(false))?;
    become_unprivileged(&[CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN, CAP_SYS_PTRACE])?;
    for (more, missing) in [
        (&[][..], Some("CAP_SYS_ADMIN")),
        (&[CAP_SYS_ADMIN], Some("CAP_SYS_PTRACE")),
        (&[CAP_SYS_ADMIN, CAP_SYS_PTRACE], None),
    ] {
        on_thread(|| {
            keep(&[LITTLE, more].concat())?;
            let collector = Collector::start_sampling()?;
            collector.also(elsewhere.inode()?);
            let hook = hook(&collector, "sample")?;
            let note = hook.note.clone().unwrap_or_default();
            ensure!(note.contains(missing.unwrap_or_default()), "{hook}");
            ensure!(hook.note.is_some() == missing.is_some(), "{hook}");
            let is = |event: &Event, cookie| event.socket.cookie == Some(cookie);
            if missing.is_none() {
                collector.wait_for_sample("the stranger", |event| is(event, far.cookie))?;
            }
            // After the second sample of this socket, a round has visited all namespaces.
            collector.wait_for_sample("the neighbour", |event| is(event, near.cookie))?;
            let samples = collector.samples();
            let sees_far = samples.iter().any(|event| is(event, far.cookie));
            ensure!(sees_far == missing.is_none(), "{samples:#?}");
            ensure!(collector.handle().stats().sample_faults == 0);
            Ok(())
        })?;
    }
    Ok(())
}

/// The programs compare the namespace of a filter themselves, so the tracer need not enter it.
fn filter_names_any_namespace() -> anyhow::Result<()> {
    let elsewhere = Netns::new()?;
    let inodes = [elsewhere.inode()?, Netns::current()?.inode()?];
    let mut stranger = elsewhere.run(|| Actor::spawn("stranger"))?;
    let mut neighbour = Actor::spawn("neighbour")?;
    become_unprivileged(LITTLE)?;
    let collector =
        Collector::start_with(move |builder| builder.filter(Filter::new().netns(inodes[0])))?;
    collector.also(inodes[0]);
    for inode in inodes {
        collector.set_filter(Filter::new().netns(inode))?;
        let mut meant = None;
        for actor in [&mut stranger, &mut neighbour] {
            let listener = actor.listen(loopback(false))?;
            actor.close(&listener)?;
            if actor.netns() == inode {
                meant = Some(listener.cookie);
            }
        }
        let is_it = |event: &Event| event.is_end() && event.socket.cookie == meant;
        collector.wait_for("end of a listener", is_it)?;
    }
    let events = collector.finish_all()?;
    let namespaces = events.iter().map(|event| event.socket.netns);
    ensure!(
        namespaces.eq([inodes[0], inodes[0], inodes[1], inodes[1]]),
        "{events:#?}"
    );
    Ok(())
}

/// The programs read the executable of another user's process, which `/proc` shows only to
/// privileged processes. Where the kernel's verifier is too slow for that, only `/proc` is left.
fn details_of_other_users_need_no_sys_ptrace() -> anyhow::Result<()> {
    let mut roots = Actor::spawn("roots")?;
    let mut unprivileged = Actor::spawn_as("unprivileged".as_ref(), Some(UNPRIVILEGED))?;
    become_unprivileged(&[CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE])?;
    for privileged in [false, true] {
        on_thread(|| {
            let capabilities = [LITTLE, &[CAP_SYS_PTRACE][..usize::from(privileged)]].concat();
            keep(&capabilities)?;
            let collector = Collector::start_with(|builder| builder.process_details(true))?;
            for (actor, is_ours) in [(&mut roots, false), (&mut unprivileged, true)] {
                // Without the executable there are no details at all.
                if !(captures_images()? || is_ours || privileged) {
                    continue;
                }
                let event = collector.details_of(actor)?;
                let process = event.process.context("no owner")?;
                let details = process.details.context("no details")?;
                ensure!(details.exe.is_some(), "{details:?}");
                ensure!(!details.cmdline.is_empty(), "{details:?}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// The process gives up all capabilities and root, except `CAP_BPF` before 5.19, where the kernel
/// checks it at each bpf(2). Events and samples go on, and the tracer closes as usual.
fn privileges_given_up_after_the_start() -> anyhow::Result<()> {
    let kept = if is_at_least(5, 19)? {
        &[][..]
    } else {
        &[CAP_BPF]
    };
    let files = open_files()?;
    let runtime = runtime()?;
    runtime.block_on(async {
        let tcp = TcpTracer::builder().sample_interval(SAMPLE_INTERVAL);
        let mut tcp = tcp.start().await?;
        let udp = UdpTracer::builder().sample_interval(SAMPLE_INTERVAL);
        let mut udp = udp.start().await?;
        become_unprivileged(kept)?;
        await_unprivileged(kept.len())?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let mut client = TcpStream::connect(listener.local_addr()?)?;
        let (accepted, _) = listener.accept()?;
        client.write_all(b"hello")?;
        let local = client.local_addr()?;
        until(&mut tcp, local, is_sample).await?;
        until(&mut tcp, local, is_sample).await?;
        drop((client, accepted));
        let close = until(&mut tcp, local, Event::is_end).await?;
        ensure!(close.traffic.tx_bytes == 5, "{close}");

        let socket = UdpSocket::bind("127.0.0.1:0")?;
        let local = socket.local_addr()?;
        socket.send_to(b"to itself", local)?;
        until(&mut udp, local, is_sample).await?;
        drop(socket);
        let close = until(&mut udp, local, Event::is_end).await?;
        ensure!(close.traffic.tx_bytes == 9, "{close}");
        for stats in [tcp.close().await?, udp.close().await?] {
            check_conservation(&stats)?;
            ensure!(stats.sample_malformed == 0, "{stats:?}");
        }
        anyhow::Ok(())
    })?;
    drop(runtime);
    let left: Vec<_> = open_files()?.difference(&files).cloned().collect();
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// Waits until at most this many threads have a capability: a thread that is about to end is not
/// changed any more.
fn await_unprivileged(threads: usize) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let mut privileged = Vec::new();
        for thread in fs::read_dir("/proc/self/task")? {
            // The thread may have ended by now.
            let status = fs::read_to_string(thread?.path().join("status")).unwrap_or_default();
            let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
            if set.is_some_and(|set| set.trim() != "0000000000000000") {
                privileged.push(status);
            }
        }
        if privileged.len() <= threads {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{privileged:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn is_sample(event: &Event) -> bool {
    matches!(event.kind, EventKind::Sample { .. })
}

/// Reads until an event of the socket at this address matches.
async fn until(
    tracer: &mut (impl Stream<Item = Event> + Unpin),
    local: SocketAddr,
    is_it: impl Fn(&Event) -> bool,
) -> anyhow::Result<Event> {
    loop {
        let next = timeout(Duration::from_secs(60), tracer.next()).await;
        let event = next
            .with_context(|| format!("nothing more of {local}"))?
            .context("the stream has ended")?;
        if event.socket.local == local && is_it(&event) {
            return Ok(event);
        }
    }
}

/// Gives this thread a mount namespace without tracefs.
fn hide_tracefs() -> anyhow::Result<()> {
    mounts::make_private()?;
    for place in ["/sys/kernel/tracing", "/sys/kernel/debug"] {
        // It need not be mounted.
        let _ = umount2(place, MntFlags::MNT_DETACH);
    }
    Ok(())
}

/// Then the second program of `state` is a worse one on a kernel that preempts tracepoints, and
/// `hooks` reports so. A connection is reported as usual.
fn tracefs_that_cannot_be_mounted() -> anyhow::Result<()> {
    hide_tracefs()?;
    keep(LITTLE)?;
    let pair = TcpPair::new()?;
    let hook = hook(&pair.collector, "state")?;
    let is_worse = is_at_least(7, 0)?;
    ensure!(
        hook.to_string().contains("without tracefs") == is_worse,
        "{hook}"
    );
    ensure!(hook.programs.len() == 2, "{hook}");
    pair.check_transfer(1_000, 2_000)
}

/// A process needs them to mount tracefs, and to read the files that belong to root.
fn tracefs_needs_sys_admin_and_dac_read_search() -> anyhow::Result<()> {
    hide_tracefs()?;
    let udp = [LITTLE, &[CAP_NET_ADMIN]].concat();
    become_unprivileged(&[&udp[..], &[CAP_SYS_ADMIN, CAP_DAC_READ_SEARCH]].concat())?;
    for (more, is_enough) in [
        (&[CAP_DAC_READ_SEARCH][..], false),
        (&[CAP_SYS_ADMIN], false),
        (&[CAP_SYS_ADMIN, CAP_DAC_READ_SEARCH], true),
    ] {
        on_thread(|| {
            keep(&[&udp, more].concat())?;
            let hook = hook(&Collector::start_udp()?, "connect")?;
            let lacks_tracefs = hook.to_string().contains("no tracefs");
            ensure!(lacks_tracefs != is_enough, "{more:?}: {hook}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Then the tracer of UDP mounts it privately, which needs `CAP_SYS_ADMIN`.
fn cgroup_v2_that_is_not_mounted() -> anyhow::Result<()> {
    mounts::make_private()?;
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo")?;
    for mount in mounts.lines().filter(|line| line.contains(" - cgroup2 ")) {
        let point = mount.split(' ').nth(4).context("no mount point")?;
        umount2(point, MntFlags::MNT_DETACH)?;
    }
    udp_pair::check_transfer(Family::V4, Collector::start_udp()?)?;
    on_thread(|| {
        keep(&[CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN])?;
        let Err(error) = start(Protocol::Udp)? else {
            bail!("started without cgroup v2")
        };
        let message = format!("{error:?}");
        ensure!(message.contains("mount -t cgroup2"), "{message}");
        Ok(())
    })
}

/// Neither protocol can be traced in confidentiality mode, where programs cannot read the kernel's
/// memory.
fn lockdown_is_named() -> anyhow::Result<()> {
    let lockdown = fs::read_to_string("/sys/kernel/security/lockdown").unwrap_or_default();
    if !lockdown.contains("[confidentiality]") {
        return skip("the kernel is not locked down so far");
    }
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        ensure_forbidden(start(protocol)?, &["lockdown", "confidentiality"])?;
    }
    Ok(())
}

/// Makes a system call fail with this error on this thread from now on.
pub(crate) fn refuse(call: libc::c_long, errno: Errno) -> anyhow::Result<()> {
    let filter = SeccompFilter::new(
        [(call, vec![])].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(errno as u32),
        std::env::consts::ARCH.try_into()?,
    )?;
    Ok(seccompiler::apply_filter(&BpfProgram::try_from(filter)?)?)
}

fn seccomp_filter_is_named() -> anyhow::Result<()> {
    for errno in [Errno::EPERM, Errno::ENOSYS] {
        let started = on_thread(|| {
            refuse(libc::SYS_bpf, errno)?;
            start(Protocol::Tcp)
        })?;
        ensure_forbidden(started, &["seccomp", "bpf(2)"])?;
    }
    Ok(())
}

/// `cargo xtask test --machine apparmor-profile` loads a profile without the required capabilities.
fn apparmor_profile_is_named() -> anyhow::Result<()> {
    const PROFILE: &str = "tcp-udp-trace-test";
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let started = on_thread(|| {
            let change = format!("changeprofile {PROFILE}");
            if fs::write("/proc/thread-self/attr/apparmor/current", change).is_err() {
                return skip(format_args!("no AppArmor profile {PROFILE}"));
            }
            start(protocol)
        })?;
        ensure_forbidden(started, &["AppArmor", PROFILE, "capability bpf"])?;
    }
    Ok(())
}

/// Raw tracepoints are enough; those of system calls identify the calls by number.
fn seccomp_filter_of_perf_events_costs_hooks() -> anyhow::Result<()> {
    refuse(libc::SYS_perf_event_open, Errno::EPERM)?;
    let pair = TcpPair::new()?;
    let udp = Collector::start_udp()?;
    for collector in [&pair.collector, &udp] {
        let hooks = collector.handle().hooks();
        let programs = hooks.iter().flat_map(|hook| &hook.programs);
        for program in programs {
            let is_perf = program.starts_with("kprobe:") || program.starts_with("tracepoint:");
            ensure!(!is_perf, "{program}");
        }
    }
    pair.check_transfer(1_000, 2_000)?;
    let expected = UdpPair::new(Family::V4, true)?.close()?;
    udp.finish_udp(expected.len())?.check_all(&expected)
}

/// The root of a user namespace has no privileges outside it.
fn user_namespace_is_named() -> anyhow::Result<()> {
    if unshare(CloneFlags::CLONE_NEWUSER).is_err() {
        return skip("no user namespaces");
    }
    fs::write("/proc/self/uid_map", "0 0 1")?;
    ensure_forbidden(start(Protocol::Tcp)?, &["user namespace"])
}

/// Before 5.11, the limit counts, and the tracer does not change it.
fn limit_on_locked_memory_is_named() -> anyhow::Result<()> {
    if is_at_least(5, 11)? {
        return skip("the limit is none for eBPF since Linux 5.11");
    }
    let limit = 64 << 10;
    let (_, most) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
    setrlimit(Resource::RLIMIT_MEMLOCK, limit, most)?;
    ensure_forbidden(start(Protocol::Tcp)?, &["65536", "ulimit -l"])?;
    ensure!(getrlimit(Resource::RLIMIT_MEMLOCK)? == (limit, most));
    Ok(())
}

/// The tracer changes neither limits nor signals, privileges, namespaces, or settings of the
/// kernel.
fn nothing_of_the_process_is_changed() -> anyhow::Result<()> {
    // The first thread makes the C library catch a signal.
    on_thread(|| Ok(()))?;
    let before = settings()?;
    let runtime = runtime()?;
    let tracers = runtime.block_on(async {
        let tcp = TcpTracer::builder().start().await?;
        let udp = UdpTracer::builder().start().await?;
        anyhow::Ok((tcp, udp))
    })?;
    let meanwhile = settings()?;
    runtime.block_on(async {
        tracers.0.close().await?;
        tracers.1.close().await
    })?;
    for (when, after) in [("running", meanwhile), ("closed", settings()?)] {
        for (name, value) in &before {
            ensure!(
                after[name] == *value,
                "{when}: {name} was {value}, is {}",
                after[name]
            );
        }
    }
    Ok(())
}

fn settings() -> anyhow::Result<BTreeMap<String, String>> {
    const FILES: [&str; 11] = [
        "/proc/self/environ",
        "/proc/self/limits",
        "/proc/sys/kernel/bpf_stats_enabled",
        "/proc/sys/kernel/kptr_restrict",
        "/proc/sys/kernel/perf_event_paranoid",
        "/proc/sys/kernel/unprivileged_bpf_disabled",
        "/proc/sys/kernel/yama/ptrace_scope",
        "/proc/sys/net/core/bpf_jit_enable",
        "/proc/sys/net/core/bpf_jit_harden",
        "/proc/sys/net/core/bpf_jit_kallsyms",
        "/proc/sys/net/core/bpf_jit_limit",
    ];
    const OF_STATUS: [&str; 12] = [
        "Umask",
        "Uid",
        "Gid",
        "Groups",
        "SigBlk",
        "SigIgn",
        "SigCgt",
        "CapInh",
        "CapPrm",
        "CapEff",
        "NoNewPrivs",
        "Seccomp",
    ];
    let mut settings = BTreeMap::new();
    for file in FILES {
        // Not every kernel has each.
        if let Ok(value) = fs::read(file) {
            let value = String::from_utf8_lossy(&value).into_owned();
            settings.insert(file.to_owned(), value);
        }
    }
    for line in fs::read_to_string("/proc/self/status")?.lines() {
        let (name, value) = line.split_once(':').context("no field")?;
        if OF_STATUS.contains(&name) {
            settings.insert(name.to_owned(), value.to_owned());
        }
    }
    for entry in fs::read_dir("/proc/self/ns")? {
        let path = entry?.path();
        let target = fs::read_link(&path)?;
        settings.insert(path.display().to_string(), target.display().to_string());
    }
    ensure!(settings.len() > 20, "{settings:?}");
    Ok(settings)
}
