//! The process side of an actor: reads commands from standard input, and answers on standard
//! output.

use std::{
    collections::HashMap,
    ffi::{CString, OsStr},
    io::{self, BufRead as _, Read as _, Write as _},
    net::{self, Shutdown, SocketAddr},
    os::{
        fd::{AsRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    process, thread,
    time::{Duration, SystemTime},
};

use nix::{
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
    },
    unistd::gettid,
};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use socket2::{Domain, Protocol, Socket, Type};
use tcp_udp_trace::{TcpTracer, UdpTracer};
use tokio::runtime::Runtime;

use super::{
    Brief, batch,
    protocol::{Answer, Command, Endpoint, Failure, Moment, Outcome},
    ring, udp,
};

/// The time limit of each call: an actor that waits for something that never comes must fail, not
/// hang.
pub(super) const TIMEOUT: Duration = Duration::from_secs(60);

fn connect_in_child(to: SocketAddr) -> io::Result<()> {
    let status = Brief::Connect.command(to).status()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("a child: {status}")))
    }
}

/// The sockets of an actor, by descriptor.
#[derive(Default)]
struct Interpreter {
    sockets: HashMap<RawFd, Socket>,
    /// The sockets that no command uses.
    held: Vec<OwnedFd>,
    /// The rings that hold connections.
    rings: Vec<io_uring::IoUring>,
    tracing: Option<Tracing>,
}

struct Tracing {
    _tracers: (TcpTracer, UdpTracer),
    _runtime: Runtime,
}

/// Runs as an actor of that name until standard input ends.
pub(super) fn run(name: &OsStr) -> io::Result<()> {
    prctl::set_name(&CString::new(name.as_bytes())?)?;
    let mut interpreter = Interpreter::default();
    let mut output = io::stdout();
    for line in io::stdin().lock().lines() {
        let command = serde_json::from_str(&line?)?;
        let mut answer = serde_json::to_vec(&interpreter.answer(command))?;
        answer.push(b'\n');
        output.write_all(&answer)?;
    }
    Ok(())
}

impl Interpreter {
    fn answer(&mut self, command: Command) -> Answer {
        if let Command::OnThread(name, command) = command {
            return thread::scope(|scope| {
                let thread = thread::Builder::new().name(name);
                thread
                    .spawn_scoped(scope, || self.answer(*command))
                    .unwrap()
                    .join()
                    .unwrap()
            });
        }
        let began = SystemTime::now();
        let outcome = self.perform(command).map_err(Failure::from);
        let tid = gettid().as_raw().unsigned_abs();
        Answer {
            moment: Moment {
                tid,
                began,
                ended: SystemTime::now(),
            },
            outcome,
        }
    }

    fn perform(&mut self, command: Command) -> io::Result<Outcome> {
        match command {
            Command::Open { v6, mptcp } => return self.keep(tcp_socket(v6, mptcp)?),
            Command::OpenUdp { v6 } => return self.keep(udp::udp_socket(v6)?),
            Command::Bind(fd, address) => {
                self.socket(fd)?.bind(&address.into())?;
                return self.describe(fd);
            }
            Command::ReusePort(fd) => self.socket(fd)?.set_reuse_port(true)?,
            Command::Listen(fd) => {
                self.socket(fd)?.listen(1024)?;
                return self.describe(fd);
            }
            Command::Connect(fd, to) => {
                self.socket(fd)?.connect(&to.into())?;
                return self.describe(fd);
            }
            Command::ConnectInChild(to) => connect_in_child(to)?,
            Command::Accept(fd) => {
                let (socket, _) = self.socket(fd)?.accept()?;
                return self.keep(socket);
            }
            Command::AcceptWaiting(fd) => return self.accept_waiting(fd),
            Command::AcceptByUring(fd) => {
                let listener = self.socket(fd)?.try_clone()?;
                return self.keep(accept_by_uring(listener.into())?);
            }
            Command::AcceptInRing(fd, way, connections) => {
                self.rings.push(ring::accept(fd, way, connections)?);
            }
            Command::ConnectInRing { fd, to, worker } => {
                ring::connect(fd, to, worker)?;
                return self.describe(fd);
            }
            Command::Take { pid, fd } => return self.keep(take(pid, fd)?.into()),
            Command::Describe(fd) => return self.describe(fd),
            Command::Udp(fd, operation) => return udp::perform(self.socket(fd)?, operation),
            Command::Send(fd, bytes) => send(self.socket(fd)?, bytes)?,
            Command::Receive(fd, bytes) => receive_exactly(self.socket(fd)?, bytes)?,
            Command::ReceiveAll(fd) => return Ok(Outcome::Bytes(receive_all(self.socket(fd)?)?)),
            Command::Shutdown(fd) => self.socket(fd)?.shutdown(Shutdown::Write)?,
            Command::Abort(fd) => {
                let socket = self.forget(fd)?;
                socket.set_linger(Some(Duration::ZERO))?;
                drop(socket);
            }
            Command::Close(fd) => drop(self.forget(fd)?),
            Command::OnThread(..) => return Err(io::Error::other("a thread within a thread")),
            Command::Serve(fd, connections) => {
                return Ok(Outcome::Exchanges(batch::serve(
                    self.socket(fd)?,
                    connections,
                )?));
            }
            Command::Churn {
                to,
                connections,
                seed,
            } => {
                return Ok(Outcome::Exchanges(batch::churn(to, connections, seed)?));
            }
            Command::Hold { address, tcp, udp } => self.hold(address, tcp, udp)?,
            Command::Trace => self.tracing = Some(start_tracers()?),
        }
        Ok(Outcome::Done)
    }

    fn accept_waiting(&mut self, fd: RawFd) -> io::Result<Outcome> {
        let mut endpoints = Vec::new();
        self.socket(fd)?.set_nonblocking(true)?;
        let end = loop {
            match self.socket(fd)?.accept() {
                Ok((socket, _)) => {
                    let Outcome::Socket(endpoint) = self.keep(socket)? else {
                        unreachable!()
                    };
                    endpoints.push(endpoint);
                }
                Err(error) => break error,
            }
        };
        self.socket(fd)?.set_nonblocking(false)?;
        match end.kind() {
            io::ErrorKind::WouldBlock => Ok(Outcome::Sockets(endpoints)),
            _ => Err(end),
        }
    }

    fn hold(&mut self, mut address: SocketAddr, tcp: u32, udp: u32) -> io::Result<()> {
        // The soft limit is often 1,024.
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        for _ in 0..tcp {
            self.held.push(net::TcpListener::bind(address)?.into());
            address.set_port(address.port() + 1);
        }
        address.set_port(0);
        for _ in 0..udp {
            self.held.push(net::UdpSocket::bind(address)?.into());
        }
        Ok(())
    }

    fn keep(&mut self, socket: Socket) -> io::Result<Outcome> {
        socket.set_read_timeout(Some(TIMEOUT))?;
        let endpoint = endpoint(&socket)?;
        self.sockets.insert(endpoint.fd, socket);
        Ok(Outcome::Socket(endpoint))
    }

    fn describe(&self, fd: RawFd) -> io::Result<Outcome> {
        Ok(Outcome::Socket(endpoint(self.socket(fd)?)?))
    }

    fn socket(&self, fd: RawFd) -> io::Result<&Socket> {
        self.sockets
            .get(&fd)
            .ok_or_else(|| io::Error::other("no such socket"))
    }

    fn forget(&mut self, fd: RawFd) -> io::Result<Socket> {
        self.sockets
            .remove(&fd)
            .ok_or_else(|| io::Error::other("no such socket"))
    }
}

pub(super) fn tcp_socket(v6: bool, mptcp: bool) -> io::Result<Socket> {
    let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
    let protocol = if mptcp {
        Protocol::MPTCP
    } else {
        Protocol::TCP
    };
    let socket = Socket::new(domain, Type::STREAM, Some(protocol))?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.set_write_timeout(Some(TIMEOUT))?;
    Ok(socket)
}

fn endpoint(socket: &Socket) -> io::Result<Endpoint> {
    let local = socket
        .local_addr()?
        .as_socket()
        .ok_or(io::ErrorKind::Unsupported)?;
    let remote = socket
        .peer_addr()
        .ok()
        .and_then(|address| address.as_socket());
    Ok(Endpoint {
        fd: socket.as_raw_fd(),
        local,
        remote,
        cookie: socket.cookie()?,
    })
}

pub(super) fn send(mut socket: &Socket, mut bytes: u64) -> io::Result<()> {
    let buffer = [0; 64 << 10];
    while bytes > 0 {
        let most = usize::try_from(bytes)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        bytes -= socket.write(&buffer[..most])? as u64;
    }
    Ok(())
}

pub(super) fn receive_exactly(socket: &Socket, mut bytes: u64) -> io::Result<()> {
    let mut buffer = [0; 64 << 10];
    while bytes > 0 {
        let most = usize::try_from(bytes)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        match read(socket, &mut buffer[..most])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => bytes -= read as u64,
        }
    }
    Ok(())
}

pub(super) fn receive_all(socket: &Socket) -> io::Result<u64> {
    let mut buffer = [0; 64 << 10];
    let mut bytes = 0;
    loop {
        match read(socket, &mut buffer)? {
            0 => return Ok(bytes),
            read => bytes += read as u64,
        }
    }
}

/// io_uring signals its process when it has done something, which interrupts a read.
fn read(mut socket: &Socket, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match socket.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

pub(super) fn take(pid: u32, fd: RawFd) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(io::ErrorKind::InvalidInput)?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    Ok(pidfd_getfd(process, fd, PidfdGetfdFlags::empty())?)
}

fn accept_by_uring(listener: net::TcpListener) -> io::Result<Socket> {
    tokio_uring::Runtime::new(&tokio_uring::builder())?.block_on(async {
        let listener = tokio_uring::net::TcpListener::from_std(listener);
        let (stream, _) = tokio::time::timeout(TIMEOUT, listener.accept()).await??;
        // The stream cannot be turned into a descriptor of the standard library, but its duplicate
        // can.
        Ok(take(process::id(), stream.as_raw_fd())?.into())
    })
}

fn start_tracers() -> io::Result<Tracing> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let tracers = runtime.block_on(async {
        let tcp = TcpTracer::builder().start().await;
        let udp = UdpTracer::builder().start().await;
        Ok((
            tcp.map_err(io::Error::other)?,
            udp.map_err(io::Error::other)?,
        ))
    });
    tracers.map(|tracers: (TcpTracer, UdpTracer)| Tracing {
        _tracers: tracers,
        _runtime: runtime,
    })
}
