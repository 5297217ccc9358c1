//! The counts of the harness, on which all other tests rely, compared with those of the kernel in
//! `/proc/net/snmp` and `/proc/net/netstat`.

use anyhow::ensure;
use integration_tests::{
    actor::{Actor, Command, Direction, Exchange, Operation, Outcome, Transfer},
    kernel::NetCounters,
    suite::Test,
    tcp_pair::loopback,
};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            churn_is_what_the_kernel_counts,
            transfers_are_what_the_kernel_counts,
            floods_are_what_the_kernel_counts,
        ],
    ]
}

/// The headers of a TCP segment with a timestamp, and of one that opens a connection.
const HEADERS: u64 = 20 + 32;
const SYN_HEADERS: u64 = 20 + 40;
/// Those of a reset that answers a late segment of a connection that has ended.
const RESET_HEADERS: u64 = 20 + 20;

/// Checks the connections and their payload, in both directions together, since the counters
/// were read.
fn check_tcp(before: &NetCounters, connections: u64, payload: u64) -> anyhow::Result<()> {
    let now = NetCounters::now()?;
    let growth = |name| before.growth(&now, name);
    for (name, expected) in [
        ("Tcp.ActiveOpens", connections),
        ("Tcp.AttemptFails", 0),
        ("Tcp.EstabResets", 0),
        ("Tcp.InErrs", 0),
    ] {
        let growth = growth(name)?;
        ensure!(growth == expected, "{name} {growth}, not {expected}");
    }
    // Two CPUs may make a child each of one handshake, of which the kernel drops one.
    ensure!(growth("Tcp.PassiveOpens")? >= connections);
    ensure!(growth("Tcp.OutSegs")? >= 4 * connections);
    let (resent, resets) = (growth("Tcp.RetransSegs")?, growth("Tcp.OutRsts")?);
    for (octets, packets) in [
        ("IpExt.OutOctets", "Ip.OutRequests"),
        ("IpExt.InOctets", "Ip.InReceives"),
    ] {
        let (octets, packets) = (growth(octets)?, growth(packets)?);
        let opening = 2 * connections;
        let special = opening * SYN_HEADERS + resets * RESET_HEADERS;
        let carried = octets - special - (packets - opening - resets) * HEADERS;
        eprintln!(
            "{payload} bytes: {octets} octets, {packets} packets, {resent} resent, {resets} resets"
        );
        // A segment that was sent again counts again. A reset may have options.
        let options = resets * RESET_HEADERS;
        ensure!(
            carried >= payload && (resent > 0 || carried <= payload + options),
            "{carried} bytes, not {payload}"
        );
    }
    Ok(())
}

fn churn_is_what_the_kernel_counts() -> anyhow::Result<()> {
    const CLIENTS: u32 = 2;
    const EACH: u32 = 200;
    let before = NetCounters::now()?;
    let mut server = Actor::spawn("server")?;
    let listener = server.listen(loopback(false))?;
    server.begin(&Command::Serve(listener.fd, CLIENTS * EACH))?;
    let mut clients = Vec::new();
    for seed in 0..CLIENTS {
        let mut client = Actor::spawn("client")?;
        client.begin(&Command::Churn {
            to: listener.local,
            connections: EACH,
            seed: seed.into(),
        })?;
        clients.push(client);
    }
    let mut payload = 0;
    for client in &mut clients {
        let exchanges = client.finish_exchanges()?;
        let bytes = |exchange: &Exchange| exchange.sent + exchange.received;
        payload += exchanges.iter().map(bytes).sum::<u64>();
    }
    let served = server.finish_exchanges()?;
    let bytes = |exchange: &Exchange| exchange.sent + exchange.received;
    ensure!(served.iter().map(bytes).sum::<u64>() == payload);
    check_tcp(&before, (CLIENTS * EACH).into(), payload)
}

fn transfers_are_what_the_kernel_counts() -> anyhow::Result<()> {
    const UP: u64 = 3_000_001;
    const DOWN: u64 = 77_777;
    let before = NetCounters::now()?;
    let (mut server, mut client) = (Actor::spawn("server")?, Actor::spawn("client")?);
    let listener = server.listen(loopback(false))?;
    let near = client.connect(listener.local)?;
    let far = server.accept(&listener)?;
    client.begin(&Command::Send(near.fd, UP))?;
    server.receive(&far, UP)?;
    client.finish()?;
    server.begin(&Command::Send(far.fd, DOWN))?;
    client.receive(&near, DOWN)?;
    server.finish()?;
    ensure!(client.carried(&near) == (UP, DOWN) && server.carried(&far) == (DOWN, UP));
    client.close(&near)?;
    server.receive_all(&far)?;
    server.close(&far)?;
    check_tcp(&before, 1, UP + DOWN)
}

/// The flood is faster than its receiver, so datagrams find the receive buffer full.
fn floods_are_what_the_kernel_counts() -> anyhow::Result<()> {
    const COUNT: u64 = 50_000;
    let before = NetCounters::now()?;
    let mut actors = [Actor::spawn("sender")?, Actor::spawn("receiver")?];
    let mut sockets = Vec::new();
    for actor in &mut actors {
        let socket = actor.socket(Command::OpenUdp { v6: false })?;
        sockets.push(actor.socket(Command::Bind(socket.fd, loopback(false)))?);
    }
    let [sender, receiver] = &mut actors;
    sender.run(Command::Connect(sockets[0].fd, sockets[1].local))?;
    receiver.run(Command::Connect(sockets[1].fd, sockets[0].local))?;
    receiver.begin(&Command::Udp(sockets[1].fd, Operation::Absorb))?;
    let flood = Operation::Flood {
        count: COUNT,
        size: 100,
    };
    let (mut sent, mut received) = (0, 0);
    for outcome in [
        sender.run(Command::Udp(sockets[0].fd, flood))?,
        receiver.finish()?,
    ] {
        let Outcome::Transfers(transfers) = outcome else {
            anyhow::bail!("{outcome:?}");
        };
        for Transfer {
            direction,
            datagrams,
            ..
        } in transfers
        {
            match direction {
                Direction::Sent => sent += datagrams,
                Direction::Received => received += datagrams,
            }
        }
    }
    let now = NetCounters::now()?;
    let growth = |name| before.growth(&now, name);
    let dropped = growth("Udp.RcvbufErrors")?;
    eprintln!("sent {sent}, received {received}, dropped {dropped}");
    ensure!(growth("Udp.OutDatagrams")? == sent && growth("Udp.InDatagrams")? == received);
    ensure!(growth("Udp.InErrors")? == dropped && growth("Udp.NoPorts")? == 0);
    // The end mark and its answer are one datagram each. Repeated marks may remain unread.
    let marks = sent - 1 - COUNT;
    let unread = sent - received - dropped;
    ensure!(unread < marks, "{unread} datagrams are missing");
    Ok(())
}
