//! Payload bytes: exact to the byte on every close, whatever the path does to the packets.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
};

use anyhow::{Context as _, ensure};
use integration_tests::{
    collector::{Collector, show},
    netns::tc,
    suite::Test,
    tcp_pair::{TcpPair, loopback},
};
use nix::{
    errno::Errno,
    libc,
    sys::socket::{
        getsockopt, setsockopt,
        sockopt::{GetStruct, SetStruct, TcpRepair},
    },
};
use socket2::{Domain, Socket, Type};
use tcp_udp_trace::{
    Direction, Event,
    TcpState::{Close, Established, Listen, SynRecv, SynSent},
    Traffic,
};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            nothing_and_one_byte,
            veth_between_namespaces,
            veth_with_loss_and_delay,
            veth_with_local_drops,
            unread_bytes_count_as_received,
            connection_taken_over,
        ],
    ]
}

const MIB: u64 = 1 << 20;

fn nothing_and_one_byte() -> anyhow::Result<()> {
    for (up, down) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
        let pair = TcpPair::new()?;
        pair.check_transfer(up, down)?;
    }
    Ok(())
}

/// Without the synchrony of the loopback: transitions run in softirqs of other tasks.
fn veth_between_namespaces() -> anyhow::Result<()> {
    let (pair, _far) = TcpPair::over_veth()?;
    pair.check_transfer(MIB, MIB)
}

/// Retransmissions are not payload.
fn veth_with_loss_and_delay() -> anyhow::Result<()> {
    let (pair, far) = TcpPair::over_veth()?;
    tc("qdisc add dev near0 root netem loss 5% delay 5ms")?;
    far.run(|| tc("qdisc add dev far0 root netem loss 5% delay 5ms"))?;
    pair.check_transfer(MIB, MIB)
}

/// Segments that were dropped in this machine's queue do not count twice.
fn veth_with_local_drops() -> anyhow::Result<()> {
    let (pair, far) = TcpPair::over_veth()?;
    const QDISC: &str = "root tbf rate 20mbit burst 4kb limit 8kb";
    tc(&format!("qdisc add dev near0 {QDISC}"))?;
    far.run(|| tc(&format!("qdisc add dev far0 {QDISC}")))?;
    pair.check_transfer(MIB, MIB)
}

/// The peer's kernel acknowledged these bytes, and its application never read them. They count as
/// sent and as received, and a close over them is a reset.
fn unread_bytes_count_as_received() -> anyhow::Result<()> {
    let mut pair = TcpPair::new()?;
    let connection = pair.connect()?;
    pair.client.send(&connection.client, 5_000)?;
    pair.server.receive(&connection.server, 1)?;
    pair.server.close(&connection.server)?;
    let client = pair.expected_client(&connection, &[Close, SynSent, Established, Close])?;
    let server = pair
        .expected_server(&connection, &[Listen, SynRecv, Established, Close])?
        .bytes(0, 5_000);
    pair.finish(&[client.error(Errno::ECONNRESET as i32), server])
}

/// Defines an option of a connection under repair.
macro_rules! repair_option {
    ($(#[$doc:meta])* $name:ident, $option:path, $type:ty) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy)]
        struct $name;
        nix::getsockopt_impl!($name, libc::IPPROTO_TCP, $option, $type, GetStruct<$type>);
        nix::setsockopt_impl!($name, libc::IPPROTO_TCP, $option, $type, SetStruct<'_, $type>);
    };
}

repair_option!(
    /// Selects the queue that the next option refers to.
    RepairQueue,
    libc::TCP_REPAIR_QUEUE,
    u32
);
repair_option!(
    /// The sequence number at the end of that queue.
    QueueSequence,
    libc::TCP_QUEUE_SEQ,
    u32
);
repair_option!(
    /// `struct tcp_repair_window`.
    RepairWindow,
    libc::TCP_REPAIR_WINDOW,
    [u32; 5]
);

/// The receive queue and the send queue.
const QUEUES: [u32; 2] = [1, 2];

/// Moves one end of a connection to another socket, as CRIU does. The new socket has the addresses
/// and the sequence numbers, and no packet is sent.
fn take_over(from: Socket) -> anyhow::Result<Socket> {
    setsockopt(&from, TcpRepair, &1)?;
    let mut sequences = [0; 2];
    for (queue, sequence) in QUEUES.iter().zip(&mut sequences) {
        setsockopt(&from, RepairQueue, queue)?;
        *sequence = getsockopt(&from, QueueSequence)?;
    }
    let windows = getsockopt(&from, RepairWindow)?;
    let (local, remote) = (from.local_addr()?, from.peer_addr()?);
    // Under repair, closing sends nothing either.
    drop(from);
    let to = Socket::new(local.domain(), Type::STREAM, None)?;
    setsockopt(&to, TcpRepair, &1)?;
    to.bind(&local)?;
    for (queue, sequence) in QUEUES.iter().zip(&sequences) {
        setsockopt(&to, RepairQueue, queue)?;
        setsockopt(&to, QueueSequence, sequence)?;
    }
    to.connect(&remote)?;
    setsockopt(&to, RepairWindow, &windows)?;
    setsockopt(&to, TcpRepair, &0)?;
    Ok(to)
}

/// Each socket counts the bytes of the connection while it belonged to that socket.
fn connection_taken_over() -> anyhow::Result<()> {
    // Otherwise the new socket would need these options, too.
    for option in ["window_scaling", "timestamps", "sack"] {
        fs::write(format!("/proc/sys/net/ipv4/tcp_{option}"), "0")?;
    }
    // One tracer, because an emulated machine starts it slowly.
    let collector = Collector::start()?;
    let mut closes = 0;
    for v6 in [false, true] {
        for (up, down) in [(0, 0), (70_000, 3), (1, 50_000)] {
            // An earlier client may have had the same port.
            let earlier = collector.events().len();
            let server = TcpListener::bind(loopback(v6))?;
            let domain = Domain::for_address(loopback(v6));
            let client = Socket::new(domain, Type::STREAM, None)?;
            client.connect(&server.local_addr()?.into())?;
            let local = client.local_addr()?.as_socket().context("no address")?;
            let mut accepted = server.accept()?.0;
            exchange(&client.try_clone()?.into(), &accepted, 100, 200)?;
            let mut client: TcpStream = take_over(client)?.into();
            exchange(&client, &accepted, up, down)?;
            client.shutdown(Shutdown::Write)?;
            ensure!(accepted.read(&mut [0])? == 0);
            drop(accepted);
            ensure!(client.read(&mut [0])? == 0);
            drop(client);
            // The closes of both clients, the server's end, and the listener.
            let ends = [local, server.local_addr()?];
            drop(server);
            closes += 4;
            collector.wait_closed(closes)?;
            let events = &collector.events()[earlier..];
            let bytes = |address: SocketAddr| {
                let ends = events.iter().filter(|e| e.is_close());
                let ends = ends.filter(|e| e.socket.local == address);
                ends.map(sent_and_received).collect::<Vec<_>>()
            };
            let mut both = ends.map(bytes).concat();
            let of_server = (down + 200, up + 100);
            let mut expected = [(100, 200), (up, down), of_server]
                .map(|(sent, received)| (sent as u64, received as u64));
            both.sort_unstable();
            expected.sort_unstable();
            ensure!(both == expected, "{up} {down}: {}", show(events));
            // The socket that took the connection over does not know who started it.
            let mut directions = BTreeMap::<_, BTreeSet<_>>::new();
            for event in events.iter().filter(|event| event.socket.local == local) {
                let names = directions.entry(event.socket.id).or_default();
                names.insert(event.socket.direction.map(Direction::name));
            }
            let mut directions: Vec<_> = directions.into_values().collect();
            directions.sort_unstable();
            let expected = [None, Some("outbound")].map(|name| BTreeSet::from([name]));
            ensure!(directions == expected, "{directions:?}: {}", show(events));
        }
    }
    collector.finish_all().map(drop)
}

fn sent_and_received(event: &Event) -> (u64, u64) {
    let Traffic {
        tx_bytes, rx_bytes, ..
    } = event.traffic;
    (tx_bytes, rx_bytes)
}

/// Sends this many bytes each way, and receives them.
fn exchange(client: &TcpStream, server: &TcpStream, up: usize, down: usize) -> anyhow::Result<()> {
    for (bytes, mut from, mut to) in [(up, client, server), (down, server, client)] {
        thread::scope(|scope| {
            let sends = scope.spawn(move || from.write_all(&vec![7; bytes]));
            to.read_exact(&mut vec![0; bytes])?;
            sends.join().unwrap()
        })?;
    }
    Ok(())
}
