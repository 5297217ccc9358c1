//! `process_details`: the parent, the cgroup, the container, the unit and the namespace's pid of a
//! socket's owner.

use std::{fs, net::TcpListener, os::unix::process::parent_id, path::Path, process};

use anyhow::{Context as _, ensure};
use integration_tests::{
    actor::{Actor, Brief},
    cgroup::{self, Cgroup},
    collector::{Collector, show},
    kernel, pid_namespace,
    suite::{Test, skip},
    tcp_pair::loopback,
};
use tcp_udp_trace::{Comm, Event, ProcessDetails};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            of_a_process_in_a_container,
        ],
        Process: [
            of_processes_that_have_ended,
            of_a_process_in_a_pid_namespace,
        ],
    ]
}

const ID: &str = "3f4fbe1ad1a1fdd4c7ae1a90c7f1c8e0bf4b1d2f4a7cbb0a2c2e4e7ad2f30951";

fn with_details() -> anyhow::Result<Collector> {
    Collector::start_with(|builder| builder.process_details(true).sample_interval(None))
}

fn details_of(event: &Event) -> anyhow::Result<&ProcessDetails> {
    let process = event.process.as_ref();
    let details = process.and_then(|process| process.details.as_deref());
    details.with_context(|| format!("no details: {event}"))
}

/// Returns the name of the calling process, as the kernel keeps it.
fn own_name() -> anyhow::Result<Comm> {
    let name = fs::read("/proc/self/comm")?;
    Ok(Comm::from_bytes(name.strip_suffix(b"\n").unwrap_or(&name)))
}

/// Makes a slice, and in it the cgroup that Docker makes for a container.
fn container(name: &str) -> anyhow::Result<Option<(Cgroup, Cgroup)>> {
    let Some(slice) = Cgroup::new(&format!("{name}.slice"))? else {
        return Ok(None);
    };
    let scope = slice.below(&format!("docker-{ID}.scope"))?;
    Ok(Some((scope, slice)))
}

/// Checks the names in the path of the cgroup that [`container`] made.
fn check_cgroup(details: &ProcessDetails, cgroup: &Cgroup, slice: &Cgroup) -> anyhow::Result<()> {
    let root = cgroup::mount_point().context("no cgroup v2")?;
    let path = Path::new("/").join(cgroup.path().strip_prefix(root)?);
    let slice = slice.path().file_name();
    ensure!(details.cgroup == Some(path), "{details:?}");
    ensure!(details.container.as_deref() == Some(ID), "{details:?}");
    let unit = format!("docker-{ID}.scope");
    ensure!(details.unit == Some(unit), "{details:?}");
    ensure!(
        details.slice.as_deref().map(AsRef::as_ref) == slice,
        "{details:?}"
    );
    Ok(())
}

fn of_a_process_in_a_container() -> anyhow::Result<()> {
    let mut client = Actor::spawn("client")?;
    let made = container("alive")?;
    if let Some((scope, _)) = &made {
        scope.adopt(client.pid())?;
    }
    let collector = with_details()?;
    let listener = TcpListener::bind(loopback(false))?;
    let connected = client.connect(listener.local_addr()?)?;
    drop(listener.accept()?);
    let is_clients = |event: &Event| event.socket.local == connected.local;
    collector.wait_for("a connection", is_clients)?;
    let events = collector.events();
    let event = events.iter().find(|event| is_clients(event));
    let details = details_of(event.expect("an earlier wait found it"))?;
    let parent = details.parent.context("no parent")?;
    ensure!(parent.pid == process::id(), "{details:?}");
    ensure!(parent.comm == own_name()?, "{details:?}");
    ensure!(details.ns_pid == Some(client.pid()), "{details:?}");
    if let Some((scope, slice)) = &made {
        check_cgroup(details, scope, slice)?;
    }
    // It ends before the cgroup is removed.
    client.kill()?;
    collector.finish_all().map(drop)
}

/// Processes that end at once, in a cgroup that stays a little longer.
fn of_processes_that_have_ended() -> anyhow::Result<()> {
    if !kernel::captures_images()? {
        return skip("this kernel's verifier is too slow for it: details come from /proc");
    }
    let hierarchies = fs::read_to_string("/proc/self/cgroup")?;
    if hierarchies.contains(":name=systemd:") || hierarchies.contains(":memory:") {
        return skip("this machine uses cgroup v1: paths come from /proc");
    }
    let Some((scope, slice)) = container("ended")? else {
        return skip("no cgroup v2");
    };
    let collector = with_details()?;
    let listener = TcpListener::bind(loopback(false))?;
    let scope = scope.enter()?;
    let to = listener.local_addr()?;
    let mut pids = Vec::new();
    for _ in 0..20 {
        let mut child = Brief::Connect.command(to).spawn()?;
        ensure!(child.wait()?.success());
        drop(listener.accept()?);
        pids.push(child.id());
    }
    let events = collector.finish_in_order(pids.len())?;
    let mut found = 0;
    for pid in &pids {
        let of_child = |event: &&Event| {
            let process = event.process.as_ref();
            process.is_some_and(|process| process.pid == *pid)
        };
        let event = events.iter().find(of_child).context("no event")?;
        let details = details_of(event)?;
        let parent = details.parent.context("no parent")?;
        ensure!(parent.pid == process::id(), "{details:?}");
        ensure!(parent.comm == own_name()?, "{details:?}");
        ensure!(details.ns_pid == Some(*pid), "{details:?}");
        check_cgroup(details, scope.cgroup(), &slice)?;
        found += 1;
    }
    ensure!(found == pids.len(), "{}", show(&events));
    drop(scope);
    Ok(())
}

/// The first process of a pid namespace, and its child.
fn of_a_process_in_a_pid_namespace() -> anyhow::Result<()> {
    let outer = process::id();
    pid_namespace::run_in_new(|| {
        ensure!(process::id() == 1 && parent_id() == 0, "not the first one");
        let own = pid_namespace::initial(1)?;
        let mut child = Actor::spawn("child")?;
        let collector = with_details()?;
        let listener = child.listen(loopback(false))?;
        let ours = std::net::TcpStream::connect(listener.local)?;
        let end = ours.local_addr()?;
        collector.wait_for("our connection", |event| event.socket.local == end)?;
        let events = collector.events();
        for (of, socket, parent, number) in [
            ("our", end, outer, 1),
            ("the child's", listener.local, own, child.pid()),
        ] {
            let event = events.iter().find(|event| event.socket.local == socket);
            let event = event.with_context(|| format!("no event of {of} socket"))?;
            let details = details_of(event)?;
            ensure!(details.ns_pid == Some(number), "{of}: {details:?}");
            let found = details.parent.map(|parent| parent.pid);
            ensure!(found == Some(parent), "{of}: {details:?}");
        }
        drop(ours);
        child.close(&listener)?;
        collector.finish_all().map(drop)
    })
}
