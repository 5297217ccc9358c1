//! The cookies of network namespaces, and filters that name a namespace by its inode.

use std::{
    net::{SocketAddr, TcpListener, UdpSocket},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use integration_tests::{
    collector::{Collector, show},
    netns::{MountedNetns, Netns},
    suite::{Test, skip},
    tcp_pair::loopback,
};
use nix::sched::{CloneFlags, unshare};
use tcp_udp_trace::{Event, Filter, Protocol};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            sockets_show_the_cookie_of_their_namespace,
            one_of_many_namespaces,
            namespace_that_is_only_mounted,
        ],
        Solitude: [
            namespace_with_the_number_of_an_earlier_one,
        ],
    ]
}

const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

/// Starts a tracer of sockets in any of these namespaces, without samples.
fn start(protocol: Protocol, filter: Filter, namespaces: &[u32]) -> anyhow::Result<Collector> {
    let collector = match protocol {
        Protocol::Tcp => {
            Collector::start_with(move |builder| builder.sample_interval(None).filter(filter))
        }
        _ => Collector::start_udp_with(move |builder| builder.sample_interval(None).filter(filter)),
    }?;
    for &netns in namespaces {
        collector.also(netns);
    }
    Ok(collector)
}

/// Makes a socket in the calling thread's namespace, uses it, and closes it. Returns its address.
fn use_a_socket(protocol: Protocol) -> anyhow::Result<SocketAddr> {
    match protocol {
        Protocol::Tcp => Ok(TcpListener::bind(loopback(false))?.local_addr()?),
        _ => {
            let socket = UdpSocket::bind(loopback(false))?;
            let address = socket.local_addr()?;
            // Only the last report of the flow, which user space makes, counts the second datagram.
            for _ in 0..2 {
                socket.send_to(b"datagram", address)?;
            }
            Ok(address)
        }
    }
}

fn is_end_of(address: SocketAddr) -> impl Fn(&Event) -> bool {
    move |event| event.is_end() && event.socket.local == address
}

/// Each event shows the cookie that the socket itself returns (`SO_NETNS_COOKIE`), in the tracer's
/// own namespace and in another one.
fn sockets_show_the_cookie_of_their_namespace() -> anyhow::Result<()> {
    let (here, there) = (Netns::current()?, Netns::new()?);
    for protocol in PROTOCOLS {
        let collector = start(protocol, Filter::new(), &[there.inode()?])?;
        let mut cookies = Vec::new();
        for netns in [&here, &there] {
            let address = netns.run(|| use_a_socket(protocol))?;
            collector.wait_for("end of a socket", is_end_of(address))?;
            let (inode, cookie) = (netns.inode()?, netns.cookie()?);
            let events = collector.events();
            let mut events = events.iter().filter(|event| event.socket.netns == inode);
            ensure!(
                events.all(|event| event.socket.netns_cookie.map(u64::from) == cookie),
                "not {cookie:?}: {}",
                show(&collector.events())
            );
            cookies.push(cookie);
        }
        collector.finish_all()?;
        if cookies[0].is_none() {
            return skip("the kernel has no cookies of namespaces: none are shown");
        }
        ensure!(cookies[0] != cookies[1], "{cookies:?}");
    }
    Ok(())
}

/// There are more namespaces than the search checks in one run. Only a descriptor keeps each of
/// them.
fn one_of_many_namespaces() -> anyhow::Result<()> {
    const MANY: usize = 100;
    let make = || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        Netns::current()
    };
    let mut many = (0..MANY)
        .map(|_| std::thread::spawn(make).join().unwrap())
        .collect::<anyhow::Result<Vec<_>>>()?;
    many.push(Netns::current()?);
    let inodes = many
        .iter()
        .map(Netns::inode)
        .collect::<anyhow::Result<Vec<_>>>()?;
    let collector = start(Protocol::Udp, Filter::new().port(1), &inodes)?;
    for meant in [0, 1, MANY / 2, MANY - 1, MANY] {
        collector.set_filter(Filter::new().netns(inodes[meant]))?;
        for other in [meant, (meant + 1) % many.len()] {
            let socket = many[other].run(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
            let address = socket.local_addr()?;
            drop(socket);
            if other == meant {
                collector.wait_for("end of a socket", is_end_of(address))?;
            }
        }
    }
    let events = collector.finish_all()?;
    ensure!(events.len() == 5, "{}", show(&events));
    Ok(())
}

/// A namespace as `ip netns add` makes it, with no process in it.
fn namespace_that_is_only_mounted() -> anyhow::Result<()> {
    let mounted = MountedNetns::new("filtered")?;
    let netns = mounted.open()?;
    let inode = netns.inode()?;
    let socket = netns.run(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
    drop(netns);
    let collector = start(Protocol::Udp, Filter::new().netns(inode), &[inode])?;
    let elsewhere = UdpSocket::bind(loopback(false))?;
    let address = socket.local_addr()?;
    drop((elsewhere, socket));
    collector.wait_for("end of a socket", is_end_of(address))?;
    let events = collector.finish_all()?;
    ensure!(
        events.iter().all(|event| event.socket.netns == inode),
        "{}",
        show(&events)
    );
    Ok(())
}

/// A filter means the namespace that has the number when the filter is set, and not one that gets
/// the number later, both for a filter of the builder and for a later one.
fn namespace_with_the_number_of_an_earlier_one() -> anyhow::Result<()> {
    // Another program of the machine may be faster, and get the number.
    const ATTEMPTS: usize = 10;
    for protocol in PROTOCOLS {
        let mut attempts = (0..ATTEMPTS).map(|_| filter_for_the_first_of_two(protocol));
        while !attempts.next().context("no number came again")?? {}
    }
    Ok(())
}

/// Makes two namespaces with the same number, one after the other. Returns false if the second did
/// not get the number.
fn filter_for_the_first_of_two(protocol: Protocol) -> anyhow::Result<bool> {
    let first = Netns::new()?;
    let (inode, cookie) = (first.inode()?, first.cookie()?);
    let filter = Filter::new().netns(inode);
    let nothing = Filter::new().port(1);
    let built = start(protocol, filter.clone(), &[inode])?;
    let set = start(protocol, nothing.clone(), &[inode])?;
    set.set_filter(filter.clone())?;
    let in_first = first.run(|| use_a_socket(protocol))?;
    for collector in [&built, &set] {
        collector.wait_for("end of a socket", is_end_of(in_first))?;
    }
    // This filter is set while no namespace has the number.
    let late = start(protocol, nothing, &[inode])?;
    drop(first);
    let Some(second) = namespace_with_number(inode, || late.set_filter(filter.clone()))? else {
        return Ok(false);
    };
    ensure!(cookie.is_none() || second.cookie()? != cookie);
    let reference = start(protocol, filter.clone(), &[inode])?;
    let in_second = second.run(|| use_a_socket(protocol))?;
    reference.wait_for("end of a socket", is_end_of(in_second))?;
    reference.finish_all()?;
    // Where namespaces have no cookies, the number alone counts.
    let passes = cookie.is_none();
    for collector in [built, set] {
        if passes {
            collector.wait_for("end of a socket", is_end_of(in_second))?;
        }
        let events = collector.finish_all()?;
        let mut locals = events.iter().map(|event| event.socket.local);
        ensure!(
            locals.any(|local| local == in_second) == passes,
            "{}",
            show(&events)
        );
    }
    let events = late.finish_all()?;
    // Without cookies, the first may still have had the number.
    ensure!(passes || events.is_empty(), "{}", show(&events));
    Ok(true)
}

/// Makes namespaces until one has this number, and calls `before` before each.
fn namespace_with_number(
    inode: u32,
    before: impl Fn() -> anyhow::Result<()>,
) -> anyhow::Result<Option<Netns>> {
    // How long the kernel may take to end a namespace, and to release its number.
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut others = Vec::new();
    while Instant::now() < deadline {
        sleep(Duration::from_millis(100));
        before()?;
        let next = Netns::new()?;
        if next.inode()? == inode {
            return Ok(Some(next));
        }
        // This namespace took another free number, which the next one cannot get while this one
        // exists.
        others.push(next);
    }
    Ok(None)
}
