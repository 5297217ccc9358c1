//! The events that one UDP socket must have produced.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU64,
    time::{Duration, SystemTime},
};

use anyhow::{bail, ensure};
use tcp_udp_trace::{Event, EventKind, Origin, Protocol, Stats, Traffic};

use crate::{
    actor::{Direction, Endpoint, Identity, Transfer},
    collector::show,
    expected_tcp::{AGE_ERROR, CLOCK_ERROR, Owner, canonical},
    flow_sums::FlowSums,
};

/// The events that a tracer reported, grouped by the id of their socket.
#[derive(Debug)]
pub struct ObservedUdp {
    observed: BTreeMap<u64, Vec<Event>>,
    window: (SystemTime, SystemTime),
    names_every_peer: bool,
    stats: Stats,
}

impl ObservedUdp {
    /// Groups events that happened between `began` and now.
    #[must_use]
    pub fn new(
        events: Vec<Event>,
        began: SystemTime,
        names_every_peer: bool,
        stats: Stats,
    ) -> Self {
        let window = (began - CLOCK_ERROR, SystemTime::now() + CLOCK_ERROR);
        let mut observed = BTreeMap::<_, Vec<_>>::new();
        for event in events {
            observed.entry(event.socket.id).or_default().push(event);
        }
        Self {
            observed,
            window,
            names_every_peer,
            stats,
        }
    }

    /// Removes and returns the events of that socket, if they are as expected.
    pub fn check(&mut self, expected: &ExpectedUdp) -> anyhow::Result<Vec<Event>> {
        let is_it = |events: &Vec<Event>| {
            events
                .iter()
                .any(|event| event.socket.cookie == Some(expected.cookie))
        };
        let found = self.observed.iter().find(|(_, events)| is_it(events));
        let Some((&id, events)) = found else {
            bail!("no socket is {expected:?} among{}", show(&self.rest()));
        };
        if let Err(error) = self.compare(expected, events) {
            bail!(
                "{error:#}\nevents:{}\nexpected {expected:?}; {:?}",
                show(events),
                self.stats
            );
        }
        Ok(self.observed.remove(&id).expect("it was found above"))
    }

    /// Checks these sockets, and that there is no other event.
    pub fn check_all(mut self, sockets: &[ExpectedUdp]) -> anyhow::Result<()> {
        for expected in sockets {
            self.check(expected)?;
        }
        let rest = self.rest();
        ensure!(rest.is_empty(), "more than expected:{}", show(&rest));
        Ok(())
    }

    fn rest(&self) -> Vec<Event> {
        self.observed.values().flatten().cloned().collect()
    }

    fn compare(&self, expected: &ExpectedUdp, events: &[Event]) -> anyhow::Result<()> {
        for event in events {
            expected.compare_socket(event)?;
            ensure!(
                self.window.0 <= event.time && event.time <= self.window.1,
                "not in {:?}: {event}",
                self.window
            );
        }
        compare_age(events)?;
        let seen = expected.seen(self.names_every_peer);
        expected.compare_connects(events)?;
        expected.compare_datagrams(events, &seen)?;
        expected.compare_flows(events, &seen, self.stats.unassigned)?;
        expected.compare_close(events, &seen)
    }
}

/// The events that one UDP socket must have produced, from the knowledge of the applications.
#[derive(Debug, Clone)]
pub struct ExpectedUdp {
    owner: Owner,
    /// Every address that the socket has had, in their order.
    locals: Vec<SocketAddr>,
    remote: Option<SocketAddr>,
    cookie: u64,
    uid: u32,
    netns: u32,
    netns_cookie: Option<u64>,
    cgroup: Option<u64>,
    connects: Vec<SocketAddr>,
    transfers: Book,
    /// The sender of the datagrams whose call did not request the peer's address.
    hears: Option<SocketAddr>,
    drops: u64,
    evicted: bool,
    per_datagram: bool,
}

/// All transfers, in their order.
#[derive(Clone, Default)]
struct Book(Vec<Transfer>);

/// Shows only the last entries: there may be thousands.
impl fmt::Debug for Book {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hidden = self.0.len().saturating_sub(20);
        write!(f, "{hidden} more, then {:?}", &self.0[hidden..])
    }
}

/// A transfer as the tracer must see it.
struct Seen {
    direction: Direction,
    peer: SocketAddr,
    bytes: u64,
    packets: u64,
    /// Each is one datagram event.
    messages: u64,
    approximate: bool,
}

impl Seen {
    fn add_to(&self, traffic: &mut Traffic) {
        let (bytes, packets) = match self.direction {
            Direction::Sent => (&mut traffic.tx_bytes, &mut traffic.tx_packets),
            Direction::Received => (&mut traffic.rx_bytes, &mut traffic.rx_packets),
        };
        *bytes += self.bytes;
        *packets += self.packets;
    }
}

impl ExpectedUdp {
    /// Returns the events of a new socket of `identity`.
    #[must_use]
    pub fn of(identity: &Identity, socket: &Endpoint) -> Self {
        Self {
            owner: Owner::new(identity, Origin::Creator),
            locals: vec![canonical(socket.local)],
            remote: None,
            cookie: socket.cookie,
            uid: identity.uid,
            netns: identity.netns,
            netns_cookie: identity.netns_cookie,
            cgroup: identity.cgroup,
            connects: Vec::new(),
            transfers: Book::default(),
            hears: None,
            drops: 0,
            evicted: false,
            per_datagram: false,
        }
    }

    /// Marks the socket as older than the tracer. The tracer could see neither its creator nor its
    /// traffic until now, but `holder` had it open.
    pub fn older_than_the_tracer(&mut self, holder: &Identity) {
        self.owner = Owner::new(holder, Origin::Snapshot);
        self.connects.clear();
        self.transfers.0.clear();
    }

    /// Sets the addresses that the socket has now.
    pub fn moved_to(&mut self, socket: &Endpoint) {
        let local = canonical(socket.local);
        if self.locals.last() != Some(&local) {
            self.locals.push(local);
        }
        self.remote = socket.remote.map(canonical);
    }

    /// Adds a successful connect.
    pub fn connected_to(&mut self, peer: SocketAddr) {
        self.connects.push(canonical(peer));
    }

    /// Sets the sender of all datagrams whose call does not request the peer's address.
    pub fn hears(&mut self, peer: SocketAddr) {
        self.hears = Some(canonical(peer));
    }

    /// Adds datagrams that were sent or received.
    pub fn transferred(&mut self, transfers: &[Transfer]) {
        self.transfers.0.extend(transfers);
    }

    /// Sets how many datagrams in all found the receive buffer full.
    pub fn dropped(&mut self, drops: u64) {
        self.drops = drops;
    }

    /// Allows flows to end and begin again: there were more peers than the tracer remembers.
    #[must_use]
    pub fn evicted(self) -> Self {
        Self {
            evicted: true,
            ..self
        }
    }

    /// Returns the events for a tracer that reports each datagram.
    #[must_use]
    pub fn per_datagram(&self) -> Self {
        Self {
            per_datagram: true,
            ..self.clone()
        }
    }

    /// Returns the totals of the application.
    #[must_use]
    pub fn totals(&self) -> Traffic {
        let mut totals = Traffic::default();
        for seen in self.seen(true) {
            seen.add_to(&mut totals);
        }
        totals
    }

    fn seen(&self, names_every_peer: bool) -> Vec<Seen> {
        let see = |transfer: &Transfer| {
            let is_received = transfer.direction == Direction::Received;
            let peer = match transfer.peer {
                Some(peer) => canonical(peer),
                None if names_every_peer => self
                    .hears
                    .expect("the test must give the peer with `hears`"),
                None => unknown_peer(self.locals[0]),
            };
            let is_merged = is_received && transfer.messages != transfer.datagrams;
            let approximate = is_merged && !names_every_peer;
            Seen {
                direction: transfer.direction,
                peer,
                bytes: transfer.bytes,
                packets: if approximate {
                    transfer.messages
                } else {
                    transfer.datagrams
                },
                messages: transfer.messages,
                approximate,
            }
        };
        self.transfers.0.iter().map(see).collect()
    }

    fn compare_socket(&self, event: &Event) -> anyhow::Result<()> {
        let socket = &event.socket;
        let is_owned = event
            .process
            .as_ref()
            .is_some_and(|process| self.owner.is(process));
        ensure!(is_owned, "wrong owner: {event}");
        ensure!(socket.protocol == Protocol::Udp, "wrong protocol: {event}");
        ensure!(
            socket.cookie == Some(self.cookie),
            "wrong cookie {:?}: {event}",
            socket.cookie
        );
        ensure!(socket.uid == self.uid, "wrong user {}: {event}", socket.uid);
        ensure!(socket.netns == self.netns, "wrong namespace: {event}");
        let cookie = socket.netns_cookie.map(NonZeroU64::get);
        ensure!(
            cookie == self.netns_cookie,
            "wrong namespace {cookie:?}: {event}"
        );
        if let Some(cgroup) = self.cgroup {
            let is = socket.cgroup;
            ensure!(is == cgroup, "wrong cgroup {is}: {event}");
        }
        ensure!(
            self.is_local(socket.local, socket.remote),
            "wrong local address: {event}"
        );
        Ok(())
    }

    /// A socket that is bound to no address has, with each peer, the address that the route to that
    /// peer gives it. The event may have that address or not.
    fn is_local(&self, local: SocketAddr, remote: SocketAddr) -> bool {
        self.locals.iter().any(|&own| {
            is_same(local, own)
                || own.ip().is_unspecified()
                    && local.port() == own.port()
                    && local.ip().is_loopback() == remote.ip().is_loopback()
        })
    }

    fn compare_connects(&self, events: &[Event]) -> anyhow::Result<()> {
        let connects: Vec<_> = events
            .iter()
            .filter(|event| event.kind == EventKind::Connect)
            .map(|event| event.socket.remote)
            .collect();
        ensure!(connects == self.connects, "wrong connects");
        Ok(())
    }

    /// Each datagram has one event, in their order, with the totals of the socket.
    fn compare_datagrams(&self, events: &[Event], seen: &[Seen]) -> anyhow::Result<()> {
        let mut totals = Traffic::default();
        let mut expected = seen.iter().filter(|_| self.per_datagram);
        for event in events {
            let (direction, bytes) = match event.kind {
                EventKind::Send { bytes } => (Direction::Sent, bytes),
                EventKind::Receive { bytes } => (Direction::Received, bytes),
                _ => continue,
            };
            let Some(seen) = expected.next() else {
                bail!("a datagram too many: {event}")
            };
            ensure!(seen.messages == 1, "this test is not for single datagrams");
            seen.add_to(&mut totals);
            let is_right = (direction, bytes) == (seen.direction, seen.bytes)
                && is_same(event.socket.remote, seen.peer)
                && event.traffic == totals;
            ensure!(
                is_right,
                "{:?} of {} bytes with {} and {totals:?} expected: {event}",
                seen.direction,
                seen.bytes,
                seen.peer
            );
        }
        let missing = expected.count();
        ensure!(missing == 0, "{missing} datagrams have no event");
        Ok(())
    }

    /// Flows may lack as many datagrams as the tracer reports as unassigned.
    fn compare_flows(
        &self,
        events: &[Event],
        seen: &[Seen],
        unassigned: u64,
    ) -> anyhow::Result<()> {
        let mut expected = BTreeMap::<SocketAddr, (Traffic, bool)>::new();
        for seen in seen {
            let (traffic, approximate) = expected.entry(key(seen.peer)).or_default();
            seen.add_to(traffic);
            *approximate |= seen.approximate;
        }
        let mut sums = FlowSums::default();
        let mut marks = BTreeMap::<SocketAddr, bool>::new();
        // The flows that have not ended. A peer has several flows if it has met several addresses.
        let mut reports = BTreeMap::<(SocketAddr, Duration), &Event>::new();
        let mut flows = BTreeMap::<SocketAddr, BTreeSet<Duration>>::new();
        let mut locals = BTreeMap::<SocketAddr, BTreeSet<SocketAddr>>::new();
        for event in events {
            let EventKind::Flow {
                approximate,
                age,
                last,
            } = event.kind
            else {
                continue;
            };
            sums.add(event);
            let peer = key(event.socket.remote);
            marks.insert(peer, approximate);
            let born = event.uptime.saturating_sub(age);
            let before = reports.insert((peer, born), event);
            let is_new = flows.entry(peer).or_default().insert(born);
            let local = event.socket.local;
            locals.entry(peer).or_default().insert(local);
            ensure!(
                before.is_some() || is_new,
                "a report after the end: {event}"
            );
            if let Some(before) = before {
                // The report at the end may have no new totals.
                let is_right =
                    grows(before.traffic, event.traffic) || last && before.traffic == event.traffic;
                ensure!(is_right, "a report without new totals: {event}");
                ensure!(before.uptime <= event.uptime, "time went back: {event}");
                let was = before.socket.local.ip();
                ensure!(
                    was == local.ip() || was.is_unspecified(),
                    "another local address: {event}"
                );
            }
            if last {
                reports.remove(&(peer, born));
            }
        }
        for (peer, flows) in &flows {
            ensure!(
                self.evicted || flows.len() <= locals[peer].len(),
                "{} flows with {peer} by {:?}",
                flows.len(),
                locals[peer]
            );
        }
        ensure!(reports.is_empty(), "no end of {reports:?}");
        let sums = sums.sums().into_iter().map(|((_, peer), traffic)| {
            let peer = key(peer);
            (
                peer,
                (traffic, marks.get(&peer).copied().unwrap_or_default()),
            )
        });
        let flows: BTreeMap<_, _> = sums.collect();
        let peers: BTreeSet<_> = expected.keys().chain(flows.keys()).collect();
        let mut lacking = 0;
        for peer in peers {
            let (is, must_be) = (flows.get(peer), expected.get(peer));
            if is == must_be {
                continue;
            }
            let missing = lacks(is, must_be);
            ensure!(
                unassigned > 0 && missing.is_some(),
                "flow with {peer}: {is:?}, but {must_be:?} expected"
            );
            lacking += missing.unwrap_or_default();
        }
        ensure!(
            lacking <= unassigned,
            "{lacking} datagrams of no flow, {unassigned} unassigned"
        );
        Ok(())
    }

    fn compare_close(&self, events: &[Event], seen: &[Seen]) -> anyhow::Result<()> {
        let closes = events.iter().filter(|event| event.is_end()).count();
        let last = events.last().expect("not empty");
        ensure!(closes == 1 && last.is_end(), "not closed once, at the end");
        let mut totals = Traffic::default();
        for seen in seen {
            seen.add_to(&mut totals);
        }
        ensure!(last.traffic == totals, "{totals:?} expected: {last}");
        let kind = EventKind::Close {
            drops: self.drops,
            approximate: seen.iter().any(|seen| seen.approximate),
        };
        ensure!(last.kind == kind, "{kind:?} expected: {:?}", last.kind);
        let (is, must_be) = (last.socket, self.locals.last().expect("not empty"));
        ensure!(
            is_same(is.local, *must_be),
            "wrong local address at the end"
        );
        let must_be = self.remote.unwrap_or(unknown_peer(*must_be));
        ensure!(
            is_same(is.remote, must_be),
            "wrong remote address at the end"
        );
        Ok(())
    }
}

/// Returns the address of an unknown peer, in the family of `local`.
fn unknown_peer(local: SocketAddr) -> SocketAddr {
    let ip = match local.ip() {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    SocketAddr::new(ip, 0)
}

/// Whether two addresses are the same. The unspecified addresses of both families are, because one
/// socket can have both.
fn is_same(one: SocketAddr, other: SocketAddr) -> bool {
    key(one) == key(other)
}

fn key(address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port())
    } else {
        address
    }
}

/// Returns how many datagrams a flow lacks, if the flow has no other fault.
fn lacks(is: Option<&(Traffic, bool)>, must_be: Option<&(Traffic, bool)>) -> Option<u64> {
    let (is, _) = is.copied().unwrap_or_default();
    let (must_be, _) = must_be.copied()?;
    let sent = must_be.tx_packets.checked_sub(is.tx_packets)?;
    let received = must_be.rx_packets.checked_sub(is.rx_packets)?;
    must_be.tx_bytes.checked_sub(is.tx_bytes)?;
    must_be.rx_bytes.checked_sub(is.rx_bytes)?;
    Some(sent + received)
}

/// Whether no counter went back, and at least one rose.
fn grows(before: Traffic, after: Traffic) -> bool {
    let counters = |traffic: Traffic| {
        [
            traffic.tx_bytes,
            traffic.rx_bytes,
            traffic.tx_packets,
            traffic.rx_packets,
        ]
    };
    let mut pairs = counters(before).into_iter().zip(counters(after));
    before != after && pairs.all(|(before, after)| before <= after)
}

/// Checks that the age of the socket matches the time of the event.
fn compare_age(events: &[Event]) -> anyhow::Result<()> {
    let birth = |event: &Event| event.uptime.saturating_sub(event.socket.age);
    for event in events {
        ensure!(
            birth(event).abs_diff(birth(&events[0])) <= AGE_ERROR,
            "wrong age {:?}: {event}",
            event.socket.age
        );
    }
    Ok(())
}
