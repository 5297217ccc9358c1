//! The traffic.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sched::{CpuSet, sched_setaffinity},
    time::{ClockId, clock_gettime},
    unistd::{Pid, getppid},
};

use crate::{child, subject::Protocol};

/// The bytes of a connection in each direction.
const ECHO: usize = 100;
const DATAGRAM: usize = 64;
/// How many state changes a connection makes whose client closes first: five at each end.
const STATES: u64 = 10;

/// A kind of traffic, and its amount.
#[derive(Debug, Clone)]
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    /// The name of its unit.
    pub(crate) unit: &'static str,
    pub(crate) protocol: Protocol,
    pub(crate) units: u64,
    /// The events that each unit makes; 0 if costs are not given per event.
    pub(crate) events_each: u64,
    /// The tracers that are measured do not trace this traffic.
    pub(crate) is_untraced: bool,
    /// The traffic keeps to the first CPU, the tracer to the others.
    pub(crate) is_pinned: bool,
    traffic: Traffic,
}

#[derive(Debug, Clone, Copy)]
enum Traffic {
    /// By this many pairs of a client and a server.
    Connections(usize),
    /// By one socket to this many peers.
    Datagrams(u16),
    /// In blocks of this many bytes.
    Stream(usize),
    /// None, only system calls that do hardly anything.
    SystemCalls,
}

/// Returns all workloads, with far less traffic if `quick`.
pub(crate) fn all(quick: bool) -> Vec<Workload> {
    let share = if quick { 10 } else { 1 };
    let cpus = cpus();
    let tcp = connections(20_000 / share);
    let udp = datagrams(1_000_000 / share);
    let stream = Workload {
        name: "tcp, one stream",
        unit: "blocks of 64 KiB",
        units: 30_000 / share,
        events_each: 0,
        is_pinned: false,
        traffic: Traffic::Stream(1 << 16),
        ..tcp.clone()
    };
    let untraced = |name, workload: &Workload| Workload {
        name,
        events_each: 0,
        is_untraced: true,
        ..workload.clone()
    };
    let calls = Workload {
        unit: "system calls",
        units: 2_000_000 / share,
        traffic: Traffic::SystemCalls,
        ..tcp.clone()
    };
    vec![
        tcp.clone(),
        Workload {
            name: "tcp, all CPUs",
            is_pinned: false,
            traffic: Traffic::Connections(cpus),
            ..tcp.clone()
        },
        udp.clone(),
        Workload {
            name: "udp, 10,000 flows",
            traffic: Traffic::Datagrams(10_000),
            ..udp.clone()
        },
        stream.clone(),
        untraced("untraced: connections", &tcp),
        untraced("untraced: one stream", &stream),
        untraced("untraced: datagrams", &udp),
        untraced("untraced: system calls", &calls),
    ]
}

/// Returns the traffic of the gate, and the tracers' settings for it. The amount never changes. The
/// socket that is not connected sends to two peers in turn.
pub(crate) fn of_gate() -> [(Workload, &'static str); 5] {
    let tcp = |name| Workload {
        name,
        ..connections(2_000)
    };
    let connected = Workload {
        name: "udp_connected",
        ..datagrams(20_000)
    };
    let unconnected = Workload {
        name: "udp_unconnected",
        traffic: Traffic::Datagrams(2),
        ..datagrams(20_000)
    };
    [
        (tcp("tcp"), child::TCP),
        (tcp("tcp_summaries"), child::TCP_SUMMARIES),
        (tcp("tcp_rejected"), child::TCP_REJECTED),
        (connected, child::UDP),
        (unconnected, child::UDP),
    ]
}

fn connections(units: u64) -> Workload {
    Workload {
        name: "tcp, one CPU",
        unit: "connections",
        protocol: Protocol::Tcp,
        units,
        events_each: STATES,
        is_untraced: false,
        is_pinned: cpus() > 1,
        traffic: Traffic::Connections(1),
    }
}

fn datagrams(units: u64) -> Workload {
    Workload {
        name: "udp, one flow",
        unit: "datagrams",
        protocol: Protocol::Udp,
        units,
        events_each: 1,
        is_untraced: false,
        is_pinned: cpus() > 1,
        traffic: Traffic::Datagrams(1),
    }
}

fn cpus() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

impl Workload {
    /// Returns the protocols of the tracers that are measured.
    pub(crate) fn tracers(&self) -> &'static [Protocol] {
        match (self.protocol, self.is_untraced, self.traffic) {
            (_, _, Traffic::SystemCalls) => &[Protocol::Tcp, Protocol::Udp],
            (Protocol::Tcp, false, _) | (Protocol::Udp, true, _) => &[Protocol::Tcp],
            (Protocol::Udp, false, _) | (Protocol::Tcp, true, _) => &[Protocol::Udp],
        }
    }

    /// Returns a smaller amount that suffices to read the kernel's clock.
    pub(crate) fn timed_units(&self) -> u64 {
        self.units / 4
    }

    pub(crate) fn prepare(&self) -> anyhow::Result<Field> {
        let listener = TcpListener::bind("0.0.0.0:0")?;
        Ok(Field {
            traffic: self.traffic,
            cpu: self.is_pinned.then_some(0),
            port: listener.local_addr()?.port(),
            listener,
        })
    }
}

/// The surroundings of the traffic.
#[derive(Debug)]
pub(crate) struct Field {
    traffic: Traffic,
    cpu: Option<usize>,
    listener: TcpListener,
    pub(crate) port: u16,
}

impl Field {
    /// Makes this much traffic, on threads of its own. Returns how long that took.
    ///
    /// On one CPU one of the threads always runs, and the programs run in their time. So there it
    /// returns the CPU time of this process, which is the same on a quiet machine, and better
    /// beside other load.
    pub(crate) fn run(&self, units: u64) -> anyhow::Result<Duration> {
        let before = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?;
        let took = match self.traffic {
            Traffic::Connections(pairs) => self.connections(pairs, units / pairs as u64),
            Traffic::Datagrams(peers) => self.datagrams(units, peers),
            Traffic::Stream(block) => self.stream(units, block),
            Traffic::SystemCalls => self.system_calls(units),
        }?;
        let after = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?;
        Ok(match self.cpu {
            Some(_) => (after - before).into(),
            None => took,
        })
    }

    fn connections(&self, pairs: usize, each: u64) -> anyhow::Result<Duration> {
        let begin = Barrier::new(pairs + 1);
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for _ in 0..pairs {
                threads.push(scope.spawn(|| {
                    self.keep_to_cpu()?;
                    for _ in 0..each {
                        let (mut stream, _) = self.listener.accept()?;
                        let mut bytes = [0; ECHO];
                        stream.read_exact(&mut bytes)?;
                        stream.write_all(&bytes)?;
                        // The client closes first.
                        stream.read_to_end(&mut Vec::new())?;
                    }
                    anyhow::Ok(())
                }));
                threads.push(scope.spawn(|| {
                    self.keep_to_cpu()?;
                    let to = (Ipv4Addr::LOCALHOST, self.port);
                    begin.wait();
                    for _ in 0..each {
                        let mut stream = TcpStream::connect(to)?;
                        let mut bytes = [0; ECHO];
                        stream.write_all(&bytes)?;
                        stream.read_exact(&mut bytes)?;
                    }
                    Ok(())
                }));
            }
            begin.wait();
            let began = Instant::now();
            for thread in threads {
                thread.join().unwrap()?;
            }
            Ok(began.elapsed())
        })
    }

    /// One thread sends and receives, so no datagram can get lost.
    fn datagrams(&self, count: u64, peers: u16) -> anyhow::Result<Duration> {
        let run = || {
            self.keep_to_cpu()?;
            let receiver = UdpSocket::bind("0.0.0.0:0")?;
            let sender = UdpSocket::bind("127.0.0.1:0")?;
            let port = receiver.local_addr()?.port();
            let to = |at: u16| {
                let [high, low] = at.to_be_bytes();
                SocketAddr::from(([127, 1, high, low], port))
            };
            let (payload, mut buffer) = ([0; DATAGRAM], [0; DATAGRAM]);
            if peers == 1 {
                sender.connect(to(0))?;
            }
            let began = Instant::now();
            for datagram in 0..count {
                if peers == 1 {
                    sender.send(&payload)?;
                } else {
                    let peer = u16::try_from(datagram % u64::from(peers))?;
                    sender.send_to(&payload, to(peer))?;
                }
                receiver.recv(&mut buffer)?;
            }
            Ok(began.elapsed())
        };
        thread::scope(|scope| scope.spawn(run).join().unwrap())
    }

    fn stream(&self, blocks: u64, block: usize) -> anyhow::Result<Duration> {
        thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
                let bytes = vec![0; block];
                for _ in 0..blocks {
                    stream.write_all(&bytes)?;
                }
                anyhow::Ok(())
            });
            let began = Instant::now();
            let (mut stream, _) = self.listener.accept()?;
            let mut buffer = vec![0; block];
            while stream.read(&mut buffer)? > 0 {}
            sender.join().unwrap()?;
            Ok(began.elapsed())
        })
    }

    fn system_calls(&self, count: u64) -> anyhow::Result<Duration> {
        let run = || {
            self.keep_to_cpu()?;
            let began = Instant::now();
            for _ in 0..count {
                getppid();
            }
            anyhow::Ok(began.elapsed())
        };
        thread::scope(|scope| scope.spawn(run).join().unwrap())
    }

    fn keep_to_cpu(&self) -> anyhow::Result<()> {
        match self.cpu {
            Some(cpu) => keep_to(|candidate| candidate == cpu),
            None => Ok(()),
        }
    }
}

/// Limits the calling thread, and the threads that it starts later, to these CPUs.
pub(crate) fn keep_to(cpus: impl Fn(usize) -> bool) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    let all =
        aya::util::online_cpus().map_err(|(path, error)| anyhow::anyhow!("{path}: {error}"))?;
    for cpu in all {
        let cpu = usize::try_from(cpu)?;
        if cpus(cpu) {
            set.set(cpu)?;
        }
    }
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// Traffic for which every tracer of that protocol has a program.
pub(crate) fn poke(protocol: Protocol) -> anyhow::Result<()> {
    match protocol {
        Protocol::Tcp => {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            drop(TcpStream::connect(listener.local_addr()?)?);
        }
        Protocol::Udp => {
            let socket = UdpSocket::bind("127.0.0.1:0")?;
            socket.send_to(&[0], socket.local_addr()?)?;
        }
    }
    Ok(())
}
