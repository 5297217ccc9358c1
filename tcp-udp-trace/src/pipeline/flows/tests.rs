//! Tests of flows, with a map that behaves like the kernel's.

use std::{collections::HashMap, time::SystemTime};

use super::*;
use crate::event::{LossStage, Protocol};

const SECOND: Duration = Duration::from_secs(1);

/// A replacement of the kernel's map: the totals of each flow, and the time of its beginning.
#[derive(Default)]
struct Map(BTreeMap<FlowKey, (Totals, Duration)>);

impl FlowMap for Map {
    fn totals(&self, flow: &FlowKey, _: Option<u64>, _known: Traffic) -> Option<Totals> {
        self.0.get(flow).map(|&(totals, _)| totals)
    }

    fn take(&mut self, flow: &FlowKey, _: Option<u64>) -> Option<Totals> {
        self.0.remove(flow).map(|(totals, _)| totals)
    }
}

/// Flows, and the kernel's map of them.
struct Scene {
    flows: Flows,
    map: Map,
    now: Duration,
    reported: Vec<Event>,
}

fn key(socket: u64, port: u16) -> FlowKey {
    FlowKey {
        socket: FlowKey::socket(socket, 0),
        peer: Peer {
            address: [0; 4],
            port,
            family: 2,
        },
        scope: 0,
        local: [0; 4],
    }
}

fn stamp(now: Duration) -> impl FnMut(&mut Event) {
    move |event| event.uptime = now
}

/// The port of the peer, the packets sent, and whether it is the last report.
fn short(event: &Event) -> (u16, u64, bool) {
    let EventKind::Flow { last, .. } = event.kind else {
        panic!("not of a flow: {event}");
    };
    (event.socket.remote.port(), event.traffic.tx_packets, last)
}

impl Scene {
    fn new(capacity: usize) -> Self {
        Self {
            flows: Flows::new(SECOND, capacity),
            map: Map::default(),
            now: SECOND,
            reported: vec![],
        }
    }

    /// Counts datagrams, and writes a record if the flow begins with them.
    fn send(&mut self, key: FlowKey, packets: u64) {
        let is_first = !self.map.0.contains_key(&key);
        let (totals, _) = self
            .map
            .0
            .entry(key)
            .or_insert((Totals::default(), self.now));
        totals.traffic.tx_packets += packets;
        if is_first {
            self.record(key, true);
        }
    }

    /// Writes a record.
    fn record(&mut self, key: FlowKey, is_first: bool) {
        let event = self.event(key);
        self.seen(key, is_first, event);
    }

    /// Returns the content of a record.
    fn event(&self, key: FlowKey) -> Event {
        let (time, protocol) = (SystemTime::UNIX_EPOCH, Protocol::Udp);
        let mut event = Event::gap(0, LossStage::Ring, protocol, time, self.now);
        let (totals, born) = self.map.0[&key];
        event.kind = EventKind::Flow {
            approximate: totals.approximate,
            age: self.now - born,
            last: false,
        };
        event.socket.id = key.id();
        // Each hundred sockets belong to another user.
        event.socket.uid = u32::try_from(key.id() / 100).expect("a user");
        event.socket.remote = decode::peer(&key).expect("an address");
        event.traffic = totals.traffic;
        event
    }

    fn seen(&mut self, key: FlowKey, is_first: bool, event: Event) {
        let (map, reported) = (&mut self.map, &mut self.reported);
        let emit = |event| reported.push(event);
        self.flows
            .seen(key, is_first, event, map, stamp(self.now), emit);
    }

    fn tick(&mut self, now: Duration) -> Vec<(u16, u64, bool)> {
        self.now = now;
        let (map, reported) = (&mut self.map, &mut self.reported);
        let emit = |event| reported.push(event);
        self.flows.report(now, 100, map, stamp(now), emit);
        self.take()
    }

    fn close(&mut self, socket: u64) -> Vec<(u16, u64, bool)> {
        let (map, reported) = (&mut self.map, &mut self.reported);
        let emit = |event| reported.push(event);
        self.flows.close(socket, map, stamp(self.now), emit);
        self.take()
    }

    fn take(&mut self) -> Vec<(u16, u64, bool)> {
        self.reported.drain(..).map(|event| short(&event)).collect()
    }
}

#[test]
fn first_datagram_then_once_per_interval_and_at_the_end() {
    let mut scene = Scene::new(10);
    let flow = key(1, 1);
    scene.send(flow, 1);
    assert_eq!(scene.tick(SECOND), [(1, 1, false)]);
    scene.send(flow, 4);
    assert_eq!(scene.tick(SECOND * 3 / 2), []);
    let idle = scene.tick(SECOND * 2);
    assert_eq!(idle, [(1, 5, false)], "an idle flow is flushed");
    assert_eq!(scene.tick(SECOND * 3), [], "nothing new");
    assert_eq!(scene.flows.next_due(), None, "an idle flow costs nothing");
    scene.now = SECOND * 10;
    scene.send(flow, 1);
    scene.record(flow, false);
    assert_eq!(scene.tick(SECOND * 10), [(1, 6, false)]);
    assert_eq!(scene.close(1), [(1, 6, true)]);
    assert_eq!(scene.map.0.len(), 0);
    assert_eq!(scene.tick(SECOND * 20), []);
    assert_eq!(scene.flows.evicted(), 0);
}

#[test]
fn a_record_within_the_interval_waits_for_its_end() {
    let mut scene = Scene::new(10);
    let flow = key(1, 1);
    scene.send(flow, 1);
    scene.now = SECOND * 3 / 2;
    scene.send(flow, 1);
    scene.record(flow, false);
    assert_eq!(scene.take(), [(1, 1, false)]);
    assert_eq!(scene.tick(SECOND * 2), [(1, 2, false)]);
}

#[test]
fn the_least_recently_used_makes_room_with_its_last_totals() {
    let mut scene = Scene::new(3);
    for port in 1..=3 {
        scene.send(key(1, port), 1);
    }
    // The first is used after the others, and so is the third, whose change is not reported yet.
    scene.send(key(1, 1), 1);
    assert_eq!(scene.tick(SECOND * 2).len(), 4);
    scene.send(key(1, 3), 1);
    scene.send(key(2, 4), 1);
    assert_eq!(scene.take(), [(2, 1, true), (4, 1, false)]);
    scene.send(key(2, 5), 1);
    assert_eq!(scene.take(), [(1, 2, true), (5, 1, false)]);
    assert_eq!(scene.flows.evicted(), 2);
    assert_eq!(scene.close(1), [(3, 2, true)]);
    assert_eq!(scene.close(2).len(), 2);
}

#[test]
fn the_user_with_the_most_flows_makes_room() {
    let mut scene = Scene::new(4);
    for (socket, port) in [(100, 1), (1, 2), (1, 3), (1, 4)] {
        scene.send(key(socket, port), 1);
    }
    scene.take();
    for (socket, port, makes_room) in [(1, 5, 2), (100, 6, 3), (100, 7, 1)] {
        scene.send(key(socket, port), 1);
        assert_eq!(scene.take(), [(makes_room, 1, true), (port, 1, false)]);
    }
    assert_eq!(scene.close(1).len(), 2);
    assert_eq!(scene.close(100).len(), 2);
    assert_eq!(
        (scene.flows.users.len(), scene.flows.by_flows.len()),
        (0, 0)
    );
}

#[test]
fn a_steady_flow_outlives_any_number_of_others() {
    let mut scene = Scene::new(100);
    let steady = key(1, 1);
    for round in 0..5_000 {
        scene.send(steady, 1);
        scene.send(key(2, 2 + round), 1);
        scene.tick(SECOND + Duration::from_millis(10) * u32::from(round));
    }
    assert_eq!(scene.flows.evicted(), 5_000 + 1 - 100);
    assert_eq!(scene.close(1), [(1, 5_000, true)]);
}

#[test]
fn the_search_for_room_ends_if_all_flows_are_in_use() {
    let mut scene = Scene::new(20);
    for port in 1..=20 {
        scene.send(key(1, port), 1);
        scene.send(key(1, port), 1);
    }
    scene.take();
    scene.send(key(1, 21), 1);
    let looked_at = u16::try_from(ATTEMPTS).expect("few");
    assert_eq!(scene.take(), [(looked_at, 2, true), (21, 1, false)]);
}

#[test]
fn a_flow_that_comes_back_starts_again() {
    let mut scene = Scene::new(1);
    scene.send(key(1, 1), 5);
    scene.now = SECOND * 5;
    let late = scene.event(key(1, 1));
    scene.send(key(1, 2), 1);
    scene.seen(key(1, 1), false, late.clone());
    assert_eq!(
        scene.take(),
        [(1, 5, false), (1, 5, true), (2, 1, false)],
        "a record of the time before says nothing new"
    );
    scene.send(key(1, 1), 1);
    scene.seen(key(1, 1), false, late);
    let ages = scene.reported.iter().map(|event| match event.kind {
        EventKind::Flow { age, last, .. } => (short(event).0, age, last),
        _ => panic!("not of a flow: {event}"),
    });
    let zero = Duration::ZERO;
    assert_eq!(
        ages.collect::<Vec<_>>(),
        [(2, zero, true), (1, zero, false)]
    );
    assert_eq!(scene.close(1).last(), Some(&(1, 1, true)));
}

/// A flow's last reports and its newest report add up to its traffic, as the documentation
/// promises.
#[test]
fn sums_are_exact_whichever_flow_makes_room() {
    let mut scene = Scene::new(16);
    let mut truth = HashMap::<u16, u64>::new();
    let mut state = 1_u64;
    let mut events = vec![];
    for step in 0..20_000_u32 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Some peers are more frequent than others.
        let port = 1 + u16::try_from((state >> 8) % (1 << (state % 8))).expect("a port");
        let key = key(u64::from(port % 3), port);
        scene.send(key, 1 + state % 3);
        *truth.entry(port).or_default() += 1 + state % 3;
        if state.is_multiple_of(5) {
            scene.record(key, false);
        }
        if state.is_multiple_of(7) {
            let now = SECOND + Duration::from_millis(100) * step;
            events.extend(scene.tick(now));
        }
        if state.is_multiple_of(1_001) {
            events.extend(scene.close(state % 3));
        }
    }
    events.extend(scene.take());
    for socket in 0..3 {
        events.extend(scene.close(socket));
    }
    let mut sums = HashMap::<u16, u64>::new();
    for (port, packets, last) in events {
        if last {
            *sums.entry(port).or_default() += packets;
        }
    }
    assert!(scene.flows.evicted() > 100);
    assert_eq!(sums, truth);
    assert_eq!(scene.map.0.len(), 0);
    let Flows {
        flows,
        sockets,
        due,
        used,
        ..
    } = scene.flows;
    assert_eq!(
        (flows.len(), sockets.len(), due.len(), used.len()),
        (0, 0, 0, 0)
    );
}

#[test]
fn a_flow_missing_in_the_kernel_ends() {
    let mut scene = Scene::new(10);
    scene.send(key(1, 1), 1);
    scene.map.0.clear();
    assert_eq!(scene.tick(SECOND * 2), [(1, 1, false), (1, 1, true)]);
    assert_eq!(scene.flows.evicted(), 1);
    assert_eq!(scene.close(1), []);
}

#[test]
fn every_report_shows_if_it_is_approximate() {
    let mut scene = Scene::new(10);
    let flow = key(1, 1);
    scene.send(flow, 1);
    let (totals, _) = scene.map.0.get_mut(&flow).expect("a flow");
    totals.traffic.rx_packets = 1;
    totals.approximate = true;
    let mut kinds = vec![];
    let emit = |event: Event| kinds.push(event.kind);
    let Scene {
        mut flows, mut map, ..
    } = scene;
    flows.report(SECOND * 2, 100, &mut map, stamp(SECOND * 2), emit);
    flows.close(1, &mut map, stamp(SECOND * 3), |event| {
        kinds.push(event.kind)
    });
    let kind = |seconds, last| EventKind::Flow {
        approximate: true,
        age: SECOND * seconds,
        last,
    };
    assert_eq!(kinds, [kind(1, false), kind(2, true)]);
}

#[test]
fn the_end_of_the_tracer_reports_changed_flows() {
    let mut scene = Scene::new(10);
    for port in 1..=2 {
        scene.send(key(1, port), 1);
    }
    scene.send(key(1, 2), 6);
    let Scene { mut flows, map, .. } = scene;
    let mut last = vec![];
    flows.finish(&map, stamp(SECOND), |event| last.push(short(&event)));
    assert_eq!(last, [(2, 7, false)]);
}

/// The documentation of `max_flows` gives the memory of a flow. A tree's nodes are at least half
/// full.
#[test]
#[cfg(target_pointer_width = "64")]
fn a_flow_takes_no_more_memory_than_documented() {
    let tree = |entry: usize| entry * 2 + 16;
    let flow = tree(size_of::<(FlowKey, Flow)>())
        + tree(size_of::<(Duration, FlowKey)>())
        + tree(size_of::<((u32, u64), FlowKey)>());
    assert!(flow <= 610, "{flow}");
    // Each socket may belong to another user.
    let user = 2 * tree(size_of::<(u32, u32)>());
    let socket = tree(size_of::<(u64, Socket)>()) + size_of::<Event>() + user;
    assert!(socket <= 560, "{socket}");
}
