//! Sent datagrams are those that a send call reports as sent.

use std::{
    net::{IpAddr, SocketAddr},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::ensure;
use integration_tests::{
    actor::{Actor, Operation, ReceiveCall, SendCall, SocketOption, errno},
    cgroup::Cgroup,
    kernel::is_at_least,
    netns::{NEAR, ip, veth},
    refusal::Refusal,
    suite::{Test, skip},
    udp_actor::UdpActor,
    udp_pair::{Family, UdpCollectors},
};
use nix::{errno::Errno, net::if_::if_nametoindex};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            refused_by_a_program_of_the_cgroup,
            kept_on_this_host,
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
