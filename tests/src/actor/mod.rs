//! Processes that make traffic on command, and count it.
//!
//! An actor is this program itself, started again with `--actor NAME`. It needs no other file, also
//! inside a VM.

mod batch;
mod book;
mod brief;
mod datagram;
mod flood;
mod heir;
mod interpreter;
mod protocol;
mod ring;
mod udp;

use std::{
    env,
    ffi::OsStr,
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    os::{
        fd::{OwnedFd, RawFd},
        unix::process::CommandExt as _,
    },
    process::{Child, ChildStdout, ExitCode, Stdio},
};

use anyhow::{Context as _, bail};

pub use batch::Exchange;
pub use brief::Brief;
pub use datagram::{
    Direction, Hold, Operation, ReceiveCall, Segmentation, SendCall, SocketOption, Transfer,
};
pub use heir::{Heir, Inheritance};
pub use protocol::{Command, Endpoint, Failure, Moment, Outcome, UringAccept};
pub use udp::receive_queue;

use book::Book;

use crate::{cgroup, netns::Netns};

const FLAG: &str = "--actor";
/// The part that the actor's parent uses.
const PARENT_FLAG: &str = "--parent-of-actor";

/// Runs as an actor if this process was started as one; `main` begins with this.
#[must_use]
pub fn run_if_asked() -> Option<ExitCode> {
    let mut args = env::args_os().skip(1);
    let flag = args.next()?;
    let done = if flag == FLAG {
        interpreter::run(&args.next()?)
    } else if flag == PARENT_FLAG {
        be_parent(&args.next()?)
    } else if flag == brief::FLAG {
        brief::run(args.next()?.to_str()?, args.next()?.to_str()?)
    } else if flag == heir::FLAG {
        heir::run(args.next()?.to_str()?, args.next()?.to_str()?)
    } else if flag == udp::CHILD_FLAG {
        udp::send_through_stdin(args.next()?.to_str()?)
    } else {
        return None;
    };
    match done {
        Ok(()) => Some(ExitCode::SUCCESS),
        Err(error) => {
            eprintln!("actor: {error}");
            Some(ExitCode::FAILURE)
        }
    }
}

/// Starts an actor that has the input and output of this process, and waits for its end.
fn be_parent(name: &OsStr) -> io::Result<()> {
    let mut actor = std::process::Command::new("/proc/self/exe");
    actor.arg(FLAG).arg(name).spawn()?.wait().map(drop)
}

/// A process under the control of a test, in the network namespace of the thread that started it.
/// Dropping it kills the process.
#[derive(Debug)]
pub struct Actor {
    child: Child,
    output: BufReader<ChildStdout>,
    netns: u32,
    netns_cookie: Option<u64>,
    moment: Option<Moment>,
    /// The command that [`finish`](Self::finish) waits for.
    begun: Option<Command>,
    book: Book,
}

/// The identity of an actor.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Process id.
    pub pid: u32,
    /// User id.
    pub uid: u32,
    /// The name, as the kernel keeps it.
    pub comm: Vec<u8>,
    /// The inode of its network namespace.
    pub netns: u32,
    /// The cookie of its network namespace, where the kernel reports it.
    pub netns_cookie: Option<u64>,
    /// The id of its cgroup, where it can be read.
    pub cgroup: Option<u64>,
}

impl Actor {
    /// Starts an actor.
    pub fn spawn(name: &str) -> anyhow::Result<Self> {
        Self::spawn_as(OsStr::new(name), None)
    }

    /// Starts an actor of any name, as another user if `uid` is given.
    pub fn spawn_as(name: &OsStr, uid: Option<u32>) -> anyhow::Result<Self> {
        Self::spawn_by(FLAG, name, uid)
    }

    /// Starts an actor as the grandchild of this process. [`pid`](Self::pid) is that of its parent,
    /// which only waits for it.
    pub fn spawn_below_a_parent(name: &str) -> anyhow::Result<Self> {
        Self::spawn_by(PARENT_FLAG, OsStr::new(name), None)
    }

    fn spawn_by(flag: &str, name: &OsStr, uid: Option<u32>) -> anyhow::Result<Self> {
        let mut command = std::process::Command::new("/proc/self/exe");
        command
            .arg(flag)
            .arg(name)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some(uid) = uid {
            command.gid(uid).uid(uid);
        }
        let mut child = command.spawn().context("starting an actor")?;
        let output = child.stdout.take().unwrap();
        let netns = Netns::current()?.inode()?;
        Ok(Self {
            child,
            output: BufReader::new(output),
            netns,
            netns_cookie: Netns::current_cookie()?,
            moment: None,
            begun: None,
            book: Book::default(),
        })
    }

    /// Returns the actor's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the inode of the actor's network namespace.
    #[must_use]
    pub fn netns(&self) -> u32 {
        self.netns
    }

    /// Returns the actor's identity at this moment. It must have answered a command, or it may not
    /// have its name yet.
    pub fn identity(&self) -> anyhow::Result<Identity> {
        let pid = self.pid();
        let mut comm = fs::read(format!("/proc/{pid}/comm"))?;
        comm.truncate(comm.len() - 1);
        // The process name is part of the line, and may have any bytes.
        let status = fs::read(format!("/proc/{pid}/status"))?;
        let status = String::from_utf8_lossy(&status);
        let uid = status
            .lines()
            .find_map(|line| line.strip_prefix("Uid:"))
            .context("no uid")?;
        let uid = uid.split_whitespace().next().context("no uid")?.parse()?;
        Ok(Identity {
            pid,
            uid,
            comm,
            netns: self.netns,
            netns_cookie: self.netns_cookie,
            cgroup: cgroup::of_process(pid),
        })
    }

    /// Returns the bytes that the actor sent and received through a TCP socket.
    #[must_use]
    pub fn carried(&self, socket: &Endpoint) -> (u64, u64) {
        self.book.carried(socket)
    }

    /// Returns when and where the actor did the last command.
    #[must_use]
    pub fn moment(&self) -> Moment {
        self.moment.expect("no command was done yet")
    }

    /// Kills the actor, as `kill -9` does, and waits for its end.
    pub fn kill(mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Ends the parent of an actor that was [started below a parent](Self::spawn_below_a_parent).
    pub fn orphan(&mut self) -> anyhow::Result<()> {
        // `wait` would close standard input, which the actor also reads.
        let input = self.child.stdin.take();
        self.child.kill()?;
        self.child.wait()?;
        self.child.stdin = input;
        Ok(())
    }

    /// Sends a command, whose outcome [`finish`](Self::finish) waits for.
    pub fn begin(&mut self, command: &Command) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(command)?;
        line.push(b'\n');
        let input = self.child.stdin.as_mut().unwrap();
        input.write_all(&line).context("the actor has ended")?;
        self.begun = Some(command.clone());
        Ok(())
    }

    /// Waits for the outcome of the command that was begun.
    pub fn finish(&mut self) -> anyhow::Result<Outcome> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("the actor has ended");
        }
        let answer: protocol::Answer = serde_json::from_str(&line)?;
        self.moment = Some(answer.moment);
        let command = self.begun.take();
        let outcome = answer.outcome?;
        if let Some(command) = command {
            self.book.record(&command, &outcome);
        }
        Ok(outcome)
    }

    /// Runs a command.
    pub fn run(&mut self, command: Command) -> anyhow::Result<Outcome> {
        self.begin(&command)?;
        self.finish().with_context(|| format!("{command:?}"))
    }

    /// Runs a command that must fail. Returns its `errno`.
    pub fn fail(&mut self, command: Command) -> anyhow::Result<i32> {
        match self.run(command.clone()) {
            Ok(outcome) => bail!("{command:?} should have failed: {outcome:?}"),
            Err(error) => errno(&error).with_context(|| format!("{error:#}")),
        }
    }

    /// Makes a socket of the family of `address`.
    pub fn open(&mut self, address: SocketAddr) -> anyhow::Result<Endpoint> {
        self.socket(Command::Open {
            v6: address.is_ipv6(),
            mptcp: false,
        })
    }

    /// Makes a socket and binds it to `address`.
    pub fn bind(&mut self, address: SocketAddr) -> anyhow::Result<Endpoint> {
        let fd = self.open(address)?.fd;
        self.socket(Command::Bind(fd, address))
    }

    /// Listens at `address`.
    pub fn listen(&mut self, address: SocketAddr) -> anyhow::Result<Endpoint> {
        let fd = self.bind(address)?.fd;
        self.socket(Command::Listen(fd))
    }

    /// Connects a new socket.
    pub fn connect(&mut self, to: SocketAddr) -> anyhow::Result<Endpoint> {
        let fd = self.open(to)?.fd;
        self.socket(Command::Connect(fd, to))
    }

    /// Accepts one connection.
    pub fn accept(&mut self, listener: &Endpoint) -> anyhow::Result<Endpoint> {
        self.socket(Command::Accept(listener.fd))
    }

    /// Sends this many bytes.
    pub fn send(&mut self, socket: &Endpoint, bytes: u64) -> anyhow::Result<()> {
        self.run(Command::Send(socket.fd, bytes)).map(drop)
    }

    /// Receives exactly this many bytes.
    pub fn receive(&mut self, socket: &Endpoint, bytes: u64) -> anyhow::Result<()> {
        self.run(Command::Receive(socket.fd, bytes)).map(drop)
    }

    /// Receives until the peer ends. Returns the number of bytes.
    pub fn receive_all(&mut self, socket: &Endpoint) -> anyhow::Result<u64> {
        match self.run(Command::ReceiveAll(socket.fd))? {
            Outcome::Bytes(bytes) => Ok(bytes),
            other => bail!("{other:?}"),
        }
    }

    /// Ends the sending direction.
    pub fn shutdown(&mut self, socket: &Endpoint) -> anyhow::Result<()> {
        self.run(Command::Shutdown(socket.fd)).map(drop)
    }

    /// Closes a socket.
    pub fn close(&mut self, socket: &Endpoint) -> anyhow::Result<()> {
        self.run(Command::Close(socket.fd)).map(drop)
    }

    /// Closes a socket with a reset.
    pub fn abort(&mut self, socket: &Endpoint) -> anyhow::Result<()> {
        self.run(Command::Abort(socket.fd)).map(drop)
    }

    /// Takes a socket of another actor, as a process that inherits it would have it.
    pub fn take(&mut self, from: &Self, fd: RawFd) -> anyhow::Result<Endpoint> {
        self.socket(Command::Take {
            pid: from.pid(),
            fd,
        })
    }

    /// Returns a descriptor of one of the actor's sockets for the calling process.
    pub fn lend(&self, socket: &Endpoint) -> anyhow::Result<OwnedFd> {
        Ok(interpreter::take(self.pid(), socket.fd)?)
    }

    /// Runs a command that returns one socket.
    pub fn socket(&mut self, command: Command) -> anyhow::Result<Endpoint> {
        self.run(command).and_then(one_socket)
    }

    /// Like [`finish`](Self::finish), for a command that returns one socket.
    pub fn finish_socket(&mut self) -> anyhow::Result<Endpoint> {
        self.finish().and_then(one_socket)
    }

    /// Like [`finish`](Self::finish), for [`Command::Serve`] and [`Command::Churn`].
    pub fn finish_exchanges(&mut self) -> anyhow::Result<Vec<Exchange>> {
        match self.finish()? {
            Outcome::Exchanges(exchanges) => Ok(exchanges),
            other => bail!("{other:?}"),
        }
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        // The actor may have ended already. If this process may not kill it, it ends because there
        // are no more commands.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the system call's error behind a failed command.
#[must_use]
pub fn errno(error: &anyhow::Error) -> Option<i32> {
    error
        .downcast_ref::<Failure>()
        .and_then(|failure| failure.errno)
}

fn one_socket(outcome: Outcome) -> anyhow::Result<Endpoint> {
    match outcome {
        Outcome::Socket(endpoint) => Ok(endpoint),
        other => bail!("{other:?}"),
    }
}
