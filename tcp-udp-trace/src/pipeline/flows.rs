//! Decides when to report the totals of a flow, and which flow makes room for another.
//!
//! The kernel counts each datagram in a map. It writes a record only for a flow's first datagram.
//! User space queries the rest: each report schedules a lookup in the map one interval later. If
//! the totals have changed, the flow is reported and rescheduled. If not, the lookup re-arms the
//! kernel to write a record for the next datagram, so an idle flow costs nothing.
//!
//! The kernel removes no flow by itself. So the last totals of each flow are reported before the
//! flow is removed.
//!
//! This module has no clock and no kernel: the caller passes the time, and the map is a trait.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use tcp_udp_trace_common::{FlowKey, Peer};

use super::decode;
use crate::event::{Event, EventKind, Traffic, process::User};

/// The maximum number of flows that are checked to find one that makes room.
const ATTEMPTS: usize = 8;

/// The flows that were reported and have not ended.
///
/// Trees instead of hash tables, because trees release memory when flows end, and never need twice
/// the memory to grow.
#[derive(Debug)]
pub(crate) struct Flows {
    interval: Duration,
    capacity: usize,
    flows: BTreeMap<FlowKey, Flow>,
    /// The sockets that have flows.
    sockets: BTreeMap<u64, Socket>,
    /// The time of the next lookup of each flow that has one.
    due: BTreeSet<(Duration, FlowKey)>,
    /// Every flow, by its user, and in the order in which a lookup or a record last showed a
    /// change.
    used: BTreeMap<(u32, u64), FlowKey>,
    /// The highest number in `used`.
    uses: u64,
    /// How many flows each user has.
    users: BTreeMap<u32, u32>,
    /// The same, the user with the most flows last.
    by_flows: BTreeSet<(u32, u32)>,
    evicted: u64,
}

/// The state of one flow after its last report.
#[derive(Debug)]
struct Flow {
    local: SocketAddr,
    /// The time of its first datagram, which identifies this life of the flow.
    born: Duration,
    reported: Traffic,
    /// Its key in `due`.
    due: Option<Duration>,
    /// Its key in `used`.
    used: u64,
}

/// The common state of all flows of a socket.
#[derive(Debug)]
struct Socket {
    /// The newest record of one of its flows.
    event: Box<Event>,
    /// Whose flows they are counted as. The event's may change.
    user: u32,
    flows: u32,
}

/// The traffic of a flow so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) traffic: Traffic,
    /// See [`EventKind::Flow`].
    pub(crate) approximate: bool,
    /// The local address, if it is known.
    pub(crate) local: Option<[u32; 4]>,
    /// The last process that was seen using the socket, the owner or another one.
    pub(crate) user: Option<User>,
}

/// The kernel's map of flows.
pub(crate) trait FlowMap {
    /// Returns the totals of a flow, and the user of its socket, if the socket has this cookie;
    /// `None` if the map does not have the flow. If the totals equal `known`, the kernel will write
    /// a record for the next datagram.
    fn totals(&self, flow: &FlowKey, cookie: Option<u64>, known: Traffic) -> Option<Totals>;
    /// Removes a flow that has ended or must make room, and returns its last totals.
    fn take(&mut self, flow: &FlowKey, cookie: Option<u64>) -> Option<Totals>;
}

/// Returns the lowest key that a flow of this socket may have.
const fn lowest_key(socket: u64) -> FlowKey {
    FlowKey {
        socket: FlowKey::socket(socket, 0),
        peer: Peer {
            address: [0; 4],
            port: 0,
            family: 0,
        },
        scope: 0,
        local: [0; 4],
    }
}

impl Flows {
    /// Makes an empty set that reports each flow at most once per `interval`, and remembers at most
    /// `capacity` flows.
    pub(crate) fn new(interval: Duration, capacity: usize) -> Self {
        Self {
            interval,
            capacity,
            flows: BTreeMap::new(),
            sockets: BTreeMap::new(),
            due: BTreeSet::new(),
            used: BTreeMap::new(),
            uses: 0,
            users: BTreeMap::new(),
            by_flows: BTreeSet::new(),
            evicted: 0,
        }
    }

    /// Returns how many flows made room for others before they ended.
    pub(crate) fn evicted(&self) -> u64 {
        self.evicted
    }

    /// Takes the kernel's record of a flow, and emits it if the flow is to be reported now. `stamp`
    /// gives an event the time of this record.
    pub(crate) fn seen(
        &mut self,
        key: FlowKey,
        is_first: bool,
        event: Event,
        map: &mut impl FlowMap,
        stamp: impl FnMut(&mut Event),
        mut emit: impl FnMut(Event),
    ) {
        let EventKind::Flow { age, .. } = event.kind else {
            return;
        };
        let born = event.uptime.saturating_sub(age);
        match self.flows.get(&key) {
            Some(flow) if flow.born == born => {
                if flow.due.is_some_and(|due| event.uptime < due) {
                    // The lookup that is scheduled will report it.
                    self.touch(&key);
                    return;
                }
            }
            // The record was written before the flow made room, and the last report included it.
            _ if !is_first => return,
            Some(_) => {}
            None => {
                if self.flows.len() >= self.capacity {
                    self.evict(map, stamp, &mut emit);
                }
                self.insert(key, &event, born);
            }
        }
        self.reported(&key, &event, born);
        emit(event);
    }

    /// Returns the time of the next lookup, for [`report`](Self::report).
    pub(crate) fn next_due(&self) -> Option<Duration> {
        self.due.first().map(|&(due, _)| due)
    }

    /// Looks up the flows that are due, at most `limit` of them, and emits those that have changed.
    /// `stamp` gives an event the current time.
    pub(crate) fn report(
        &mut self,
        now: Duration,
        limit: usize,
        map: &mut impl FlowMap,
        mut stamp: impl FnMut(&mut Event),
        mut emit: impl FnMut(Event),
    ) {
        for _ in 0..limit {
            if self.next_due().is_none_or(|due| due > now) {
                return;
            }
            let Some((_, key)) = self.due.pop_first() else {
                return;
            };
            let Some(flow) = self.flows.get_mut(&key) else {
                continue;
            };
            flow.due = None;
            let (born, reported) = (flow.born, flow.reported);
            match map.totals(&key, self.cookie(&key), reported) {
                Some(totals) if totals.traffic != reported => {
                    let Some(event) = self.event(&key, totals, false, &mut stamp) else {
                        continue;
                    };
                    self.reported(&key, &event, born);
                    emit(event);
                }
                Some(_) => {}
                None => {
                    self.evicted += 1;
                    self.end(&key, map, &mut stamp, &mut emit);
                }
            }
        }
    }

    /// Returns whether the last report of one of the socket's flows satisfies the predicate.
    pub(crate) fn any(&self, socket: u64, is_it: impl Fn(&Event) -> bool) -> bool {
        let mut flows = self
            .flows
            .range(lowest_key(socket)..)
            .take_while(|(key, _)| key.id() == socket);
        flows.any(|(key, flow)| {
            let totals = Totals {
                traffic: flow.reported,
                ..Totals::default()
            };
            let event = self.event(key, totals, false, |_| {});
            event.is_some_and(|event| is_it(&event))
        })
    }

    /// Emits the last report of each flow of a closed socket.
    pub(crate) fn close(
        &mut self,
        socket: u64,
        map: &mut impl FlowMap,
        mut stamp: impl FnMut(&mut Event),
        mut emit: impl FnMut(Event),
    ) {
        while let Some((&key, _)) = self.flows.range(lowest_key(socket)..).next() {
            if key.id() != socket {
                return;
            }
            self.end(&key, map, &mut stamp, &mut emit);
        }
    }

    /// Emits the flows that have changed since their last report, at the end of the tracer.
    pub(crate) fn finish(
        &mut self,
        map: &impl FlowMap,
        mut stamp: impl FnMut(&mut Event),
        mut emit: impl FnMut(Event),
    ) {
        for (key, flow) in &self.flows {
            let totals = map.totals(key, self.cookie(key), flow.reported);
            let changed = totals.filter(|totals| totals.traffic != flow.reported);
            if let Some(event) =
                changed.and_then(|totals| self.event(key, totals, false, &mut stamp))
            {
                emit(event);
            }
        }
        *self = Self::new(self.interval, self.capacity).after(self.evicted);
    }

    fn after(self, evicted: u64) -> Self {
        Self { evicted, ..self }
    }

    /// Makes room for a new flow: removes a flow of the user who has the most, so that no user can
    /// take the room of others. In the order of use, it is the first flow that has not changed
    /// since its last lookup. A flow that has changed is in use. If [`ATTEMPTS`] flows in a row are
    /// in use, the first of them is removed.
    fn evict(
        &mut self,
        map: &mut impl FlowMap,
        mut stamp: impl FnMut(&mut Event),
        emit: &mut impl FnMut(Event),
    ) {
        let mut attempts = ATTEMPTS;
        let Some(&(_, user)) = self.by_flows.last() else {
            return;
        };
        while let Some((_, &key)) = self.used.range((user, 0)..).next() {
            attempts -= 1;
            let reported = self.flows.get(&key).map(|flow| flow.reported);
            let totals =
                reported.and_then(|reported| map.totals(&key, self.cookie(&key), reported));
            let is_used = totals.is_some_and(|totals| reported != Some(totals.traffic));
            if is_used && attempts > 0 {
                self.touch(&key);
                continue;
            }
            self.evicted += 1;
            self.end(&key, map, &mut stamp, emit);
            return;
        }
    }

    /// Adds a new flow.
    fn insert(&mut self, key: FlowKey, event: &Event, born: Duration) {
        let flow = Flow {
            local: event.socket.local,
            born,
            reported: event.traffic,
            due: None,
            // No flow has these keys.
            used: 0,
        };
        self.flows.insert(key, flow);
        let socket = self.sockets.entry(key.id()).or_insert_with(|| Socket {
            event: Box::new(event.clone()),
            user: event.socket.uid,
            flows: 0,
        });
        socket.flows += 1;
        let user = socket.user;
        self.count(user, |flows| flows + 1);
    }

    /// A user has more or fewer flows.
    fn count(&mut self, user: u32, change: impl FnOnce(u32) -> u32) {
        let before = self.users.remove(&user).unwrap_or_default();
        self.by_flows.remove(&(before, user));
        let now = change(before);
        if now > 0 {
            self.users.insert(user, now);
            self.by_flows.insert((now, user));
        }
    }

    /// Records a report of the flow, and schedules its next lookup one interval later.
    fn reported(&mut self, key: &FlowKey, event: &Event, born: Duration) {
        if let Some(flow) = self.flows.get_mut(key) {
            let due = event.uptime + self.interval;
            flow.born = born;
            flow.local = event.socket.local;
            flow.reported = event.traffic;
            if let Some(before) = flow.due.replace(due) {
                self.due.remove(&(before, *key));
            }
            self.due.insert((due, *key));
        }
        if let Some(socket) = self.sockets.get_mut(&key.id()) {
            *socket.event = event.clone();
        }
        self.touch(key);
    }

    /// Makes the flow the most recently used one.
    fn touch(&mut self, key: &FlowKey) {
        let Some(socket) = self.sockets.get(&key.id()) else {
            return;
        };
        if let Some(flow) = self.flows.get_mut(key) {
            self.used.remove(&(socket.user, flow.used));
            self.uses += 1;
            flow.used = self.uses;
            self.used.insert((socket.user, self.uses), *key);
        }
    }

    /// Removes the flow here and in the kernel, and emits its last totals.
    fn end(
        &mut self,
        key: &FlowKey,
        map: &mut impl FlowMap,
        stamp: impl FnMut(&mut Event),
        emit: &mut impl FnMut(Event),
    ) {
        let totals = map.take(key, self.cookie(key)).or_else(|| {
            let traffic = self.flows.get(key)?.reported;
            Some(Totals {
                traffic,
                approximate: true,
                ..Totals::default()
            })
        });
        if let Some(event) = totals.and_then(|totals| self.event(key, totals, true, stamp)) {
            emit(event);
        }
        let Some(flow) = self.flows.remove(key) else {
            return;
        };
        if let Some(due) = flow.due {
            self.due.remove(&(due, *key));
        }
        if let Some(socket) = self.sockets.get_mut(&key.id()) {
            let user = socket.user;
            self.used.remove(&(user, flow.used));
            socket.flows -= 1;
            if socket.flows == 0 {
                self.sockets.remove(&key.id());
            }
            self.count(user, |flows| flows - 1);
        }
    }

    /// Returns the cookie of a flow's socket.
    fn cookie(&self, key: &FlowKey) -> Option<u64> {
        self.sockets.get(&key.id())?.event.socket.cookie
    }

    /// Makes a report of the flow, with the time of `stamp`.
    fn event(
        &self,
        key: &FlowKey,
        totals: Totals,
        last: bool,
        mut stamp: impl FnMut(&mut Event),
    ) -> Option<Event> {
        let flow = self.flows.get(key)?;
        let mut event = Event::clone(&self.sockets.get(&key.id())?.event);
        stamp(&mut event);
        let local = totals.local;
        let local = local.and_then(|words| decode::local(key, words));
        event.socket.local = local.unwrap_or(flow.local);
        event.socket.remote = decode::peer(key)?;
        event.traffic = totals.traffic;
        let owner = event.process.as_ref().map(|process| process.pid);
        event.user = totals.user.filter(|user| Some(user.pid) != owner);
        event.kind = EventKind::Flow {
            approximate: totals.approximate,
            age: event.uptime.saturating_sub(flow.born),
            last,
        };
        Some(event)
    }
}

#[cfg(test)]
mod tests;
