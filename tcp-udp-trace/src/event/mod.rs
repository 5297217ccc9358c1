//! The event that a tracer yields.

pub(crate) mod comm;
pub(crate) mod escape;
pub(crate) mod kind;
pub(crate) mod process;
pub(crate) mod reset_reason;
pub(crate) mod rfc3339;
pub(crate) mod sample_info;
#[cfg(feature = "serde")]
pub(crate) mod serde_impls;
pub(crate) mod summary;
pub(crate) mod tcp_info;
pub(crate) mod tcp_state;
pub(crate) mod udp_info;

use std::{
    fmt,
    net::SocketAddr,
    num::{NonZeroU32, NonZeroU64},
    time::{Duration, SystemTime},
};

use self::{
    process::{Process, User},
    reset_reason::ResetReason,
    sample_info::SampleInfo,
    summary::Summary,
    tcp_state::TcpState,
};

/// An event of a socket of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Event {
    /// The time of the event on the wall clock. It is right to 1 ms after any clock steps and
    /// suspends.
    #[cfg_attr(feature = "serde", serde(with = "crate::event::serde_impls::rfc3339"))]
    pub time: SystemTime,
    /// The same instant on `CLOCK_BOOTTIME` of this process, which a time namespace may have set.
    /// It is monotonic, has nanoseconds, and includes time in suspend.
    #[cfg_attr(
        feature = "serde",
        serde(rename = "uptime_ns", with = "crate::event::serde_impls::nanos")
    )]
    pub uptime: Duration,
    /// The kind of the event.
    pub kind: EventKind,
    /// The process that owns the socket. `None` if the owner is unknown: the tracer never guesses.
    pub process: Option<Process>,
    /// The last process that a hook saw using the socket, in the context of that process. `None`
    /// while that process is the owner, and if it is unknown.
    ///
    /// TCP: for a listener, the last process that accepted a connection. UDP: the last process that
    /// connected the socket, sent or received. A process that sends by `io_uring`, `sendfile` or
    /// `splice`, or as a 32-bit program, is seen only when it receives. If the user changes more
    /// than 8 times in one tick of the kernel's clock (1 to 10 ms), this is one of the processes
    /// that use the socket by turns, and not always the last, unless
    /// [`per_datagram`](crate::UdpTracerBuilder::per_datagram) is set.
    #[cfg_attr(feature = "serde", serde(default))]
    pub user: Option<User>,
    /// The socket.
    pub socket: Socket,
    /// The traffic of the socket so far. In an [`EventKind::Flow`], the traffic of the flow.
    pub traffic: Traffic,
}

/// The kind of an event, with its details.
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
        /// `ECONNREFUSED`) if a `connect` failed, or if the peer or a timeout ended the connection.
        error: Option<i32>,
        /// On the way to [`TcpState::Close`], except for a listener: the summary of the connection,
        /// or of the attempt at one. `None` in every other change.
        #[cfg_attr(feature = "serde", serde(default))]
        summary: Option<Box<Summary>>,
    },
    /// TCP: `accept` returned the socket to a process, which owns it from now on. There is no such
    /// event for a connection that ended while it waited for its accept.
    Accept,
    /// TCP: the kernel retransmitted a segment, or several segments in one. Only with
    /// [`retransmits`](crate::TcpTracerBuilder::retransmits).
    ///
    /// A SYN-ACK belongs to a connection that has no socket yet. The socket of its event is the
    /// listener, with the addresses of that connection.
    Retransmit {
        /// The reason. `None` if this kernel does not show it.
        #[cfg_attr(feature = "serde", serde(default))]
        what: Option<Retransmission>,
        /// The number of segments.
        #[cfg_attr(feature = "serde", serde(default))]
        packets: u32,
        /// Their payload.
        #[cfg_attr(feature = "serde", serde(default))]
        bytes: u32,
    },
    /// TCP: the connection was reset. Only with [`resets`](crate::TcpTracerBuilder::resets).
    ///
    /// A reset that this side sends while it closes comes after the socket's change to `CLOSE`. A
    /// reset that answers a segment for no socket is not an event.
    Reset {
        /// The side that sent the reset.
        direction: ResetDirection,
        /// The kernel's reason of a reset that this side sent. `None` before Linux 6.10.
        #[cfg_attr(feature = "serde", serde(default))]
        reason: Option<ResetReason>,
    },
    /// TCP: a listener dropped a segment of a handshake, because as many connections as its backlog
    /// allows wait to be accepted. Only with
    /// [`listen_overflows`](crate::TcpTracerBuilder::listen_overflows).
    ///
    /// The socket is the listener, with the addresses of the refused connection. The client usually
    /// sends the segment again, which is another event if the queue is still full.
    ListenOverflow,
    /// UDP: `connect` gave the socket a peer.
    Connect,
    /// A `connect` failed and left the socket unchanged. The reason may be a missing route, a
    /// refusal by a program of a cgroup or a security module, or a bad address.
    ///
    /// [`Socket::remote`] is the address that the caller gave. It is unspecified if the caller gave
    /// no IPv4 or IPv6 address.
    ///
    /// TCP: a `connect` that fails after the change to `SYN_SENT` is a
    /// [`StateChange`](Self::StateChange) with its error instead. The process is the caller.
    /// [`Socket::id`] identifies this attempt only. No other event has this id, even if the socket
    /// connects later.
    ///
    /// UDP: the socket keeps its id, its owner, and its peer, if it has one.
    ConnectFailed {
        /// The `errno` of Linux that `connect` returned, such as 101, `ENETUNREACH`.
        error: i32,
    },
    /// UDP: the totals of one flow so far, in [`Event::traffic`]. A flow is a socket, its local
    /// address and a peer. The event comes at the first datagram, then at most once per
    /// [interval](crate::UdpTracerBuilder::interval), and once more when the socket ends.
    Flow {
        /// The numbers may be too small, for one of two reasons:
        ///
        /// - `rx_packets` counts reads, because this kernel shows only those, and one read of the
        ///   socket may return several datagrams (`UDP_GRO`).
        /// - Datagrams of the socket were assigned to no flow
        ///   ([`Stats::unassigned`](crate::Stats::unassigned)). Then any number may be too small.
        approximate: bool,
        /// The time since the flow's first datagram. A flow that continues after its last report
        /// starts again at zero.
        #[cfg_attr(
            feature = "serde",
            serde(rename = "age_ns", with = "crate::event::serde_impls::nanos")
        )]
        age: Duration,
        /// Whether this is the last report of the flow: the socket has ended, or the flow made room
        /// for another one ([`max_flows`](crate::UdpTracerBuilder::max_flows)). The total of a flow
        /// is the sum of its last reports and its newest report.
        last: bool,
    },
    /// UDP: the socket sent a datagram. Only with
    /// [`per_datagram`](crate::UdpTracerBuilder::per_datagram).
    ///
    /// A batch (`UDP_SEGMENT`) is one event. The socket's totals in `traffic` count its datagrams.
    Send {
        /// The payload in bytes.
        bytes: u64,
    },
    /// UDP: the application received a datagram. Only with
    /// [`per_datagram`](crate::UdpTracerBuilder::per_datagram).
    Receive {
        /// The payload bytes that the application received.
        bytes: u64,
    },
    /// UDP: the socket was closed. [`Event::traffic`] has its totals.
    Close {
        /// How many datagrams the kernel dropped because the receive buffer was full.
        drops: u64,
        /// As in [`Flow`](Self::Flow).
        approximate: bool,
    },
    /// The state of a live socket, once per
    /// [`sample_interval`](crate::TcpTracerBuilder::sample_interval).
    ///
    /// TCP: every socket, listeners included, except those in `TIME_WAIT` and in the first half of
    /// a handshake. UDP: every socket that is bound to a port.
    ///
    /// [`Event::traffic`] is of the event's time, as in every other event. `info` may be older by
    /// up to the duration of a [round](crate::Stats::sample_last_round).
    Sample {
        /// The kernel's view of the socket.
        info: SampleInfo,
    },
    /// A gap. Events that the tracer could not deliver are missing here.
    Lost {
        /// How many events are missing.
        count: u64,
        /// Where they were lost.
        stage: LossStage,
    },
}

/// The reason of a retransmission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Retransmission {
    /// No acknowledgment came in time, or the kernel recovers from such a timeout.
    Timeout,
    /// Acknowledgments of later segments showed that the segment was lost.
    Fast,
    /// No SYN-ACK answered the SYN of `connect` in time.
    Syn,
    /// No acknowledgment answered the SYN-ACK in time.
    SynAck,
    /// The last segment was sent again to provoke an acknowledgment (tail loss probe).
    Probe,
}

impl Retransmission {
    /// Returns the name, as in JSON: `timeout`, `fast`, `syn`, `syn_ack`, `probe`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Fast => "fast",
            Self::Syn => "syn",
            Self::SynAck => "syn_ack",
            Self::Probe => "probe",
        }
    }
}

impl fmt::Display for Retransmission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The direction of a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[allow(clippy::exhaustive_enums, reason = "there is no third way")]
pub enum ResetDirection {
    /// From this side.
    Sent,
    /// To this side.
    Received,
}

/// The stage at which an event was lost on its way to the consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum LossStage {
    /// The buffer between kernel and reader was full. The machine was too busy to run the reader in
    /// time.
    Ring,
    /// The queue between reader and consumer was full. The consumer was too slow.
    Queue,
}

/// The socket of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Socket {
    /// The protocol of the socket.
    pub protocol: Protocol,
    /// Identifies one life of a socket, from `connect`, `listen` or the handshake to its close. It
    /// is unique in the tracer's life and never reused. It does not order sockets by age, because
    /// each CPU has its own counter.
    pub id: u64,
    /// The kernel's own id of the socket (`SO_COOKIE`). `None` until a program requests it
    /// from the kernel.
    pub cookie: Option<u64>,
    /// The address of this side, as the socket has it before any NAT.
    ///
    /// It is unspecified until the kernel has chosen it and a hook shows it. On a kernel without
    /// kprobes, the receives of a UDP socket that is bound to no address do not show it. A
    /// link-local IPv6 address has the interface ([`device`](Self::device)) as its scope.
    pub local: SocketAddr,
    /// The address of the other side, unspecified until known. Its scope is as in
    /// [`local`](Self::local).
    pub remote: SocketAddr,
    /// The user id that the kernel charges the socket to.
    pub uid: u32,
    /// The network namespace: the inode number of `/proc/PID/ns/net`. After the namespace has
    /// ended, the kernel gives the number to another one.
    pub netns: u32,
    /// The kernel's own id of the network namespace (`SO_NETNS_COOKIE`), which the kernel never
    /// reuses. `None` before Linux 5.12.
    #[cfg_attr(feature = "serde", serde(default))]
    pub netns_cookie: Option<NonZeroU64>,
    /// The cgroup in which the socket was created: the id (inode number) of its directory in cgroup
    /// v2. 0 if the kernel does not have it.
    pub cgroup: u64,
    /// The interface that the socket is bound to, by `SO_BINDTODEVICE` or by a link-local IPv6
    /// address. It is an interface number of the socket's network namespace (`if_nametoindex`).
    ///
    /// A UDP socket that is bound to no interface has none. The scope of the link-local addresses
    /// of its flows is the interface of their datagrams.
    #[cfg_attr(feature = "serde", serde(default))]
    pub device: Option<NonZeroU32>,
    /// The time since the socket's life began. If the socket may be older than the tracer
    /// ([`older`](Self::older)), the time since the tracer first saw it.
    #[cfg_attr(
        feature = "serde",
        serde(rename = "age_ns", with = "crate::event::serde_impls::nanos")
    )]
    pub age: Duration,
    /// Whether the socket's life began before the tracer started. Then its true age is more than
    /// [`age`](Self::age), and the tracer has not seen its first events.
    ///
    /// `None` if that is unknown: for a socket whose beginning the tracer may have missed
    /// ([`Stats::untracked`](crate::Stats::untracked), [`Stats::missed`](crate::Stats::missed)),
    /// and for the kernel's own UDP sockets.
    #[cfg_attr(feature = "serde", serde(default))]
    pub older: Option<bool>,
    /// TCP: the side that started the connection, in every event of the socket. `None` for UDP.
    ///
    /// `None` also if it is unknown: for a connection that is older than the tracer
    /// ([`older`](Self::older)), unless the tracer sees its accept, and for a connection that a
    /// process has taken over (`TCP_REPAIR`).
    #[cfg_attr(feature = "serde", serde(default))]
    pub direction: Option<Direction>,
}

/// The side that started a TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Direction {
    /// This side called `connect`. If both sides connect to each other (simultaneous open), both
    /// are outbound.
    Outbound,
    /// The peer connected to a listener of this side, whether or not a process has accepted the
    /// connection.
    Inbound,
    /// The socket is a listener, not a connection.
    Listener,
}

impl Direction {
    /// Returns the name, as in JSON: `outbound`, `inbound`, `listener`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
            Self::Listener => "listener",
        }
    }
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

/// The traffic of a socket so far, or in an [`EventKind::Flow`] that of a flow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Traffic {
    /// Payload bytes sent. TCP: bytes put on the wire, each counted once, without retransmissions,
    /// SYN and FIN. UDP: bytes of datagrams that the kernel accepted.
    pub tx_bytes: u64,
    /// Payload bytes received. TCP: bytes in order, without SYN and FIN. UDP: bytes that the
    /// receive calls returned, without those of a peek.
    pub rx_bytes: u64,
    /// TCP: segments sent, as the kernel counts them (`tcpi_segs_out`, modulo 2³²). UDP: datagrams
    /// sent. Each segment of a `UDP_SEGMENT` batch is one datagram, and so are a corked datagram
    /// and an empty one.
    pub tx_packets: u64,
    /// TCP: segments received, as the kernel counts them (`tcpi_segs_in`, modulo 2³²). UDP:
    /// datagrams received.
    pub rx_packets: u64,
}

impl Event {
    /// Makes a gap in the stream of a protocol.
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
            direction: None,
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

    /// Makes a gap that ends with `last`.
    pub(crate) fn lost(count: u64, stage: LossStage, last: &Self) -> Self {
        Self::gap(count, stage, last.socket.protocol, last.time, last.uptime)
    }

    /// Returns whether the event is a lifecycle event. A consumer that misses one has a wrong
    /// picture from then on.
    pub(crate) fn is_lifecycle(&self) -> bool {
        use TcpState::{Close, Established, Listen};
        match &self.kind {
            EventKind::StateChange { from, to, .. } => [from, to]
                .into_iter()
                .any(|state| matches!(state, Close | Established | Listen)),
            EventKind::Accept | EventKind::Close { .. } | EventKind::ConnectFailed { .. } => true,
            _ => false,
        }
    }

    /// Returns whether a TCP connection begins here, or a UDP socket got a peer.
    ///
    /// TCP: true for the change out of the handshake (`SYN_SENT`, `SYN_RECV`), nearly always to
    /// `ESTABLISHED`. A socket that is shut down during its handshake goes to `FIN_WAIT1`. A peer's
    /// FIN that came with its SYN (TCP Fast Open) leads to `CLOSE_WAIT`.
    ///
    /// A TCP connection that the tracer saw from its beginning to its end has exactly one such
    /// event, and one event with [`is_close`](Self::is_close). A connection that is older than the
    /// tracer ([`Socket::older`]) has only the second one. UDP events do not pair: a UDP socket may
    /// connect never or several times, and closes once.
    #[must_use]
    pub fn is_open(&self) -> bool {
        match self.kind {
            EventKind::StateChange { from, to, .. } => !from.is_connected() && to.is_connected(),
            EventKind::Connect => true,
            _ => false,
        }
    }

    /// Returns whether a TCP connection ends here, or a UDP socket is closed. Then the
    /// [`traffic`](Self::traffic) is final.
    ///
    /// False for the end of a listener, and for the end of a failed attempt to connect: see
    /// [`is_end`](Self::is_end).
    #[must_use]
    pub fn is_close(&self) -> bool {
        match self.kind {
            EventKind::StateChange { from, to, .. } => from.is_connected() && to == TcpState::Close,
            EventKind::Close { .. } => true,
            _ => false,
        }
    }

    /// Returns whether this is the end of a socket's life ([`Socket::id`]): the end of a
    /// connection, a listener, or an attempt to connect. A consumer can drop its state of the
    /// socket. Only a [`Reset`](EventKind::Reset) that this side sends may follow.
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

/// One line: time, protocol, addresses, kind, owner, user, traffic.
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
        write!(f, "{} {} ", rfc3339::Rfc3339(*time), socket.protocol)?;
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
            Self::StateChange {
                from,
                to,
                error,
                summary,
            } => {
                write!(f, "{from}->{to}")?;
                if let Some(errno) = error {
                    write!(f, " ({})", std::io::Error::from_raw_os_error(*errno))?;
                }
                match summary.as_ref().and_then(|summary| summary.ended_by) {
                    Some(ended_by) => write!(f, " by {ended_by}"),
                    None => Ok(()),
                }
            }
            Self::Accept => f.write_str("accept"),
            Self::Retransmit {
                what: Some(what),
                packets,
                bytes,
            } => write!(f, "retransmit ({what}) {bytes} B/{packets}"),
            Self::Retransmit {
                what: None,
                packets,
                bytes,
            } => write!(f, "retransmit {bytes} B/{packets}"),
            Self::Reset { direction, reason } => {
                write!(f, "reset {direction}")?;
                match reason {
                    Some(reason) => write!(f, " ({reason})"),
                    None => Ok(()),
                }
            }
            Self::ListenOverflow => f.write_str("listen overflow"),
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
        f.pad(self.name())
    }
}

impl fmt::Display for ResetDirection {
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
        let (error, summary) = (None, None);
        let kind = EventKind::StateChange {
            from,
            to,
            error,
            summary,
        };
        Event {
            kind,
            ..Event::gap(1, LossStage::Ring, Protocol::Tcp, time, uptime)
        }
    }

    /// Counts the opens, closes and ends of a life with these states.
    fn counts(states: &[TcpState]) -> [usize; 3] {
        let changes = || states.windows(2).map(|pair| change(pair[0], pair[1]));
        [Event::is_open, Event::is_close, Event::is_end]
            .map(|predicate| changes().filter(predicate).count())
    }

    #[test]
    fn every_path_has_one_open_and_one_close() {
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
