//! Many datagrams, with counts of what arrived.

use std::{
    io::{self, IoSlice},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::AsRawFd as _,
    thread,
    time::{Duration, Instant},
};

use nix::{
    libc,
    sys::socket::{ControlMessage, MsgFlags, SockaddrIn, sendmsg},
};
use rustix::net::{RecvFlags, SendFlags};
use socket2::Socket;

use super::{
    datagram::{
        Direction::{self, Received, Sent},
        Transfer,
    },
    interpreter::TIMEOUT,
    udp::{peer, send_flagged},
};

/// The datagram that marks the end of a flood, and its confirmation.
const MARK: [u8; 1] = [0];
/// How long a mark may remain unanswered before it is repeated: it may have found the buffer full.
const ANSWERED_WITHIN: Duration = Duration::from_millis(200);

/// The traffic between a connected socket and its peer.
#[derive(Default)]
struct Tally {
    bytes: u64,
    datagrams: u64,
}

impl Tally {
    fn add(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        self.datagrams += 1;
    }

    fn transfer(&self, direction: Direction, peer: Option<SocketAddr>) -> Transfer {
        Transfer {
            direction,
            peer,
            bytes: self.bytes,
            datagrams: self.datagrams,
            messages: self.datagrams,
        }
    }
}

/// Sends at full speed, then sends end marks until the peer has answered one.
pub(super) fn flood(socket: &Socket, count: u64, size: usize) -> io::Result<Vec<Transfer>> {
    let payload = vec![0; size];
    let (mut sent, mut answers) = (Tally::default(), Tally::default());
    for _ in 0..count {
        sent.add(rustix::net::send(socket, &payload, SendFlags::empty())?);
    }
    let deadline = Instant::now() + TIMEOUT;
    socket.set_read_timeout(Some(ANSWERED_WITHIN))?;
    while answers.datagrams == 0 {
        sent.add(rustix::net::send(socket, &MARK, SendFlags::empty())?);
        match rustix::net::recv(socket, &mut [0; 2], RecvFlags::empty()) {
            Ok((_, bytes)) => answers.add(bytes),
            Err(rustix::io::Errno::AGAIN) if Instant::now() < deadline => {}
            Err(error) => return Err(error.into()),
        }
    }
    socket.set_read_timeout(Some(TIMEOUT))?;
    let peer = peer(socket);
    Ok(vec![
        sent.transfer(Sent, peer),
        answers.transfer(Received, peer),
    ])
}

/// Receives until the end mark, and answers it.
pub(super) fn absorb(socket: &Socket) -> io::Result<Vec<Transfer>> {
    let mut buffer = [0; 1 << 16];
    let (mut received, mut answers) = (Tally::default(), Tally::default());
    loop {
        let (_, bytes) = rustix::net::recv(socket, &mut buffer[..], RecvFlags::empty())?;
        received.add(bytes);
        if bytes == MARK.len() {
            break;
        }
    }
    answers.add(rustix::net::send(socket, &MARK, SendFlags::empty())?);
    let peer = peer(socket);
    Ok(vec![
        received.transfer(Received, peer),
        answers.transfer(Sent, peer),
    ])
}

/// Sends from 127.2.x.y to 127.1.x.y, for each x.y. The sizes differ.
pub(super) fn spray(socket: &Socket, port: u16, addresses: u16) -> io::Result<Vec<Transfer>> {
    let one = |at: u16| {
        let [high, low] = at.to_be_bytes();
        let to = SocketAddrV4::new(Ipv4Addr::new(127, 1, high, low), port);
        let from = libc::in_pktinfo {
            ipi_ifindex: 0,
            ipi_spec_dst: libc::in_addr {
                s_addr: u32::from_ne_bytes([127, 2, high, low]),
            },
            ipi_addr: libc::in_addr { s_addr: 0 },
        };
        let payload = vec![0; usize::from(at % 100)];
        let bytes = sendmsg(
            socket.as_raw_fd(),
            &[IoSlice::new(&payload)],
            &[ControlMessage::Ipv4PacketInfo(&from)],
            MsgFlags::empty(),
            Some(&SockaddrIn::from(to)),
        )?;
        Ok(Transfer::one(Sent, Some(to.into()), bytes))
    };
    (0..addresses).map(one).collect()
}

/// Sends one datagram after the other, at this interval.
pub(super) fn pace(
    socket: &Socket,
    to: Option<SocketAddr>,
    count: u32,
    every: Duration,
    size: usize,
) -> io::Result<Vec<Transfer>> {
    let began = Instant::now();
    let one = |at| {
        thread::sleep((every * at).saturating_sub(began.elapsed()));
        let bytes = send_flagged(socket, to, size, SendFlags::empty())?;
        Ok(Transfer::one(Sent, to.or_else(|| peer(socket)), bytes))
    };
    (0..count).map(one).collect()
}
