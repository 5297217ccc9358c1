//! Processes that use a socket which another process has made.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, UdpSocket},
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    process::{Command, Stdio, id},
};

use anyhow::Context as _;
use tcp_udp_trace::Protocol;

use crate::tcp_pair::loopback;

/// The argument that makes this program one of these processes. Its part and the protocol follow.
pub(super) const FLAG: &str = "--heir";

/// How a process gets its socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inheritance {
    /// The parent of the process made the socket, and has ended since.
    Daemon,
    /// The process made the socket itself, before it executed another program.
    Exec,
}

/// A process that serves through a socket that it has inherited.
///
/// UDP: it sends each datagram back. TCP: it accepts connections, and reads each to its end. An
/// empty datagram or connection ends the process.
#[derive(Debug)]
pub struct Heir {
    /// The process that made the socket.
    pub maker: u32,
    /// The process that serves.
    pub pid: u32,
    /// The address of the socket.
    pub address: SocketAddr,
}

impl Heir {
    /// Starts the process.
    pub fn start(how: Inheritance, protocol: Protocol) -> anyhow::Result<Self> {
        let mut maker = Command::new("/proc/self/exe");
        maker.args([FLAG, &format!("{how:?}"), &protocol.to_string()]);
        let mut maker = maker.stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        let output = maker.stdout.take().context("no output")?;
        BufReader::new(output).read_line(&mut line)?;
        if how == Inheritance::Daemon {
            maker.wait()?;
        }
        let (pid, address) = line.trim().split_once(' ').context(line.clone())?;
        Ok(Self {
            maker: maker.id(),
            pid: pid.parse()?,
            address: address.parse()?,
        })
    }
}

pub(super) fn run(part: &str, protocol: &str) -> io::Result<()> {
    let is_udp = protocol == Protocol::Udp.to_string();
    if part == "serve" {
        return if is_udp { serve_udp() } else { serve_tcp() };
    }
    let address = loopback(false);
    let socket: Stdio = if is_udp {
        std::os::fd::OwnedFd::from(UdpSocket::bind(address)?).into()
    } else {
        std::os::fd::OwnedFd::from(TcpListener::bind(address)?).into()
    };
    let mut server = Command::new("/proc/self/exe");
    server.args([FLAG, "serve", protocol]).stdin(socket);
    if part == format!("{:?}", Inheritance::Daemon) {
        server.spawn().map(drop)
    } else {
        Err(server.exec())
    }
}

/// Writes the pid and the address of this server.
fn report(address: SocketAddr) -> io::Result<()> {
    writeln!(io::stdout(), "{} {address}", id())
}

fn serve_udp() -> io::Result<()> {
    let socket = UdpSocket::from(io::stdin().as_fd().try_clone_to_owned()?);
    report(socket.local_addr()?)?;
    let mut buffer = [0; 100];
    loop {
        let (size, from) = socket.recv_from(&mut buffer)?;
        if size == 0 {
            return Ok(());
        }
        socket.send_to(&buffer[..size], from)?;
    }
}

fn serve_tcp() -> io::Result<()> {
    let listener = TcpListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    report(listener.local_addr()?)?;
    loop {
        let (mut connection, _) = listener.accept()?;
        if connection.read_to_end(&mut Vec::new())? == 0 {
            return Ok(());
        }
    }
}
