//! Filters: exactly the events that pass are reported, and the others take no room.

use std::{
    cell::RefCell,
    collections::HashSet,
    ffi::OsStr,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    process,
    rc::Rc,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use integration_tests::{
    actor::{Actor, Command, Endpoint, Operation, ReceiveCall, SendCall},
    cgroup::Cgroup,
    collector::{Collector, SAMPLE_INTERVAL, show},
    expected_tcp::{ACTIVE_CLIENT, ExpectedTcp},
    netns::Netns,
    suite::{Test, skip},
    tcp_pair::loopback,
    udp_actor::ROOM,
};
use tcp_udp_trace::{Comm, Direction, Event, EventKind, Family, Filter, Kind, TcpState};

use crate::compared::{Case, compare, described};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            each_setting_of_tcp,
            each_setting_of_udp,
            trees_of_processes,
            trees_of_cgroups,
            flows_in_trees_of_cgroups,
            samples_are_filtered,
        ],
    ]
}

/// Processes that differ in everything that a filter can select.
struct World {
    server: Actor,
    client: Actor,
    /// A process of another user, in another namespace and, where cgroups exist, in another cgroup.
    other: Actor,
    other_cgroup: Option<Cgroup>,
    there: Netns,
}

impl World {
    fn new(name: &str) -> anyhow::Result<Self> {
        let there = Netns::new()?;
        let other = there.run(|| Actor::spawn_as(OsStr::new("o t,her"), Some(1234)))?;
        let other_cgroup = Cgroup::new(name)?;
        if let Some(cgroup) = &other_cgroup {
            cgroup.adopt(other.pid())?;
        }
        Ok(Self {
            server: Actor::spawn("server")?,
            client: Actor::spawn("client")?,
            other,
            other_cgroup,
            there,
        })
    }

    fn collectors(
        &self,
        start: impl Fn() -> anyhow::Result<Collector>,
    ) -> anyhow::Result<[Collector; 2]> {
        let collectors = [start()?, start()?];
        for collector in &collectors {
            collector.also(self.there.inode()?);
        }
        Ok(collectors)
    }

    /// Returns a filter for each setting, with a function that applies its documentation to an
    /// event.
    fn cases(&self) -> anyhow::Result<Vec<Case>> {
        let Self {
            server,
            client,
            other,
            other_cgroup,
            there,
        } = self;
        let [server, client, other] = [server, client, other].map(Actor::pid);
        let netns = there.inode()?;
        let pid = |event: &Event| event.process.as_ref().map(|process| process.pid);
        let comm = |event: &Event, name: &[u8]| {
            let process = event.process.as_ref();
            process.is_some_and(|process| process.comm.as_bytes() == name)
        };
        let local = |event: &Event| event.socket.local.ip();
        let remote = |event: &Event| event.socket.remote.ip();
        let ours = process::id();
        let mut cases = vec![
            Case::new(Filter::new(), |_| true),
            Case::new(Filter::new().pid(client), move |e| pid(e) == Some(client)),
            Case::new(Filter::new().pid(server).pid(other), move |e| {
                [Some(server), Some(other)].contains(&pid(e))
            }),
            Case::new(Filter::new().comm(Comm::from_bytes(b"o t,her")), move |e| {
                comm(e, b"o t,her")
            }),
            Case::new(Filter::new().uid(1234), |e| e.socket.uid == 1234),
            Case::new(Filter::new().netns(netns), move |e| e.socket.netns == netns),
            Case::new(Filter::new().family(Family::Ipv6), move |e| {
                local(e).is_ipv6()
            }),
            Case::new(
                Filter::new().local(Ipv4Addr::new(127, 0, 0, 0), 8),
                move |e| local(e) == IpAddr::V4(Ipv4Addr::LOCALHOST),
            ),
            Case::new(Filter::new().remote(Ipv6Addr::LOCALHOST, 128), move |e| {
                remote(e) == IpAddr::V6(Ipv6Addr::LOCALHOST)
            }),
            Case::new(
                Filter::new().remote(Ipv4Addr::new(127, 0, 0, 0), 31),
                move |e| remote(e) == IpAddr::V4(Ipv4Addr::LOCALHOST),
            ),
            Case::new(Filter::new().remote(Ipv4Addr::new(126, 0, 0, 0), 8), |_| {
                false
            }),
            Case::new(
                Filter::new().not_local(Ipv4Addr::new(127, 0, 0, 0), 8),
                move |e| !matches!(local(e), IpAddr::V4(ip) if ip.is_loopback()),
            ),
            Case::new(
                Filter::new().not_remote(Ipv6Addr::LOCALHOST, 128),
                move |e| remote(e) != IpAddr::V6(Ipv6Addr::LOCALHOST),
            ),
            // A part of a network.
            Case::new(
                Filter::new()
                    .remote(Ipv4Addr::new(127, 0, 0, 0), 8)
                    .not_remote(Ipv4Addr::LOCALHOST, 32),
                move |e| matches!(remote(e), IpAddr::V4(ip) if ip.is_loopback() && ip != Ipv4Addr::LOCALHOST),
            ),
            Case::new(Filter::new().exclude_loopback(), move |e| {
                ![local(e), remote(e)].iter().any(IpAddr::is_loopback)
            }),
            Case::new(Filter::new().only_self(), move |e| pid(e) == Some(ours)),
            Case::new(Filter::new().exclude_self(), move |e| pid(e) != Some(ours)),
            Case::new(Filter::new().pid(ours), move |e| pid(e) == Some(ours)),
            // Two settings: both must hold.
            Case::new(Filter::new().pid(client).family(Family::Ipv4), move |e| {
                pid(e) == Some(client) && local(e).is_ipv4()
            }),
        ];
        if let Some(cgroup) = other_cgroup {
            let id = cgroup.id()?;
            cases.push(Case::new(Filter::new().cgroup(id), move |e| {
                e.socket.cgroup == id
            }));
        }
        Ok(cases)
    }
}

fn each_setting_of_tcp() -> anyhow::Result<()> {
    let mut world = World::new("filtered-tcp")?;
    let collectors =
        world.collectors(|| Collector::start_with(|builder| builder.sample_interval(None)))?;
    let [v4, v6] = [false, true].map(|v6| world.server.listen(loopback(v6)));
    let (v4, v6) = (v4?, v6?);
    let ours = TcpListener::bind(loopback(false))?;
    let mut cases = world.cases()?;
    let port = v6.local.port();
    let state = |event: &Event, state| match event.kind {
        EventKind::StateChange { to, .. } => to == state,
        // An accept of a connection that was just made.
        _ => state == TcpState::Established,
    };
    cases.extend([
        Case::new(Filter::new().port(port), move |e| {
            [e.socket.local, e.socket.remote]
                .map(|a| a.port())
                .contains(&port)
        }),
        Case::new(Filter::new().kind(Kind::Accept).kind(Kind::Flow), |e| {
            e.kind == EventKind::Accept
        }),
        Case::new(Filter::new().state(TcpState::Established), move |e| {
            state(e, TcpState::Established)
        }),
        Case::new(
            Filter::new()
                .state(TcpState::FinWait2)
                .state(TcpState::Listen),
            move |e| state(e, TcpState::FinWait2) || state(e, TcpState::Listen),
        ),
        Case::new(Filter::new().direction(Direction::Outbound), |e| {
            e.socket.direction == Some(Direction::Outbound)
        }),
        Case::new(
            Filter::new()
                .direction(Direction::Inbound)
                .direction(Direction::Listener),
            |e| {
                let directions = [Direction::Inbound, Direction::Listener];
                e.socket
                    .direction
                    .is_some_and(|it| directions.contains(&it))
            },
        ),
        Case::new(Filter::new().kind(Kind::Close), |_| false),
        Case::new(Filter::new(), |_| true),
    ]);
    compare(collectors, &cases, || {
        for listener in [&v4, &v6] {
            connect(&mut world.client, listener, &mut world.server)?;
        }
        let listener = world.other.listen(loopback(true))?;
        let to_itself = world.other.connect(listener.local)?;
        let accepted = world.other.accept(&listener)?;
        world.other.close(&to_itself)?;
        ensure!(world.other.receive_all(&accepted)? == 0);
        world.other.close(&accepted)?;
        world.other.close(&listener)?;
        let to_us = world.client.connect(ours.local_addr()?)?;
        drop(ours.accept()?);
        ensure!(world.client.receive_all(&to_us)? == 0);
        world.client.close(&to_us)?;
        Ok(9)
    })
}

pub(crate) fn connect(
    client: &mut Actor,
    listener: &Endpoint,
    server: &mut Actor,
) -> anyhow::Result<()> {
    let connected = client.connect(listener.local)?;
    let accepted = server.accept(listener)?;
    client.close(&connected)?;
    ensure!(server.receive_all(&accepted)? == 0);
    server.close(&accepted)
}

fn each_setting_of_udp() -> anyhow::Result<()> {
    let mut world = World::new("filtered-udp")?;
    // Flows are reported once an hour, so each is reported at its first datagram and at its end,
    // and at no moment in between.
    let start = || {
        Collector::start_udp_with(|builder| {
            let builder = builder.sample_interval(None).per_datagram(true);
            builder.interval(Duration::from_secs(3600))
        })
    };
    let collectors = world.collectors(start)?;
    let mut cases = world.cases()?;
    cases.extend([
        Case::new(Filter::new().kind(Kind::Close), |e| {
            matches!(e.kind, EventKind::Close { .. })
        }),
        Case::new(Filter::new().kind(Kind::Flow), |e| {
            matches!(e.kind, EventKind::Flow { .. })
        }),
        Case::new(Filter::new().kind(Kind::Send).kind(Kind::Connect), |e| {
            matches!(e.kind, EventKind::Send { .. } | EventKind::Connect)
        }),
        Case::new(Filter::new().kind(Kind::Flow).port(PORT), |e| {
            let ports = [e.socket.local, e.socket.remote].map(|a| a.port());
            matches!(e.kind, EventKind::Flow { .. }) && ports.contains(&PORT)
        }),
        // At their close, neither end of most of these sockets is at this port.
        Case::new(Filter::new().port(PORT), |e| {
            [e.socket.local, e.socket.remote]
                .map(|a| a.port())
                .contains(&PORT)
        }),
        // Settings for TCP.
        Case::new(Filter::new().state(TcpState::Established), |_| true),
        Case::new(Filter::new().direction(Direction::Outbound), |_| true),
        Case::new(Filter::new().kind(Kind::Accept), |_| false),
    ]);
    let handle = collectors[0].handle().clone();
    compare(collectors, &cases, || world.talk())?;
    // Closes that the kernel reported because of their flows.
    let stats = handle.stats();
    ensure!(stats.reader_filtered > 0, "{stats:?}");
    Ok(())
}

/// A port that is the same in every round.
const PORT: u16 = 4747;

impl World {
    /// Sends datagrams: the client to the server, the other process to itself, and this process to
    /// the client. Returns how many sockets were closed.
    fn talk(&mut self) -> anyhow::Result<usize> {
        let mut closed = 0;
        for v6 in [false, true] {
            let mut address = loopback(v6);
            address.set_port(PORT);
            let server = bind_udp(&mut self.server, address)?;
            let client = bind_udp(&mut self.client, loopback(v6))?;
            transfer(
                (&mut self.client, &client),
                (&mut self.server, &server),
                &[1, 22, 333],
            )?;
            let connect = Command::Connect(client.fd, server.local);
            self.client.run(connect)?;
            self.client.close(&client)?;
            self.server.close(&server)?;
            closed += 2;
        }
        let [one, two] = [false; 2].map(|v6| bind_udp(&mut self.other, loopback(v6)));
        let (one, two) = (one?, two?);
        self.other.run(send(&one, two.local, &[5]))?;
        self.other.run(receive(&two, 1))?;
        self.other.close(&one)?;
        self.other.close(&two)?;
        let client = bind_udp(&mut self.client, loopback(false))?;
        let ours = UdpSocket::bind(loopback(false))?;
        ours.send_to(b"us", client.local)?;
        self.client.run(receive(&client, 1))?;
        drop(ours);
        self.client.close(&client)?;
        Ok(closed + 4)
    }
}

pub(crate) fn bind_udp(actor: &mut Actor, address: SocketAddr) -> anyhow::Result<Endpoint> {
    let v6 = address.is_ipv6();
    let socket = actor.socket(Command::OpenUdp { v6 })?;
    actor.socket(Command::Bind(socket.fd, address))
}

pub(crate) fn send(from: &Endpoint, to: SocketAddr, sizes: &[usize]) -> Command {
    let send = Operation::Send {
        by: SendCall::SendTo,
        to: Some(to),
        sizes: sizes.to_vec(),
    };
    Command::Udp(from.fd, send)
}

pub(crate) fn receive(socket: &Endpoint, count: usize) -> Command {
    let receive = Operation::Receive {
        by: ReceiveCall::RecvFrom,
        count,
        room: ROOM,
    };
    Command::Udp(socket.fd, receive)
}

fn transfer(
    (sender, from): (&mut Actor, &Endpoint),
    (receiver, to): (&mut Actor, &Endpoint),
    sizes: &[usize],
) -> anyhow::Result<()> {
    sender.run(send(from, to.local, sizes))?;
    receiver.run(receive(to, sizes.len())).map(drop)
}

/// Descendants from before the filter, and later ones, also after their parents or they themselves
/// have ended.
fn trees_of_processes() -> anyhow::Result<()> {
    let mut server = Actor::spawn("server")?;
    let [to_inside, to_outside] = [(); 2].map(|()| server.listen(loopback(false)));
    let (to_inside, to_outside) = (to_inside?, to_outside?);
    let mut inside = Actor::spawn_below_a_parent("inside")?;
    let mut outside = Actor::spawn("outside")?;
    // The process answers, so it has started.
    let socket = inside.open(loopback(false))?;
    inside.close(&socket)?;

    let trees = Filter::new().pid_tree(inside.pid());
    let start = |filter: &Filter| {
        let filter = filter.clone();
        Collector::start_with(|builder| builder.sample_interval(None).filter(filter))
    };
    let collectors = [start(&trees)?, start(&Filter::new())?];
    let client_of = |listener: &Endpoint| {
        let address = listener.local;
        move |event: &Event| event.socket.remote == address
    };
    let mut act = |inside: &mut Actor, outside: &mut Actor| {
        for (client, listener) in [(inside, &to_inside), (outside, &to_outside)] {
            connect(client, listener, &mut server)?;
            client.run(Command::ConnectInChild(listener.local))?;
            let accepted = server.accept(listener)?;
            // The process ends together with its socket.
            ensure!(server.receive_all(&accepted)? == 0);
            server.close(&accepted)?;
        }
        Ok(8)
    };
    let [filtered, reference] = &collectors;
    let mut closed = 0;
    let mut should_come = Vec::new();
    let mut seen = 0;
    let mut check = |passes: &dyn Fn(&Event) -> bool, new: usize| {
        closed += new;
        reference.wait_closed(closed)?;
        let events = reference.events();
        should_come.extend(events[seen..].iter().filter(|e| passes(e)).cloned());
        seen = events.len();
        let came = filtered.wait_count(should_come.len())?;
        let [came, should_come] = [&came, &should_come].map(|events| described(events));
        ensure!(came == should_come, "{came:#?}\nnot\n{should_come:#?}");
        Ok(())
    };
    let new = act(&mut inside, &mut outside)?;
    check(&client_of(&to_inside), new)?;

    // The root ends, the tree does not.
    inside.orphan()?;
    let new = act(&mut inside, &mut outside)?;
    check(&client_of(&to_inside), new)?;

    // Another tree, and then both: the orphan is no longer a descendant, but it is the root of its
    // own tree.
    filtered.set_filter(Filter::new().pid_tree(outside.pid()))?;
    let new = act(&mut inside, &mut outside)?;
    check(&client_of(&to_outside), new)?;
    let orphan = reference.events().iter().find_map(|event| {
        let process = event.process.as_ref()?;
        (process.comm.as_bytes() == b"inside").then_some(process.pid)
    });
    let orphan = orphan.context("no event of the orphan")?;
    let both = Filter::new().pid_tree(outside.pid()).pid_tree(orphan);
    filtered.set_filter(both.port(to_inside.local.port()))?;
    let new = act(&mut inside, &mut outside)?;
    check(&client_of(&to_inside), new)?;

    let stats = filtered.handle().stats();
    ensure!(stats.untracked_processes == 0, "{stats:?}");
    let [filtered, reference] = collectors;
    let expected = should_come.len();
    let came = filtered.finish_all()?;
    ensure!(came.len() == expected, "{}", show(&came[expected..]));
    reference.finish_all().map(drop)
}

/// Cgroups below one another, and a process in each.
struct Tree {
    processes: [Actor; 3],
    /// This process moves to cgroups that are made later.
    mover: Actor,
    /// A cgroup below the root of the tree, the root, and a cgroup beside it. They are dropped in
    /// this order, after the processes.
    cgroups: [Cgroup; 3],
    /// The ids of the cgroups of the whole tree, and of those below the one below the root.
    ids: [Rc<RefCell<HashSet<u64>>>; 2],
}

impl Tree {
    /// Returns `None` without cgroup v2.
    fn of_name(name: &str) -> anyhow::Result<Option<Self>> {
        let beside = format!("{name}-2");
        let (Some(root), Some(beside)) = (Cgroup::new(name)?, Cgroup::new(&beside)?) else {
            return Ok(None);
        };
        let below = root.below("below")?;
        let all = HashSet::from([root.id()?, below.id()?]);
        let lower = HashSet::from([below.id()?]);
        let cgroups = [below, root, beside];
        let mut processes = Vec::new();
        for (cgroup, name) in cgroups.iter().zip(["below", "root", "beside"]) {
            let process = Actor::spawn(name)?;
            cgroup.adopt(process.pid())?;
            processes.push(process);
        }
        Ok(Some(Self {
            cgroups,
            processes: processes.try_into().ok().context("three")?,
            mover: Actor::spawn("mover")?,
            ids: [all, lower].map(RefCell::new).map(Rc::new),
        }))
    }

    /// Makes a cgroup two levels below the root, and moves a process there meanwhile.
    fn in_a_later_cgroup<T>(
        &mut self,
        act: impl FnOnce(&mut Actor) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let [below, _, beside] = &self.cgroups;
        let later = below.below("later")?;
        for ids in &self.ids {
            ids.borrow_mut().insert(later.id()?);
        }
        later.adopt(self.mover.pid())?;
        let result = act(&mut self.mover)?;
        beside.adopt(self.mover.pid())?;
        Ok(result)
    }

    /// Returns filters, each with a function that applies its documentation to an event.
    fn cases(&self) -> anyhow::Result<Vec<Case>> {
        let [below, root, beside] = &self.cgroups;
        let (root_id, below_id, beside_id) = (root.id()?, below.id()?, beside.id()?);
        let is_in = |which: usize| {
            let ids = Rc::clone(&self.ids[which]);
            move |event: &Event| ids.borrow().contains(&event.socket.cgroup)
        };
        let text = format!("cgroup_tree={}", below.path().display());
        let machine = root.path().parent().context("a root")?;
        Ok(vec![
            Case::new(Filter::new().cgroup_tree(root_id), is_in(0)),
            Case::new(Filter::new().cgroup_tree_path(root.path()), is_in(0)),
            Case::new(text.parse()?, is_in(1)),
            Case::new(Filter::new().cgroup_tree(below_id), is_in(1)),
            Case::new(Filter::new().cgroup(below_id), move |event| {
                event.socket.cgroup == below_id
            }),
            // Two trees that begin at different levels.
            Case::new(
                Filter::new().cgroup_tree(below_id).cgroup_tree(beside_id),
                {
                    let is_below = is_in(1);
                    move |event| is_below(event) || event.socket.cgroup == beside_id
                },
            ),
            // Both settings name cgroups.
            Case::new(
                Filter::new().cgroup_tree(below_id).cgroup(root_id),
                is_in(0),
            ),
            Case::new(Filter::new().cgroup_tree(beside_id), move |event| {
                event.socket.cgroup == beside_id
            }),
            Case::new(Filter::new().cgroup_tree_path(machine), |event| {
                event.socket.cgroup != 0
            }),
        ])
    }
}

/// Cgroups from before the filter, later ones, and one that is removed before its sockets end.
fn trees_of_cgroups() -> anyhow::Result<()> {
    let Some(mut tree) = Tree::of_name("tree-tcp")? else {
        return skip("cgroup v2 is not mounted");
    };
    let start = || Collector::start_with(|builder| builder.sample_interval(None));
    let mut cases = vec![Case::new(Filter::new(), |_| true)];
    cases.extend(tree.cases()?);
    let count = cases.len();
    let mut orphans = None;
    compare([start()?, start()?], &cases, || {
        for process in &mut tree.processes {
            let listener = process.listen(loopback(false))?;
            process.close(&listener)?;
        }
        tree.in_a_later_cgroup(|mover| {
            let listener = mover.listen(loopback(false))?;
            mover.close(&listener)
        })?;
        if orphans.is_none() {
            let listen = |mover: &mut Actor| {
                let listeners = (0..count).map(|_| mover.listen(loopback(false)));
                listeners.collect::<Result<Vec<_>, _>>()
            };
            orphans = Some(tree.in_a_later_cgroup(listen)?);
        }
        let orphan = orphans.as_mut().and_then(Vec::pop).context("no orphan")?;
        tree.mover.close(&orphan)?;
        Ok(5)
    })
}

/// User space applies the filter to the totals that it reports as the programs do.
fn flows_in_trees_of_cgroups() -> anyhow::Result<()> {
    let Some(mut tree) = Tree::of_name("tree-udp")? else {
        return skip("cgroup v2 is not mounted");
    };
    let start = || {
        Collector::start_udp_with(|builder| {
            let builder = builder.interval(Duration::from_secs(3600));
            builder.sample_interval(None)
        })
    };
    // Each filter is set while flows exist that began with no filter.
    let all = || Case::new(Filter::new(), |_| true);
    let cases: Vec<_> = tree.cases()?.into_iter().flat_map(|c| [all(), c]).collect();
    let mut receiver = Actor::spawn("receiver")?;
    tree.cgroups[2].adopt(receiver.pid())?;
    let mut older: Vec<(usize, Endpoint)> = Vec::new();
    compare([start()?, start()?], &cases, || {
        let to = bind_udp(&mut receiver, loopback(false))?;
        let mut send_from = |process: &mut Actor| {
            let socket = bind_udp(process, loopback(false))?;
            process.run(send(&socket, to.local, &[10, 20]))?;
            receiver.run(receive(&to, 2))?;
            anyhow::Ok(socket)
        };
        let mut closed = 0;
        let ends = !older.is_empty();
        for (which, socket) in older.drain(..) {
            let process = tree.processes.get_mut(which);
            process.unwrap_or(&mut tree.mover).close(&socket)?;
            closed += 1;
        }
        let mut sockets = Vec::new();
        for (which, process) in tree.processes.iter_mut().enumerate() {
            sockets.push((which, send_from(process)?));
        }
        sockets.push((3, tree.in_a_later_cgroup(&mut send_from)?));
        if !ends {
            older = std::mem::take(&mut sockets);
        }
        for (which, socket) in sockets {
            let process = tree.processes.get_mut(which);
            process.unwrap_or(&mut tree.mover).close(&socket)?;
            closed += 1;
        }
        // Its end shows that the events before it have come.
        receiver.close(&to)?;
        Ok(closed + 1)
    })
}

fn samples_are_filtered() -> anyhow::Result<()> {
    let mut server = Actor::spawn("server")?;
    let mut client = Actor::spawn("client")?;
    let listener = server.listen(loopback(false))?;
    let pid = client.pid();
    let collector = Collector::start_with(move |builder| {
        let builder = builder.filter(Filter::new().pid(pid));
        builder.sample_interval(SAMPLE_INTERVAL)
    })?;
    let connected = client.connect(listener.local)?;
    let accepted = server.accept(&listener)?;
    for _ in 0..2 {
        collector.wait_for_sample("the client", |event| event.socket.local == connected.local)?;
    }
    for event in collector.samples() {
        let owner = event.process.as_ref().map(|process| process.pid);
        ensure!(owner == Some(pid), "{event}");
    }
    let stats = collector.handle().stats();
    // The listener, and the server's end.
    ensure!(stats.kinds.sample.kernel_filtered >= 2, "{stats:?}");
    client.close(&connected)?;
    server.close(&accepted)?;
    let mut observed = collector.finish(1)?;
    observed.check(&ExpectedTcp::of(
        &client.identity()?,
        &connected,
        ACTIVE_CLIENT,
    ))?;
    observed.nothing_else()
}
