//! The peer of each datagram, also on unconnected sockets, and the times of a flow's reports.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::IoSlice,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    thread,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure};
use integration_tests::{
    actor::{Operation, ReceiveCall, SendCall, SocketOption, receive_queue},
    collector::{Collector, show},
    expected_udp::ExpectedUdp,
    flow_sums::last_reports,
    kernel::is_at_least,
    netns::{NEAR, ip, veth},
    program_32bit::connect_udp,
    suite::{Test, skip},
    udp_actor::UdpActor,
    udp_pair::{Family, UdpCollectors, UdpPair},
};
use nix::{
    errno::Errno,
    libc,
    net::if_::if_nametoindex,
    sys::socket::{ControlMessage, MsgFlags, SockaddrIn, sendmsg, setsockopt, sockopt},
};
use tcp_udp_trace::{Event, EventKind};

use crate::udp_numbers::skip_without_uring;

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            one_server_and_its_clients,
            one_server_with_two_addresses,
            dual_stack_server,
            connected_socket_that_sends_elsewhere,
            connect_to_another_peer,
            connect_by_io_uring,
            connect_by_a_32_bit_program,
            connect_with_datagrams_of_others_in_the_queue,
            disconnect,
            another_port_after_disconnect,
            connected_in_the_middle,
            failed_connect_is_no_event,
            multicast_v4,
            multicast_v6,
            broadcast,
            ten_thousand_peers,
            more_peers_than_flows_are_remembered,
            idle_flow_is_reported,
            one_report_per_interval,
        ],
    ]
}

/// The default of the tracer.
const INTERVAL: Duration = tcp_udp_trace::DEFAULT_INTERVAL;

/// How long datagrams may be under way.
const PATIENCE: Duration = Duration::from_secs(60);

/// Returns the address of an actor's socket as its peers see it.
fn seen(actor: &UdpActor, ip: IpAddr) -> SocketAddr {
    SocketAddr::new(ip, actor.local().port())
}

/// One unconnected socket has a flow for each client.
fn one_server_and_its_clients() -> anyhow::Result<()> {
    let collectors = UdpCollectors::start()?;
    let mut expected = Vec::new();
    for family in Family::ALL {
        let address = family.loopback();
        let mut server = UdpActor::bind("server", address)?;
        let mut clients = (0..5)
            .map(|_| UdpActor::open("client", address))
            .collect::<anyhow::Result<Vec<_>>>()?;
        for round in 1..=3 {
            for (at, client) in clients.iter_mut().enumerate() {
                client.send(SendCall::SendTo, Some(server.local()), &[10 * at + round])?;
                server.receive(ReceiveCall::RecvFrom, 1)?;
                let back = seen(client, address.ip());
                server.send(SendCall::SendMsg, Some(back), &[100 * at, round])?;
                client.receive(ReceiveCall::RecvMsg, 2)?;
            }
        }
        expected.push(server.close()?);
        for client in clients {
            expected.push(client.close()?);
        }
    }
    collectors.finish(&expected)
}

/// A socket that is bound to no address has a flow for each of its addresses that a peer sends to.
fn one_server_with_two_addresses() -> anyhow::Result<()> {
    let collector = Collector::start_udp()?;
    let server = UdpSocket::bind("0.0.0.0:0")?;
    setsockopt(&server, sockopt::Ipv4PacketInfo, &true)?;
    let client = UdpSocket::bind(Family::V4.loopback())?;
    let (port, peer) = (server.local_addr()?.port(), client.local_addr()?);
    let mut expected = BTreeMap::new();
    for (ip, turns) in [
        (Ipv4Addr::new(127, 0, 0, 1), 3),
        (Ipv4Addr::new(127, 0, 0, 2), 1),
    ] {
        let at = SocketAddr::from((ip, port));
        for _ in 0..turns {
            client.send_to(b"question", at)?;
            server.recv_from(&mut [0; 20])?;
            answer_from(&server, ip, peer)?;
            let (_, from) = client.recv_from(&mut [0; 20])?;
            ensure!(from == at, "{from}");
        }
        expected.insert((at, peer), (6 * turns, 8 * turns));
        expected.insert((peer, at), (8 * turns, 6 * turns));
    }
    let at = server.local_addr()?;
    drop((server, client));
    if !collector.names_every_peer() {
        // Both are one flow: the hook of a receive does not report the local address.
        expected.retain(|(local, _), _| *local == peer);
        expected.insert((at, peer), (24, 32));
    }
    collector.wait_closed(2)?;
    let events = collector.finish_all()?;
    let flows = last_reports(&events);
    ensure!(
        flows == expected,
        "{expected:?} expected: {}",
        show(&events)
    );
    Ok(())
}

/// Sends a datagram that has this source address.
fn answer_from(socket: &UdpSocket, ip: Ipv4Addr, to: SocketAddr) -> anyhow::Result<()> {
    let source = libc::in_pktinfo {
        ipi_ifindex: 0,
        ipi_spec_dst: libc::in_addr {
            s_addr: ip.to_bits().to_be(),
        },
        ipi_addr: libc::in_addr { s_addr: 0 },
    };
    let SocketAddr::V4(to) = to else {
        bail!("not of IPv4");
    };
    let sent = sendmsg(
        socket.as_raw_fd(),
        &[IoSlice::new(b"answer")],
        &[ControlMessage::Ipv4PacketInfo(&source)],
        MsgFlags::empty(),
        Some(&SockaddrIn::from(to)),
    )?;
    ensure!(sent == 6);
    Ok(())
}

/// One IPv6 socket with a peer of each family.
fn dual_stack_server() -> anyhow::Result<()> {
    let collectors = UdpCollectors::start()?;
    let mut server = UdpActor::bind("server", "[::]:0".parse()?)?;
    let port = server.local().port();
    let mut expected = Vec::new();
    for family in Family::ALL {
        let mut client = UdpActor::open("client", family.loopback())?;
        let to = SocketAddr::new(family.loopback().ip(), port);
        client.send(SendCall::SendTo, Some(to), &[10, 20])?;
        server.receive(ReceiveCall::RecvMsg, 2)?;
        let ip = match family {
            Family::V4 => Family::Mapped.loopback().ip(),
            other => other.loopback().ip(),
        };
        server.send(SendCall::SendTo, Some(seen(&client, ip)), &[30])?;
        client.receive(ReceiveCall::RecvFrom, 1)?;
        expected.push(client.close()?);
    }
    expected.push(server.close()?);
    collectors.finish(&expected)
}

/// An address that is given with the datagram takes precedence over that of the connect.
fn connected_socket_that_sends_elsewhere() -> anyhow::Result<()> {
    let collectors = UdpCollectors::start()?;
    let mut expected = Vec::new();
    for family in Family::ALL {
        let mut pair = UdpPair::new(family, true)?;
        let mut other = UdpActor::bind("other", family.loopback())?;
        pair.sender.send(SendCall::SendTo, None, &[1])?;
        for by in [SendCall::SendTo, SendCall::SendMsg, SendCall::SendMmsg] {
            pair.sender.send(by, Some(other.local()), &[10, 20])?;
            other.receive(ReceiveCall::RecvFrom, 2)?;
        }
        pair.sender.send(SendCall::SendTo, None, &[2])?;
        pair.receiver.receive(ReceiveCall::RecvFrom, 2)?;
        expected.push(other.close()?);
        expected.extend(pair.close()?);
    }
    collectors.finish(&expected)
}

/// Two flows and two connects of one socket, which is closed once.
fn connect_to_another_peer() -> anyhow::Result<()> {
    let collectors = UdpCollectors::start()?;
    let mut expected = Vec::new();
    for family in Family::ALL {
        let mut pair = UdpPair::new(family, true)?;
        let mut other = UdpActor::bind("other", family.loopback())?;
        pair.sender.send(SendCall::SendTo, None, &[1, 2])?;
        pair.receiver.receive(ReceiveCall::RecvFrom, 2)?;
        pair.sender.connect(other.local())?;
        pair.sender.send(SendCall::SendTo, None, &[10, 20])?;
        other.receive(ReceiveCall::RecvFrom, 2)?;
        expected.push(other.close()?);
        expected.extend(pair.close()?);
    }
    collectors.finish(&expected)
}

/// Connects by the thread that submits the request, and by a worker.
fn connect_by_io_uring() -> anyhow::Result<()> {
    if !is_at_least(5, 18)? {
        return skip("this kernel does not report which request of io_uring has ended");
    }
    let collectors = UdpCollectors::start()?;
    let mut expected = Vec::new();
    for family in Family::ALL {
        for worker in [false, true] {
            let mut server = UdpActor::bind("server", family.loopback())?;
            let mut client = UdpActor::open("client", family.loopback())?;
            client
                .connect_in_ring(server.local(), worker)
                .or_else(skip_without_uring)?;
            client.send(SendCall::Write, None, &[10])?;
            server.receive(ReceiveCall::RecvFrom, 1)?;
            expected.extend([client.close()?, server.close()?]);
        }
    }
    collectors.finish(&expected)
}

/// No hook sees the end of the call. The event comes at the end of the socket, or with a sample.
fn connect_by_a_32_bit_program() -> anyhow::Result<()> {
    let collector = Collector::start_udp()?;
    let to = UdpSocket::bind(Family::V4.loopback())?.local_addr()?;
    let SocketAddr::V4(v4) = to else {
        bail!("{to}");
    };
    let pid = connect_udp(v4)?;
    let is_it = |event: &Event| {
        event
            .process
            .as_ref()
            .is_some_and(|process| process.pid == pid)
    };
    collector.wait_for("close", |event| event.is_end() && is_it(event))?;
    let events = collector.finish_all()?;
    let kinds: Vec<_> = events
        .iter()
        .filter(|event| is_it(event))
        .map(|event| (event.kind.clone(), event.socket.remote))
        .collect();
    ensure!(
        matches!(kinds[..], [(EventKind::Connect, peer), (EventKind::Close { .. }, _)] if peer == to),
        "{}",
        show(&events)
    );
    Ok(())
}

/// Datagrams that wait in the queue when a socket gets its peer may come from any sender. They
/// never count as the peer's.
fn connect_with_datagrams_of_others_in_the_queue() -> anyhow::Result<()> {
    for returns_peer in [true, false] {
        for family in Family::ALL {
            let collector = Collector::start_udp()?;
            let bind = || UdpSocket::bind(family.loopback());
            let (server, peer, other) = (bind()?, bind()?, bind()?);
            let at = server.local_addr()?;
            peer.send_to(&[0; 100], at)?;
            let (_, first) = server.peek_from(&mut [0; 10])?;
            let one = receive_queue(&server)?;
            for sender in [&other, &other, &other, &other, &peer] {
                sender.send_to(&[0; 100], at)?;
            }
            // After its `connect`, the kernel gives the socket no more datagrams of others.
            let deadline = Instant::now() + PATIENCE;
            while receive_queue(&server)? < 6 * one {
                ensure!(Instant::now() < deadline, "not all have arrived");
                thread::sleep(Duration::from_millis(1));
            }
            ensure!(first == peer.local_addr()?);
            server.connect(first)?;
            peer.send_to(&[0; 100], at)?;
            for _ in 0..7 {
                if returns_peer {
                    server.recv_from(&mut [0; 200])?;
                } else {
                    server.recv(&mut [0; 200])?;
                }
            }
            drop(server);
            collector.wait_closed(1)?;
            let names_every_peer = collector.names_every_peer() || returns_peer;
            let ports = [at, first, other.local_addr()?].map(|address| address.port());
            drop((peer, other));
            collector.wait_closed(3)?;
            let received = collector.finish_all()?.into_iter().filter(|event| {
                matches!(event.kind, EventKind::Flow { last: true, .. })
                    && event.socket.local.port() == ports[0]
            });
            let received =
                received.map(|event| (event.socket.remote.port(), event.traffic.rx_packets));
            let expected = if names_every_peer {
                [(ports[1], 3), (ports[2], 4)]
            } else {
                [(0, 6), (ports[1], 1)]
            };
            let received: BTreeMap<_, _> = received.collect();
            ensure!(
                received == BTreeMap::from(expected),
                "{received:?}, but {expected:?} expected"
            );
        }
    }
    Ok(())
}

/// Connecting to an address of no family removes the peer. The socket stays the same.
fn disconnect() -> anyhow::Result<()> {
    let collectors = UdpCollectors::start()?;
    let mut expected = Vec::new();
    for family in Family::ALL {
        let mut server = UdpActor::bind("server", family.loopback())?;
        let mut client = UdpActor::open("client", family.loopback())?;
        client.connect(server.local())?;
        client.send(SendCall::Write, None, &[10])?;
        server.receive(ReceiveCall::RecvFrom, 1)?;
        client.disconnect()?;
        ensure!(client.socket.remote.is_none());
        client.send(SendCall::SendTo, Some(server.local()), &[20])?;
        server.receive(ReceiveCall::RecvFrom, 1)?;
        client.disconnect()?;
        expected.extend([client.close()?, server.close()?]);
    }
    collectors.finish(&expected)
}

/// A disconnected socket that is bound to no port gets another one. Then its datagrams belong to
/// another flow.
fn another_port_after_disconnect() -> anyhow::Result<()> {
    for address in [Family::V4, Family::V6].map(Family::loopback) {
        let collector = Collector::start_udp()?;
        let mut server = UdpActor::bind("server", address)?;
        let mut client = UdpActor::open("client", address)?;
        client.connect(server.local())?;
        client.send(SendCall::Write, None, &[10])?;
        let first = client.local();
        client.disconnect()?;
        let heir = UdpActor::bind("heir", first)?;
        client.send(SendCall::SendTo, Some(server.local()), &[20])?;
        let second = SocketAddr::new(address.ip(), client.local().port());
        ensure!(first.port() != second.port());
        server.receive(ReceiveCall::RecvFrom, 2)?;
        server.send(SendCall::SendTo, Some(second), &[5])?;
        client.receive(ReceiveCall::RecvFrom, 1)?;
        let peer = server.local();
        for actor in [client, heir, server] {
            actor.close()?;
        }
        let events = collector.finish_in_order(3)?;
        let mut flows = last_reports(&events);
        flows.retain(|(_, remote), _| *remote == peer);
        let expected = [((first, peer), (10, 0)), ((second, peer), (20, 5))].into();
        ensure!(flows == expected, "{flows:?}: {}", show(&events));
    }
    Ok(())
}

/// A socket that is bound to no address has one while it is connected. All of its datagrams with
/// one peer belong to one flow.
fn connected_in_the_middle() -> anyhow::Result<()> {
    for (any, address) in [
        ("0.0.0.0:7771", Family::V4.loopback()),
        ("[::]:7771", Family::V6.loopback()),
    ] {
        let collector = Collector::start_udp()?;
        let mut server = UdpActor::bind("server", any.parse()?)?;
        let mut client = UdpActor::bind("client", address)?;
        let (at, peer) = (SocketAddr::new(address.ip(), 7771), client.local());
        client.send(SendCall::SendTo, Some(at), &[10])?;
        server.receive(ReceiveCall::RecvFrom, 1)?;
        for size in [20, 30] {
            server.connect(peer)?;
            server.send(SendCall::Write, None, &[size])?;
            client.send(SendCall::SendTo, Some(at), &[1])?;
            server.receive(ReceiveCall::Read, 1)?;
            server.disconnect()?;
            server.send(SendCall::SendTo, Some(peer), &[size])?;
        }
        for actor in [client, server] {
            actor.close()?;
        }
        let events = collector.finish_in_order(2)?;
        let of_server = |event: &&Event| event.socket.remote == peer;
        let flows: BTreeSet<_> = events
            .iter()
            .filter(of_server)
            .filter_map(|event| match event.kind {
                EventKind::Flow { age, .. } => Some(event.uptime - age),
                _ => None,
            })
            .collect();
        ensure!(flows.len() == 1, "{}", show(&events));
        let totals = last_reports(&events);
        ensure!(
            totals.get(&(at, peer)) == Some(&(100, 12)),
            "{}",
            show(&events)
        );
    }
    Ok(())
}

fn failed_connect_is_no_event() -> anyhow::Result<()> {
    let collectors = UdpCollectors::start()?;
    let mut expected = Vec::new();
    for (to, errno) in [
        ("127.255.255.255:9", Errno::EACCES),
        ("192.0.2.1:9", Errno::ENETUNREACH),
        ("[::ffff:192.0.2.1]:9", Errno::ENETUNREACH),
        ("[2001:db8::1]:9", Errno::ENETUNREACH),
    ] {
        let to: SocketAddr = to.parse()?;
        let mut client = UdpActor::open("client", to)?;
        let failed = client.fail_to_connect(to)?;
        ensure!(failed == errno as i32, "{to}: {failed}");
        expected.push(client.close()?);
    }
    // After a failure, and after another peer.
    for family in Family::ALL {
        let mut pair = UdpPair::new(family, true)?;
        let unreachable = match family {
            Family::V4 => "192.0.2.1:9",
            Family::V6 => "[2001:db8::1]:9",
            Family::Mapped => "[::ffff:192.0.2.1]:9",
        };
        pair.sender.fail_to_connect(unreachable.parse()?)?;
        let to = Some(pair.receiver.local());
        pair.sender.send(SendCall::SendTo, to, &[10])?;
        pair.receiver.receive(ReceiveCall::RecvFrom, 1)?;
        expected.extend(pair.close()?);
    }
    collectors.finish(&expected)
}

/// The port of the groups.
const PORT: u16 = 7_700;

fn multicast_v4() -> anyhow::Result<()> {
    multicast(NEAR.parse()?, "239.1.2.3".parse()?)
}

fn multicast_v6() -> anyhow::Result<()> {
    multicast("fd77::1".parse()?, "ff05::123".parse()?)
}

/// A datagram to a group is one datagram for its sender and one for each receiver, of which one is
/// on the same machine.
fn multicast(source: IpAddr, group: IpAddr) -> anyhow::Result<()> {
    let far = veth()?;
    if source.is_ipv6() {
        ip(&format!("addr add {source}/64 dev near0 nodad"))?;
    }
    let near_index = if_nametoindex("near0")?;
    let far_index = far.run(|| Ok(if_nametoindex("far0")?))?;
    let collectors = UdpCollectors::start()?;
    collectors.also(&far)?;

    let any = if source.is_ipv6() {
        "[::]:0"
    } else {
        "0.0.0.0:0"
    }
    .parse::<SocketAddr>()?;
    let at = SocketAddr::new(any.ip(), PORT);
    let mut near_receiver = UdpActor::bind("near", at)?;
    near_receiver.set(SocketOption::Join(group, near_index))?;
    let mut far_receiver = far.run(|| UdpActor::bind("far", at))?;
    far_receiver.set(SocketOption::Join(group, far_index))?;
    let mut sender = UdpActor::bind("sender", SocketAddr::new(source, 0))?;
    if source.is_ipv6() {
        sender.set(SocketOption::MulticastTo(near_index))?;
    }
    let to = SocketAddr::new(group, PORT);
    sender.send(SendCall::SendTo, Some(to), &[10, 0, 30])?;
    for receiver in [&mut near_receiver, &mut far_receiver] {
        receiver.receive(ReceiveCall::RecvFrom, 3)?;
    }
    collectors.finish(&[
        sender.close()?,
        near_receiver.close()?,
        far_receiver.close()?,
    ])
}

/// Broadcasts count as multicasts do, and are not sent without permission.
fn broadcast() -> anyhow::Result<()> {
    let far = veth()?;
    let collectors = UdpCollectors::start()?;
    collectors.also(&far)?;
    let at = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), PORT);
    let mut near_receiver = UdpActor::bind("near", at)?;
    let mut far_receiver = far.run(|| UdpActor::bind("far", at))?;
    let mut sender = UdpActor::bind("sender", SocketAddr::new(NEAR.parse()?, 0))?;
    let to: SocketAddr = format!("10.77.0.255:{PORT}").parse()?;
    let send = Operation::Send {
        by: SendCall::SendTo,
        to: Some(to),
        sizes: vec![10],
    };
    ensure!(sender.fail(send.clone())? == Errno::EACCES as i32);
    sender.set(SocketOption::Broadcast)?;
    sender.run(send)?;
    sender.connect(to)?;
    sender.send(SendCall::Write, None, &[20, 0])?;
    for receiver in [&mut near_receiver, &mut far_receiver] {
        receiver.receive(ReceiveCall::RecvFrom, 3)?;
    }
    collectors.finish(&[
        sender.close()?,
        near_receiver.close()?,
        far_receiver.close()?,
    ])
}

fn ten_thousand_peers() -> anyhow::Result<()> {
    let collector = Collector::start_udp()?;
    let expected = crowd(10_000)?;
    let handle = collector.handle().clone();
    collector.finish_udp(expected.len())?.check_all(&expected)?;
    let stats = handle.stats();
    ensure!(stats.flows_evicted == 0, "{stats:?}");
    Ok(())
}

/// Flows beyond the limit are forgotten and counted. The totals of the socket stay exact.
fn more_peers_than_flows_are_remembered() -> anyhow::Result<()> {
    let collector = Collector::start_udp_with(|builder| builder.max_flows(1_000))?;
    // However late the reader is, all of them fit into the kernel's map, which has room for 16,384
    // more.
    let expected = crowd(4_000)?.map(ExpectedUdp::evicted);
    let handle = collector.handle().clone();
    collector.finish_udp(expected.len())?.check_all(&expected)?;
    let stats = handle.stats();
    ensure!(stats.flows_evicted > 0, "{stats:?}");
    Ok(())
}

/// Sends twice from each of many addresses of the loopback network to another one. One socket has
/// all the sources, another all the destinations.
fn crowd(addresses: u16) -> anyhow::Result<[ExpectedUdp; 2]> {
    let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
    let mut sender = UdpActor::bind("sender", any)?;
    let mut receiver = UdpActor::bind("receiver", any)?;
    receiver.set(SocketOption::LargeReceiveBuffer(64 << 20))?;
    let port = receiver.local().port();
    for _ in 0..2 {
        sender.run(Operation::Spray { port, addresses })?;
        receiver.receive(ReceiveCall::RecvFrom, addresses.into())?;
    }
    Ok([sender.close()?, receiver.close()?])
}

/// Datagrams within the interval after a report are reported at its end, although no more come.
fn idle_flow_is_reported() -> anyhow::Result<()> {
    let collector = Collector::start_udp()?;
    let mut pair = UdpPair::new(Family::V4, false)?;
    let to = Some(pair.receiver.local());
    pair.sender.send(SendCall::SendTo, to, &[10])?;
    let port = pair.sender.local().port();
    let sent = |packets| {
        move |event: &Event| {
            is_flow(event)
                && event.socket.local.port() == port
                && event.traffic.tx_packets == packets
        }
    };
    collector.wait_for("report of the first datagram", sent(1))?;
    pair.sender.send(SendCall::SendTo, to, &[1, 2, 3, 4])?;
    collector.wait_for("report of the other four", sent(5))?;
    // The receiver has not received anything yet, so it has no flow.
    pair.receiver.receive(ReceiveCall::RecvFrom, 5)?;
    let expected = pair.close()?;
    collector.finish_udp(2)?.check_all(&expected)
}

fn one_report_per_interval() -> anyhow::Result<()> {
    /// By how much two reports may be closer than the interval.
    const TOLERANCE: Duration = Duration::from_millis(10);
    let collector = Collector::start_udp()?;
    let mut pair = UdpPair::new(Family::V4, true)?;
    pair.sender.pace(None, 61, Duration::from_millis(50), 10)?;
    pair.receiver.receive(ReceiveCall::RecvFrom, 61)?;
    let expected = pair.close()?;
    let mut seen = collector.finish_udp(2)?;
    let events = seen.check(&expected[0])?;
    let reports: Vec<_> = events.iter().filter(|event| is_flow(event)).collect();
    ensure!(
        (3..=5).contains(&reports.len()),
        "{} reports in 3 s:{}",
        reports.len(),
        show(&events)
    );
    // The last report is for the end of the socket.
    let (_, regular) = reports.split_last().expect("there are three");
    for pair in regular.windows(2) {
        let between = pair[1].uptime - pair[0].uptime;
        ensure!(
            between + TOLERANCE >= INTERVAL,
            "{between:?} between:{}",
            show(&events)
        );
    }
    seen.check_all(&expected[1..])
}

fn is_flow(event: &Event) -> bool {
    matches!(event.kind, EventKind::Flow { .. })
}
