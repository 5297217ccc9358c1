//! Many short connections, done within the actors, each with a known number of bytes.
//!
//! The client opens with a header: how much it sends, how much it requests, and which end closes
//! first. The end that closes first sends all its bytes and ends its sending direction. If that is
//! the client, the server reads that end before it answers. Otherwise the server closes as soon as
//! it has answered. So either end is the active closer, and no end closes with unread bytes, which
//! would be a reset.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr},
};

use serde::{Deserialize, Serialize};
use socket2::Socket;

use super::interpreter::{TIMEOUT, receive_all, receive_exactly, send, tcp_socket};

/// One connection, as one of its ends knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Exchange {
    /// `getsockname`.
    pub local: SocketAddr,
    /// `getpeername`.
    pub remote: SocketAddr,
    /// Bytes written.
    pub sent: u64,
    /// Bytes read.
    pub received: u64,
    /// Whether this end was the first to close.
    pub active: bool,
}

const HEADER: usize = 17;

/// The plan of a connection, which its client makes.
struct Plan {
    request: u64,
    response: u64,
    client_ends_first: bool,
}

impl Plan {
    /// Most connections carry little, some nothing, a few more than any socket buffer holds at
    /// once.
    fn draw(random: &mut Xorshift) -> Self {
        let mut size = || match random.next() % 16 {
            0..=2 => 0,
            3..=13 => random.next() % 2_000,
            14 => random.next() % 20_000,
            _ => random.next() % 100_000,
        };
        let (request, response) = (size(), size());
        Self {
            request,
            response,
            client_ends_first: random.next().is_multiple_of(2),
        }
    }

    fn to_bytes(&self) -> [u8; HEADER] {
        let mut bytes = [u8::from(self.client_ends_first); HEADER];
        bytes[..8].copy_from_slice(&self.request.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.response.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: [u8; HEADER]) -> Self {
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        Self {
            request: number(0),
            response: number(8),
            client_ends_first: bytes[16] != 0,
        }
    }
}

/// A generator of repeatable numbers, random enough for sizes:
/// <https://en.wikipedia.org/wiki/Xorshift>.
struct Xorshift(u64);

impl Xorshift {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Runs the client's side of [`super::Command::Churn`].
pub(super) fn churn(to: SocketAddr, connections: u32, seed: u64) -> io::Result<Vec<Exchange>> {
    let mut random = Xorshift(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    (0..connections)
        .map(|_| exchange(to, &Plan::draw(&mut random)))
        .collect()
}

fn exchange(to: SocketAddr, plan: &Plan) -> io::Result<Exchange> {
    let mut socket = tcp_socket(to.is_ipv6(), false)?;
    socket.connect(&to.into())?;
    let (local, remote) = addresses(&socket)?;
    socket.write_all(&plan.to_bytes())?;
    send(&socket, plan.request)?;
    if plan.client_ends_first {
        socket.shutdown(Shutdown::Write)?;
    }
    let received = receive_all(&socket)?;
    if received != plan.response {
        return Err(io::Error::other(format!(
            "got {received} of {} bytes",
            plan.response
        )));
    }
    let sent = HEADER as u64 + plan.request;
    Ok(Exchange {
        local,
        remote,
        sent,
        received,
        active: plan.client_ends_first,
    })
}

/// Runs the server's side of [`super::Command::Churn`].
pub(super) fn serve(listener: &Socket, connections: u32) -> io::Result<Vec<Exchange>> {
    (0..connections)
        .map(|_| {
            let (socket, _) = listener.accept()?;
            answer(&socket)
        })
        .collect()
}

fn answer(mut socket: &Socket) -> io::Result<Exchange> {
    socket.set_read_timeout(Some(TIMEOUT))?;
    let (local, remote) = addresses(socket)?;
    let mut header = [0; HEADER];
    socket.read_exact(&mut header)?;
    let plan = Plan::from_bytes(header);
    receive_exactly(socket, plan.request)?;
    if plan.client_ends_first && receive_all(socket)? != 0 {
        return Err(io::Error::other("got more than was announced"));
    }
    send(socket, plan.response)?;
    let received = HEADER as u64 + plan.request;
    Ok(Exchange {
        local,
        remote,
        sent: plan.response,
        received,
        active: !plan.client_ends_first,
    })
}

fn addresses(socket: &Socket) -> io::Result<(SocketAddr, SocketAddr)> {
    let inet = |address: socket2::SockAddr| address.as_socket().ok_or(io::ErrorKind::Unsupported);
    Ok((inet(socket.local_addr()?)?, inet(socket.peer_addr()?)?))
}
