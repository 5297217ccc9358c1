//! Counts of datagrams and their payload: exact, whatever call they went through. Anything else is
//! not counted.

use std::{
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::ensure;
use integration_tests::{
    actor::{Hold, Operation, ReceiveCall, Segmentation, SendCall, SocketOption, errno},
    collector::Collector,
    cpu_load::CpuLoad,
    suite::{Test, skip},
    udp_actor::UdpActor,
    udp_pair::{Family, UdpCollectors, UdpPair, connected, everywhere},
};
use nix::errno::Errno;

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            sendto,
            sendmsg,
            sendmmsg,
            send,
            write,
            writev,
            recvfrom,
            recvmsg,
            recvmmsg,
            recv,
            read,
            readv,
            io_uring_sendmsg_and_recvmsg,
            io_uring_write_and_read,
            both_directions,
            empty_datagrams,
            peek,
            peek_of_an_empty_datagram,
            buffer_too_small,
            msg_trunc,
            msg_more,
            udp_cork,
            unfinished_datagram_is_not_sent,
            udp_segment_by_socket_option,
            udp_segment_by_control_message,
            udp_gro,
            error_queue,
            too_large_is_not_sent,
            refused_is_not_sent,
            full_receive_buffer,
            unread_datagrams_are_not_received,
        ],
        Solitude: [
            a_million_datagrams_at_full_speed,
            eight_sockets_at_full_speed_under_load,
        ],
    ]
}

/// Payloads of every sort, also an empty one, and one that is cut into IP fragments.
const SIZES: &[usize] = &[10, 0, 1, 1_400, 9_000, 30_000];

fn sendto() -> anyhow::Result<()> {
    everywhere(|pair| exchange(pair, SendCall::SendTo, ReceiveCall::RecvFrom))
}

fn sendmsg() -> anyhow::Result<()> {
    everywhere(|pair| exchange(pair, SendCall::SendMsg, ReceiveCall::RecvFrom))
}

fn sendmmsg() -> anyhow::Result<()> {
    everywhere(|pair| exchange(pair, SendCall::SendMmsg, ReceiveCall::RecvFrom))
}

fn send() -> anyhow::Result<()> {
    connected(|pair| exchange(pair, SendCall::SendTo, ReceiveCall::RecvFrom))
}

fn write() -> anyhow::Result<()> {
    connected(|pair| exchange(pair, SendCall::Write, ReceiveCall::RecvFrom))
}

/// Unlike `write`, `writev` sends nothing for an empty payload.
fn writev() -> anyhow::Result<()> {
    connected(|pair| {
        pair.sender.send(SendCall::Writev, None, &[10, 1, 30_000])?;
        pair.receiver.receive(ReceiveCall::RecvFrom, 3)
    })
}

fn recvfrom() -> anyhow::Result<()> {
    everywhere(|pair| exchange(pair, SendCall::SendTo, ReceiveCall::RecvFrom))
}

fn recvmsg() -> anyhow::Result<()> {
    everywhere(|pair| exchange(pair, SendCall::SendTo, ReceiveCall::RecvMsg))
}

fn recvmmsg() -> anyhow::Result<()> {
    everywhere(|pair| exchange(pair, SendCall::SendTo, ReceiveCall::RecvMmsg))
}

fn recv() -> anyhow::Result<()> {
    everywhere(|pair| exchange(pair, SendCall::SendTo, ReceiveCall::Recv))
}

fn read() -> anyhow::Result<()> {
    everywhere(|pair| exchange(pair, SendCall::SendTo, ReceiveCall::Read))
}

fn readv() -> anyhow::Result<()> {
    everywhere(|pair| exchange(pair, SendCall::SendTo, ReceiveCall::Readv))
}

fn io_uring_sendmsg_and_recvmsg() -> anyhow::Result<()> {
    everywhere(|pair| {
        exchange(pair, SendCall::Uring, ReceiveCall::Uring).or_else(skip_without_uring)
    })
}

fn io_uring_write_and_read() -> anyhow::Result<()> {
    connected(|pair| {
        exchange(pair, SendCall::UringWrite, ReceiveCall::UringRead).or_else(skip_without_uring)
    })
}

/// Skips the test if the kernel, or a rule of the machine, refuses io_uring.
pub(crate) fn skip_without_uring(error: anyhow::Error) -> anyhow::Result<()> {
    let is_refused = [Errno::ENOSYS, Errno::EPERM]
        .iter()
        .any(|&refusal| errno(&error) == Some(refusal as i32));
    if is_refused {
        return skip(format_args!("no io_uring here: {error:#}"));
    }
    Err(error)
}

/// Lets the sender send all, then the receiver receive all.
fn exchange(pair: &mut UdpPair, send: SendCall, receive: ReceiveCall) -> anyhow::Result<()> {
    pair.sender.send(send, pair.to(), SIZES)?;
    pair.receiver.receive(receive, SIZES.len())
}

fn both_directions() -> anyhow::Result<()> {
    everywhere(|pair| {
        for _ in 0..3 {
            exchange(pair, SendCall::SendTo, ReceiveCall::RecvFrom)?;
            let sender = SocketAddr::new(pair.family.loopback().ip(), pair.sender.local().port());
            let back = (!pair.connected).then_some(sender);
            pair.receiver.send(SendCall::SendMsg, back, &[5, 50])?;
            pair.sender.receive(ReceiveCall::RecvMsg, 2)?;
        }
        Ok(())
    })
}

/// Each empty payload is a datagram, through every call.
fn empty_datagrams() -> anyhow::Result<()> {
    everywhere(|pair| {
        const RECEIVE: [ReceiveCall; 6] = [
            ReceiveCall::RecvFrom,
            ReceiveCall::RecvMsg,
            ReceiveCall::RecvMmsg,
            ReceiveCall::Recv,
            ReceiveCall::Read,
            ReceiveCall::Readv,
        ];
        let mut send = vec![SendCall::SendTo, SendCall::SendMsg, SendCall::SendMmsg];
        if pair.connected {
            send.push(SendCall::Write);
        }
        for (at, receive) in RECEIVE.into_iter().enumerate() {
            pair.sender
                .send(send[at % send.len()], pair.to(), &[0, 0])?;
            pair.receiver.receive(receive, 2)?;
        }
        Ok(())
    })
}

/// However often an application peeks at a datagram, it is received once.
fn peek() -> anyhow::Result<()> {
    everywhere(|pair| peek_then_receive(pair, &[100, 1]))
}

/// To the kernel, this looks like receiving one.
fn peek_of_an_empty_datagram() -> anyhow::Result<()> {
    everywhere(|pair| peek_then_receive(pair, &[0, 0]))
}

fn peek_then_receive(pair: &mut UdpPair, sizes: &[usize]) -> anyhow::Result<()> {
    pair.sender.send(SendCall::SendTo, pair.to(), sizes)?;
    for _ in sizes {
        for (with_address, room) in [(true, 200), (false, 200), (true, 10)] {
            pair.receiver.run(Operation::Peek { with_address, room })?;
        }
        pair.receiver.receive(ReceiveCall::RecvFrom, 1)?;
    }
    // A datagram that is peeked at and never received.
    pair.sender.send(SendCall::SendTo, pair.to(), &sizes[..1])?;
    let peek = Operation::Peek {
        with_address: true,
        room: 200,
    };
    pair.receiver.run(peek).map(drop)
}

/// Bytes that do not fit are not received, and the rest of the datagram is lost.
fn buffer_too_small() -> anyhow::Result<()> {
    everywhere(|pair| {
        pair.sender
            .send(SendCall::SendTo, pair.to(), &[100, 100, 100, 100])?;
        for (by, room) in [
            (ReceiveCall::RecvFrom, 40),
            (ReceiveCall::RecvMsg, 0),
            (ReceiveCall::RecvMmsg, 99),
            (ReceiveCall::Recv, 1),
        ] {
            pair.receiver
                .run(Operation::Receive { by, count: 1, room })?;
        }
        Ok(())
    })
}

/// The call returns the size of the datagram, and that counts.
fn msg_trunc() -> anyhow::Result<()> {
    everywhere(|pair| {
        pair.sender.send(SendCall::SendTo, pair.to(), &[100, 30])?;
        for bytes in [100, 30] {
            let transfers = pair
                .receiver
                .run(Operation::ReceiveTruncated { room: 40 })?;
            ensure!(transfers[0].bytes == bytes, "{transfers:?}");
        }
        Ok(())
    })
}

fn msg_more() -> anyhow::Result<()> {
    pieces(Hold::More)
}

fn udp_cork() -> anyhow::Result<()> {
    pieces(Hold::Cork)
}

/// Sends one datagram by several calls.
fn pieces(held_by: Hold) -> anyhow::Result<()> {
    everywhere(|pair| {
        for sizes in [&[10, 15][..], &[0, 0], &[1_000, 0, 2_000, 3], &[7]] {
            pair.sender.send_pieces(held_by, pair.to(), sizes)?;
            pair.receiver.receive(ReceiveCall::RecvFrom, 1)?;
        }
        exchange(pair, SendCall::SendTo, ReceiveCall::RecvFrom)
    })
}

fn unfinished_datagram_is_not_sent() -> anyhow::Result<()> {
    everywhere(|pair| {
        exchange(pair, SendCall::SendTo, ReceiveCall::RecvFrom)?;
        let to = pair.to();
        pair.sender
            .run(Operation::SendUnfinished { to, size: 10 })
            .map(drop)
    })
}

fn udp_segment_by_socket_option() -> anyhow::Result<()> {
    segments(Segmentation::Option)
}

fn udp_segment_by_control_message() -> anyhow::Result<()> {
    segments(Segmentation::ControlMessage)
}

/// Sends several datagrams by one call. The last one may be shorter, and a payload that is not
/// larger than a segment is one datagram.
fn segments(by: Segmentation) -> anyhow::Result<()> {
    everywhere(|pair| {
        for (bytes, segment, datagrams) in [
            (2_200, 500, 5),
            (1_000, 300, 4),
            (1_500, 500, 3),
            (100, 500, 1),
            (500, 500, 1),
            (501, 500, 2),
        ] {
            pair.sender.send_segments(by, pair.to(), bytes, segment)?;
            pair.receiver.receive(ReceiveCall::RecvFrom, datagrams)?;
        }
        Ok(())
    })
}

/// Received as one message, if the kernel has merged them.
fn udp_gro() -> anyhow::Result<()> {
    everywhere(|pair| {
        pair.receiver.set(SocketOption::Merge)?;
        for (bytes, segment) in [(2_200, 500), (60_000, 1_000), (100, 500)] {
            pair.sender
                .send_segments(Segmentation::ControlMessage, pair.to(), bytes, segment)?;
            pair.receiver.run(Operation::ReceiveMerged {
                bytes: bytes as u64,
            })?;
        }
        Ok(())
    })
}

/// A datagram that comes back with an error was not received.
fn error_queue() -> anyhow::Result<()> {
    let collectors = UdpCollectors::start()?;
    let mut expected = Vec::new();
    for family in Family::ALL {
        for connected in [false, true] {
            let mut sender = UdpActor::open("sender", family.loopback())?;
            sender.set(SocketOption::ErrorQueue)?;
            let to = closed_port(family);
            if connected {
                sender.connect(to)?;
            }
            for _ in 0..3 {
                let to = (!connected).then_some(to);
                sender.send(SendCall::SendTo, to, &[10])?;
                sender.run(Operation::TakeError)?;
            }
            expected.push(sender.close()?);
        }
    }
    collectors.finish(&expected)
}

/// Returns an address at which no socket receives.
fn closed_port(family: Family) -> SocketAddr {
    SocketAddr::new(family.loopback().ip(), 1)
}

fn too_large_is_not_sent() -> anyhow::Result<()> {
    everywhere(|pair| {
        for by in [SendCall::SendTo, SendCall::SendMsg, SendCall::SendMmsg] {
            let send = Operation::Send {
                by,
                to: pair.to(),
                sizes: vec![70_000],
            };
            ensure!(pair.sender.fail(send)? == Errno::EMSGSIZE as i32);
        }
        exchange(pair, SendCall::SendTo, ReceiveCall::RecvFrom)
    })
}

/// The error of a datagram that was sent makes the next call fail, which sends or receives nothing.
fn refused_is_not_sent() -> anyhow::Result<()> {
    let collectors = UdpCollectors::start()?;
    let mut expected = Vec::new();
    for family in Family::ALL {
        let mut sender = UdpActor::open("sender", family.loopback())?;
        sender.connect(closed_port(family))?;
        for by in [SendCall::SendTo, SendCall::SendMsg, SendCall::Write] {
            sender.send(by, None, &[10])?;
            refuse(&mut sender, by)?;
        }
        sender.send(SendCall::SendTo, None, &[10])?;
        let receive = Operation::Receive {
            by: ReceiveCall::RecvFrom,
            count: 1,
            room: 100,
        };
        ensure!(sender.fail(receive)? == Errno::ECONNREFUSED as i32);
        expected.push(sender.close()?);
    }
    collectors.finish(&expected)
}

/// Sends until it fails: a busy machine may take its time to refuse.
fn refuse(sender: &mut UdpActor, by: SendCall) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        match sender.send(by, None, &[20]) {
            Ok(()) => {}
            Err(error) if errno(&error) == Some(Errno::ECONNREFUSED as i32) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    anyhow::bail!("never refused")
}

/// Datagrams that the application never got are not received, but dropped.
fn full_receive_buffer() -> anyhow::Result<()> {
    const SENT: u64 = 20;
    everywhere(|pair| {
        pair.receiver.set(SocketOption::ReceiveBuffer(1))?;
        for round in 1..=2 {
            pair.sender
                .send(SendCall::SendTo, pair.to(), &[1_000; SENT as usize])?;
            // A busy machine may take its time to deliver.
            let deadline = Instant::now() + Duration::from_secs(10);
            loop {
                pair.receiver.run(Operation::Drain)?;
                let drops = pair.receiver.drops()?;
                let received = pair.receiver.expected.totals().rx_packets;
                if received + drops == round * SENT {
                    ensure!(received > 0 && drops > 0, "{received} and {drops} drops");
                    break;
                }
                ensure!(
                    Instant::now() < deadline,
                    "{received} received and {drops} dropped of {SENT}, {round} times"
                );
            }
        }
        Ok(())
    })
}

fn unread_datagrams_are_not_received() -> anyhow::Result<()> {
    everywhere(|pair| {
        pair.sender
            .send(SendCall::SendTo, pair.to(), &[10, 20, 30])?;
        pair.receiver.receive(ReceiveCall::RecvFrom, 1)
    })
}

/// Returns a number of datagrams. A VM without hardware support is slow.
fn many() -> anyhow::Result<u64> {
    let is_emulated = fs::read_to_string("/proc/cmdline")?.contains("tut_vm");
    Ok(if is_emulated { 100_000 } else { 1_000_000 })
}

/// The totals are those of the applications, to the last datagram.
fn a_million_datagrams_at_full_speed() -> anyhow::Result<()> {
    flood(1, many()?)
}

/// The same in both directions and on several sockets at once, while every CPU is busy. The
/// programs of the tracer interrupt each other wherever that is possible.
fn eight_sockets_at_full_speed_under_load() -> anyhow::Result<()> {
    let _load = CpuLoad::on_every_cpu();
    flood(4, many()? / 20)
}

fn flood(pairs: usize, count: u64) -> anyhow::Result<()> {
    let collector = Collector::start_udp()?;
    let handle = collector.handle().clone();
    let mut pairs = (0..pairs)
        .map(|at| UdpPair::new(Family::ALL[at % Family::ALL.len()], true))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let began = Instant::now();
    for pair in &mut pairs {
        pair.receiver.begin(Operation::Absorb)?;
        pair.sender.begin(Operation::Flood { count, size: 64 })?;
    }
    let mut expected = Vec::new();
    for mut pair in pairs {
        pair.sender.finish()?;
        pair.receiver.finish()?;
        let drops = pair.receiver.drops()?;
        let [sender, receiver] = pair.close()?;
        let (sent, received) = (sender.totals().tx_packets, receiver.totals().rx_packets);
        eprintln!("{sent} sent, {received} received, {drops} dropped");
        ensure!(sent > count && received > 0);
        expected.extend([sender, receiver]);
    }
    eprintln!("in {:.1?}; {:?}", began.elapsed(), handle.stats());
    collector.finish_udp(expected.len())?.check_all(&expected)
}
