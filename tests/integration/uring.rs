//! Accepts without a system call of their own: every way of `io_uring`.

use anyhow::ensure;
use integration_tests::{
    actor::{Actor, Command, UringAccept, errno},
    collector::{Collector, show},
    suite::{Test, skip},
    tcp_pair::loopback,
};
use nix::errno::Errno;
use tcp_udp_trace::{Event, EventKind, TcpState};

/// More connections than an actor had descriptors before, so that the numbers of slots are also
/// those of other sockets' descriptors.
const CONNECTIONS: u32 = 12;

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            once,
            by_the_polling_thread,
            by_a_worker,
            deferred,
            multishot,
            multishot_deferred,
            direct,
            direct_allocated,
            multishot_direct,
            multishot_in_a_worker_process,
            direct_in_a_worker_process,
        ],
    ]
}

fn once() -> anyhow::Result<()> {
    check(UringAccept::Once, false)
}

fn by_the_polling_thread() -> anyhow::Result<()> {
    check(UringAccept::Polled, false)
}

fn by_a_worker() -> anyhow::Result<()> {
    check(UringAccept::Worker, false)
}

fn deferred() -> anyhow::Result<()> {
    check(UringAccept::Deferred, false)
}

fn multishot() -> anyhow::Result<()> {
    check(UringAccept::Multishot, false)
}

fn multishot_deferred() -> anyhow::Result<()> {
    check(UringAccept::MultishotDeferred, false)
}

fn direct() -> anyhow::Result<()> {
    check(UringAccept::Direct, false)
}

fn direct_allocated() -> anyhow::Result<()> {
    check(UringAccept::DirectAllocated, false)
}

fn multishot_direct() -> anyhow::Result<()> {
    check(UringAccept::MultishotDirect, false)
}

fn multishot_in_a_worker_process() -> anyhow::Result<()> {
    check(UringAccept::Multishot, true)
}

fn direct_in_a_worker_process() -> anyhow::Result<()> {
    check(UringAccept::MultishotDirect, true)
}

/// Each connection is accepted once, by the process with the ring. The server's listener and its
/// own connections are not accepts.
fn check(way: UringAccept, another_process_accepts: bool) -> anyhow::Result<()> {
    let (mut parent, mut client) = (Actor::spawn("server")?, Actor::spawn("client")?);
    let (other, collector) = (client.listen(loopback(false))?, Collector::start()?);
    let mut listener = parent.listen(loopback(false))?;
    let address = listener.local;
    let mut server = parent;
    let mut _listening = None;
    if another_process_accepts {
        let mut worker = Actor::spawn("worker")?;
        listener = worker.take(&server, listener.fd)?;
        _listening = Some(std::mem::replace(&mut server, worker));
    }
    for _ in 0..4 {
        server.connect(other.local)?;
    }
    server.begin(&Command::AcceptInRing(listener.fd, way, CONNECTIONS))?;
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS {
        clients.push(client.connect(address)?);
    }
    if let Err(error) = server.finish() {
        // A kernel refuses the ways that it lacks. Before 5.19 it takes a multishot request for a
        // single one with an invalid flag.
        let refusals = [Errno::ENOSYS, Errno::EPERM, Errno::EINVAL, Errno::EBADF];
        let is_refused = refusals
            .iter()
            .any(|&refusal| errno(&error) == Some(refusal as i32));
        return if is_refused {
            skip(format_args!("{way:?} by io_uring: {error:#}"))
        } else {
            Err(error)
        };
    }
    let accepts = |event: &Event| matches!(event.kind, EventKind::Accept);
    for end in &clients {
        collector.wait_for("an accept", |event| {
            accepts(event) && event.socket.remote == end.local
        })?;
    }
    for end in &clients {
        client.close(end)?;
    }
    let pid = server.pid();
    server.kill()?;
    // Both ends of each connection, and the sockets that the server made.
    let events = collector.finish_in_order(2 * CONNECTIONS as usize + 4)?;
    for event in events.iter().filter(|event| accepts(event)) {
        let is_right = event.socket.local == address
            && event
                .process
                .as_ref()
                .is_some_and(|process| process.pid == pid);
        ensure!(
            is_right,
            "{event} is no accept by {pid}:\n{}",
            show(&events)
        );
    }
    let count = events.iter().filter(|event| accepts(event)).count();
    ensure!(
        count == clients.len(),
        "{count} accepts:\n{}",
        show(&events)
    );
    let listener_events = events.iter().filter(|event| {
        matches!(event.kind, EventKind::StateChange { from: TcpState::Listen, to, .. } if to == TcpState::Close)
    });
    ensure!(listener_events.count() <= 1, "{}", show(&events));
    Ok(())
}
