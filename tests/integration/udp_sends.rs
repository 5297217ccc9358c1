//! Sent datagrams are those that a send call reports as sent.

use std::{
    net::{IpAddr, SocketAddr},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use integration_tests::{
    actor::{Actor, Operation, ReceiveCall, SendCall, SocketOption, errno},
    cgroup::Cgroup,
    collector::{Collector, show},
    kernel::is_at_least,
    netns::{FAR, NEAR, Netns, ip, tc, veth},
    refusal::Refusal,
    suite::{Test, skip},
    udp_actor::UdpActor,
    udp_pair::{Family, UdpCollectors},
};
use nix::{errno::Errno, net::if_::if_nametoindex};
use tcp_udp_trace::{Event, EventKind};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            refused_by_a_program_of_the_cgroup,
            kept_on_this_host,
            dropped_by_a_full_queue,
            dropped_by_a_device,
            lost_in_a_queue,
        ],
    ]
}

const PATIENCE: Duration = Duration::from_secs(60);

/// The send fails after the hook that counts. Neither the socket nor the flow has sent anything,
/// and there is no event of a send.
fn refused_by_a_program_of_the_cgroup() -> anyhow::Result<()> {
    if !is_at_least(5, 18)? {
        return skip("this kernel does not say why it drops a packet");
    }
    let collectors = UdpCollectors::start()?;
    let mut expected = Vec::new();
    for family in Family::ALL {
        for connected in [false, true] {
            let address = family.loopback();
            let mut receiver = UdpActor::bind("receiver", address)?;
            let name = format!("refused-{family:?}-{connected}");
            let Some(cgroup) = Cgroup::new(&name)? else {
                return skip("no cgroup v2");
            };
            // A socket belongs to the cgroup in which it was made.
            let actor = Actor::spawn("refused")?;
            cgroup.adopt(actor.pid())?;
            let mut sender = UdpActor::with(actor, address)?;
            if connected {
                sender.connect(receiver.local())?;
            }
            let to = (!connected).then_some(receiver.local());
            sender.send(SendCall::SendTo, to, &[10])?;
            receiver.receive(ReceiveCall::RecvFrom, 1)?;
            let refusal = Refusal::at(&cgroup)?;
            for _ in 0..5 {
                let (by, sizes) = (SendCall::SendTo, vec![100]);
                let failed = sender.fail(Operation::Send { by, to, sizes })?;
                ensure!(failed == Errno::EPERM as i32, "{failed}");
            }
            drop(refusal);
            // A process that another test has just forked may keep the descriptor for a moment.
            let deadline = Instant::now() + PATIENCE;
            while let Err(error) = sender.send(SendCall::SendTo, to, &[20]) {
                let is_refused = errno(&error) == Some(Errno::EPERM as i32);
                if !is_refused || Instant::now() > deadline {
                    return Err(error);
                }
                sleep(Duration::from_millis(1));
            }
            receiver.receive(ReceiveCall::RecvFrom, 1)?;
            expected.push(sender.close()?);
            expected.push(receiver.close()?);
        }
    }
    collectors.finish(&expected)
}

/// Sends datagrams to a group that may not leave the host, with a receiver there and without.
fn kept_on_this_host() -> anyhow::Result<()> {
    if !is_at_least(5, 18)? {
        return skip("this kernel does not say why it drops a packet");
    }
    let _far = veth()?;
    let v6: IpAddr = "fd77::1".parse()?;
    ip(&format!("addr add {v6}/64 dev near0 nodad"))?;
    let index = if_nametoindex("near0")?;
    let collectors = UdpCollectors::start()?;
    let mut expected = Vec::new();
    for (source, group) in [(NEAR.parse()?, "239.255.76.67"), (v6, "ff05::4242")] {
        let to = SocketAddr::new(group.parse()?, 7667);
        let any = if source.is_ipv6() { "[::]" } else { "0.0.0.0" };
        let mut receiver = UdpActor::bind("receiver", format!("{any}:7667").parse()?)?;
        receiver.set(SocketOption::Join(to.ip(), index))?;
        let mut sender = UdpActor::bind("sender", SocketAddr::new(source, 0))?;
        if source.is_ipv6() {
            sender.set(SocketOption::MulticastTo(index))?;
        }
        sender.set(SocketOption::MulticastHops(0))?;
        sender.send(SendCall::SendTo, Some(to), &[50, 0, 70])?;
        receiver.receive(ReceiveCall::RecvFrom, 3)?;
        let closed = SocketAddr::new(to.ip(), 7668);
        sender.send(SendCall::SendTo, Some(closed), &[30])?;
        expected.extend([sender.close()?, receiver.close()?]);
    }
    collectors.finish(&expected)
}

/// The queue holds few datagrams.
fn dropped_by_a_full_queue() -> anyhow::Result<()> {
    let qdisc = "qdisc add dev near0 root tbf rate 8kbit burst 2000 limit 3000";
    check_drops(|_| tc(qdisc), true)
}

/// The device has no queue, and the device at its other end takes only smaller datagrams. Whether
/// the send fails depends on the kernel.
fn dropped_by_a_device() -> anyhow::Result<()> {
    check_drops(|far| far.run(|| ip("link set far0 mtu 300")), false)
}

/// The queue drops datagrams and reports them as sent.
fn lost_in_a_queue() -> anyhow::Result<()> {
    check_drops(|_| tc("qdisc add dev near0 root netem loss 50%"), false)
}

/// Sends of a socket, and how many of them succeeded.
#[derive(Debug)]
struct Sends {
    local: SocketAddr,
    bytes: [u64; 2],
    datagrams: [u64; 2],
}

/// Sends datagrams through a device that drops some, and counts the sends that fail. They fail only
/// if the socket has `IP_RECVERR`.
fn check_drops(
    make_drops: impl FnOnce(&Netns) -> anyhow::Result<()>,
    fails: bool,
) -> anyhow::Result<()> {
    const SENDS: u64 = 20;
    const LEAST: u64 = 400;
    const OF_THE_LINK: [(&str, &str); 2] = [(NEAR, FAR), ("fd77::1", "fd77::2")];
    let far = veth()?;
    ip("addr add fd77::1/64 dev near0 nodad")?;
    far.run(|| ip("addr add fd77::2/64 dev far0 nodad"))?;
    let collector = Collector::start_udp()?;
    let mut receivers = Vec::new();
    for (_, to) in OF_THE_LINK {
        let address = SocketAddr::new(to.parse()?, 7777);
        let mut receiver = far.run(|| UdpActor::bind("receiver", address))?;
        // The neighbors know each other, because a datagram that waits for that is in no queue.
        let from = SocketAddr::new(if address.is_ipv6() { "fd77::1" } else { NEAR }.parse()?, 0);
        let mut first = UdpActor::bind("first", from)?;
        first.send(SendCall::SendTo, Some(address), &[1])?;
        receiver.receive(ReceiveCall::RecvFrom, 1)?;
        first.close()?;
        receivers.push(receiver);
    }
    make_drops(&far)?;
    let mut all = Vec::new();
    let mut failures = 0;
    for (from, to) in OF_THE_LINK {
        let to = SocketAddr::new(to.parse()?, 7777);
        for (reports, connected, by) in [
            (true, false, SendCall::SendTo),
            (true, true, SendCall::SendMsg),
            (true, false, SendCall::SendMmsg),
            (false, false, SendCall::SendTo),
            (false, true, SendCall::Write),
        ] {
            let mut sender = UdpActor::bind("sender", SocketAddr::new(from.parse()?, 0))?;
            if reports {
                sender.set(SocketOption::ErrorQueue)?;
            }
            if connected {
                sender.connect(to)?;
            }
            let (mut bytes, mut datagrams) = ([0; 2], [0; 2]);
            for size in (LEAST..).take(SENDS as usize) {
                let result = sender.send(by, (!connected).then_some(to), &[size as usize]);
                let succeeded = match result {
                    Err(error) if errno(&error) == Some(Errno::ENOBUFS as i32) => false,
                    result => result.map(|()| true)?,
                };
                ensure!(succeeded || reports, "{by:?} of {size}");
                for (nth, counts) in [true, succeeded].into_iter().enumerate() {
                    bytes[nth] += if counts { size } else { 0 };
                    datagrams[nth] += u64::from(counts);
                }
            }
            failures += SENDS - datagrams[1];
            let local = sender.local();
            sender.close()?;
            all.push(Sends {
                local,
                bytes,
                datagrams,
            });
        }
    }
    ensure!(!fails || failures > 0, "no send failed");
    println!("{failures} sends failed");
    let hooks = collector.handle().hooks();
    let mut programs = hooks.iter().flat_map(|hook| &hook.programs);
    let sees_results = programs.any(|program| program.ends_with(":sock_send_length"));
    let events = collector.finish_in_order(all.len() + 2)?;
    for sends in &all {
        check_sends(sends, &events, sees_results).with_context(|| format!("{sends:?}"))?;
    }
    Ok(())
}

/// Without the result of a send, each attempt counts, and the totals are approximate.
fn check_sends(sends: &Sends, events: &[Event], sees_results: bool) -> anyhow::Result<()> {
    let of_it: Vec<_> = events
        .iter()
        .filter(|event| event.socket.local == sends.local)
        .cloned()
        .collect();
    let nth = usize::from(sees_results);
    for is_close in [false, true] {
        let mut last = of_it.iter().rev().filter_map(|event| match event.kind {
            EventKind::Flow { approximate, .. } if !is_close => Some((event, approximate)),
            EventKind::Close { approximate, .. } if is_close => Some((event, approximate)),
            _ => None,
        });
        let (last, approximate) = last.next().context("no event")?;
        let traffic = last.traffic;
        let is_right = (traffic.tx_bytes, traffic.tx_packets)
            == (sends.bytes[nth], sends.datagrams[nth])
            && approximate != sees_results;
        ensure!(is_right, "{}", show(&of_it));
    }
    Ok(())
}
