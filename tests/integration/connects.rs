//! The result of a `connect` that failed, and the event that has its errno.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener},
    process,
    sync::atomic::{AtomicU16, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use integration_tests::{
    collector::{Collector, show},
    netns::{FAR, Netns, ip, veth},
    suite::Test,
    tcp_pair::loopback,
};
use nix::{errno::Errno, libc, unistd::gettid};
use socket2::{Domain, SockAddr, Socket, Type};
use tcp_udp_trace::{Event, EventKind, Family, Filter, Kind, Origin, Protocol, TcpState, Traffic};

use crate::{
    compared::{Case, compare},
    privileges::refuse,
};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        // The kernel skips the one hook while it interrupts a program of another tracer.
        Solitude: [
            that_fail_before_any_state_change,
            that_find_no_address_of_their_own,
            that_are_refused,
            beside_many_that_wait,
            that_have_begun_are_state_changes,
            of_a_socket_that_goes_on,
            of_a_socket_that_was_disconnected,
            pass_filters,
        ],
    ]
}

/// The next port for a socket. The kernel would release a port that it chose with the first
/// connection.
static PORT: AtomicU16 = AtomicU16::new(20_000);

/// An address at which no process listens.
const REFUSED: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 1);
const UNREACHABLE: &str = "10.9.1.1:81";

/// Makes routes that refuse, in the namespace of the test. Returns addresses behind them, with the
/// errno that `connect` returns there.
fn refusals() -> anyhow::Result<Vec<(SocketAddr, Errno)>> {
    for (kind, number) in [("unreachable", 1), ("prohibit", 2), ("blackhole", 3)] {
        ip(&format!("route add {kind} 10.9.{number}.0/24"))?;
        ip(&format!("-6 route add {kind} 2001:db8:{number}::/48"))?;
    }
    [
        (UNREACHABLE, Errno::EHOSTUNREACH),
        ("10.9.2.1:82", Errno::EACCES),
        ("10.9.3.1:83", Errno::EINVAL),
        ("10.9.4.1:84", Errno::ENETUNREACH),
        ("[2001:db8:1::1]:81", Errno::EHOSTUNREACH),
        ("[2001:db8:2::1]:82", Errno::EACCES),
        ("[2001:db8:3::1]:83", Errno::EINVAL),
        ("[2001:db8:4::1]:84", Errno::ENETUNREACH),
        ("[::ffff:10.9.1.1]:81", Errno::EHOSTUNREACH),
    ]
    .into_iter()
    .map(|(address, errno)| Ok((address.parse()?, errno)))
    .collect()
}

/// Makes a network in which [`FAR`] never answers.
fn silent_peer() -> anyhow::Result<Netns> {
    let far = veth()?;
    ip(&format!(
        "neigh replace {FAR} lladdr 02:00:00:00:00:99 dev near0 nud permanent"
    ))?;
    Ok(far)
}

/// A `connect` that failed, as its event must show it.
#[derive(Debug)]
struct Failure {
    local: SocketAddr,
    remote: SocketAddr,
    errno: Errno,
    cookie: u64,
    tid: u32,
}

/// Makes a socket that is bound to a port, and lets it fail to connect.
fn fail(
    protocol: Protocol,
    v6: bool,
    to: &SockAddr,
    errno: Errno,
) -> anyhow::Result<(Socket, Failure)> {
    let kind = match protocol {
        Protocol::Udp => Type::DGRAM,
        _ => Type::STREAM,
    };
    let port = PORT.fetch_add(1, Ordering::Relaxed);
    let any: SocketAddr = if v6 {
        (Ipv6Addr::UNSPECIFIED, port).into()
    } else {
        (Ipv4Addr::UNSPECIFIED, port).into()
    };
    let socket = Socket::new(Domain::for_address(any), kind, None)?;
    socket.bind(&any.into())?;
    let failure = fail_again(&socket, to, errno)?;
    Ok((socket, failure))
}

/// Lets a socket fail to connect.
///
/// A socket that is not bound to a port continues to show the port of its last connection.
fn fail_again(socket: &Socket, to: &SockAddr, errno: Errno) -> anyhow::Result<Failure> {
    let error = socket
        .connect(to)
        .err()
        .and_then(|error| error.raw_os_error());
    ensure!(
        error == Some(errno as i32),
        "{error:?}, not {errno:?} of {to:?}"
    );
    let local = socket.local_addr()?.as_socket().context("no address")?;
    let unspecified = SocketAddr::new(local.ip(), 0);
    let unspecified = SocketAddr::new(unspecified.ip().to_canonical(), 0);
    let remote = to.as_socket().map_or(unspecified, canonical);
    // An IPv6 socket that is bound to no address shows one of its peer's family.
    let ip = match (local.ip().is_unspecified(), remote.ip()) {
        (true, IpAddr::V4(_)) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        _ => local.ip().to_canonical(),
    };
    let cookie = socket.cookie()?;
    Ok(Failure {
        local: SocketAddr::new(ip, local.port()),
        remote,
        errno,
        cookie,
        tid: gettid().as_raw().unsigned_abs(),
    })
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn is_failure(event: &Event) -> bool {
    matches!(event.kind, EventKind::ConnectFailed { .. })
}

/// Compares an event with the result of the system call.
fn check(event: &Event, protocol: Protocol, failure: &Failure) -> anyhow::Result<()> {
    let error = failure.errno as i32;
    ensure!(
        event.kind == EventKind::ConnectFailed { error },
        "{failure:?}: {event}"
    );
    let socket = &event.socket;
    ensure!(
        (socket.protocol, socket.local, socket.remote) == (protocol, failure.local, failure.remote),
        "{failure:?}: {event}"
    );
    ensure!(socket.netns == Netns::current()?.inode()?, "{event}");
    let is_cookie = match protocol {
        Protocol::Udp => socket.cookie == Some(failure.cookie),
        // No process had requested the socket's cookie.
        _ => socket.cookie.is_none_or(|cookie| cookie == failure.cookie),
    };
    ensure!(is_cookie, "{:?}: {event}", socket.cookie);
    ensure!(socket.id != 0 && socket.older == Some(false), "{socket:?}");
    ensure!(event.traffic == Traffic::default(), "{event}");
    let process = event.process.as_ref().context("no process")?;
    ensure!(
        (process.pid, process.tid, process.origin) == (process::id(), failure.tid, Origin::Creator),
        "{process:?}"
    );
    Ok(())
}

/// Compares the failures among these events with the results of the system calls. Returns them.
fn check_all<'a>(
    events: &'a [Event],
    protocol: Protocol,
    failures: &[Failure],
) -> anyhow::Result<Vec<&'a Event>> {
    let failed: Vec<_> = events.iter().filter(|event| is_failure(event)).collect();
    ensure!(failed.len() == failures.len(), "{}", show(events));
    for (event, failure) in failed.iter().zip(failures) {
        check(event, protocol, failure)?;
    }
    Ok(failed)
}

/// Each failure is one event, and the only one of TCP.
fn that_fail_before_any_state_change() -> anyhow::Result<()> {
    let refusals = refusals()?;
    // As long as an address of IPv6.
    let nowhere = SockAddr::unix("/nowhere/in/this/world/of/ours")?;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let is_udp = protocol == Protocol::Udp;
        let collector = if is_udp {
            Collector::start_udp()?
        } else {
            Collector::start()?
        };
        let mut failures = Vec::new();
        for &(to, errno) in &refusals {
            failures.push(fail(protocol, to.is_ipv6(), &to.into(), errno)?.1);
        }
        // Addresses of another family.
        let (v4, v6) = (refusals[0].0.into(), loopback(true).into());
        failures.push(fail(protocol, false, &v6, Errno::EAFNOSUPPORT)?.1);
        failures.push(fail(protocol, false, &nowhere, Errno::EAFNOSUPPORT)?.1);
        failures.push(fail(protocol, true, &nowhere, Errno::EAFNOSUPPORT)?.1);
        let errno = if is_udp {
            Errno::EHOSTUNREACH
        } else {
            Errno::EINVAL
        };
        failures.push(fail(protocol, true, &v4, errno)?.1);

        collector.wait_for("last failure", |event| {
            is_failure(event) && event.socket.local == failures.last().unwrap().local
        })?;
        let events = collector.finish_all()?;
        for event in check_all(&events, protocol, &failures)? {
            let of_it = events.iter().filter(|e| e.socket.id == event.socket.id);
            let kinds: Vec<_> = of_it.filter_map(Kind::of).collect();
            let expected: &[_] = if is_udp {
                &[Kind::ConnectFailed, Kind::Close]
            } else {
                &[Kind::ConnectFailed]
            };
            ensure!(kinds == expected, "{kinds:?}: {event}");
        }
    }
    Ok(())
}

/// A `connect` that has begun may also return this errno.
fn that_find_no_address_of_their_own() -> anyhow::Result<()> {
    fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")?;
    let collector = Collector::start()?;
    let to: SocketAddr = "[::1]:85".parse()?;
    let failure = fail(Protocol::Tcp, true, &to.into(), Errno::EADDRNOTAVAIL)?.1;
    collector.wait_count(1)?;
    let events = collector.finish_all()?;
    check(&events[0], Protocol::Tcp, &failure)?;
    ensure!(events.len() == 1, "{}", show(&events));
    Ok(())
}

/// A filter of system calls refuses them, so the kernel has not checked the address. With fexit,
/// the hook is in the system call, which is never entered.
fn that_are_refused() -> anyhow::Result<()> {
    let to: SocketAddr = UNREACHABLE.parse()?;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let collector = match protocol {
            Protocol::Udp => Collector::start_udp()?,
            _ => Collector::start()?,
        };
        let refused = thread::scope(|scope| {
            let refused = scope.spawn(|| {
                refuse(libc::SYS_connect, Errno::EPERM)?;
                anyhow::Ok(fail(protocol, false, &to.into(), Errno::EPERM)?.1)
            });
            refused.join().unwrap()
        });
        let mut failure = refused?;
        let hooks = collector.handle().hooks();
        let is_fexit = |program: &String| program.starts_with("fexit:");
        if hooks.iter().flat_map(|hook| &hook.programs).any(is_fexit) {
            // This hook does not see the refusal, so another failure is the only event.
            failure = fail(protocol, false, &to.into(), Errno::ENETUNREACH)?.1;
        }
        collector.wait_for("failure", is_failure)?;
        let events = collector.finish_all()?;
        check_all(&events, protocol, &[failure])?;
    }
    Ok(())
}

/// Many threads wait in `connect` while others fail. The kernel would have ten instances of a
/// kretprobe for all of them.
fn beside_many_that_wait() -> anyhow::Result<()> {
    const WAITING: usize = 200;
    let refusals = refusals()?;
    let _far = silent_peer()?;
    let nowhere: SocketAddr = format!("{FAR}:9").parse()?;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let collector = match protocol {
            Protocol::Udp => Collector::start_udp()?,
            _ => Collector::start()?,
        };
        // Reports when all of them wait.
        let begun = Collector::start()?;
        let waiting: Vec<_> = (0..WAITING)
            .map(|_| {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
                // On 5.10, a shutdown does not end the wait.
                socket.set_write_timeout(Some(Duration::from_secs(10)))?;
                anyhow::Ok(socket)
            })
            .collect::<Result<_, _>>()?;
        let failures = thread::scope(|scope| {
            for socket in &waiting {
                scope.spawn(|| socket.connect(&nowhere.into()));
            }
            let failures = begun.wait_count(WAITING).and_then(|_| {
                let fail = |&(to, errno): &(SocketAddr, Errno)| {
                    anyhow::Ok(fail(protocol, to.is_ipv6(), &to.into(), errno)?.1)
                };
                refusals.iter().map(fail).collect::<Result<Vec<_>, _>>()
            });
            for socket in &waiting {
                // Ends the `connect`.
                let _ = socket.shutdown(Shutdown::Both);
            }
            failures
        })?;
        collector.wait_for("last failure", |event| {
            is_failure(event) && event.socket.local == failures.last().unwrap().local
        })?;
        let events = collector.finish_all()?;
        check_all(&events, protocol, &failures)?;
    }
    Ok(())
}

/// Returns the changes of TCP states, and the errno of each failure.
fn shape(events: &[Event]) -> Vec<(Option<TcpState>, Option<i32>)> {
    let shape = |event: &Event| match event.kind {
        EventKind::StateChange { to, error, .. } => Some((Some(to), error)),
        EventKind::ConnectFailed { error } => Some((None, Some(error))),
        _ => None,
    };
    events.iter().filter_map(shape).collect()
}

/// Returns the [`shape`] of a `connect` that has begun and failed.
fn begun(errno: Option<Errno>) -> [(Option<TcpState>, Option<i32>); 2] {
    let errno = errno.map(|errno| errno as i32);
    [
        (Some(TcpState::SynSent), None),
        (Some(TcpState::Close), errno),
    ]
}

fn that_have_begun_are_state_changes() -> anyhow::Result<()> {
    let _far = silent_peer()?;
    fs::write("/proc/sys/net/ipv4/tcp_syn_retries", "1")?;
    let server = TcpListener::bind(loopback(false))?;
    let listens: SockAddr = server.local_addr()?.into();
    let collector = Collector::start()?;
    let mut expected = Vec::new();

    let socket = || Socket::new(Domain::IPV4, Type::STREAM, None);
    fail_again(&socket()?, &REFUSED.into(), Errno::ECONNREFUSED)?;
    expected.extend(begun(Some(Errno::ECONNREFUSED)));

    // The second call waits for the result of the first.
    let one = socket()?;
    one.set_nonblocking(true)?;
    for _ in 0..2 {
        fail_again(&one, &REFUSED.into(), Errno::EINPROGRESS)?;
        fail_again(&one, &REFUSED.into(), Errno::ECONNREFUSED)?;
        expected.extend(begun(Some(Errno::ECONNREFUSED)));
    }
    // Another call has taken the errno.
    fail_again(&one, &REFUSED.into(), Errno::EINPROGRESS)?;
    ensure!(one.take_error()?.is_some());
    fail_again(&one, &REFUSED.into(), Errno::ECONNABORTED)?;
    expected.extend(begun(Some(Errno::ECONNREFUSED)));

    // No address is left.
    let reusing = || {
        let socket = socket()?;
        socket.set_reuse_address(true)?;
        anyhow::Ok(socket)
    };
    let (first, second) = (reusing()?, reusing()?);
    first.bind(&loopback(false).into())?;
    second.bind(&first.local_addr()?)?;
    first.connect(&listens)?;
    expected.extend([TcpState::SynSent, TcpState::Established].map(|to| (Some(to), None)));
    // Both ends of the connection are in this namespace.
    expected.extend([TcpState::SynRecv, TcpState::Established].map(|to| (Some(to), None)));
    fail_again(&second, &listens, Errno::EADDRNOTAVAIL)?;
    expected.extend(begun(Some(Errno::EADDRNOTAVAIL)));
    fail_again(&first, &listens, Errno::EISCONN)?;

    // The peer does not answer, or not before the timeout.
    let far: SockAddr = SocketAddr::new(FAR.parse()?, 80).into();
    let hasty = socket()?;
    hasty.set_write_timeout(Some(Duration::from_millis(50)))?;
    fail_again(&hasty, &far, Errno::EINPROGRESS)?;
    fail_again(&hasty, &far, Errno::EALREADY)?;
    drop(hasty);
    expected.extend(begun(None));
    fail_again(&socket()?, &far, Errno::ETIMEDOUT)?;
    expected.extend(begun(Some(Errno::ETIMEDOUT)));

    let events = collector.wait_count(expected.len())?;
    let mut seen = shape(&events);
    // The events of the two ends come in any order.
    seen.sort_unstable_by_key(|(to, error)| (to.map(|to| to as u8), *error));
    expected.sort_unstable_by_key(|(to, error)| (to.map(|to| to as u8), *error));
    ensure!(seen == expected, "{expected:?} expected: {}", show(&events));
    let all = collector.finish_all()?;
    ensure!(!all.iter().any(is_failure), "{}", show(&all));
    Ok(())
}

/// The failures are between two connections of the socket, and belong to neither.
fn of_a_socket_that_goes_on() -> anyhow::Result<()> {
    refusals()?;
    let unreachable: SockAddr = UNREACHABLE.parse::<SocketAddr>()?.into();
    let server = TcpListener::bind(loopback(false))?;
    let collector = Collector::start()?;
    for is_blocking in [true, false] {
        let (socket, first) = fail(Protocol::Tcp, false, &unreachable, Errno::EHOSTUNREACH)?;
        socket.set_nonblocking(!is_blocking)?;
        let unreachable = || fail_again(&socket, &unreachable, Errno::EHOSTUNREACH);
        let mut failures = vec![first, unreachable()?];
        if !is_blocking {
            fail_again(&socket, &REFUSED.into(), Errno::EINPROGRESS)?;
        }
        fail_again(&socket, &REFUSED.into(), Errno::ECONNREFUSED)?;
        failures.extend([unreachable()?, unreachable()?]);
        socket.set_nonblocking(false)?;
        socket.connect(&server.local_addr()?.into())?;
        let local = socket.local_addr()?.as_socket().context("no address")?;
        drop(server.accept()?);
        drop(socket);
        let is_its_end = |event: &Event| event.is_close() && event.socket.local == local;
        collector.wait_for("end", is_its_end)?;
        let events = collector.events();
        let of_it = events.iter().cloned();
        let of_it = of_it.filter(|event| event.socket.local.port() == local.port());
        let of_it: Vec<_> = of_it.collect();
        let failed = (None, Some(Errno::EHOSTUNREACH as i32));
        let mut expected = vec![failed; 2];
        expected.extend(begun(Some(Errno::ECONNREFUSED)));
        expected.extend([failed; 2]);
        ensure!(shape(&of_it).starts_with(&expected), "{}", show(&of_it));
        let mut ids = Vec::new();
        let failed = of_it.iter().filter(|event| is_failure(event));
        for (event, failure) in failed.zip(&failures) {
            check(event, Protocol::Tcp, failure)?;
            let same = events.iter().filter(|e| e.socket.id == event.socket.id);
            ensure!(same.count() == 1, "{}", show(&events));
            ids.push(event.socket.id);
        }
        ensure!(ids.len() == 4);
    }
    collector.finish_all().map(drop)
}

/// The end of a connection is no failure to connect, and hides none.
fn of_a_socket_that_was_disconnected() -> anyhow::Result<()> {
    refusals()?;
    let unreachable: SockAddr = UNREACHABLE.parse::<SocketAddr>()?.into();
    let server = TcpListener::bind(loopback(false))?;
    let collector = Collector::start()?;
    let (socket, first) = fail(Protocol::Tcp, false, &unreachable, Errno::EHOSTUNREACH)?;
    socket.connect(&server.local_addr()?.into())?;
    drop(server.accept()?);
    rustix::net::connect_unspec(&socket)?;
    let tcp = fail_again(&socket, &unreachable, Errno::EHOSTUNREACH)?;
    // A socket that has listened.
    let listener = fail(Protocol::Tcp, false, &unreachable, Errno::EHOSTUNREACH)?.0;
    listener.listen(1)?;
    listener.shutdown(Shutdown::Both)?;
    let listener = fail_again(&listener, &unreachable, Errno::EHOSTUNREACH)?;
    for failure in [&first, &tcp, &listener] {
        collector.wait_for("failure", |event| {
            check(event, Protocol::Tcp, failure).is_ok()
        })?;
    }
    let events = collector.finish_all()?;
    let count = events.iter().filter(|event| is_failure(event)).count();
    ensure!(count == 4, "{}", show(&events));

    // A UDP socket keeps its peer.
    let collector = Collector::start_udp()?;
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    socket.connect(&REFUSED.into())?;
    let failure = fail_again(&socket, &unreachable, Errno::EHOSTUNREACH)?;
    drop(socket);
    let events = collector.finish_in_order(1)?;
    let [connected, failed, closed] = &events[..] else {
        bail!("{}", show(&events));
    };
    check(failed, Protocol::Udp, &failure)?;
    ensure!(connected.kind == EventKind::Connect && closed.is_end());
    ensure!(closed.socket.remote == REFUSED, "{closed}");
    ensure!(closed.socket.id == failed.socket.id, "{failed:?}");
    Ok(())
}

fn pass_filters() -> anyhow::Result<()> {
    let refusals = refusals()?;
    let ports = |event: &Event| [event.socket.local.port(), event.socket.remote.port()];
    let mut cases = vec![
        Case::new(Filter::new(), |_| true),
        Case::new(Filter::new().kind(Kind::ConnectFailed), is_failure),
        Case::new(
            Filter::new().kind(Kind::StateChange).kind(Kind::Close),
            |e| !is_failure(e),
        ),
        Case::new(Filter::new().port(82), move |e| ports(e).contains(&82)),
        Case::new(
            Filter::new().remote(Ipv4Addr::new(10, 9, 1, 0), 24),
            |e| matches!(e.socket.remote.ip(), IpAddr::V4(ip) if ip.octets()[..3] == [10, 9, 1]),
        ),
        Case::new(Filter::new().family(Family::Ipv6), |e| {
            e.socket.local.is_ipv6()
        }),
        Case::new(Filter::new().pid(process::id()), |_| true),
        Case::new(Filter::new().pid_tree(process::id()), |_| true),
        Case::new(Filter::new().pid(1), |_| false),
        Case::new(Filter::new().netns(Netns::current()?.inode()?), |_| true),
        Case::new(Filter::new().uid(0), |_| true),
        Case::new(Filter::new(), |_| true),
    ];
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let is_udp = protocol == Protocol::Udp;
        let start = || {
            if is_udp {
                Collector::start_udp_with(|builder| builder.sample_interval(None))
            } else {
                Collector::start_with(|builder| builder.sample_interval(None))
            }
        };
        if !is_udp {
            let in_state = |state: TcpState| {
                move |event: &Event| match event.kind {
                    EventKind::StateChange { to, .. } => to == state,
                    _ => state == TcpState::Close,
                }
            };
            for state in [TcpState::Close, TcpState::Established] {
                cases.push(Case::new(Filter::new().state(state), in_state(state)));
            }
        }
        compare([start()?, start()?], &cases, || {
            for &(to, errno) in &refusals {
                fail(protocol, to.is_ipv6(), &to.into(), errno)?;
            }
            if is_udp {
                return Ok(refusals.len());
            }
            fail(protocol, false, &REFUSED.into(), Errno::ECONNREFUSED)?;
            Ok(1)
        })?;
        cases.truncate(12);
    }
    Ok(())
}
