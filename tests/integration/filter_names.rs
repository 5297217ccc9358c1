//! Filters that name processes by the pids of a pid namespace, and cgroups by their paths.

use std::{
    fs,
    net::{TcpListener, UdpSocket},
    path::PathBuf,
    process,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use integration_tests::{
    actor::Actor,
    cgroup::{self, Cgroup, Hybrid},
    collector::{Collector, show},
    pid_namespace::{self, initial},
    suite::{Test, skip},
    tcp_pair::loopback,
};
use nix::sched::{CloneFlags, unshare};
use tcp_udp_trace::{ErrorKind, Event, EventKind, Filter};

use crate::{
    compared::{Case, compare},
    filters::connect,
};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Process: [
            pids_of_a_pid_namespace,
            pids_of_a_nested_pid_namespace,
            pid_of_a_stranger,
            flows_in_a_pid_namespace,
            cgroups_by_their_paths,
            cgroup_in_a_cgroup_namespace,
        ],
    ]
}

fn pids_of_a_pid_namespace() -> anyhow::Result<()> {
    pid_namespace::run_in_new(each_filter_of_processes)
}

fn pids_of_a_nested_pid_namespace() -> anyhow::Result<()> {
    pid_namespace::run_in_new(|| pid_namespace::run_in_new(each_filter_of_processes))
}

fn start() -> anyhow::Result<Collector> {
    Collector::start_with(|builder| builder.sample_interval(None))
}

fn owner(event: &Event) -> Option<u32> {
    event.process.as_ref().map(|process| process.pid)
}

/// The first process of a pid namespace, which has another pid in the initial namespace.
fn each_filter_of_processes() -> anyhow::Result<()> {
    ensure!(process::id() == 1, "not in a pid namespace of its own");
    let mut server = Actor::spawn("server")?;
    let mut client = Actor::spawn("client")?;
    let mut below = Actor::spawn_below_a_parent("below")?;
    let listener = server.listen(loopback(false))?;
    let ours = TcpListener::bind(loopback(false))?;
    let numbers = [1, server.pid(), client.pid()];
    let [own, of_server, of_client] = numbers.map(initial);
    let (own, of_server, of_client) = (own?, of_server?, of_client?);
    ensure!([own, of_server, of_client] != numbers);
    let is = |pid| move |event: &Event| owner(event) == Some(pid);
    let is_below = |event: &Event| {
        let process = event.process.as_ref();
        process.is_some_and(|process| process.comm.as_bytes() == b"below")
    };
    let known = [own, of_server, of_client];
    let cases = [
        Case::new(Filter::new(), |_| true),
        Case::new(Filter::new().pid(client.pid()), is(of_client)),
        Case::new(
            Filter::new().pid(server.pid()).pid(client.pid()),
            move |event| is(of_server)(event) || is(of_client)(event),
        ),
        Case::new(Filter::new().pid(1), is(own)),
        Case::new(Filter::new().only_self(), is(own)),
        Case::new(Filter::new().exclude_self(), move |event| !is(own)(event)),
        Case::new(Filter::new().pid_tree(below.pid()), is_below),
        Case::new(
            Filter::new().only_self().pid_tree(below.pid()),
            move |event| is(own)(event) || is_below(event),
        ),
        Case::new(Filter::new().pid_tree(1), move |event| {
            is_below(event) || owner(event).is_some_and(|pid| known.contains(&pid))
        }),
    ];
    let collectors = [start()?, start()?];
    let names_nothing = [
        (Filter::new().pid(own), format!("pid is {own}: no process")),
        (
            Filter::new().pid_tree(own),
            format!("pid_tree is {own}: there is no such process"),
        ),
    ];
    for (filter, message) in &names_nothing {
        refused(&collectors[0], filter, message)?;
    }
    compare(collectors, &cases, || {
        connect(&mut client, &listener, &mut server)?;
        let to_us = client.connect(ours.local_addr()?)?;
        drop(ours.accept()?);
        ensure!(client.receive_all(&to_us)? == 0);
        client.close(&to_us)?;
        let listens = below.listen(loopback(false))?;
        below.close(&listens)?;
        Ok(5)
    })
}

/// Checks that the filter is refused, and that the previous one stays.
fn refused(collector: &Collector, filter: &Filter, message: &str) -> anyhow::Result<()> {
    let before = collector.handle().filter();
    let error = collector
        .set_filter(filter.clone())
        .err()
        .context("accepted")?;
    let error: &tcp_udp_trace::Error = error.downcast_ref().context("another error")?;
    ensure!(error.kind() == ErrorKind::InvalidFilter, "{error:?}");
    ensure!(
        error.to_string().starts_with(message),
        "{error}\nnot\n{message}"
    );
    ensure!(collector.handle().filter() == before);
    Ok(())
}

/// A process of the initial pid namespace and one of the tracer's namespace have the same pid, each
/// in its own. The filter means the latter.
fn pid_of_a_stranger() -> anyhow::Result<()> {
    let mut stranger = Actor::spawn("stranger")?;
    let number = stranger.pid();
    pid_namespace::run_in_new(|| {
        pid_namespace::number_next(number)?;
        let mut meant = Actor::spawn("meant")?;
        ensure!(meant.pid() == number, "it is {}", meant.pid());
        let initial = initial(number)?;
        let cases = [
            Case::new(Filter::new().pid(number), move |event| {
                owner(event) == Some(initial)
            }),
            Case::new(Filter::new().pid_tree(number), move |event| {
                owner(event) == Some(initial)
            }),
            Case::new(Filter::new().exclude_self(), |_| true),
        ];
        compare([start()?, start()?], &cases, || {
            for actor in [&mut stranger, &mut meant] {
                let listener = actor.listen(loopback(false))?;
                actor.close(&listener)?;
            }
            Ok(2)
        })
    })
}

/// User space applies the filter to the totals that it reports as the programs do.
fn flows_in_a_pid_namespace() -> anyhow::Result<()> {
    pid_namespace::run_in_new(|| {
        let start = |filter: Filter| {
            Collector::start_udp_with(|builder| {
                let builder = builder.interval(Duration::from_secs(3600)).filter(filter);
                builder.sample_interval(None)
            })
        };
        let collectors = [
            start(Filter::new().only_self())?,
            start(Filter::new().pid(1))?,
        ];
        let [from, to] = [(); 2].map(|()| UdpSocket::bind(loopback(false)));
        let (from, to) = (from?, to?);
        for _ in 0..3 {
            from.send_to(b"datagram", to.local_addr()?)?;
        }
        drop(from);
        let own = initial(1)?;
        for collector in collectors {
            // The flow at its beginning and at its end, and the socket's end.
            let events = collector.wait_count(3)?;
            let packets = events.iter().map(|event| event.traffic.tx_packets);
            ensure!(packets.eq([1, 3, 3]), "{}", show(&events));
            ensure!(
                matches!(events[2].kind, EventKind::Close { .. }),
                "{}",
                show(&events)
            );
            ensure!(
                events.iter().all(|event| owner(event) == Some(own)),
                "{}",
                show(&events)
            );
            collector.finish_all()?;
        }
        Ok(())
    })
}

/// On a machine with both versions, the directories of v1 have inodes too, but these are not the
/// cgroup ids of sockets.
fn cgroups_by_their_paths() -> anyhow::Result<()> {
    let _hybrid = Hybrid::mount()?;
    let group = Cgroup::new("by-path")?.context("it was mounted")?;
    let (mut inside, mut outside) = (Actor::spawn("inside")?, Actor::spawn("outside")?);
    group.adopt(inside.pid())?;
    let folder = group.path().to_owned();
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", inside.pid()))?;
    let shown = groups.lines().find_map(|line| line.strip_prefix("0::"));
    let shown = PathBuf::from(shown.context("in no cgroup")?);
    ensure!(folder.starts_with(cgroup::UNIFIED) && folder.ends_with(shown.file_name().unwrap()));
    let id = group.id()?;
    let collectors = [start()?, start()?];

    // Cgroups of the same name and of another one, in the other hierarchy.
    let v1 = [shown.file_name().unwrap().to_str().unwrap(), "only-v1"]
        .map(|name| PathBuf::from(cgroup::V1).join(name));
    for folder in &v1 {
        fs::create_dir(folder)?;
    }
    let unified = cgroup::UNIFIED;
    for (path, what) in [
        (
            v1[0].clone(),
            format!("{} is of a cgroup v1 hierarchy", v1[0].display()),
        ),
        (
            "/only-v1".into(),
            format!("{} is of a cgroup v1 hierarchy", v1[1].display()),
        ),
        (
            PathBuf::from("/sys/fs/cgroup").join(shown.file_name().unwrap()),
            format!("there is no such cgroup; cgroup v2 is mounted at {unified}"),
        ),
        ("/sys/fs/cgroup".into(), "there is no such cgroup".into()),
        (folder.join("none"), "there is no such cgroup".into()),
        (folder.join("cgroup.procs"), "a cgroup is a folder".into()),
        (
            folder.join(".."),
            "not an absolute path without `..`".into(),
        ),
        (
            "relative".into(),
            "not an absolute path without `..`".into(),
        ),
    ] {
        let message = format!("cgroup is {}: {what}", path.display());
        refused(&collectors[0], &Filter::new().cgroup_path(path), &message)?;
    }
    for folder in &v1 {
        fs::remove_dir(folder)?;
    }

    let is_inside = move |event: &Event| event.socket.cgroup == id;
    let text = format!("cgroup={},{}", shown.display(), u64::MAX);
    let cases = [
        Case::new(Filter::new().cgroup_path(&folder), is_inside),
        Case::new(Filter::new().cgroup_path(&shown), is_inside),
        Case::new(text.parse()?, is_inside),
        Case::new(Filter::new().cgroup_tree_path(&shown), is_inside),
        Case::new(Filter::new().cgroup_tree(id), is_inside),
        Case::new(Filter::new().cgroup_path("/"), {
            let root = fs::metadata(unified)?;
            let root = std::os::unix::fs::MetadataExt::ino(&root);
            move |event: &Event| event.socket.cgroup == root
        }),
    ];
    compare(collectors, &cases, || {
        for actor in [&mut inside, &mut outside] {
            let listener = actor.listen(loopback(false))?;
            actor.close(&listener)?;
        }
        Ok(2)
    })
}

/// If the whole hierarchy is mounted in a cgroup namespace, `/` could be the machine's root or the
/// namespace's.
fn cgroup_in_a_cgroup_namespace() -> anyhow::Result<()> {
    let Some(group) = Cgroup::new("own")? else {
        return skip("cgroup v2 is not mounted");
    };
    let folder = group.path().to_owned();
    let collector = start()?;
    let entered = group.enter()?;
    unshare(CloneFlags::CLONE_NEWCGROUP)?;
    refused(
        &collector,
        &Filter::new().cgroup_path("/"),
        "cgroup is /: cgroup v2 is not mounted, or not at the root of this cgroup namespace",
    )?;
    collector.set_filter(Filter::new().cgroup_path(&folder))?;
    collector.set_filter(Filter::new().cgroup_tree_path(&folder))?;
    collector.set_filter(Filter::new().cgroup_tree(entered.cgroup().id()?))?;
    // The levels are those of the machine's hierarchy.
    let mut trees = Filter::new();
    let mut path = folder.clone();
    let mut below = Vec::new();
    for _ in 0..5 {
        trees = trees.cgroup_tree_path(&path);
        path.push("below");
        fs::create_dir(&path)?;
        below.push(path.clone());
    }
    refused(
        &collector,
        &trees,
        "cgroup_tree has cgroups at 5 levels of the hierarchy: at most 4",
    )?;
    for path in below.iter().rev() {
        fs::remove_dir(path)?;
    }
    let none = Filter::new().cgroup_tree(u64::MAX);
    let message = format!("cgroup_tree is {}: there is no such cgroup", u64::MAX);
    refused(&collector, &none, &message)?;
    collector.finish_all()?;
    drop(entered);
    Ok(())
}
