//! The promises of the first page: which events open and close a connection, which sockets are
//! older than the tracer, and how to read a tracer without async.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
};

use anyhow::{Context as _, ensure};
use integration_tests::{
    actor::{Actor, Command},
    collector::{self, Collector, SAMPLE_INTERVAL, show},
    suite::Test,
    tcp_pair::loopback,
};
use tcp_udp_trace::{Event, EventKind, Filter, Kind, Protocol, TcpState, TcpTracer};
use tokio::runtime::{Builder, Runtime};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            opens_and_closes_pair,
            recipe_only_closed_connections,
            tcp_sockets_older_and_younger,
            udp_sockets_older_and_younger,
            blocking_without_a_runtime,
            blocking_on_the_runtime,
            blocking_beside_a_runtime_of_several_threads,
        ],
    ]
}

/// Makes listeners, connections that are accepted, reset and never accepted, and attempts that
/// fail. Returns how many sockets end, and how many of them were connections.
fn all_sorts() -> anyhow::Result<(usize, usize)> {
    let (mut server, mut client) = (Actor::spawn("server")?, Actor::spawn("client")?);
    let listener = server.listen(loopback(false))?;
    for is_reset in [false, true] {
        let near = client.connect(listener.local)?;
        let far = server.accept(&listener)?;
        if is_reset {
            server.abort(&far)?;
            client.close(&near)?;
        } else {
            client.close(&near)?;
            ensure!(server.receive_all(&far)? == 0);
            server.close(&far)?;
        }
    }
    // Never accepted: the end of the listener resets it.
    let waiting = client.connect(listener.local)?;
    server.close(&listener)?;
    client.close(&waiting)?;
    let refused = client.open(listener.local)?;
    client.fail(Command::Connect(refused.fd, listener.local))?;
    client.close(&refused)?;
    Ok((3 * 2 + 2, 3 * 2))
}

fn opens_and_closes_pair() -> anyhow::Result<()> {
    let collector = Collector::start()?;
    let (ends, connections) = all_sorts()?;
    let events = collector.finish_in_order(ends)?;
    let (mut open, mut opens) = (0_i64, 0);
    for event in &events {
        ensure!(event.socket.older == Some(false), "{event}");
        opens += usize::from(event.is_open());
        open += i64::from(event.is_open()) - i64::from(event.is_close());
        ensure!(open >= 0, "{open} at {event}:{}", show(&events));
    }
    let ended = events.iter().filter(|event| event.is_end()).count();
    ensure!(
        (open, opens, ended) == (0, connections, ends),
        "{open} open, {opens} opened, {ended} ended:{}",
        show(&events)
    );
    Ok(())
}

fn recipe_only_closed_connections() -> anyhow::Result<()> {
    let closes = Filter::new().kind(Kind::StateChange).state(TcpState::Close);
    let collector = Collector::start_with(|builder| builder.filter(closes).sample_interval(None))?;
    let (ends, connections) = all_sorts()?;
    let events = collector.finish_in_order(ends)?;
    let printed: Vec<_> = events.iter().filter(|event| event.is_close()).collect();
    ensure!(printed.len() == connections, "{}", show(&events));
    ensure!(
        printed.iter().all(|event| event.socket.remote.port() != 0),
        "a listener:{}",
        show(&events)
    );
    Ok(())
}

/// Checks that each socket of this port was reported, and whether it is older than the tracer.
fn check_older(events: &[Event], port: u16, older: bool) -> anyhow::Result<()> {
    let of_it: Vec<_> = events
        .iter()
        .filter(|event| event.socket.local.port() == port)
        .collect();
    ensure!(!of_it.is_empty(), "nothing of {port}:{}", show(events));
    for event in of_it {
        ensure!(
            event.socket.older == Some(older),
            "{:?} of {event}",
            event.socket.older
        );
    }
    Ok(())
}

fn tcp_sockets_older_and_younger() -> anyhow::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let old = TcpStream::connect(listener.local_addr()?)?;
    let (accepted, _) = listener.accept()?;
    // No process has a descriptor of the other end, so the accept is its first event.
    let waiting = TcpStream::connect(listener.local_addr()?)?;
    let collector = Collector::start_with(|builder| builder.sample_interval(SAMPLE_INTERVAL))?;
    let young = TcpStream::connect(listener.local_addr()?)?;
    let (first, _) = listener.accept()?;
    let (second, _) = listener.accept()?;
    let port = |stream: &TcpStream| anyhow::Ok(stream.local_addr()?.port());
    let olds = [port(&old)?, port(&waiting)?];
    let youngs = [port(&young)?];
    let each = [(olds[0], true), (olds[1], true), (youngs[0], false)];
    for (port, older) in each {
        for is_near in [true, false] {
            let sample = collector.wait_for_sample("an end", |event| {
                let ports = [event.socket.local.port(), event.socket.remote.port()];
                ports[usize::from(!is_near)] == port
            })?;
            ensure!(sample.socket.older == Some(older), "{sample}");
        }
    }
    drop((old, accepted, waiting, young, first, second));
    let listens_at = listener.local_addr()?.port();
    drop(listener);
    let events = collector.finish_in_order(7)?;
    for port in olds {
        check_older(&events, port, true)?;
    }
    check_older(&events, youngs[0], false)?;
    for event in &events {
        if event.socket.local.port() == listens_at {
            let is_of_young = event.socket.remote.port() == youngs[0];
            // Up to 6.12, a child shows no peer yet when it begins.
            let begins = matches!(
                event.kind,
                EventKind::StateChange {
                    to: TcpState::SynRecv,
                    ..
                }
            );
            let older = !is_of_young && !begins;
            ensure!(event.socket.older == Some(older), "{event}");
        }
    }
    Ok(())
}

fn udp_sockets_older_and_younger() -> anyhow::Result<()> {
    let old = UdpSocket::bind("127.0.0.1:0")?;
    let collector = Collector::start_udp_with(|builder| builder.sample_interval(SAMPLE_INTERVAL))?;
    let young = UdpSocket::bind("127.0.0.1:0")?;
    let (old_is, young_is) = (old.local_addr()?, young.local_addr()?);
    for (at, older) in [(old_is, true), (young_is, false)] {
        let sample = collector.wait_for_sample("a socket", |event| event.socket.local == at)?;
        ensure!(sample.socket.older == Some(older), "{sample}");
    }
    // Sending gives a socket its cookie, which must not change whether it is older.
    old.send_to(b"to the young", young_is)?;
    young.recv_from(&mut [0; 16])?;
    young.send_to(b"to the old", old_is)?;
    old.recv_from(&mut [0; 16])?;
    drop((old, young));
    let events = collector.finish_in_order(2)?;
    check_older(&events, old_is.port(), true)?;
    check_older(&events, young_is.port(), false)
}

/// Checks that a tracer which is read by `next` reports a connection.
fn reads_a_connection(
    tracer: TcpTracer,
    mut next: impl FnMut(&mut TcpTracer) -> Option<Event>,
) -> anyhow::Result<()> {
    let mut tracer = tracer;
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let local = client.local_addr()?;
    loop {
        let event = next(&mut tracer).context("the stream has ended")?;
        ensure!(event.socket.protocol == Protocol::Tcp, "{event}");
        if event.is_open() && event.socket.local == local {
            return Ok(());
        }
    }
}

/// Both tracers are iterators without any runtime, also on a thread of a runtime. The thread of the
/// tracer ends with it.
fn blocking_without_a_runtime() -> anyhow::Result<()> {
    let threads = || {
        let tasks = fs::read_dir("/proc/self/task")?.flatten();
        let names = tasks.flat_map(|task| fs::read_to_string(task.path().join("comm")));
        anyhow::Ok(names.filter(|name| name.trim_end() == "tracer").count())
    };
    let trace = || {
        let mut tcp = collector::tcp().blocking()?;
        let handle = tcp.handle();
        let local = make_a_connection()?;
        let is_open = |event: &Event| event.is_open() && event.socket.local == local;
        tcp.find(is_open).context("the events have ended")?;
        handle.blocking_set_filter(Filter::new().port(1))?;
        // Its events wait in the buffer until the program reads them.
        let stopper = thread::spawn(move || handle.stop());
        let rest = tcp.by_ref().count();
        ensure!(tcp.next().is_none(), "an event after {rest} and the end");
        stopper.join().unwrap();
        let stats = tcp.close()?;
        collector::check_conservation(&stats)?;
        let mut udp = collector::udp().blocking()?;
        let socket = UdpSocket::bind(loopback(false))?;
        let local = socket.local_addr()?;
        drop(socket);
        let is_it = |event: &Event| event.is_end() && event.socket.local == local;
        udp.find(is_it).context("the events have ended")?;
        Ok(())
    };
    trace()?;
    ensure!(threads()? == 0, "{} threads are left", threads()?);
    Builder::new_current_thread()
        .build()?
        .block_on(async { trace() })
}

/// Makes a connection, and returns the address of the client.
fn make_a_connection() -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind(loopback(false))?;
    Ok(TcpStream::connect(listener.local_addr()?)?.local_addr()?)
}

fn blocking_on_the_runtime() -> anyhow::Result<()> {
    for runtime in [
        Runtime::new()?,
        Builder::new_current_thread().enable_all().build()?,
    ] {
        let tracer = runtime.block_on(collector::tcp().start())?;
        reads_a_connection(tracer, |tracer| runtime.block_on(tracer.next()))?;
    }
    Ok(())
}

fn blocking_beside_a_runtime_of_several_threads() -> anyhow::Result<()> {
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let tracer = runtime.block_on(collector::tcp().start())?;
    let reader = thread::spawn(|| {
        // Like any other executor, it drives only the future that it waits for.
        let other = Builder::new_current_thread().build()?;
        reads_a_connection(tracer, |tracer| other.block_on(tracer.next()))
    });
    let done = reader.join().unwrap();
    drop(runtime);
    done
}
