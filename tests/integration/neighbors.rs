//! One unprivileged user takes all the room of a tracer, and the sockets and flows of others are
//! still reported. Another privileged process detaches a program of ours. For a flood of events see
//! `overflow::closes_outlive_a_flood_of_datagrams`.

use std::{
    ffi::OsStr,
    net::{SocketAddr, UdpSocket},
    process,
    time::Duration,
};

use anyhow::{bail, ensure};
use integration_tests::{
    actor::{Actor, Command, SendCall},
    collector::{Collector, show},
    kernel::BpfObjects,
    netns::Netns,
    privileges::UNPRIVILEGED,
    suite::{Test, skip},
    tcp_pair::{TcpPair, loopback},
    udp_actor::UdpActor,
    udp_pair::{Family, UdpPair},
};
use tcp_udp_trace::{ErrorKind, Event, EventKind, Filter, UdpTracer};
use tokio::{runtime::Builder, time::timeout};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            tcp_sockets_of_one_user_leave_room_for_others,
            udp_sockets_of_one_user_leave_room_for_others,
            flows_of_one_user_make_room_for_each_other,
        ],
        Process: [
            detached_program_ends_the_tracer,
        ],
    ]
}

/// How many sockets the tracers of these tests remember. Other tests have sockets at the same time.
const ROOM: u32 = 1_024;
/// A user other than root and [`UNPRIVILEGED`].
const BYSTANDER: u32 = 4_242;

fn spawn(name: &str, uid: u32) -> anyhow::Result<Actor> {
    Actor::spawn_as(OsStr::new(name), Some(uid))
}

/// The user connects to a server of another user, so both of them have too many sockets.
fn tcp_sockets_of_one_user_leave_room_for_others() -> anyhow::Result<()> {
    const CONNECTIONS: u32 = ROOM * 6 / 10;
    let collector = Collector::start_with(|builder| builder.max_sockets(ROOM))?;
    let handle = collector.handle().clone();
    let (mut server, mut client) = Netns::new()?.run(|| {
        let server = Actor::spawn("crowded")?;
        Ok((server, spawn("neighbor", UNPRIVILEGED)?))
    })?;
    let listener = server.listen(loopback(false))?;
    for _ in 0..CONNECTIONS {
        client.connect(listener.local)?;
        server.accept(&listener)?;
    }
    ensure!(handle.stats().untracked > 0, "{:?}", handle.stats());
    let (server, client) = (spawn("server", BYSTANDER)?, spawn("client", BYSTANDER)?);
    TcpPair::traced_between(collector, server, loopback(false), client)?
        .check_transfer(3_000, 5_000)
}

fn udp_sockets_of_one_user_leave_room_for_others() -> anyhow::Result<()> {
    let collector = Collector::start_udp_with(|builder| builder.max_sockets(ROOM))?;
    let handle = collector.handle().clone();
    let mut neighbor = Netns::new()?.run(|| spawn("neighbor", UNPRIVILEGED))?;
    for _ in 0..ROOM * 11 / 10 {
        neighbor.socket(Command::OpenUdp { v6: false })?;
    }
    ensure!(handle.stats().untracked > 0, "{:?}", handle.stats());
    let mut pair = UdpPair::new(Family::V4, true)?;
    pair.sender.send(SendCall::SendTo, None, &[100, 200])?;
    let expected = pair.close()?;
    collector.finish_udp(2)?.check_all(&expected)
}

/// A silent flow is kept, though another user has more peers than the tracer remembers.
fn flows_of_one_user_make_room_for_each_other() -> anyhow::Result<()> {
    const FLOWS: u16 = 200;
    let filter = Filter::new().netns(Netns::current()?.inode()?);
    let collector =
        Collector::start_udp_with(move |builder| builder.filter(filter).max_flows(FLOWS.into()))?;
    let handle = collector.handle().clone();
    let silent = UdpSocket::bind(loopback(false))?;
    let local = silent.local_addr()?;
    silent.send_to(b"once", local)?;
    let mut neighbor = UdpActor::with(spawn("neighbor", UNPRIVILEGED)?, loopback(false))?;
    for port in 1..=2 * FLOWS {
        let to = SocketAddr::new(local.ip(), port);
        neighbor.send(SendCall::SendTo, Some(to), &[8])?;
    }
    neighbor.close()?;
    collector.wait_closed(1)?;
    ensure!(handle.stats().flows_evicted > 0, "{:?}", handle.stats());
    let lasts = |events: &[Event]| {
        let is_last = |event: &&Event| {
            event.socket.local == local && matches!(event.kind, EventKind::Flow { last: true, .. })
        };
        events.iter().filter(is_last).count()
    };
    let before = lasts(&collector.events());
    drop(silent);
    let events = collector.finish_in_order(2)?;
    ensure!(
        before == 0 && lasts(&events) == 1,
        "{before}:{}",
        show(&events)
    );
    Ok(())
}

/// Another privileged process may detach a program from the cgroup. The numbers would be wrong from
/// then on, so the stream ends with an error.
fn detached_program_ends_the_tracer() -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut tracer = UdpTracer::builder().start().await?;
        let detached = BpfObjects::of_this_process()?.links.into_iter().find(|id| {
            let mut bpftool = process::Command::new("bpftool");
            let done = bpftool
                .args(["link", "detach", "id", &id.to_string()])
                .output();
            done.is_ok_and(|output| output.status.success())
        });
        if detached.is_none() {
            return skip("no bpftool");
        }
        let ends = async { while tracer.next().await.is_some() {} };
        timeout(Duration::from_secs(30), ends).await?;
        let Err(error) = tracer.close().await else {
            bail!("no error");
        };
        eprintln!("{error}");
        ensure!(error.kind() == ErrorKind::Attach && error.to_string().contains("detached"));
        Ok(())
    })
}
