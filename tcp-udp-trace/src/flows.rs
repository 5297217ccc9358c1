//! When the totals of a flow are reported.
//!
//! The kernel counts each datagram in a map and writes a record only for a flow's first one. The rest is asked for: each report sets a date, one
//! interval ahead, on which the map is looked at. Has the flow changed, it is reported and gets a new date; has it not, the kernel is told so, and writes
//! a record for the next datagram.
//!
//! Knows nothing of clocks and kernels: the caller gives the time, and looks into the map.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    time::Duration,
};

use tcp_udp_trace_common::FlowKey;

use crate::{Event, EventKind, Traffic};

/// The flows that were reported and have not ended.
#[derive(Debug)]
pub(crate) struct Flows {
    interval: Duration,
    capacity: usize,
    flows: HashMap<FlowKey, Reported>,
    /// The flows of each socket, for its end.
    sockets: HashMap<u64, HashSet<FlowKey>>,
    /// Dates, oldest first: each is one interval after a report.
    due: VecDeque<(Duration, FlowKey)>,
    evicted: u64,
}

/// A flow and its last report.
#[derive(Debug)]
struct Reported {
    event: Event,
    /// It stands in `due` with this date.
    due: Option<Duration>,
}

/// What a flow has carried so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) traffic: Traffic,
    /// See [`EventKind::Flow`].
    pub(crate) approximate: bool,
}

impl Totals {
    /// These are the event's numbers from now on.
    fn put_into(self, event: &mut Event) {
        event.traffic = self.traffic;
        event.kind = EventKind::Flow {
            approximate: self.approximate,
        };
    }
}

/// What the kernel's map knows of flows.
pub(crate) trait FlowMap {
    /// The totals of a flow; `None` if it had to make room for others. If they are no others than those `known`, there will be a record of the
    /// next datagram.
    fn totals(&self, flow: &FlowKey, known: Traffic) -> Option<Totals>;
    /// The last totals of a flow that has ended, or must make room.
    fn take(&mut self, flow: &FlowKey) -> Option<Totals>;
}

impl Flows {
    /// Reports each flow at most once per `interval`, and remembers at most `capacity`.
    pub(crate) fn new(interval: Duration, capacity: usize) -> Self {
        Self {
            interval,
            capacity,
            flows: HashMap::new(),
            sockets: HashMap::new(),
            due: VecDeque::new(),
            evicted: 0,
        }
    }

    /// How many flows had to make room for others before they ended.
    pub(crate) fn evicted(&self) -> u64 {
        self.evicted
    }

    /// The kernel has written a record of this flow, which is passed on if it is to be reported now.
    pub(crate) fn seen(
        &mut self,
        key: FlowKey,
        event: Event,
        map: &mut impl FlowMap,
        mut emit: impl FnMut(Event),
    ) {
        let now = event.uptime;
        let date = now + self.interval;
        if let Some(flow) = self.flows.get_mut(&key) {
            if flow.due.is_some_and(|due| now < due) {
                // Soon to be told.
                return;
            }
            flow.event = event.clone();
            flow.due = Some(date);
        } else {
            if self.flows.len() >= self.capacity {
                self.evict_oldest(map, &mut emit);
            }
            self.sockets.entry(key.socket).or_default().insert(key);
            self.flows.insert(
                key,
                Reported {
                    event: event.clone(),
                    due: Some(date),
                },
            );
        }
        self.due.push_back((date, key));
        emit(event);
    }

    /// When [`report`](Self::report) has something to do.
    pub(crate) fn next_due(&self) -> Option<Duration> {
        self.due.front().map(|&(due, _)| due)
    }

    /// Looks at the flows whose date has come, at most `limit` of them, and passes on those that have changed. `stamp` gives an
    /// event the time of now.
    pub(crate) fn report(
        &mut self,
        now: Duration,
        limit: usize,
        map: &impl FlowMap,
        mut stamp: impl FnMut(&mut Event),
        mut emit: impl FnMut(Event),
    ) {
        for _ in 0..limit {
            let Some(&(due, key)) = self.due.front().filter(|(due, _)| *due <= now) else {
                return;
            };
            self.due.pop_front();
            // A date that was superseded, or the flow has ended.
            let Some(flow) = self
                .flows
                .get_mut(&key)
                .filter(|flow| flow.due == Some(due))
            else {
                continue;
            };
            flow.due = None;
            match map.totals(&key, flow.event.traffic) {
                Some(totals) if totals.traffic != flow.event.traffic => {
                    totals.put_into(&mut flow.event);
                    stamp(&mut flow.event);
                    emit(flow.event.clone());
                    let date = now + self.interval;
                    flow.due = Some(date);
                    self.due.push_back((date, key));
                }
                Some(_) => {}
                None => {
                    self.evicted += 1;
                    self.remove(&key);
                }
            }
        }
    }

    /// The socket is gone: passes on its flows, each for the last time.
    pub(crate) fn close(
        &mut self,
        socket: u64,
        map: &mut impl FlowMap,
        mut stamp: impl FnMut(&mut Event),
        mut emit: impl FnMut(Event),
    ) {
        for key in self.sockets.remove(&socket).unwrap_or_default() {
            let Some(Reported { mut event, .. }) = self.flows.remove(&key) else {
                continue;
            };
            match map.take(&key) {
                Some(totals) => totals.put_into(&mut event),
                None => self.evicted += 1,
            }
            stamp(&mut event);
            emit(event);
        }
    }

    /// The tracer ends: passes on the flows that have changed since their last report.
    pub(crate) fn finish(
        &mut self,
        map: &impl FlowMap,
        mut stamp: impl FnMut(&mut Event),
        mut emit: impl FnMut(Event),
    ) {
        for (key, Reported { mut event, .. }) in self.flows.drain() {
            match map.totals(&key, event.traffic) {
                Some(totals) if totals.traffic != event.traffic => {
                    totals.put_into(&mut event);
                    stamp(&mut event);
                    emit(event);
                }
                _ => {}
            }
        }
        self.sockets.clear();
        self.due.clear();
    }

    /// Makes room for a new flow: the kernel's map has as many entries, and has done the same or is about to.
    fn evict_oldest(&mut self, map: &mut impl FlowMap, emit: &mut impl FnMut(Event)) {
        let dated = std::iter::from_fn(|| self.due.pop_front())
            .find(|(due, key)| {
                self.flows
                    .get(key)
                    .is_some_and(|flow| flow.due == Some(*due))
            })
            .map(|(_, key)| key);
        let Some(key) = dated.or_else(|| self.flows.keys().next().copied()) else {
            return;
        };
        self.evicted += 1;
        if let Some(Reported { mut event, .. }) = self.remove(&key) {
            let totals = map.take(&key);
            if let Some(totals) = totals.filter(|totals| totals.traffic != event.traffic) {
                totals.put_into(&mut event);
                emit(event);
            }
        }
    }

    fn remove(&mut self, key: &FlowKey) -> Option<Reported> {
        if let Some(keys) = self.sockets.get_mut(&key.socket) {
            keys.remove(key);
            if keys.is_empty() {
                self.sockets.remove(&key.socket);
            }
        }
        self.flows.remove(key)
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use tcp_udp_trace_common::Peer;

    use super::*;
    use crate::{EventKind, LossStage, Protocol};

    const SECOND: Duration = Duration::from_secs(1);

    /// The kernel's map.
    #[derive(Default)]
    struct Map(HashMap<FlowKey, Totals>);

    impl FlowMap for Map {
        fn totals(&self, flow: &FlowKey, _known: Traffic) -> Option<Totals> {
            self.0.get(flow).copied()
        }

        fn take(&mut self, flow: &FlowKey) -> Option<Totals> {
            self.0.remove(flow)
        }
    }

    /// Flows and the kernel's map of them; what was reported, as the packets sent.
    struct Scene {
        flows: Flows,
        map: Map,
        reported: Vec<u64>,
    }

    fn key(socket: u64, port: u16) -> FlowKey {
        FlowKey {
            socket,
            peer: Peer {
                address: [0; 4],
                port,
                family: 2,
            },
            _pad: 0,
        }
    }

    impl Scene {
        fn new(capacity: usize) -> Self {
            Self {
                flows: Flows::new(SECOND, capacity),
                map: Map::default(),
                reported: vec![],
            }
        }

        /// Datagrams are counted, without a record.
        fn count(&mut self, key: FlowKey, packets: u64) {
            self.map.0.entry(key).or_default().traffic.tx_packets += packets;
        }

        /// The kernel writes a record now.
        fn record(&mut self, key: FlowKey, now: Duration) {
            let mut event = Event::gap(
                0,
                LossStage::Ring,
                Protocol::Udp,
                SystemTime::UNIX_EPOCH,
                now,
            );
            self.map.0[&key].put_into(&mut event);
            let Self {
                flows,
                map,
                reported,
            } = self;
            flows.seen(key, event, map, |event| {
                reported.push(event.traffic.tx_packets)
            });
        }

        fn tick(&mut self, now: Duration) -> Vec<u64> {
            let Self {
                flows,
                map,
                reported,
            } = self;
            flows.report(
                now,
                100,
                map,
                |_| {},
                |event| reported.push(event.traffic.tx_packets),
            );
            std::mem::take(reported)
        }

        fn close(&mut self, socket: u64) -> Vec<u64> {
            let Self {
                flows,
                map,
                reported,
            } = self;
            flows.close(
                socket,
                map,
                |_| {},
                |event| reported.push(event.traffic.tx_packets),
            );
            std::mem::take(reported)
        }
    }

    #[test]
    fn first_datagram_then_once_per_interval_and_at_the_end() {
        let mut scene = Scene::new(10);
        let flow = key(1, 1);
        scene.count(flow, 1);
        scene.record(flow, SECOND);
        assert_eq!(scene.tick(SECOND), [1]);
        scene.count(flow, 4);
        assert_eq!(scene.tick(SECOND * 3 / 2), [0; 0]);
        assert_eq!(scene.tick(SECOND * 2), [5], "an idle flow is flushed");
        assert_eq!(scene.tick(SECOND * 3), [0; 0], "nothing new");
        assert_eq!(scene.flows.next_due(), None, "an idle flow costs nothing");
        scene.count(flow, 1);
        scene.record(flow, SECOND * 10);
        assert_eq!(scene.tick(SECOND * 10), [6]);
        assert_eq!(scene.close(1), [6]);
        assert_eq!(scene.map.0.len(), 0);
        assert_eq!(scene.tick(SECOND * 20), [0; 0]);
        assert_eq!(scene.flows.evicted(), 0);
    }

    #[test]
    fn a_record_within_the_interval_waits_for_its_date() {
        let mut scene = Scene::new(10);
        let flow = key(1, 1);
        scene.count(flow, 1);
        scene.record(flow, SECOND);
        scene.count(flow, 1);
        scene.record(flow, SECOND * 3 / 2);
        assert_eq!(scene.reported, [1]);
        assert_eq!(scene.tick(SECOND * 2), [1, 2]);
    }

    #[test]
    fn the_oldest_makes_room_and_is_counted() {
        let mut scene = Scene::new(2);
        for port in 1..=3 {
            scene.count(key(1, port), 1);
            scene.record(key(1, port), SECOND);
            scene.count(key(1, port), u64::from(port) * 10);
        }
        assert_eq!(scene.flows.evicted(), 1);
        assert_eq!(
            scene.reported,
            [1, 1, 11, 1],
            "the first is reported before it goes"
        );
        scene.reported.clear();
        let mut last = scene.close(1);
        last.sort_unstable();
        assert_eq!(last, [21, 31]);
    }

    #[test]
    fn what_the_kernel_evicted_is_counted() {
        let mut scene = Scene::new(10);
        scene.count(key(1, 1), 1);
        scene.record(key(1, 1), SECOND);
        scene.map.0.clear();
        assert_eq!(scene.tick(SECOND * 2), [1]);
        assert_eq!(scene.flows.evicted(), 1);
        assert_eq!(scene.close(1), [0; 0]);
    }

    #[test]
    fn every_report_says_whether_its_numbers_may_be_too_small() {
        let mut scene = Scene::new(10);
        let flow = key(1, 1);
        scene.count(flow, 1);
        scene.record(flow, SECOND);
        let totals = scene.map.0.get_mut(&flow).expect("a flow");
        totals.traffic.rx_packets = 1;
        totals.approximate = true;
        let Scene {
            mut flows, mut map, ..
        } = scene;
        let mut kinds = vec![];
        flows.report(
            SECOND * 2,
            100,
            &map,
            |_| {},
            |event| kinds.push(event.kind),
        );
        flows.close(1, &mut map, |_| {}, |event| kinds.push(event.kind));
        assert_eq!(
            kinds,
            [
                EventKind::Flow { approximate: true },
                EventKind::Flow { approximate: true }
            ]
        );
    }

    #[test]
    fn the_end_of_the_tracer_flushes_what_has_changed() {
        let mut scene = Scene::new(10);
        for port in 1..=2 {
            scene.count(key(1, port), 1);
            scene.record(key(1, port), SECOND);
        }
        scene.count(key(1, 2), 6);
        let Scene { mut flows, map, .. } = scene;
        let mut last = vec![];
        flows.finish(&map, |_| {}, |event| last.push(event.traffic.tx_packets));
        assert_eq!(last, [7]);
    }
}
