//! When the totals of a flow are reported, and which flow makes room for another.
//!
//! The kernel counts each datagram in a map and writes a record only for a flow's first one. The rest is asked for: each report sets a date, one
//! interval ahead, on which the map is looked at. Has the flow changed, it is reported and gets a new date; has it not, the kernel is told so, and writes
//! a record for the next datagram.
//!
//! The kernel removes no flow by itself. So the last totals of each are reported before it goes.
//!
//! Knows nothing of clocks and kernels: the caller gives the time, and looks into the map.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use tcp_udp_trace_common::{FlowKey, Peer};

use crate::{Event, EventKind, Traffic, User, decode};

/// How many flows are looked at, at most, to find one that makes room.
const LOOKS: usize = 8;

/// The flows that were reported and have not ended.
///
/// Trees rather than hash tables: they give memory back when flows end, and never need twice as much to grow.
#[derive(Debug)]
pub(crate) struct Flows {
    interval: Duration,
    capacity: usize,
    flows: BTreeMap<FlowKey, Flow>,
    /// The sockets that have flows.
    sockets: BTreeMap<u64, Socket>,
    /// The date of each flow that has one.
    due: BTreeSet<(Duration, FlowKey)>,
    /// Every flow, in the order in which they were last found to have changed.
    used: BTreeMap<u64, FlowKey>,
    /// The highest number in `used`.
    uses: u64,
    evicted: u64,
}

/// What differs from flow to flow, after its last report.
#[derive(Debug)]
struct Flow {
    local: SocketAddr,
    /// When its first datagram was counted, which names this life of it.
    born: Duration,
    reported: Traffic,
    /// Where it stands in `due`.
    due: Option<Duration>,
    /// Where it stands in `used`.
    used: u64,
}

/// What all flows of a socket have in common.
#[derive(Debug)]
struct Socket {
    /// The newest record of one of them.
    event: Box<Event>,
    flows: usize,
}

/// What a flow has carried so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) traffic: Traffic,
    /// See [`EventKind::Flow`].
    pub(crate) approximate: bool,
    /// The local address, if it is known now.
    pub(crate) local: Option<[u32; 4]>,
    /// The last process that was seen using the socket, the owner or another one.
    pub(crate) user: Option<User>,
}

/// What the kernel's map knows of flows.
pub(crate) trait FlowMap {
    /// The totals of a flow, and the user of its socket, if that has this cookie; `None` if the flow is not there. If they are no others than those `known`, there will be a record of the
    /// next datagram.
    fn totals(&self, flow: &FlowKey, cookie: Option<u64>, known: Traffic) -> Option<Totals>;
    /// The last totals of a flow that has ended, or must make room.
    fn take(&mut self, flow: &FlowKey, cookie: Option<u64>) -> Option<Totals>;
}

/// The lowest key that a flow of this socket may have.
const fn lowest_key(socket: u64) -> FlowKey {
    FlowKey {
        socket,
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
    /// Reports each flow at most once per `interval`, and remembers at most `capacity`.
    pub(crate) fn new(interval: Duration, capacity: usize) -> Self {
        Self {
            interval,
            capacity,
            flows: BTreeMap::new(),
            sockets: BTreeMap::new(),
            due: BTreeSet::new(),
            used: BTreeMap::new(),
            uses: 0,
            evicted: 0,
        }
    }

    /// How many flows had to make room for others before they ended.
    pub(crate) fn evicted(&self) -> u64 {
        self.evicted
    }

    /// The kernel has written a record of this flow, which is passed on if it is to be reported now. `stamp` gives an event the
    /// time of this one.
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
                    // Soon to be told.
                    self.touch(&key);
                    return;
                }
            }
            // It was written before the flow made room, which told all.
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

    /// When [`report`](Self::report) has something to do.
    pub(crate) fn next_due(&self) -> Option<Duration> {
        self.due.first().map(|&(due, _)| due)
    }

    /// Looks at the flows whose date has come, at most `limit` of them, and passes on those that have changed. `stamp` gives an
    /// event the time of now.
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

    /// Whether the last report of one of the socket's flows is like this.
    pub(crate) fn any(&self, socket: u64, is_it: impl Fn(&Event) -> bool) -> bool {
        let mut flows = self
            .flows
            .range(lowest_key(socket)..)
            .take_while(|(key, _)| key.socket == socket);
        flows.any(|(key, flow)| {
            let totals = Totals {
                traffic: flow.reported,
                ..Totals::default()
            };
            let event = self.event(key, totals, false, |_| {});
            event.is_some_and(|event| is_it(&event))
        })
    }

    /// The socket is gone: passes on its flows, each for the last time.
    pub(crate) fn close(
        &mut self,
        socket: u64,
        map: &mut impl FlowMap,
        mut stamp: impl FnMut(&mut Event),
        mut emit: impl FnMut(Event),
    ) {
        while let Some((&key, _)) = self.flows.range(lowest_key(socket)..).next() {
            if key.socket != socket {
                return;
            }
            self.end(&key, map, &mut stamp, &mut emit);
        }
    }

    /// The tracer ends: passes on the flows that have changed since their last report.
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

    /// Makes room for a new flow. The first one that has not changed since it was last looked at goes, in the order of their use. A flow
    /// that has changed is in use; only if many are in a row, the first of them goes.
    fn evict(
        &mut self,
        map: &mut impl FlowMap,
        mut stamp: impl FnMut(&mut Event),
        emit: &mut impl FnMut(Event),
    ) {
        let mut looks = LOOKS;
        while let Some((_, &key)) = self.used.first_key_value() {
            looks -= 1;
            let reported = self.flows.get(&key).map(|flow| flow.reported);
            let totals =
                reported.and_then(|reported| map.totals(&key, self.cookie(&key), reported));
            let is_used = totals.is_some_and(|totals| reported != Some(totals.traffic));
            if is_used && looks > 0 {
                self.touch(&key);
                continue;
            }
            self.evicted += 1;
            self.end(&key, map, &mut stamp, emit);
            return;
        }
    }

    /// Remembers a new flow.
    fn insert(&mut self, key: FlowKey, event: &Event, born: Duration) {
        let flow = Flow {
            local: event.socket.local,
            born,
            reported: event.traffic,
            due: None,
            // No flow stands there.
            used: 0,
        };
        self.flows.insert(key, flow);
        self.sockets
            .entry(key.socket)
            .or_insert_with(|| Socket {
                event: Box::new(event.clone()),
                flows: 0,
            })
            .flows += 1;
    }

    /// The flow is being reported like this, and will be looked at one interval later.
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
        if let Some(socket) = self.sockets.get_mut(&key.socket) {
            *socket.event = event.clone();
        }
        self.touch(key);
    }

    /// The flow is the one most recently used.
    fn touch(&mut self, key: &FlowKey) {
        if let Some(flow) = self.flows.get_mut(key) {
            self.used.remove(&flow.used);
            self.uses += 1;
            flow.used = self.uses;
            self.used.insert(self.uses, *key);
        }
    }

    /// Forgets the flow, here and in the kernel, and passes on its last totals.
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
        self.used.remove(&flow.used);
        if let Some(due) = flow.due {
            self.due.remove(&(due, *key));
        }
        if let Some(socket) = self.sockets.get_mut(&key.socket) {
            socket.flows -= 1;
            if socket.flows == 0 {
                self.sockets.remove(&key.socket);
            }
        }
    }

    /// The cookie of a flow's socket.
    fn cookie(&self, key: &FlowKey) -> Option<u64> {
        self.sockets.get(&key.socket)?.event.socket.cookie
    }

    /// A report of the flow, with the time that `stamp` gives it.
    fn event(
        &self,
        key: &FlowKey,
        totals: Totals,
        last: bool,
        mut stamp: impl FnMut(&mut Event),
    ) -> Option<Event> {
        let flow = self.flows.get(key)?;
        let mut event = Event::clone(&self.sockets.get(&key.socket)?.event);
        stamp(&mut event);
        let local = totals.local;
        let local = local.and_then(|words| decode::local(key, words, flow.local.port()));
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
