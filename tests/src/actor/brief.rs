//! Processes that use one socket and end at once.

use std::{
    ffi::OsString,
    io,
    net::{SocketAddr, TcpStream, UdpSocket},
    os::unix::process::CommandExt as _,
    process::Command,
};

/// The argument that makes this program one of these processes. Its action and the address follow.
pub(super) const FLAG: &str = "--brief";

/// The action of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Brief {
    /// Connects, and lets the end of the process close the socket.
    Connect,
    /// Sends a datagram of one byte.
    Send,
    /// Connects, and becomes one that connects.
    ConnectTwice,
}

impl Brief {
    const ALL: [Self; 3] = [Self::Connect, Self::Send, Self::ConnectTwice];

    /// Returns the command that starts the process, which ignores further arguments.
    #[must_use]
    pub fn command(self, to: SocketAddr) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command.args(self.args(to));
        command
    }

    /// Returns the arguments of the process, without the name of the program.
    #[must_use]
    pub fn args(self, to: SocketAddr) -> [OsString; 3] {
        [FLAG.into(), self.name().into(), to.to_string().into()]
    }

    fn name(self) -> String {
        format!("{self:?}")
    }
}

pub(super) fn run(what: &str, to: &str) -> io::Result<()> {
    let known = Brief::ALL.into_iter().find(|brief| brief.name() == what);
    let to: SocketAddr = to.parse().map_err(io::Error::other)?;
    match known.ok_or(io::ErrorKind::InvalidInput)? {
        Brief::Connect => std::mem::forget(TcpStream::connect(to)?),
        Brief::Send => {
            let any = SocketAddr::new(to.ip(), 0);
            UdpSocket::bind(any)?.send_to(b"x", to)?;
        }
        Brief::ConnectTwice => {
            let _first = TcpStream::connect(to)?;
            return Err(Brief::Connect.command(to).exec());
        }
    }
    Ok(())
}
