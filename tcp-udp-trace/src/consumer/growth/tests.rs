use std::{collections::BTreeMap, net::SocketAddr};

use super::*;
use crate::{
    consumer::script::{Random, address, change, event, flow, gap, retransmit, traffic},
    event::tcp_state::TcpState::{Close, Established, FinWait2, Listen, SynSent},
};

const NONE: Traffic = Traffic {
    tx_bytes: 0,
    rx_bytes: 0,
    tx_packets: 0,
    rx_packets: 0,
};

fn tcp(id: u64, now: u64, kind: EventKind, total: u64) -> Event {
    Event {
        traffic: traffic(total),
        ..event(Protocol::Tcp, id, [1, now], kind)
    }
}

fn udp(id: u64, peer: u16, now: u64, kind: EventKind, total: u64) -> Event {
    let mut event = event(Protocol::Udp, id, [1, now], kind);
    event.socket.remote = SocketAddr::from(([127, 0, 0, 1], peer));
    event.traffic = traffic(total);
    event
}

const CLOSE: EventKind = EventKind::Close {
    drops: 0,
    approximate: false,
};

#[test]
fn a_connection_adds_its_total() {
    let mut growth = Growth::new();
    let mut add = |event: &Event| growth.add(event).traffic;
    assert_eq!(add(&tcp(1, 1, change(SynSent, Established), 0)), NONE);
    assert_eq!(add(&tcp(1, 2, EventKind::Accept, 5)), traffic(5));
    // Another CPU has read a newer total before.
    assert_eq!(add(&tcp(1, 2, retransmit(), 4)), NONE);
    assert_eq!(add(&gap(Protocol::Tcp, 3)), NONE);
    assert_eq!(add(&tcp(1, 3, change(FinWait2, Close), 9)), traffic(4));
    let direction = crate::event::ResetDirection::Sent;
    assert_eq!(
        add(&tcp(
            1,
            3,
            EventKind::Reset {
                direction,
                reason: None
            },
            9
        )),
        NONE
    );
    assert_eq!(growth.known.len(), 0);
}

#[test]
fn the_first_event_of_a_connection_may_be_its_last() {
    let mut growth = Growth::new();
    let end = |id| tcp(id, 9, change(FinWait2, Close), 7);
    assert_eq!(growth.add(&end(1)).traffic, traffic(7));
    for older in [Some(true), None] {
        let mut end = end(2);
        end.socket.older = older;
        assert_eq!(growth.add(&end).traffic, NONE, "{older:?}");
    }
    let mut begin = tcp(3, 9, EventKind::Accept, 7);
    begin.socket.older = Some(true);
    assert_eq!(growth.add(&begin).traffic, NONE);
    assert_eq!(
        growth.add(&tcp(3, 9, change(FinWait2, Close), 9)).traffic,
        traffic(2)
    );
}

#[test]
fn segments_are_counted_modulo() {
    let mut growth = Growth::new();
    let max = u64::from(u32::MAX);
    let mut event = tcp(1, 1, EventKind::Accept, 0);
    for (total, added) in [(max - 5, max - 5), (4, 10), (3, 0), (4, 0), (5, 1)] {
        event.traffic.tx_packets = total;
        assert_eq!(growth.add(&event).traffic.tx_packets, added, "at {total}");
    }
}

#[test]
fn a_flow_that_starts_again_adds_to_its_earlier_life() {
    let mut growth = Growth::new();
    let mut add = |event: &Event| growth.add(event).traffic;
    assert_eq!(add(&udp(1, 53, 2, flow(0, false), 1)), traffic(1));
    assert_eq!(add(&udp(1, 53, 3, flow(1, false), 3)), traffic(2));
    // An idle report, and the totals of the socket.
    assert_eq!(add(&udp(1, 53, 4, flow(2, false), 3)), NONE);
    assert_eq!(add(&udp(1, 0, 4, EventKind::Connect, 3)), NONE);
    assert_eq!(add(&udp(1, 53, 5, flow(3, true), 4)), traffic(1));
    assert_eq!(add(&udp(1, 53, 6, flow(0, false), 2)), traffic(2));
    // The last report of this life is lost, so the next life has a higher total at once.
    assert_eq!(add(&udp(1, 53, 9, flow(1, false), 9)), traffic(9));
    let close = growth.add(&udp(1, 0, 10, CLOSE, 20));
    assert_eq!((close.traffic, close.outside_flows), (NONE, traffic(5)));
    assert_eq!(growth.known.len(), 0);
}

#[test]
fn two_flows_with_one_peer() {
    let mut growth = Growth::new();
    let mut add = |local, event: &mut Event| {
        event.socket.local = address(local);
        growth.add(event).traffic
    };
    assert_eq!(
        add("10.0.0.1:9", &mut udp(1, 53, 2, flow(0, false), 3)),
        traffic(3)
    );
    assert_eq!(
        add("10.0.0.2:9", &mut udp(1, 53, 3, flow(0, false), 2)),
        traffic(2)
    );
    assert_eq!(
        add("10.0.0.1:9", &mut udp(1, 53, 4, flow(2, false), 5)),
        traffic(2)
    );
    // The local address becomes known later.
    assert_eq!(
        add("10.0.0.3:9", &mut udp(1, 53, 5, flow(2, false), 4)),
        traffic(2)
    );
}

#[test]
fn forgotten_sockets_and_flows_are_not_counted_twice() {
    let mut growth = Growth::with_capacity(2);
    let young = |id, total| {
        let total = traffic(total);
        Event {
            traffic: total,
            ..event(Protocol::Tcp, id, [id, 50], EventKind::Accept)
        }
    };
    for id in 1..4 {
        assert_eq!(growth.add(&young(id, 10)).traffic, traffic(10));
    }
    assert_eq!(growth.forgotten(), 1);
    assert_eq!(growth.add(&young(1, 15)).traffic, NONE, "it was forgotten");
    assert_eq!(growth.add(&young(1, 16)).traffic, traffic(1));
    assert_eq!(growth.add(&young(9, 16)).traffic, traffic(16), "it is new");
}

/// The documentation says how much memory a socket or flow takes at most.
#[test]
fn an_entry_takes_the_documented_memory() {
    // A node of a tree of the standard library is at least half full.
    let entry = size_of::<(Key, (u64, Known))>() + size_of::<(u64, Key)>();
    assert!(2 * entry <= 500, "{entry}");
}

/// Random lives of sockets, of which events are lost or a small set forgets some.
#[test]
fn sums_are_exact_or_too_small() {
    for seed in 1..=300 {
        let mut random = Random(seed * 0x9e37_79b9);
        let is_small = random.once_in(3);
        let loses = random.once_in(2);
        let capacity = if is_small {
            1 + random.below(8) as usize
        } else {
            1000
        };
        let mut world = World {
            growth: Growth::with_capacity(capacity),
            ..World::new()
        };
        for now in 2..400 {
            world.step(now, loses, &mut random);
        }
        world.check(is_small, loses, seed);
    }
}

/// Invented sockets, and what a consumer has added up.
struct World {
    growth: Growth,
    /// The protocol, the beginning and the total of each socket, by its id.
    open: BTreeMap<u64, (Protocol, u64, u64)>,
    /// The beginning and the total of the flows of UDP sockets, by the socket and the peer.
    flows: BTreeMap<(u64, u16), (u64, u64)>,
    ended: BTreeMap<u64, (Protocol, u64)>,
    sums: BTreeMap<u64, Increment>,
    ids: u64,
}

impl World {
    fn new() -> Self {
        Self {
            growth: Growth::new(),
            open: BTreeMap::new(),
            flows: BTreeMap::new(),
            ended: BTreeMap::new(),
            sums: BTreeMap::new(),
            ids: 0,
        }
    }

    fn report(&mut self, event: &Event, is_lost: bool) {
        if is_lost {
            let gap = self
                .growth
                .add(&gap(event.socket.protocol, event.uptime.as_secs()));
            assert_eq!(gap, Increment::default());
            return;
        }
        let sum = self.sums.entry(event.socket.id).or_default();
        let added = self.growth.add(event);
        sum.traffic = plus(sum.traffic, added.traffic);
        sum.outside_flows = plus(sum.outside_flows, added.outside_flows);
        let total = self
            .open
            .get(&event.socket.id)
            .map_or(0, |&(_, _, total)| total);
        assert!(
            sum.traffic.tx_bytes + sum.outside_flows.tx_bytes <= total,
            "{event}"
        );
    }

    /// Lets a random thing happen to a random socket at this second.
    fn step(&mut self, now: u64, loses: bool, random: &mut Random) {
        // The end of a socket is never lost here, because the sum is checked there.
        let is_lost = loses && random.once_in(4);
        let at = random.below(self.open.len() as u64 + 1) as usize;
        let Some((&id, &(protocol, born, total))) = self.open.iter().nth(at) else {
            self.ids += 1;
            let protocol = if random.once_in(2) {
                Protocol::Tcp
            } else {
                Protocol::Udp
            };
            self.open.insert(self.ids, (protocol, now, 0));
            if protocol == Protocol::Tcp {
                let begin = event(protocol, self.ids, [now, now], change(SynSent, Established));
                self.report(&begin, is_lost);
            }
            return;
        };
        let more = random.below(100);
        let of = |kind, total| Event {
            traffic: traffic(total),
            ..event(protocol, id, [born, now], kind)
        };
        let with = |peer, kind, total| {
            let mut event = of(kind, total);
            event.socket.remote = SocketAddr::from(([127, 0, 0, 1], peer));
            event
        };
        if random.once_in(10) {
            let flows: Vec<_> = self
                .flows
                .range((id, 0)..(id + 1, 0))
                .map(|(&k, &v)| (k, v))
                .collect();
            for (key, (born, total)) in flows {
                self.report(&with(key.1, flow(now - born, true), total), is_lost);
                self.flows.remove(&key);
            }
            let end = match protocol {
                Protocol::Tcp => change(FinWait2, Close),
                Protocol::Udp => CLOSE,
            };
            self.report(&of(end, total), false);
            self.open.remove(&id);
            self.ended.insert(id, (protocol, total));
            return;
        }
        self.open.insert(id, (protocol, born, total + more));
        if protocol == Protocol::Tcp {
            self.report(&of(retransmit(), total + more), is_lost);
            return;
        }
        if random.once_in(8) {
            // Datagrams that belong to no flow.
            self.report(&of(EventKind::Connect, total + more), is_lost);
            return;
        }
        let peer = random.below(3) as u16 + 1;
        let (born, total) = self.flows.get(&(id, peer)).copied().unwrap_or((now, 0));
        let total = total + more;
        let last = random.once_in(5);
        if last {
            self.flows.remove(&(id, peer));
        } else {
            self.flows.insert((id, peer), (born, total));
        }
        self.report(&with(peer, flow(now - born, last), total), is_lost);
    }

    fn check(&self, is_small: bool, loses: bool, seed: u64) {
        assert!(is_small || self.growth.forgotten() == 0);
        let mut exact = 0;
        for (id, &(protocol, total)) in &self.ended {
            let sum = self.sums.get(id).copied().unwrap_or_default();
            let both = plus(sum.traffic, sum.outside_flows);
            assert!(
                both.tx_bytes <= total,
                "socket {id} of seed {seed}: {both:?} of {total}"
            );
            if !is_small {
                assert_eq!(both, traffic(total), "socket {id} of seed {seed}");
                let is_tcp = protocol == Protocol::Tcp;
                assert!(!is_tcp || sum.outside_flows == NONE);
            }
            exact += usize::from(both == traffic(total));
        }
        assert!(
            exact > 0 && self.ended.len() > 5,
            "loses: {loses}, seed {seed}"
        );
    }
}

#[test]
fn a_listener_adds_nothing() {
    let mut growth = Growth::new();
    assert_eq!(
        growth.add(&tcp(1, 1, change(Close, Listen), 0)),
        Increment::default()
    );
    assert_eq!(
        growth.add(&tcp(1, 1, change(Listen, Close), 0)),
        Increment::default()
    );
    let failed = EventKind::ConnectFailed { error: 101 };
    assert_eq!(growth.add(&udp(1, 53, 2, failed, 4)), Increment::default());
    assert_eq!(growth.known.len(), 0);
}
