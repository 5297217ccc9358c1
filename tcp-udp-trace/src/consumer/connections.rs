//! The connections that are open now.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use super::bounded::{Bounded, Key};
use crate::{
    config::{DEFAULT_MAX_FLOWS, DEFAULT_MAX_SOCKETS},
    event::{
        Direction, Event, EventKind, Protocol, Socket, Traffic,
        process::{Process, User},
        sample_info::SampleInfo,
        summary::Summary,
        tcp_state::TcpState,
    },
};

/// The set of connections that are open now: TCP connections and UDP flows, each with its newest
/// event. Each end of a connection that is on this machine is a connection of its own here, and
/// knows the process at the other end.
///
/// [`add`](Self::add) takes every event of a tracer, and returns the record of a connection that
/// ends with it. A record is complete even if its connection is older than the tracer, or earlier
/// events were lost or filtered: it has what the last event shows. Listeners and failed attempts to
/// connect are no connections.
///
/// A UDP flow is open from its first datagram to its last report
/// ([`last`](EventKind::Flow::last)).
///
/// # The other end
///
/// Two connections are the ends of one if the local address of each is the remote address of the
/// other. In one network namespace that is certain. Ends in two namespaces, such as those of
/// containers, belong together if they are the only ones on this machine with these addresses, and
/// neither is a loopback address. That can be wrong only if a connection between other machines has
/// the same four addresses and ports as one on this machine. NAT between the ends hides them from
/// each other.
///
/// # Lost events
///
/// If the end of a TCP connection was lost ([`EventKind::Lost`]), the connection stays in the set
/// until samples show that it is gone: until two rounds of samples have come without it since the
/// gap. A UDP flow whose last report was lost stays until its socket is closed. Both then disappear
/// without a record ([`forgotten`](Self::forgotten)).
///
/// Ids belong to one tracer, so two tracers of the same protocol need a set each. One set can serve
/// a [`TcpTracer`](crate::TcpTracer) and a [`UdpTracer`](crate::UdpTracer).
///
/// # Memory
///
/// The set has at most [`DEFAULT_CAPACITY`](Self::DEFAULT_CAPACITY) or the given number of
/// connections, with up to 2,000 bytes each, plus the process details if they are enabled. Beyond
/// that, it forgets the connection whose events are the longest ago. A later event of that
/// connection adds it again.
///
/// # Examples
///
/// ```no_run
/// use tcp_udp_trace::{TcpTracer, consumer::Connections};
///
/// # async fn run() -> Result<(), tcp_udp_trace::Error> {
/// let mut tcp = TcpTracer::builder().start().await?;
/// let mut connections = Connections::new();
/// while let Some(event) = tcp.next().await {
///     let Some(ended) = connections.add(&event) else { continue };
///     let other = ended.peer.and_then(|peer| peer.process);
///     println!("{} and {other:?}, {} still open", ended.socket.remote, connections.len());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Connections {
    open: Bounded<Entry>,
    /// The addresses of each connection.
    ends: BTreeSet<(Ends, Key)>,
    forgotten: u64,
    /// How many gaps the TCP events have had, and whether samples have shown what is open since the
    /// last one.
    gaps: u64,
    is_confirmed: bool,
}

/// One end of a connection, as its newest event shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Connection {
    /// The socket.
    pub socket: Socket,
    /// The process that owns the socket.
    pub process: Option<Process>,
    /// The last process that was seen using the socket, as in [`Event::user`].
    pub user: Option<User>,
    /// The traffic of the connection or the flow so far.
    pub traffic: Traffic,
    /// The time of the newest event.
    pub time: SystemTime,
    /// The age of the connection at that time. TCP: [`Socket::age`]. UDP: the time since the first
    /// datagram of the flow.
    pub age: Duration,
    /// The side that started it. TCP: [`Socket::direction`]. UDP: the side that sent the first
    /// datagram of the flow that the tracer counted; `None` if both sides had sent before the first
    /// report that was seen.
    pub direction: Option<Direction>,
    /// The state of a TCP connection. `None` for a UDP flow, and while it is unknown.
    pub state: Option<TcpState>,
    /// The duration of the handshake. `None` for a UDP flow, and if the event of the establishment
    /// was not seen.
    pub handshake: Option<Duration>,
    /// The error that ended the connection, as in [`EventKind::StateChange`].
    pub error: Option<i32>,
    /// The summary of a TCP connection that has ended, as in [`EventKind::StateChange`].
    pub summary: Option<Box<Summary>>,
    /// The other end, if it is on this machine and was seen.
    pub peer: Option<Peer>,
}

/// The other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Peer {
    /// The [`Socket::id`] of its socket.
    pub id: u64,
    /// The [`Socket::netns`] of its socket.
    pub netns: u32,
    /// The process that owns its socket.
    pub process: Option<Process>,
}

#[derive(Debug)]
struct Entry {
    connection: Connection,
    /// The other end, if it is in the set.
    peer: Option<Key>,
    /// How many gaps there were before its newest event.
    gaps: u64,
    /// How many samples of it have come since the last gap.
    samples: u8,
}

/// Whether it is UDP, the local address and the remote address.
type Ends = (bool, SocketAddr, SocketAddr);

fn ends(socket: &Socket) -> Ends {
    // The scope of an address is an interface of its own namespace.
    let plain = |address: SocketAddr| SocketAddr::new(address.ip(), address.port());
    let is_udp = socket.protocol == Protocol::Udp;
    (is_udp, plain(socket.local), plain(socket.remote))
}

fn reversed((is_udp, local, remote): Ends) -> Ends {
    (is_udp, remote, local)
}

fn namespace(socket: &Socket) -> (u32, Option<std::num::NonZeroU64>) {
    (socket.netns, socket.netns_cookie)
}

impl Default for Connections {
    fn default() -> Self {
        Self::new()
    }
}

impl Connections {
    /// How many connections [`new`](Self::new) has room for: as many as the tracers remember by
    /// default.
    pub const DEFAULT_CAPACITY: usize = (DEFAULT_MAX_SOCKETS + DEFAULT_MAX_FLOWS) as usize;

    /// Makes an empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::with_capacity(Self::DEFAULT_CAPACITY)
    }

    /// Makes an empty set with room for this many connections, at least one.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            open: Bounded::new(capacity),
            ends: BTreeSet::new(),
            forgotten: 0,
            gaps: 0,
            is_confirmed: true,
        }
    }

    /// Returns how many connections are open.
    #[must_use]
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// Returns whether no connection is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the open connections, those of TCP first.
    pub fn iter(&self) -> impl Iterator<Item = &Connection> {
        self.open.iter().map(|(_, entry)| &entry.connection)
    }

    /// Returns the open connection that the event belongs to.
    #[must_use]
    pub fn get(&self, event: &Event) -> Option<&Connection> {
        self.open.get(key(event)?).map(|entry| &entry.connection)
    }

    /// Returns how many connections disappeared from the set without a record: there was no room,
    /// or their end was lost.
    #[must_use]
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// Adds an event. Returns the record of the connection that it ends.
    pub fn add(&mut self, event: &Event) -> Option<Connection> {
        use TcpState::Close;
        match &event.kind {
            EventKind::Lost { .. } if event.socket.protocol == Protocol::Tcp => {
                self.gaps += 1;
                self.is_confirmed = false;
                None
            }
            EventKind::StateChange {
                from, to: Close, ..
            } => {
                let is_open = self.open.get(Key::of_socket(event)).is_some();
                if from.is_connected() || is_open {
                    return self.end(event);
                }
                None
            }
            EventKind::Flow { last: true, .. } => self.end(event),
            EventKind::Close { .. } => {
                self.close(Key::of_socket(event));
                None
            }
            _ => {
                self.update(event);
                None
            }
        }
    }

    /// Updates the connection of the event, or adds it if it is open.
    fn update(&mut self, event: &Event) {
        if self.update_known(event) || !is_connected(event) {
            return;
        }
        let Some(key) = key(event) else { return };
        self.replace(event);
        self.insert(key, Connection::new(event));
        self.join(key);
        self.count_sample(key, event);
    }

    /// Updates the connection of the event, if it is in the set.
    fn update_known(&mut self, event: &Event) -> bool {
        let Some(key) = key(event) else { return false };
        let Some(entry) = self.open.touch(key) else {
            return false;
        };
        let before = ends(&entry.connection.socket);
        entry.connection.update(event);
        let after = ends(&entry.connection.socket);
        if before != after {
            self.ends.remove(&(before, key));
            self.ends.insert((after, key));
            self.join(key);
        }
        self.inform_peer(key);
        self.count_sample(key, event);
        true
    }

    fn insert(&mut self, key: Key, connection: Connection) {
        self.ends.insert((ends(&connection.socket), key));
        let entry = Entry {
            connection,
            peer: None,
            gaps: self.gaps,
            samples: 0,
        };
        if let Some((evicted, entry)) = self.open.insert(key, entry) {
            self.unlink(evicted, &entry);
            self.forgotten += 1;
        }
    }

    /// Removes a connection, and returns its record.
    fn end(&mut self, event: &Event) -> Option<Connection> {
        self.update_known(event);
        let key = key(event)?;
        if let Some(known) = self.remove(key) {
            return Some(known);
        }
        // Its earlier events were lost or filtered.
        self.replace(event);
        let mut connection = Connection::new(event);
        let other = self.other_end(key, &event.socket);
        if let Some(other) = other.and_then(|other| self.open.get_mut(other)) {
            connection.peer = Some(Peer::of(&other.connection));
            if other.peer.is_none() {
                other.connection.peer = Some(Peer::of(&connection));
            }
        }
        Some(connection)
    }

    fn remove(&mut self, key: Key) -> Option<Connection> {
        let entry = self.open.remove(key)?;
        self.unlink(key, &entry);
        Some(entry.connection)
    }

    /// Removes an entry that is no longer in the set from the index and from its peer.
    fn unlink(&mut self, key: Key, entry: &Entry) {
        self.ends.remove(&(ends(&entry.connection.socket), key));
        if let Some(peer) = entry.peer.and_then(|peer| self.open.get_mut(peer)) {
            peer.peer = None;
        }
    }

    /// Removes the earlier life of the event's flow, whose last report was lost.
    fn replace(&mut self, event: &Event) {
        let socket = Key::of_socket(event);
        let ends = ends(&event.socket);
        let keys = self.range(ends).map(|&(_, key)| key);
        let earlier = only(keys.filter(|key| key.has_socket_of(socket)));
        if let Some(earlier) = earlier {
            self.remove(earlier);
            self.forgotten += 1;
        }
    }

    /// Removes the flows of a closed socket.
    fn close(&mut self, socket: Key) {
        while let Some(flow) = self.open.a_flow_of(socket) {
            self.remove(flow);
            self.forgotten += 1;
        }
    }

    /// Returns the connections with these addresses.
    fn range(&self, ends: Ends) -> impl Iterator<Item = &(Ends, Key)> {
        self.ends
            .range((ends, Key::LEAST)..)
            .take_while(move |(of, _)| *of == ends)
    }

    /// Returns the other end of a connection.
    fn other_end(&self, key: Key, socket: &Socket) -> Option<Key> {
        let (ends, here) = (ends(socket), namespace(socket));
        let is_here = |key: &Key| {
            let entry = self.open.get(*key);
            entry.is_some_and(|entry| namespace(&entry.connection.socket) == here)
        };
        let others = |ends| {
            let others = self.range(ends).map(|&(_, key)| key);
            others.filter(move |&other| other != key)
        };
        let near = only(others(reversed(ends)).filter(is_here));
        let (_, local, remote) = ends;
        if near.is_some() || local.ip().is_loopback() || remote.ip().is_loopback() {
            return near;
        }
        let has_double = others(ends).next().is_some();
        only(others(reversed(ends))).filter(|other| !has_double && !is_here(other))
    }

    /// Joins a connection with its other end.
    fn join(&mut self, key: Key) {
        let alone = |key| self.open.get(key).filter(|entry| entry.peer.is_none());
        let Some(entry) = alone(key) else { return };
        let other = self.other_end(key, &entry.connection.socket);
        let Some(other) = other.filter(|&other| alone(other).is_some()) else {
            return;
        };
        for (key, peer) in [(key, other), (other, key)] {
            if let Some(entry) = self.open.get_mut(key) {
                entry.peer = Some(peer);
            }
            self.inform_peer(key);
        }
    }

    /// Updates what the other end knows about this one.
    fn inform_peer(&mut self, key: Key) {
        let Some(entry) = self.open.get(key) else {
            return;
        };
        let Some(peer) = entry.peer.and_then(|peer| self.open.get(peer)) else {
            return;
        };
        let known = peer.connection.peer.as_ref();
        let id = entry.connection.socket.id;
        if known.is_some_and(|known| known.id == id && known.process == entry.connection.process) {
            return;
        }
        let (peer, this) = (entry.peer, Peer::of(&entry.connection));
        if let Some(peer) = peer.and_then(|peer| self.open.get_mut(peer)) {
            peer.connection.peer = Some(this);
        }
    }

    /// After a gap, removes the connections that two whole rounds of samples have not shown. Three
    /// samples of one socket have two rounds between them.
    fn count_sample(&mut self, key: Key, event: &Event) {
        const ROUNDS: u8 = 3;
        let is_sample = matches!(event.kind, EventKind::Sample { .. });
        let Some(entry) = self.open.get_mut(key) else {
            return;
        };
        if entry.gaps != self.gaps {
            entry.gaps = self.gaps;
            entry.samples = 0;
        }
        entry.samples = entry.samples.saturating_add(u8::from(is_sample));
        if self.is_confirmed || entry.samples < ROUNDS {
            return;
        }
        self.is_confirmed = true;
        let entries = self.open.iter();
        let gone = entries.filter(|(_, entry)| {
            entry.gaps != self.gaps && entry.connection.socket.protocol == Protocol::Tcp
        });
        for key in gone.map(|(key, _)| key).collect::<Vec<_>>() {
            self.remove(key);
            self.forgotten += 1;
        }
    }
}

/// Returns the key of the connection or flow that an event belongs to.
fn key(event: &Event) -> Option<Key> {
    match (event.socket.protocol, &event.kind) {
        (_, EventKind::Lost { .. } | EventKind::ConnectFailed { .. }) => None,
        (Protocol::Tcp, _) => Some(Key::of_socket(event)),
        (Protocol::Udp, &EventKind::Flow { age, .. }) => Some(Key::of_flow(event, age)),
        (Protocol::Udp, _) => None,
    }
}

/// Returns whether the event shows that its connection is open.
fn is_connected(event: &Event) -> bool {
    match &event.kind {
        EventKind::StateChange { to, .. } => to.is_connected(),
        EventKind::Accept | EventKind::Flow { .. } => true,
        EventKind::Sample {
            info: SampleInfo::Tcp(info),
        } => TcpState::from_number(info.state).is_some_and(TcpState::is_connected),
        _ => false,
    }
}

/// Returns the item if there is exactly one.
fn only<T>(mut items: impl Iterator<Item = T>) -> Option<T> {
    let first = items.next();
    first.filter(|_| items.next().is_none())
}

impl Peer {
    fn of(end: &Connection) -> Self {
        Self {
            id: end.socket.id,
            netns: end.socket.netns,
            process: end.process.clone(),
        }
    }
}

impl Connection {
    fn new(event: &Event) -> Self {
        let mut connection = Self {
            socket: event.socket,
            process: None,
            user: None,
            traffic: Traffic::default(),
            time: event.time,
            age: Duration::ZERO,
            direction: match (event.socket.protocol, event.traffic) {
                (Protocol::Udp, Traffic { rx_packets: 0, .. }) => Some(Direction::Outbound),
                (Protocol::Udp, Traffic { tx_packets: 0, .. }) => Some(Direction::Inbound),
                _ => None,
            },
            state: None,
            handshake: None,
            error: None,
            summary: None,
            peer: None,
        };
        connection.update(event);
        connection
    }

    fn update(&mut self, event: &Event) {
        self.socket = event.socket;
        if self.process != event.process {
            self.process.clone_from(&event.process);
        }
        self.user = event.user;
        self.traffic = event.traffic;
        self.time = event.time;
        self.age = event.socket.age;
        self.direction = event.socket.direction.or(self.direction);
        match &event.kind {
            EventKind::StateChange {
                to, error, summary, ..
            } => {
                self.state = Some(*to);
                self.error = *error;
                self.summary.clone_from(summary);
                if event.is_open() && event.socket.older == Some(false) {
                    self.handshake = Some(event.socket.age);
                }
            }
            EventKind::Flow { age, .. } => self.age = *age,
            EventKind::Sample {
                info: SampleInfo::Tcp(info),
                // The answer may be older than the event.
            } if self.state.is_none() => self.state = TcpState::from_number(info.state),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
