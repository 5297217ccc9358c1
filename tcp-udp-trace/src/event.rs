//! What a tracer yields.

use std::{
    fmt,
    net::SocketAddr,
    num::{NonZeroU32, NonZeroU64},
    time::{Duration, SystemTime},
};

use crate::{
    info::SampleInfo,
    process::{Process, User},
    tcp_state::TcpState,
};

/// Something that happened to a socket of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Event {
    /// When, on the wall clock: right to 1 ms, whatever clock steps and suspends came before.
    #[cfg_attr(feature = "serde", serde(with = "crate::json::rfc3339"))]
    pub time: SystemTime,
    /// The same instant on `CLOCK_BOOTTIME` of this process (which a time namespace may have set): monotonic, in nanoseconds, time in suspend
    /// included.
    #[cfg_attr(
        feature = "serde",
        serde(rename = "uptime_ns", with = "crate::json::nanos")
    )]
    pub uptime: Duration,
    /// What happened.
    pub kind: EventKind,
    /// The process that owns the socket; `None` when it is not known, never a guess.
    pub process: Option<Process>,
    /// The last process that was seen using the socket, in its own context. `None` while that is the
    /// owner, and where it is not known.
    ///
    /// TCP: the last process that accepted a connection, for a listener and for a connection that
    /// waits to be accepted. UDP: the last process that connected the socket, sent or received. A
    /// process that sends by `io_uring`, `sendfile` or `splice`, or as a 32-bit program, is seen only
    /// when it receives. If the user changes more than 8 times in one tick of the kernel's clock (1
    /// to 10 ms), it is one of the processes that use the socket by turns, and not always the last,
    /// unless [`per_datagram`](crate::UdpTracerBuilder::per_datagram) is set.
    #[cfg_attr(feature = "serde", serde(default))]
    pub user: Option<User>,
    /// The socket.
    pub socket: Socket,
    /// What the socket has carried so far.
    pub traffic: Traffic,
}

/// What happened to a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(tag = "type", rename_all = "snake_case"))]
#[non_exhaustive]
pub enum EventKind {
    /// TCP: the kernel moved the socket from one state to another.
    StateChange {
        /// The state it left.
        from: TcpState,
        /// The state it is in now.
        to: TcpState,
        /// On the way to [`TcpState::Close`]: the socket's error (an `errno` of Linux, such as 111,
        /// `ECONNREFUSED`) when a `connect` failed or the peer or a timeout ended the connection.
        error: Option<i32>,
    },
    /// TCP: `accept` gave the socket to a process, from now on its owner. Not reported for a connection that had
    /// already ended while it waited to be accepted.
    Accept,
    /// TCP: a segment, or several as one, was sent again. Only with [`retransmits`](crate::TcpTracerBuilder::retransmits).
    Retransmit,
    /// TCP: the connection was reset. Only with [`resets`](crate::TcpTracerBuilder::resets). One that this side sends while it closes comes after the
    /// socket's change to `CLOSE`. A reset that answers a segment for no socket at all is no event.
    Reset {
        /// Who did it.
        direction: Direction,
    },
    /// UDP: `connect` gave the socket a peer.
    Connect,
    /// A `connect` failed and left the socket as it was: there was no route, a program of a cgroup
    /// or a security module refused it, or the address made no sense. `connect` returned the error.
    ///
    /// [`Socket::remote`] is where the caller wanted to go. It is unspecified if the caller gave no
    /// address of IPv4 or IPv6.
    ///
    /// TCP: a `connect` that has begun, which the kernel shows by `SYN_SENT`, and failed then, is a
    /// [`StateChange`](Self::StateChange) with its error instead. The process is the caller.
    /// [`Socket::id`] names this attempt only: no other event has it, also if the socket connects
    /// later. UDP: the socket keeps its id, its owner, and any peer that it had.
    ConnectFailed {
        /// The `errno` of Linux, such as 101, `ENETUNREACH`.
        error: i32,
    },
    /// UDP: the totals of one flow (a socket, its local address and a peer) so far, in
    /// [`Event::traffic`]; at its first datagram, then at most once per
    /// [interval](crate::UdpTracerBuilder::interval), and once more when the socket ends.
    Flow {
        /// `rx_packets` may be too small: this kernel tells how often was read, and the socket (with `UDP_GRO`) gets several
        /// datagrams at a time. Or any number may be: datagrams of the socket were counted for no flow
        /// ([`Stats::unassigned`](crate::Stats::unassigned)).
        approximate: bool,
        /// How long ago its first datagram was counted. A flow that goes on after its last report starts again at zero.
        #[cfg_attr(
            feature = "serde",
            serde(rename = "age_ns", with = "crate::json::nanos")
        )]
        age: Duration,
        /// It is the last report of the flow: the socket has ended, or the flow made room for another one
        /// ([`max_flows`](crate::UdpTracerBuilder::max_flows)). What the flow has carried in all is the sum of its last reports and its newest one.
        last: bool,
    },
    /// UDP: a datagram was sent. Only with [`per_datagram`](crate::UdpTracerBuilder::per_datagram). A batch that was sent as one
    /// (`UDP_SEGMENT`) is one event; `traffic`, the socket's totals, counts its datagrams.
    Send {
        /// Its payload.
        bytes: u64,
    },
    /// UDP: a datagram was received. Only with [`per_datagram`](crate::UdpTracerBuilder::per_datagram).
    Receive {
        /// What the application got of its payload.
        bytes: u64,
    },
    /// UDP: the socket is gone; [`Event::traffic`] has its totals.
    Close {
        /// How many datagrams the application never got because the receive buffer was full.
        drops: u64,
        /// As in [`Flow`](Self::Flow).
        approximate: bool,
    },
    /// The socket is alive, and this is how it is: once per [`sample_interval`](crate::TcpTracerBuilder::sample_interval). TCP: every socket
    /// but those in `TIME_WAIT` and in the first half of a handshake, listeners too. UDP: every socket that is bound to a port.
    ///
    /// [`Event::traffic`] is of the event's time, as in every other event, and `info` of up to the duration of a
    /// [round](crate::Stats::sample_last_round) earlier.
    Sample {
        /// What the kernel tells of it.
        info: SampleInfo,
    },
    /// A gap: events that were produced and could not be delivered would stand here.
    Lost {
        /// How many events are missing.
        count: u64,
        /// Where they were lost.
        stage: LossStage,
    },
}

/// Which way something went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[allow(clippy::exhaustive_enums, reason = "there is no third way")]
pub enum Direction {
    /// From this side.
    Sent,
    /// To this side.
    Received,
}

/// Where an event was lost on its way to the consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum LossStage {
    /// The buffer between kernel and reader was full: the machine was too busy to run the reader in time.
    Ring,
    /// The queue between reader and consumer was full: the consumer was too slow.
    Queue,
}

/// The socket that an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Socket {
    /// Its protocol.
    pub protocol: Protocol,
    /// Names one life of a socket, from `connect`, `listen` or the handshake to its close. Unique in the
    /// tracer's life, never reused. Not in the order in which sockets begin: each CPU counts its own.
    pub id: u64,
    /// The kernel's own name of the socket (`SO_COOKIE`), once somebody has asked the kernel for one.
    pub cookie: Option<u64>,
    /// The address of this side, as the socket knows it: before any NAT. Unspecified until the
    /// kernel has chosen it, or revealed it: the receives of a UDP socket that is bound to no
    /// address do not tell it on a kernel without kprobes. A link-local IPv6 address has the
    /// interface ([`device`](Self::device)) as its scope.
    pub local: SocketAddr,
    /// The address of the other side; unspecified until known. Its scope is as for
    /// [`local`](Self::local).
    pub remote: SocketAddr,
    /// The user that the kernel charges the socket to.
    pub uid: u32,
    /// The network namespace: the inode number of `/proc/PID/ns/net`. When the namespace has ended,
    /// another one gets the number.
    pub netns: u32,
    /// The kernel's own name of the network namespace, which it never reuses (`SO_NETNS_COOKIE`).
    /// `None` before Linux 5.12.
    #[cfg_attr(feature = "serde", serde(default))]
    pub netns_cookie: Option<NonZeroU64>,
    /// The cgroup that the socket was made in: the id of its directory in cgroup v2 (its inode number).
    /// 0 when the kernel does not tell.
    pub cgroup: u64,
    /// The interface that the socket is bound to: by `SO_BINDTODEVICE`, or by a link-local IPv6
    /// address. It is a number of the socket's network namespace (`if_nametoindex`).
    ///
    /// A UDP socket that is bound to no interface has none. The link-local addresses of its flows
    /// then have the interface that their datagrams went through as their scope.
    #[cfg_attr(feature = "serde", serde(default))]
    pub device: Option<NonZeroU32>,
    /// How long ago its life began. Of a socket that is not known to be younger than the tracer
    /// ([`older`](Self::older)), how long ago the tracer saw it for the first time.
    #[cfg_attr(
        feature = "serde",
        serde(rename = "age_ns", with = "crate::json::nanos")
    )]
    pub age: Duration,
    /// Whether its life began before the tracer was there. Then its true age is more than
    /// [`age`](Self::age), and the tracer has not seen its first events.
    ///
    /// `None` where that is not known: of a socket whose beginning the tracer may have missed
    /// ([`Stats::untracked`](crate::Stats::untracked), [`Stats::missed`](crate::Stats::missed)),
    /// and of the UDP sockets of the kernel itself.
    #[cfg_attr(feature = "serde", serde(default))]
    pub older: Option<bool>,
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// What a socket, or in an [`EventKind::Flow`] a flow, has carried so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Traffic {
    /// Payload bytes sent. TCP: put on the wire, each counted once: no retransmissions, SYN or FIN. UDP: of datagrams that the kernel
    /// accepted.
    pub tx_bytes: u64,
    /// Payload bytes received. TCP: in order, no SYN or FIN. UDP: what the receive calls returned; not what was only peeked at.
    pub rx_bytes: u64,
    /// TCP: segments sent, as the kernel counts them (`tcpi_segs_out`; modulo 2³²). UDP: datagrams; each segment of a `UDP_SEGMENT`
    /// batch is one, a corked datagram is one, an empty one too.
    pub tx_packets: u64,
    /// TCP: segments received, as the kernel counts them (`tcpi_segs_in`; modulo 2³²). UDP: datagrams received.
    pub rx_packets: u64,
}

impl Event {
    /// A gap in the stream of a protocol.
    pub(crate) fn gap(
        count: u64,
        stage: LossStage,
        protocol: Protocol,
        time: SystemTime,
        uptime: Duration,
    ) -> Self {
        let nowhere = SocketAddr::from(([0; 4], 0));
        let socket = Socket {
            protocol,
            id: 0,
            cookie: None,
            local: nowhere,
            remote: nowhere,
            uid: 0,
            netns: 0,
            netns_cookie: None,
            cgroup: 0,
            device: None,
            age: Duration::ZERO,
            older: None,
        };
        let kind = EventKind::Lost { count, stage };
        Self {
            time,
            uptime,
            kind,
            process: None,
            user: None,
            socket,
            traffic: Traffic::default(),
        }
    }

    /// A gap that ends with `last`.
    pub(crate) fn lost(count: u64, stage: LossStage, last: &Self) -> Self {
        Self::gap(count, stage, last.socket.protocol, last.time, last.uptime)
    }

    /// Whether it tells the beginning or the end of something, so that whoever misses it has a wrong picture from then on.
    pub(crate) fn is_vital(&self) -> bool {
        use TcpState::{Close, Established, Listen};
        match &self.kind {
            EventKind::StateChange { from, to, .. } => [from, to]
                .into_iter()
                .any(|state| matches!(state, Close | Established | Listen)),
            EventKind::Accept | EventKind::Close { .. } | EventKind::ConnectFailed { .. } => true,
            _ => false,
        }
    }

    /// Whether a TCP connection begins here, or a UDP socket got a peer.
    ///
    /// TCP: the change out of the handshake (`SYN_SENT`, `SYN_RECV`), nearly always to
    /// `ESTABLISHED`. A socket that is shut down during its handshake goes to `FIN_WAIT1`, and a
    /// peer's FIN that came with its SYN (TCP Fast Open) leads to `CLOSE_WAIT`.
    ///
    /// Each TCP connection that the tracer has seen from its beginning to its end has one such
    /// event, and one that [`is_close`](Self::is_close). A connection that was there before the
    /// tracer ([`Socket::older`]) has only the second. UDP events do not pair: a UDP socket may
    /// connect never or several times, and closes once.
    #[must_use]
    pub fn is_open(&self) -> bool {
        match self.kind {
            EventKind::StateChange { from, to, .. } => !from.is_connected() && to.is_connected(),
            EventKind::Connect => true,
            _ => false,
        }
    }

    /// Whether a TCP connection ends here, or a UDP socket is gone. Its
    /// [`traffic`](Self::traffic) is final.
    ///
    /// Not the end of a listener, and not that of an attempt to connect that failed: see
    /// [`is_end`](Self::is_end).
    #[must_use]
    pub fn is_close(&self) -> bool {
        match self.kind {
            EventKind::StateChange { from, to, .. } => from.is_connected() && to == TcpState::Close,
            EventKind::Close { .. } => true,
            _ => false,
        }
    }

    /// Whether this is the end of the socket's life ([`Socket::id`]), whatever it was: a
    /// connection, a listener, an attempt to connect. What is remembered of the socket can be
    /// forgotten. Only a [`Reset`](EventKind::Reset) that this side sends may follow.
    #[must_use]
    pub fn is_end(&self) -> bool {
        matches!(
            self.kind,
            EventKind::StateChange {
                to: TcpState::Close,
                ..
            } | EventKind::Close { .. }
        )
    }
}

/// One line: time, protocol, addresses, what happened, owner, user, traffic.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            time,
            kind,
            process,
            user,
            socket,
            traffic,
            ..
        } = self;
        write!(f, "{} {} ", crate::time::Rfc3339(*time), socket.protocol)?;
        if let EventKind::Lost { count, stage } = kind {
            return write!(f, "lost {count} in the {stage}");
        }
        write!(f, "{} > {} {kind} ", socket.local, socket.remote)?;
        match process {
            Some(Process { pid, comm, .. }) => write!(f, "{comm}[{pid}]")?,
            None => f.write_str("-")?,
        }
        if let Some(User { pid, comm, .. }) = user {
            write!(f, " used by {comm}[{pid}]")?;
        }
        let Traffic {
            tx_bytes,
            rx_bytes,
            tx_packets,
            rx_packets,
        } = traffic;
        write!(
            f,
            " tx {tx_bytes} B/{tx_packets} rx {rx_bytes} B/{rx_packets}"
        )
    }
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StateChange { from, to, error } => {
                write!(f, "{from}->{to}")?;
                match error {
                    Some(errno) => write!(f, " ({})", std::io::Error::from_raw_os_error(*errno)),
                    None => Ok(()),
                }
            }
            Self::Accept => f.write_str("accept"),
            Self::Retransmit => f.write_str("retransmit"),
            Self::Reset { direction } => write!(f, "reset {direction}"),
            Self::Connect => f.write_str("connect"),
            Self::ConnectFailed { error } => {
                let error = std::io::Error::from_raw_os_error(*error);
                write!(f, "connect failed ({error})")
            }
            Self::Flow { .. } => f.write_str("flow"),
            Self::Send { bytes } => write!(f, "send {bytes} B"),
            Self::Receive { bytes } => write!(f, "receive {bytes} B"),
            Self::Close { drops: 0, .. } => f.write_str("close"),
            Self::Close { drops, .. } => write!(f, "close ({drops} dropped)"),
            Self::Sample { info } => write!(f, "sample ({info})"),
            Self::Lost { count, stage } => write!(f, "lost {count} in the {stage}"),
        }
    }
}

impl fmt::Display for LossStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ring => "ring",
            Self::Queue => "queue",
        })
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Sent => "sent",
            Self::Received => "received",
        })
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(from: TcpState, to: TcpState) -> Event {
        let (time, uptime) = (SystemTime::UNIX_EPOCH, Duration::ZERO);
        let error = None;
        Event {
            kind: EventKind::StateChange { from, to, error },
            ..Event::gap(1, LossStage::Ring, Protocol::Tcp, time, uptime)
        }
    }

    /// How often a life with these states opens and closes, and how often it ends.
    fn counts(states: &[TcpState]) -> [usize; 3] {
        let changes = || states.windows(2).map(|pair| change(pair[0], pair[1]));
        [Event::is_open, Event::is_close, Event::is_end]
            .map(|predicate| changes().filter(predicate).count())
    }

    #[test]
    fn opens_and_closes_pair_on_every_path() {
        use TcpState::{
            Close, CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, Listen, SynRecv,
            SynSent,
        };
        let connections: &[&[TcpState]] = &[
            &[Close, SynSent, Established, FinWait1, FinWait2, Close],
            &[Close, SynSent, Established, FinWait1, Closing, Close],
            &[
                Close,
                SynSent,
                SynRecv,
                Established,
                CloseWait,
                LastAck,
                Close,
            ],
            &[Listen, SynRecv, Established, CloseWait, LastAck, Close],
            &[Listen, SynRecv, Established, Close],
            &[Listen, SynRecv, FinWait1, FinWait2, Close],
            &[Listen, SynRecv, CloseWait, LastAck, Close],
        ];
        for states in connections {
            assert_eq!(counts(states), [1, 1, 1], "{states:?}");
        }
        let others: &[&[TcpState]] = &[
            &[Close, Listen, Close],
            &[Close, SynSent, Close],
            &[Close, SynSent, SynRecv, Close],
            &[Listen, SynRecv, Close],
        ];
        for states in others {
            assert_eq!(counts(states), [0, 0, 1], "{states:?}");
        }
    }
}
