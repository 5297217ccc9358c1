//! `process_details`: the program of a socket's owner.

use std::{collections::HashMap, ffi::OsString, io, net::SocketAddr, os::unix::ffi::OsStrExt as _};

use anyhow::{Context as _, ensure};
use integration_tests::{
    actor::{Actor, Brief},
    collector::{Collector, show},
    kernel,
    suite::{Test, skip},
    tcp_pair::loopback,
};
use tcp_udp_trace::{Event, ProcessDetails};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            of_a_process_that_ends_later,
            of_short_tcp_processes,
            of_short_udp_processes,
            of_a_long_and_odd_command_line,
            of_the_program_before_an_exec,
        ],
    ]
}

/// The most bytes of a command line, with the NUL after each argument.
const MOST: usize = 4096;

fn is_captured() -> anyhow::Result<()> {
    if kernel::captures_images()? {
        Ok(())
    } else {
        skip("this kernel's verifier is too slow for it: details come from /proc")
    }
}

fn with_details() -> anyhow::Result<Collector> {
    Collector::start_with(|builder| builder.process_details(true))
}

/// Returns the command line of a process that [`Brief`] starts.
fn cmdline(brief: Brief, to: SocketAddr, more: &[OsString]) -> Vec<OsString> {
    let mut cmdline = vec!["/proc/self/exe".into()];
    cmdline.extend(brief.args(to));
    cmdline.extend_from_slice(more);
    cmdline
}

fn pid(event: &Event) -> Option<u32> {
    event.process.as_ref().map(|process| process.pid)
}

fn details(event: &Event) -> Option<&ProcessDetails> {
    event.process.as_ref()?.details.as_deref()
}

/// The details of a process that was seen before are also there after its end.
fn of_a_process_that_ends_later() -> anyhow::Result<()> {
    let collector = with_details()?;
    let mut server = Actor::spawn("server")?;
    let mut client = Actor::spawn("client")?;
    for actor in [&mut server, &mut client] {
        collector.details_of(actor)?;
    }
    let listener = server.listen(loopback(false))?;
    let connected = client.connect(listener.local)?;
    let accepted = server.accept(&listener)?;
    let pids = [client.pid(), server.pid()];
    client.kill()?;
    ensure!(server.receive_all(&accepted)? == 0);
    server.close(&accepted)?;
    let exe = std::env::current_exe()?;
    for (its, name, end) in [
        (pids[0], "client", connected.local),
        (pids[1], "server", listener.local),
    ] {
        let is_its_end = |event: &Event| {
            event.is_end() && event.socket.local == end && event.socket.remote.port() != 0
        };
        collector.wait_for("end of the connection", is_its_end)?;
        let events = collector.events();
        let last = events.iter().find(|event| is_its_end(event));
        let last = last.expect("an earlier wait found it");
        let details = details(last).with_context(|| format!("no details: {last}"))?;
        ensure!(pid(last) == Some(its), "{last}");
        ensure!(details.exe.as_ref() == Some(&exe), "{details:?}");
        ensure!(
            details.cmdline == ["/proc/self/exe", "--actor", name],
            "{details:?}"
        );
    }
    collector.finish_all().map(drop)
}

/// One process after the other, at the default latency.
fn of_short_tcp_processes() -> anyhow::Result<()> {
    is_captured()?;
    let collector = with_details()?;
    let listener = std::net::TcpListener::bind(loopback(false))?;
    let to = listener.local_addr()?;
    let truth = run_briefly(Brief::Connect, to, || listener.accept().map(drop))?;
    let events = collector.finish_in_order(truth.len())?;
    nearly_all_have_details(&events, &truth)
}

/// The same with UDP.
fn of_short_udp_processes() -> anyhow::Result<()> {
    is_captured()?;
    if !kernel::is_at_least(6, 17)? {
        return skip("this kernel's verifier is too slow for it in UDP: details come from /proc");
    }
    let collector = Collector::start_udp_with(|builder| builder.process_details(true))?;
    let receiver = std::net::UdpSocket::bind(loopback(false))?;
    let to = receiver.local_addr()?;
    let truth = run_briefly(Brief::Send, to, || receiver.recv(&mut [0]).map(drop))?;
    let events = collector.finish_in_order(truth.len())?;
    nearly_all_have_details(&events, &truth)
}

/// Runs many processes, each with another argument. Returns their command lines by pid.
fn run_briefly(
    brief: Brief,
    to: SocketAddr,
    mut answer: impl FnMut() -> io::Result<()>,
) -> anyhow::Result<HashMap<u32, Vec<OsString>>> {
    let count = if kernel::is_emulated()? { 100 } else { 1_000 };
    let mut truth = HashMap::new();
    for index in 0..count {
        let more = [OsString::from("a\nb"), index.to_string().into()];
        let mut child = brief.command(to).args(&more).spawn()?;
        let status = child.wait()?;
        ensure!(status.success(), "{status}");
        answer()?;
        truth.insert(child.id(), cmdline(brief, to, &more));
    }
    Ok(truth)
}

/// At least 99 of 100 have their executable and their whole command line, and none has another's.
fn nearly_all_have_details(
    events: &[Event],
    truth: &HashMap<u32, Vec<OsString>>,
) -> anyhow::Result<()> {
    let exe = std::env::current_exe()?;
    let mut found = std::collections::HashSet::new();
    for event in events {
        let pid = pid(event);
        let cmdline = pid.and_then(|pid| truth.get(&pid));
        let (Some(pid), Some(cmdline), Some(details)) = (pid, cmdline, details(event)) else {
            continue;
        };
        ensure!(details.exe.as_ref() == Some(&exe), "{details:?}");
        ensure!(&details.cmdline == cmdline, "{details:?}");
        found.insert(pid);
    }
    eprintln!("{} of {} have details", found.len(), truth.len());
    ensure!(
        found.len() * 100 >= truth.len() * 99,
        "{} of {}",
        found.len(),
        truth.len()
    );
    Ok(())
}

/// 100 KB, with bytes that are no text and arguments that are empty: the beginning is there,
/// unchanged.
fn of_a_long_and_odd_command_line() -> anyhow::Result<()> {
    is_captured()?;
    let collector = with_details()?;
    let listener = std::net::TcpListener::bind(loopback(false))?;
    let to = listener.local_addr()?;
    let odd = std::ffi::OsStr::from_bytes(b"\xff\x1b[31m").to_owned();
    let more = [
        odd,
        OsString::new(),
        "x".repeat(100_000).into(),
        "end".into(),
    ];
    let mut child = Brief::Connect.command(to).args(&more).spawn()?;
    ensure!(child.wait()?.success());
    drop(listener.accept()?);
    let events = collector.finish_in_order(1)?;
    let event = events.iter().find(|event| pid(event) == Some(child.id()));
    let event = event.context("no event")?;
    let details = details(event).with_context(|| format!("no details: {event}"))?;
    let whole = cmdline(Brief::Connect, to, &more);
    let (last, before) = details.cmdline.split_last().context("no arguments")?;
    ensure!(whole[..before.len()] == *before, "{details:?}");
    ensure!(
        before.len() == 6 && whole[6].as_bytes().starts_with(last.as_bytes()),
        "{} arguments, the last one of {} bytes",
        details.cmdline.len(),
        last.len()
    );
    let len: usize = details
        .cmdline
        .iter()
        .map(|argument| argument.len() + 1)
        .sum();
    ensure!((MOST - 1..=MOST + 1).contains(&len), "{len} bytes");
    Ok(())
}

/// A process connects and executes another program, which connects too. Each connection has the
/// command line of the program that made it.
fn of_the_program_before_an_exec() -> anyhow::Result<()> {
    is_captured()?;
    let collector = with_details()?;
    let listener = std::net::TcpListener::bind(loopback(false))?;
    let to = listener.local_addr()?;
    let mut child = Brief::ConnectTwice.command(to).spawn()?;
    ensure!(child.wait()?.success());
    let mut truth = HashMap::new();
    for brief in [Brief::ConnectTwice, Brief::Connect] {
        let (_, client) = listener.accept()?;
        truth.insert(client, cmdline(brief, to, &[]));
    }
    let events = collector.finish_in_order(2)?;
    let exe = std::env::current_exe()?;
    for event in events.iter().filter(|event| pid(event) == Some(child.id())) {
        let is_right = details(event).is_some_and(|details| details.exe.as_ref() == Some(&exe));
        ensure!(is_right, "{event}: {:?}", event.process);
    }
    for (client, cmdline) in truth {
        let mut of_client = events
            .iter()
            .filter(|event| event.socket.local == client)
            .peekable();
        ensure!(of_client.peek().is_some(), "{}", show(&events));
        for event in of_client {
            let is_right = details(event).is_some_and(|details| details.cmdline == cmdline);
            ensure!(is_right, "{event}: {:?}", event.process);
        }
    }
    Ok(())
}
