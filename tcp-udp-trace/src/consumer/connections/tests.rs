use super::*;
use crate::consumer::script::{
    Random, address, change, event, flow, gap, process, retransmit, sample, traffic,
};
use TcpState::{
    Close, CloseWait, Established, FinWait1, FinWait2, LastAck, Listen, SynRecv, SynSent,
};

const HERE: u32 = 1;

/// Returns an event of a TCP socket between these addresses in a network namespace.
fn tcp(id: u64, netns: u32, [local, remote]: [&str; 2], kind: EventKind) -> Event {
    let mut event = event(Protocol::Tcp, id, [1, 3], kind);
    event.socket.netns = netns;
    (event.socket.local, event.socket.remote) = (address(local), address(remote));
    event.process = Some(process(id as u32));
    event
}

const CLIENT: [&str; 2] = ["127.0.0.1:40000", "127.0.0.1:80"];
const SERVER: [&str; 2] = ["127.0.0.1:80", "127.0.0.1:40000"];

fn opens(id: u64, netns: u32, ends: [&str; 2]) -> Event {
    tcp(id, netns, ends, change(SynSent, Established))
}

fn closes(id: u64, netns: u32, ends: [&str; 2]) -> Event {
    Event {
        traffic: traffic(9),
        ..tcp(id, netns, ends, change(FinWait2, Close))
    }
}

fn pid(peer: &Option<Peer>) -> Option<u32> {
    peer.as_ref()?.process.as_ref().map(|process| process.pid)
}

#[test]
fn one_record_at_each_end() {
    let mut set = Connections::new();
    let attempt = tcp(1, HERE, CLIENT, change(Close, SynSent));
    assert_eq!(set.add(&attempt), None);
    assert!(set.is_empty());
    let mut client = opens(1, HERE, CLIENT);
    client.socket.direction = Some(Direction::Outbound);
    set.add(&client);
    set.add(&tcp(2, HERE, SERVER, change(SynRecv, Established)));
    let mut accepted = tcp(2, HERE, SERVER, EventKind::Accept);
    accepted.process = Some(process(77));
    set.add(&accepted);
    assert_eq!(set.len(), 2);
    assert_eq!(set.get(&attempt).and_then(|open| pid(&open.peer)), Some(77));
    set.add(&tcp(1, HERE, CLIENT, change(Established, FinWait1)));
    assert_eq!(
        set.get(&attempt).and_then(|open| open.state),
        Some(FinWait1)
    );

    let client = set.add(&closes(1, HERE, CLIENT)).expect("it ends");
    assert_eq!(client.direction, Some(Direction::Outbound));
    assert_eq!((client.traffic, client.state), (traffic(9), Some(Close)));
    assert_eq!(
        (client.age, client.handshake),
        (Duration::from_secs(2), Some(Duration::from_secs(2)))
    );
    assert_eq!(pid(&client.peer), Some(77));
    // The client has ended, and the server still knows it.
    let server = set
        .add(&tcp(2, HERE, SERVER, change(LastAck, Close)))
        .expect("it ends");
    assert_eq!(pid(&server.peer), Some(1));
    assert!(set.is_empty() && set.ends.is_empty());
    assert_eq!(set.forgotten(), 0);
}

#[test]
fn listeners_and_failed_attempts_are_no_connections() {
    let mut set = Connections::new();
    for (from, to) in [
        (Close, Listen),
        (Listen, Close),
        (Close, SynSent),
        (SynSent, Close),
        (Listen, SynRecv),
        (SynRecv, Close),
    ] {
        assert_eq!(set.add(&tcp(1, HERE, CLIENT, change(from, to))), None);
        assert!(set.is_empty());
    }
    set.add(&tcp(
        1,
        HERE,
        CLIENT,
        EventKind::ConnectFailed { error: 101 },
    ));
    set.add(&tcp(1, HERE, CLIENT, retransmit()));
    assert!(set.is_empty());
}

#[test]
fn a_close_alone_is_a_record() {
    let mut set = Connections::new();
    set.add(&opens(2, HERE, SERVER));
    let record = set.add(&closes(1, HERE, CLIENT)).expect("it ends");
    assert_eq!((record.handshake, pid(&record.peer)), (None, Some(2)));
    let server = set.add(&closes(2, HERE, SERVER)).expect("it ends");
    assert_eq!(pid(&server.peer), Some(1));
}

#[test]
fn connections_older_than_the_tracer_are_open() {
    let mut set = Connections::new();
    let mut older = tcp(1, HERE, CLIENT, sample());
    older.socket.older = Some(true);
    set.add(&older);
    assert_eq!(
        set.iter().next().and_then(|open| open.state),
        Some(Established)
    );
    set.add(&tcp(2, HERE, SERVER, change(Established, CloseWait)));
    assert_eq!(set.len(), 2);
}

#[test]
fn ends_in_two_namespaces() {
    const NEAR: [&str; 2] = ["10.0.0.1:40000", "10.0.0.2:80"];
    const FAR: [&str; 2] = ["10.0.0.2:80", "10.0.0.1:40000"];
    let peer_of_the_first = |events: &[Event]| {
        let mut set = Connections::new();
        for event in events {
            set.add(event);
        }
        set.get(&events[0]).and_then(|open| pid(&open.peer))
    };
    let (near, far) = (opens(1, HERE, NEAR), opens(2, 2, FAR));
    assert_eq!(peer_of_the_first(&[near.clone(), far.clone()]), Some(2));
    assert_eq!(peer_of_the_first(&[far.clone(), near.clone()]), Some(1));
    // Another namespace has the same addresses.
    let double = opens(3, 3, NEAR);
    assert_eq!(
        peer_of_the_first(&[near.clone(), double.clone(), far.clone()]),
        None
    );
    // An end in the same namespace is the one.
    assert_eq!(
        peer_of_the_first(&[near.clone(), double, opens(4, HERE, FAR)]),
        Some(4)
    );
    // The loopback of each namespace is its own.
    assert_eq!(
        peer_of_the_first(&[opens(1, HERE, CLIENT), opens(2, 2, SERVER)]),
        None
    );
    // A socket that is connected to itself has no other end.
    let itself = ["127.0.0.1:80", "127.0.0.1:80"];
    assert_eq!(peer_of_the_first(&[opens(1, HERE, itself)]), None);
}

#[test]
fn flows_of_udp() {
    let mut set = Connections::new();
    let report = |now, age, last| {
        let mut event = event(Protocol::Udp, 1, [1, now], flow(age, last));
        event.traffic.tx_packets = 1;
        event.traffic.rx_packets = u64::from(last);
        event.socket.remote = address("10.0.0.2:53");
        event
    };
    assert_eq!(set.add(&report(3, 0, false)), None);
    let flow = set.add(&report(5, 2, true)).expect("it ends");
    assert_eq!((flow.age, flow.state), (Duration::from_secs(2), None));
    assert_eq!(flow.direction, Some(Direction::Outbound));
    // The last report of the second life is lost, and that of the third.
    set.add(&report(6, 0, false));
    set.add(&report(9, 1, false));
    assert_eq!((set.len(), set.forgotten()), (1, 1));
    let drops = 0;
    let approximate = false;
    let close = EventKind::Close { drops, approximate };
    assert_eq!(set.add(&event(Protocol::Udp, 1, [1, 9], close)), None);
    assert_eq!((set.len(), set.forgotten()), (0, 2));
    assert!(set.ends.is_empty());
}

#[test]
fn samples_show_which_ends_were_lost() {
    let mut set = Connections::new();
    set.add(&opens(1, HERE, CLIENT));
    set.add(&opens(2, HERE, SERVER));
    set.add(&gap(Protocol::Tcp, 4));
    for _ in 0..2 {
        set.add(&tcp(2, HERE, SERVER, sample()));
    }
    assert_eq!(
        set.len(),
        2,
        "it may be that the first round had begun before the gap"
    );
    set.add(&tcp(2, HERE, SERVER, sample()));
    assert_eq!((set.len(), set.forgotten()), (1, 1));
}

#[test]
fn the_set_is_bounded() {
    let mut set = Connections::with_capacity(3);
    let ends = |port: u64| [format!("10.0.0.1:{port}"), "10.0.0.2:80".to_owned()];
    for id in 1..=10 {
        let [local, remote] = ends(id);
        set.add(&opens(id, HERE, [&local, &remote]));
    }
    assert_eq!((set.len(), set.ends.len(), set.forgotten()), (3, 3, 7));
    let [local, remote] = ends(1);
    // A forgotten connection has its record, and costs no other one its place.
    assert!(set.add(&closes(1, HERE, [&local, &remote])).is_some());
    assert_eq!((set.len(), set.forgotten()), (3, 7));
}

/// The documentation says how much memory a connection takes at most.
#[test]
fn a_connection_takes_the_documented_memory() {
    // A node of a tree of the standard library is at least half full.
    let entry =
        size_of::<(Key, (u64, Entry))>() + size_of::<(u64, Key)>() + size_of::<(Ends, Key)>();
    assert!(2 * entry <= 2_000, "{entry}");
}

/// Random connections between random ends, of which events are lost.
#[test]
fn the_set_is_what_is_open() {
    for seed in 1..=200 {
        let mut random = Random(seed * 0x9e37_79b9);
        let loses = random.once_in(2);
        let mut set = Connections::new();
        let mut open: Vec<(u64, [String; 2])> = Vec::new();
        let mut records = 0;
        let mut ended = 0;
        let mut lost = 0;
        for id in 1..200 {
            let mut add = |event: &Event| {
                if loses && random.once_in(5) {
                    lost += 1;
                    set.add(&gap(Protocol::Tcp, 3))
                } else {
                    set.add(event)
                }
            };
            if id % 3 == 0 {
                let (id, [local, remote]) = open.swap_remove(random_index(id, open.len()));
                records += u64::from(add(&closes(id, HERE, [&local, &remote])).is_some());
                ended += 1;
                continue;
            }
            let port = 1_000 + id / 2;
            let (one, two) = (format!("10.0.0.1:{port}"), "10.0.0.1:80".to_owned());
            let [local, remote] = if id % 2 == 0 { [one, two] } else { [two, one] };
            add(&opens(id, HERE, [&local, &remote]));
            open.push((id, [local, remote]));
        }
        assert!(loses || records == ended, "seed {seed}");
        assert!(!loses || lost > 0);
        for _ in 0..3 {
            for (id, [local, remote]) in &open {
                set.add(&tcp(*id, HERE, [local, remote], sample()));
            }
        }
        let mut expected: Vec<_> = open.iter().map(|(id, _)| *id).collect();
        expected.sort_unstable();
        let ids: Vec<_> = set.iter().map(|open| open.socket.id).collect();
        assert_eq!(ids, expected, "seed {seed}");
        for connection in set.iter() {
            let id = connection.socket.id;
            let other = open.iter().find(|(other, _)| *other == (id ^ 1));
            if let Some((other, _)) = other {
                let peer = connection.peer.as_ref().map(|peer| peer.id);
                assert_eq!(peer, Some(*other), "of {id}, seed {seed}");
            }
        }
        assert_eq!(set.ends.len(), open.len());
    }
}

fn random_index(number: u64, len: usize) -> usize {
    (number.wrapping_mul(0x9e37_79b9) >> 7) as usize % len
}
