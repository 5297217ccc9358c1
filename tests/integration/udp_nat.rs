//! Sockets whose packets get other addresses, by netfilter or by a program at their cgroup. The
//! addresses of a flow are those that the socket knows.

use std::net::SocketAddr;

use integration_tests::{
    actor::{Actor, Operation, ReceiveCall, SendCall},
    balancer::Balancer,
    cgroup::Cgroup,
    netns::{FAR, NEAR, ip, nft, veth},
    suite::{Test, skip},
    udp_actor::{ROOM, UdpActor},
    udp_pair::UdpCollectors,
};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            resolver_of_a_container,
            redirected_port,
            masquerade,
            other_port_of_the_source,
            one_backend_of_two_services,
            balanced_by_a_program_of_the_cgroup,
        ],
    ]
}

const TURNS: usize = 3;

/// Lets a client send to `address`, and the server answer.
fn converse(
    client: &mut UdpActor,
    address: Option<SocketAddr>,
    server: &mut UdpActor,
) -> anyhow::Result<()> {
    for turn in 1..=TURNS {
        client.send(SendCall::SendTo, address, &[40 * turn])?;
        let (by, count, room) = (ReceiveCall::RecvFrom, 1, ROOM);
        let question = server.run(Operation::Receive { by, count, room })?;
        server.send(SendCall::SendTo, question[0].peer, &[90 * turn])?;
        client.receive(ReceiveCall::RecvFrom, 1)?;
    }
    Ok(())
}

/// Returns a client for the address, connected to it or not, and the destination that it gives with
/// each datagram.
fn client(address: SocketAddr, connected: bool) -> anyhow::Result<(UdpActor, Option<SocketAddr>)> {
    let mut client = UdpActor::open("client", address)?;
    if connected {
        client.connect(address)?;
    }
    Ok((client, (!connected).then_some(address)))
}

/// Both ends are on this host: 127.0.0.11:53 is a server at another port, as Docker has it.
fn resolver_of_a_container() -> anyhow::Result<()> {
    let (queried, answers): (SocketAddr, SocketAddr) =
        ("127.0.0.11:53".parse()?, "127.0.0.11:35971".parse()?);
    nft("table ip docker {
           chain output {
             type nat hook output priority -100;
             ip daddr 127.0.0.11 udp dport 53 dnat to 127.0.0.11:35971
           }
           chain postrouting {
             type nat hook postrouting priority 100;
             ip saddr 127.0.0.11 udp sport 35971 snat to 127.0.0.11:53
           }
         }")?;
    let collectors = UdpCollectors::start()?;
    let mut server = UdpActor::bind("resolver", answers)?;
    let mut expected = Vec::new();
    for connected in [false, true] {
        let (mut client, to) = client(queried, connected)?;
        converse(&mut client, to, &mut server)?;
        expected.push(client.close()?);
    }
    expected.push(server.close()?);
    collectors.finish(&expected)
}

/// This host answers all queries to port 53 at any address, as in a service mesh.
fn redirected_port() -> anyhow::Result<()> {
    nft("table inet mesh {
           chain output {
             type nat hook output priority -100;
             udp dport 53 redirect to :15053
           }
         }")?;
    ip("addr add 192.0.2.1/32 dev lo")?;
    ip("addr add 2001:db8::1/128 dev lo nodad")?;
    let collectors = UdpCollectors::start()?;
    let mut expected = Vec::new();
    for (queried, answers) in [
        ("192.0.2.1:53", "127.0.0.1:15053"),
        ("[2001:db8::1]:53", "[::1]:15053"),
    ] {
        let mut server = UdpActor::bind("proxy", answers.parse()?)?;
        for connected in [false, true] {
            let (mut client, to) = client(queried.parse()?, connected)?;
            converse(&mut client, to, &mut server)?;
            expected.push(client.close()?);
        }
        expected.push(server.close()?);
    }
    collectors.finish(&expected)
}

/// Packets leave the host with another source address.
fn masquerade() -> anyhow::Result<()> {
    translated_source("masquerade")
}

/// Packets leave the host with another source port, too.
fn other_port_of_the_source() -> anyhow::Result<()> {
    translated_source("snat to 10.77.0.9:7001-7009")
}

fn translated_source(statement: &str) -> anyhow::Result<()> {
    let far = veth()?;
    // The address to which the far end sends its answers.
    ip("addr add 10.77.0.9/24 dev near0")?;
    ip("addr add 198.51.100.1/32 dev lo")?;
    nft(&format!(
        "table ip gateway {{
           chain postrouting {{
             type nat hook postrouting priority 100;
             ip saddr 198.51.100.1 oifname near0 meta l4proto udp {statement}
           }}
         }}"
    ))?;
    let collectors = UdpCollectors::start()?;
    collectors.also(&far)?;
    let mut server = far.run(|| UdpActor::bind("server", format!("{FAR}:5000").parse()?))?;
    let mut expected = Vec::new();
    for connected in [false, true] {
        let mut client = UdpActor::bind("client", "198.51.100.1:0".parse()?)?;
        if connected {
            client.connect(server.local())?;
        }
        let to = (!connected).then_some(server.local());
        converse(&mut client, to, &mut server)?;
        expected.push(client.close()?);
    }
    // Not translated, because it has the address of the link.
    let mut plain = UdpActor::bind("plain", format!("{NEAR}:0").parse()?)?;
    let to = Some(server.local());
    converse(&mut plain, to, &mut server)?;
    expected.extend([plain.close()?, server.close()?]);
    collectors.finish(&expected)
}

/// Two addresses that lead to the same backend are two peers of a socket, and the backend's own
/// address is a third.
fn one_backend_of_two_services() -> anyhow::Result<()> {
    nft("table ip services {
           chain output {
             type nat hook output priority -100;
             ip daddr 127.0.1.1 udp dport 80 dnat to 127.0.0.1:8080
             ip daddr 127.0.1.2 udp dport 80 dnat to 127.0.0.1:8080
           }
         }")?;
    let collectors = UdpCollectors::start()?;
    let mut server = UdpActor::bind("backend", "127.0.0.1:8080".parse()?)?;
    let mut client = UdpActor::bind("client", "127.0.0.1:0".parse()?)?;
    for _ in 0..2 {
        for queried in ["127.0.1.1:80", "127.0.0.1:8080", "127.0.1.2:80"] {
            converse(&mut client, Some(queried.parse()?), &mut server)?;
        }
    }
    collectors.finish(&[client.close()?, server.close()?])
}

/// A socket load balancer replaces the addresses in the calls of its clients.
fn balanced_by_a_program_of_the_cgroup() -> anyhow::Result<()> {
    let collectors = UdpCollectors::start()?;
    let mut expected = Vec::new();
    for (service, backend) in [
        ("192.0.2.53:53", "127.0.0.1:5353"),
        ("[2001:db8::53]:53", "[::1]:5353"),
    ] {
        let (service, backend): (SocketAddr, SocketAddr) = (service.parse()?, backend.parse()?);
        let mut server = UdpActor::bind("backend", backend)?;
        let Some(cgroup) = Cgroup::new(&format!("balanced-{}", service.is_ipv6()))? else {
            return skip("no cgroup v2");
        };
        let _balancer = Balancer::at(&cgroup, service, backend)?;
        let mut calls = vec![SendCall::SendTo, SendCall::SendMsg, SendCall::SendMmsg];
        calls.rotate_left(usize::from(service.is_ipv6()));
        let actor = Actor::spawn("client")?;
        cgroup.adopt(actor.pid())?;
        let mut client = UdpActor::with(actor, backend)?;
        client.bind_to(SocketAddr::new(backend.ip(), 0))?;
        for (nth, by) in calls.into_iter().enumerate() {
            client.send(by, Some(service), &[10 + nth])?;
            server.receive(ReceiveCall::RecvFrom, 1)?;
            server.send(SendCall::SendTo, Some(client.local()), &[100])?;
            client.receive(ReceiveCall::RecvMsg, 1)?;
        }
        // Another socket, which gives the address of the backend itself.
        let mut other = UdpActor::bind("other", SocketAddr::new(backend.ip(), 0))?;
        converse(&mut other, Some(backend), &mut server)?;
        expected.extend([client.close()?, other.close()?, server.close()?]);
    }
    collectors.finish(&expected)
}
