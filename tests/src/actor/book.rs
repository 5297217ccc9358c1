//! The payload that each TCP socket of an actor carried, from the commands that succeeded.

use std::{collections::HashMap, os::fd::RawFd};

use super::{Command, Endpoint, Outcome};

/// The records of one actor.
#[derive(Debug, Default)]
pub(super) struct Book {
    /// The cookie of the socket that last had this descriptor.
    cookies: HashMap<RawFd, u64>,
    /// Bytes sent and received, by cookie.
    carried: HashMap<u64, (u64, u64)>,
}

impl Book {
    /// Records a command that succeeded.
    pub(super) fn record(&mut self, command: &Command, outcome: &Outcome) {
        let sockets = match outcome {
            Outcome::Socket(socket) => std::slice::from_ref(socket),
            Outcome::Sockets(sockets) => sockets,
            _ => &[],
        };
        self.cookies
            .extend(sockets.iter().map(|socket| (socket.fd, socket.cookie)));
        let (fd, sent, received) = match (command, outcome) {
            (Command::OnThread(_, command), _) => return self.record(command, outcome),
            (Command::Send(fd, bytes), _) => (fd, *bytes, 0),
            (Command::Receive(fd, bytes), _) => (fd, 0, *bytes),
            (Command::ReceiveAll(fd), Outcome::Bytes(bytes)) => (fd, 0, *bytes),
            _ => return,
        };
        if let Some(cookie) = self.cookies.get(fd) {
            let carried = self.carried.entry(*cookie).or_default();
            carried.0 += sent;
            carried.1 += received;
        }
    }

    /// Returns the bytes that the actor sent and received through a socket.
    pub(super) fn carried(&self, socket: &Endpoint) -> (u64, u64) {
        self.carried
            .get(&socket.cookie)
            .copied()
            .unwrap_or_default()
    }
}
