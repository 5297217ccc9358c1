//! The errno of a socket's end is that of the call that failed, also if the call does not set the
//! socket's error.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
};

use anyhow::{bail, ensure};
use integration_tests::{
    collector::{Collector, show},
    suite::Test,
    tcp_pair::loopback,
};
use nix::errno::Errno;
use socket2::{Domain, Socket, Type};
use tcp_udp_trace::{Event, EventKind, TcpState};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            connect_without_a_free_port,
            connect_with_addresses_in_use,
            listen_on_a_port_in_use,
            listen_without_a_free_port,
            listener_that_was_a_connection,
            listener_that_is_shut_down,
        ],
    ]
}

const BACKLOG: i32 = 8;

/// Returns a socket bound to this address, which others may share.
fn bound(address: SocketAddr) -> anyhow::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn local(socket: &Socket) -> anyhow::Result<SocketAddr> {
    match socket.local_addr()?.as_socket() {
        Some(address) => Ok(address),
        None => bail!("no address"),
    }
}

fn ensure_failed(result: std::io::Result<()>, errno: Errno) -> anyhow::Result<()> {
    let error = result.err().and_then(|error| error.raw_os_error());
    ensure!(error == Some(errno as i32), "{error:?}");
    Ok(())
}

/// Waits for this many ends of sockets. Returns the state before each, and its errno, in the order
/// of the ends.
fn ends(collector: Collector, count: usize) -> anyhow::Result<Vec<(TcpState, Option<i32>)>> {
    let events = collector.finish_in_order(count)?;
    let end = |event: &Event| match event.kind {
        EventKind::StateChange {
            from,
            to: TcpState::Close,
            error,
            ..
        } => Some((from, error)),
        _ => None,
    };
    let ends: Vec<_> = events.iter().filter_map(end).collect();
    ensure!(ends.len() == count, "{}", show(&events));
    Ok(ends)
}

/// Waits for the one end of a socket, of a connect that found no address.
fn ensure_no_address(collector: Collector) -> anyhow::Result<()> {
    let ends = ends(collector, 1)?;
    let expected = (TcpState::SynSent, Some(Errno::EADDRNOTAVAIL as i32));
    ensure!(ends == [expected], "{ends:?}");
    Ok(())
}

/// Every port of the range has a connection to the same address.
fn connect_without_a_free_port() -> anyhow::Result<()> {
    let server = TcpListener::bind(loopback(false))?;
    fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40001")?;
    let collector = Collector::start()?;
    let mut clients = Vec::new();
    let failed = loop {
        match TcpStream::connect(server.local_addr()?) {
            Ok(client) => clients.push(client),
            Err(error) => break error,
        }
        ensure!(clients.len() <= 2, "more connections than ports");
    };
    ensure_failed(Err(failed), Errno::EADDRNOTAVAIL)?;
    ensure_no_address(collector)
}

/// Another connection has the same addresses.
fn connect_with_addresses_in_use() -> anyhow::Result<()> {
    for v6 in [false, true] {
        let server = TcpListener::bind(loopback(v6))?;
        let to = server.local_addr()?.into();
        let first = bound(loopback(v6))?;
        let second = bound(local(&first)?)?;
        let collector = Collector::start()?;
        first.connect(&to)?;
        ensure_failed(second.connect(&to), Errno::EADDRNOTAVAIL)?;
        ensure_no_address(collector)?;
    }
    Ok(())
}

/// Two sockets may share an address, but only one of them can listen. After its close, the other
/// can.
fn listen_on_a_port_in_use() -> anyhow::Result<()> {
    for v6 in [false, true] {
        let first = bound(loopback(v6))?;
        let second = bound(local(&first)?)?;
        let collector = Collector::start()?;
        first.listen(BACKLOG)?;
        ensure_failed(second.listen(BACKLOG), Errno::EADDRINUSE)?;
        drop(first);
        second.listen(BACKLOG)?;
        drop(second);
        let ends = ends(collector, 3)?;
        let errors = [Some(Errno::EADDRINUSE as i32), None, None];
        let expected = errors.map(|error| (TcpState::Listen, error));
        ensure!(ends == expected, "{ends:?}");
    }
    Ok(())
}

/// The only port of the range is taken, so the listener never has a port.
fn listen_without_a_free_port() -> anyhow::Result<()> {
    fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40000")?;
    for v6 in [false, true] {
        let _first = Socket::new(Domain::for_address(loopback(v6)), Type::STREAM, None)?;
        _first.listen(BACKLOG)?;
        let collector = Collector::start()?;
        let second = Socket::new(Domain::for_address(loopback(v6)), Type::STREAM, None)?;
        ensure_failed(second.listen(BACKLOG), Errno::EADDRINUSE)?;
        let events = collector.finish_in_order(1)?;
        let changes: Vec<_> = events.iter().map(|event| &event.kind).collect();
        let change = |from, to, error| EventKind::StateChange {
            from,
            to,
            error,
            summary: None,
        };
        let expected = [
            &change(TcpState::Close, TcpState::Listen, None),
            &change(
                TcpState::Listen,
                TcpState::Close,
                Some(Errno::EADDRINUSE as i32),
            ),
        ];
        ensure!(changes == expected, "{}", show(&events));
        ensure!(
            events.iter().all(|event| event.socket.local.port() == 0),
            "{}",
            show(&events)
        );
    }
    Ok(())
}

/// A connection that is given up leaves an errno and the peer's address in its socket.
fn listener_that_was_a_connection() -> anyhow::Result<()> {
    let server = TcpListener::bind(loopback(false))?;
    let socket = bound(loopback(false))?;
    let collector = Collector::start()?;
    socket.connect(&server.local_addr()?.into())?;
    drop(server.accept()?);
    rustix::net::connect_unspec(&socket)?;
    socket.listen(BACKLOG)?;
    let local = local(&socket)?;
    drop(socket);
    collector.wait_for("the end of the listener", |event| {
        event.is_end() && event.socket.local == local && is_of_listener(event)
    })?;
    let events = collector.finish_all()?;
    let of_listener: Vec<_> = events
        .iter()
        .filter(|event| is_of_listener(event))
        .collect();
    ensure!(of_listener.len() == 2, "{}", show(&events));
    for event in of_listener {
        let EventKind::StateChange { error, .. } = event.kind else {
            bail!("{event}");
        };
        let is_right = error.is_none()
            && event.socket.remote.port() == 0
            && event.socket.remote.ip().is_unspecified();
        ensure!(is_right, "{event}");
    }
    Ok(())
}

fn is_of_listener(event: &Event) -> bool {
    use TcpState::{Close, Listen};
    matches!(event.kind, EventKind::StateChange { from, to, .. }
        if [(Close, Listen), (Listen, Close)].contains(&(from, to)))
}

/// The listener ends, but no call has failed.
fn listener_that_is_shut_down() -> anyhow::Result<()> {
    let socket = bound(loopback(false))?;
    let collector = Collector::start()?;
    socket.listen(BACKLOG)?;
    socket.shutdown(std::net::Shutdown::Both)?;
    let ends = ends(collector, 1)?;
    ensure!(ends == [(TcpState::Listen, None)], "{ends:?}");
    Ok(())
}
