//! The events that one TCP socket must have produced.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU64,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail, ensure};
use tcp_udp_trace::{
    Comm, Direction, Event, EventKind, Origin, Process, Protocol, TcpState, Traffic,
};

use crate::actor::{Actor, Endpoint, Exchange, Identity};

use TcpState::{
    Close, CloseWait, Established, FinWait1, FinWait2, LastAck, Listen, SynRecv, SynSent,
};

/// How far the wall clock of an event may be off.
pub const CLOCK_ERROR: Duration = Duration::from_millis(1);
/// How far the age of a socket may be off. It comes from two timestamps, and a busy machine may run
/// other processes between them.
pub(crate) const AGE_ERROR: Duration = Duration::from_secs(1);

/// The states of a client that closes first.
pub const ACTIVE_CLIENT: &[TcpState] = &[Close, SynSent, Established, FinWait1, FinWait2, Close];
/// The states of a client that closes after its server.
pub const PASSIVE_CLIENT: &[TcpState] = &[Close, SynSent, Established, CloseWait, LastAck, Close];
/// The states of the server's socket if it closes first.
pub const ACTIVE_SERVER: &[TcpState] = &[Listen, SynRecv, Established, FinWait1, FinWait2, Close];
/// The states of the server's socket if it closes after its client.
pub const PASSIVE_SERVER: &[TcpState] = &[Listen, SynRecv, Established, CloseWait, LastAck, Close];
/// The states of a listener.
pub const LISTENER: &[TcpState] = &[Close, Listen, Close];

/// A process as an event must name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Owner {
    pid: u32,
    /// `None` stands for any thread of the process, or of the kernel on its behalf.
    tid: Option<u32>,
    uid: u32,
    comm: Comm,
    origin: Origin,
}

impl Owner {
    pub(crate) fn new(identity: &Identity, origin: Origin) -> Self {
        let Identity {
            pid, uid, ref comm, ..
        } = *identity;
        Self {
            pid,
            tid: Some(pid),
            uid,
            comm: Comm::from_bytes(comm),
            origin,
        }
    }

    pub(crate) fn is(&self, process: &Process) -> bool {
        let Self {
            pid,
            tid,
            uid,
            comm,
            origin,
        } = *self;
        let tid = tid.unwrap_or(process.tid);
        (pid, tid, uid, comm, origin)
            == (
                process.pid,
                process.tid,
                process.uid,
                process.comm,
                process.origin,
            )
    }
}

/// The events that one TCP socket must have produced, from the knowledge of the applications.
#[derive(Debug, Clone)]
pub struct ExpectedTcp {
    states: Vec<TcpState>,
    creator: Option<Owner>,
    acceptor: Option<Owner>,
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
    cookie: Option<u64>,
    sent: u64,
    received: u64,
    error: Option<i32>,
    uid: u32,
    netns: u32,
    netns_cookie: Option<u64>,
    cgroup: Option<u64>,
}

impl ExpectedTcp {
    /// Returns the events of a socket that `identity` connected or let listen.
    #[must_use]
    pub fn of(identity: &Identity, socket: &Endpoint, states: &[TcpState]) -> Self {
        let unspecified = match socket.local.ip().to_canonical() {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        Self {
            states: states.to_vec(),
            creator: Some(Owner::new(identity, Origin::Creator)),
            acceptor: None,
            local: canonical(socket.local),
            remote: socket
                .remote
                .map_or(SocketAddr::new(unspecified, 0), canonical),
            cookie: Some(socket.cookie),
            sent: 0,
            received: 0,
            error: None,
            uid: identity.uid,
            netns: identity.netns,
            netns_cookie: identity.netns_cookie,
            cgroup: identity.cgroup,
        }
    }

    /// Returns the events of a socket that `actor` connected or let listen, with the bytes that
    /// this actor sent and received.
    pub fn of_actor(actor: &Actor, socket: &Endpoint, states: &[TcpState]) -> anyhow::Result<Self> {
        let (sent, received) = actor.carried(socket);
        Ok(Self::of(&actor.identity()?, socket, states).bytes(sent, received))
    }

    /// Returns the events of the server's end of a connection, which `client` made through a
    /// listener of `owner`, before an accept.
    #[must_use]
    pub fn of_child(owner: &Identity, client: &Endpoint, states: &[TcpState]) -> Self {
        let remote = client.remote.expect("the client is connected");
        let mirrored = Endpoint {
            fd: -1,
            local: remote,
            remote: Some(client.local),
            cookie: 0,
        };
        Self {
            cookie: None,
            ..Self::of(owner, &mirrored, states)
        }
    }

    /// Returns the events of the client's end of a connection of
    /// [`Command::Churn`](crate::actor::Command::Churn).
    #[must_use]
    pub fn of_client_exchange(identity: &Identity, end: &Exchange) -> Self {
        Self::of_exchange(
            identity,
            end,
            if end.active {
                ACTIVE_CLIENT
            } else {
                PASSIVE_CLIENT
            },
        )
    }

    /// Returns the events of the server's end, which `acceptor` accepted through a listener of
    /// `owner`.
    #[must_use]
    pub fn of_server_exchange(owner: &Identity, acceptor: &Identity, end: &Exchange) -> Self {
        let states = if end.active {
            ACTIVE_SERVER
        } else {
            PASSIVE_SERVER
        };
        Self::of_exchange(owner, end, states).accepted_by(acceptor)
    }

    fn of_exchange(identity: &Identity, end: &Exchange, states: &[TcpState]) -> Self {
        let socket = Endpoint {
            fd: -1,
            local: end.local,
            remote: Some(end.remote),
            cookie: 0,
        };
        Self {
            cookie: None,
            ..Self::of(identity, &socket, states)
        }
        .bytes(end.sent, end.received)
    }

    /// Adds the accept by `identity`, as `socket`.
    #[must_use]
    pub fn accepted(self, identity: &Identity, socket: &Endpoint) -> Self {
        Self {
            cookie: Some(socket.cookie),
            ..self.accepted_by(identity)
        }
    }

    fn accepted_by(self, identity: &Identity) -> Self {
        Self {
            acceptor: Some(Owner::new(identity, Origin::Acceptor)),
            ..self
        }
    }

    /// Sets the thread that connected, listened or accepted; `None` stands for any.
    #[must_use]
    pub fn thread(mut self, tid: Option<u32>) -> Self {
        let owner = self.acceptor.as_mut().or(self.creator.as_mut());
        owner.expect("the socket has an owner").tid = tid;
        self
    }

    /// Marks the socket, or the listener it comes from, as older than the tracer. The tracer could
    /// not see its creator, but its owner had it open.
    #[must_use]
    pub fn older_than_the_tracer(mut self) -> Self {
        self.creator
            .as_mut()
            .expect("the socket has a creator")
            .origin = Origin::Snapshot;
        self
    }

    /// Removes the creator: the owner cannot be known before an accept.
    #[must_use]
    pub fn without_creator(self) -> Self {
        Self {
            creator: None,
            ..self
        }
    }

    /// Sets the payload bytes that the socket sent and received in all.
    #[must_use]
    pub fn bytes(self, sent: u64, received: u64) -> Self {
        Self {
            sent,
            received,
            ..self
        }
    }

    /// Sets the `errno` that ended the connection.
    #[must_use]
    pub fn error(self, errno: i32) -> Self {
        Self {
            error: Some(errno),
            ..self
        }
    }

    /// Compares everything. Returns the number of gaps between the states, which is at most
    /// `missed`.
    pub(crate) fn compare(
        &self,
        events: &[Event],
        window: (SystemTime, SystemTime),
        missed: u64,
    ) -> anyhow::Result<u64> {
        let gaps = self.compare_states(events)?;
        ensure!(gaps <= missed, "wrong states");
        let accept = events
            .iter()
            .position(|event| event.kind == EventKind::Accept);
        for (at, event) in events.iter().enumerate() {
            let is_accepted = accept.is_some_and(|accept| accept <= at);
            let owner = if is_accepted {
                &self.acceptor
            } else {
                &self.creator
            };
            let is_owned_by = |owner: &Option<Owner>| match (owner, &event.process) {
                (None, None) => true,
                (Some(owner), Some(process)) => owner.is(process),
                _ => false,
            };
            // While one CPU accepts, the FIN of the peer may arrive at another. The order of the
            // two is a matter of nanoseconds.
            let is_accepting = accept == Some(at + 1)
                && matches!(event.kind, EventKind::StateChange { to: CloseWait, .. });
            let is_right = is_owned_by(owner) || is_accepting && is_owned_by(&self.acceptor);
            ensure!(is_right, "wrong owner, {owner:?} expected: {event}");
            self.compare_socket(event, at == 0)?;
            let direction = self.direction(is_accepted);
            ensure!(
                event.socket.direction == direction,
                "not {direction:?} but {:?}: {event}",
                event.socket.direction
            );
            // The test queries the cookie of an accepted socket only after the accept.
            let cookie_is_known = self.acceptor.is_none() || Some(at) > accept;
            if cookie_is_known && self.cookie.is_some() {
                ensure!(
                    event.socket.cookie == self.cookie,
                    "wrong cookie {:?}: {event}",
                    event.socket.cookie
                );
            }
            ensure!(
                window.0 <= event.time && event.time <= window.1,
                "not in {window:?}: {event}"
            );
        }
        compare_progress(events)?;
        let last = events.last().expect("not empty");
        let Traffic {
            tx_bytes, rx_bytes, ..
        } = last.traffic;
        ensure!(
            (tx_bytes, rx_bytes) == (self.sent, self.received),
            "wrong bytes: {last}"
        );
        Ok(gaps)
    }

    /// Returns the direction that an event must have, by the first states and the accept.
    fn direction(&self, is_accepted: bool) -> Option<Direction> {
        match self.states[..] {
            [Close, SynSent, ..] | [SynSent, ..] => Some(Direction::Outbound),
            [Listen, SynRecv, ..] => Some(Direction::Inbound),
            [Close, Listen, ..] | [Listen, ..] => Some(Direction::Listener),
            // Older than the tracer.
            _ => is_accepted.then_some(Direction::Inbound),
        }
    }

    fn compare_states(&self, events: &[Event]) -> anyhow::Result<u64> {
        let mut changes = Vec::new();
        let mut accepts = 0;
        for event in events {
            match event.kind {
                EventKind::StateChange {
                    from,
                    to,
                    error,
                    ref summary,
                } => {
                    let is_end = to == Close && from != Listen;
                    ensure!(summary.is_some() == is_end, "a wrong summary: {event}");
                    ensure!(
                        to == Close || error.is_none(),
                        "an error before the end: {event}"
                    );
                    changes.push((from, to, error));
                }
                EventKind::Accept => {
                    accepts += 1;
                    let is_established = changes
                        .last()
                        .is_some_and(|(_, to, _)| matches!(to, Established | CloseWait));
                    ensure!(is_established, "an accept at a wrong time");
                }
                _ => bail!("an unknown kind of event: {event}"),
            }
        }
        ensure!(
            accepts == usize::from(self.acceptor.is_some()),
            "{accepts} accepts"
        );
        let error = changes.last().and_then(|(_, _, error)| *error);
        ensure!(error == self.error, "wrong error");
        let states = &self.states;
        let find = |from, state| (from..states.len()).find(|&at| states[at] == state);
        let (mut at, mut gaps) = (0, 0);
        for (from, to, _) in changes {
            let left = find(at, from).context("wrong states")?;
            let entered = find(left + 1, to).context("wrong states")?;
            gaps += u64::from(left != at) + u64::from(entered != left + 1);
            at = entered;
        }
        ensure!(at + 1 == states.len(), "wrong states");
        Ok(gaps)
    }

    fn compare_socket(&self, event: &Event, is_first: bool) -> anyhow::Result<()> {
        let socket = &event.socket;
        ensure!(socket.protocol == Protocol::Tcp, "wrong protocol: {event}");
        ensure!(socket.uid == self.uid, "wrong user {}: {event}", socket.uid);
        ensure!(socket.netns == self.netns, "wrong namespace: {event}");
        let cookie = socket.netns_cookie.map(NonZeroU64::get);
        ensure!(
            cookie == self.netns_cookie,
            "wrong namespace {cookie:?}: {event}"
        );
        if let Some(cgroup) = self.cgroup {
            ensure!(
                socket.cgroup == cgroup,
                "wrong cgroup {}: {event}",
                socket.cgroup
            );
        }
        for (is, must_be) in [(socket.local, self.local), (socket.remote, self.remote)] {
            // At first the kernel may not have chosen the address, or not written it into the
            // socket.
            let is_ip = is.ip() == must_be.ip() || is_first && is.ip().is_unspecified();
            let is_port = is.port() == must_be.port() || is_first && is.port() == 0;
            ensure!(is_ip && is_port, "wrong address {is}: {event}");
        }
        Ok(())
    }
}

/// Checks that time, age and counters never go back, and match each other.
fn compare_progress(events: &[Event]) -> anyhow::Result<()> {
    let first = &events[0];
    let EventKind::StateChange { from, to, .. } = first.kind else {
        bail!("the first event is no state: {first}")
    };
    // The tracer began to see the socket at some time before.
    let age_at_first = if matches!((from, to), (Close, _) | (Listen, SynRecv)) {
        Duration::ZERO
    } else {
        first.socket.age
    };
    for event in events {
        let since_birth = age_at_first + event.uptime.saturating_sub(first.uptime);
        ensure!(
            event.socket.age.abs_diff(since_birth) <= AGE_ERROR,
            "wrong age {:?}: {event}",
            event.socket.age
        );
    }
    for (before, after) in events.iter().zip(&events[1..]) {
        // Where the hook of an accept does not hold the socket's lock, another CPU may write the
        // record of a transition at the same moment. Then the clock was not read in the order of
        // the records.
        let is_accept = [before, after]
            .iter()
            .any(|event| event.kind == EventKind::Accept);
        let slack = if is_accept {
            CLOCK_ERROR
        } else {
            Duration::ZERO
        };
        ensure!(
            before.uptime <= after.uptime + slack,
            "time went back: {after}"
        );
        if is_accept && before.uptime.abs_diff(after.uptime) <= slack {
            // The counters were not read in that order either.
            continue;
        }
        ensure!(grows(before, after), "the traffic shrank: {after}");
    }
    Ok(())
}

/// Whether no counter of the first is higher than that of the second.
pub(crate) fn grows(first: &Event, second: &Event) -> bool {
    let counters = |event: &Event| {
        let Traffic {
            tx_bytes,
            rx_bytes,
            tx_packets,
            rx_packets,
            ..
        } = event.traffic;
        [tx_bytes, rx_bytes, tx_packets, rx_packets]
    };
    counters(first)
        .iter()
        .zip(counters(second))
        .all(|(first, second)| *first <= second)
}

/// Returns an IPv4-mapped address as IPv4, and an IPv6 address without its scope.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
