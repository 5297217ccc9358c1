//! Decodes a kernel record into an [`Event`]. No I/O. Any bytes are safe.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    num::{NonZeroU32, NonZeroU64},
    time::Duration,
};

use tcp_udp_trace_common::{
    AF_INET, AF_INET6, Anomaly, End, FlowKey, Head, Owner, Peer, StateChange, Tcp, TcpSocket, Udp,
    direction, kind, mark, older, origin, retransmission,
};
use zerocopy::{FromBytes, IntoBytes as _};

use super::{clock::BootClock, ending::Ending, images::ImageKey};
use crate::event::{
    Direction, Event, EventKind, Protocol, ResetDirection, Retransmission, Socket, Traffic,
    comm::Comm,
    process::{Origin, Process, User},
    reset_reason::ResetReason,
    sample_info::SampleInfo,
    tcp_state::TcpState,
};

/// The error of a record that is not valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

/// A decoded record.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Decoded {
    pub(crate) event: Event,
    /// How many records the kernel has lost since the start of the tracer, before this one, modulo
    /// 2³².
    pub(crate) lost_before: u32,
    /// UDP: the kernel's key of the flow with this peer.
    pub(crate) flow: Option<FlowKey>,
    /// The program that the owner runs.
    pub(crate) image: ImageKey,
    /// UDP: this is the first report of the flow.
    pub(crate) is_first: bool,
}

/// Decodes one record. For a sample, `info` returns the answer of sock_diag for the socket's
/// cookie. Without an answer, there is no event.
pub(crate) fn decode(
    bytes: &[u8],
    clock: BootClock,
    info: impl FnOnce(u64) -> Option<SampleInfo>,
) -> Result<Option<Decoded>, Malformed> {
    let sample = |cookie| info(cookie).map(|info| EventKind::Sample { info });
    match u32::read_from_prefix(bytes).map_err(|_| Malformed)?.0 {
        kind::STATE_CHANGE => {
            let is_end = bytes.len() == size_of::<End>();
            let (record, summary) = if is_end {
                let End { change, summary } = read(bytes)?;
                (change, Some(summary))
            } else {
                (read::<StateChange>(bytes)?, None)
            };
            let state = |number| TcpState::from_number(number).ok_or(Malformed);
            let error = i32::try_from(record.error).map_err(|_| Malformed)?;
            let error = (error != 0).then_some(error);
            let (from, to) = (state(record.from)?, state(record.to)?);
            if is_end != (to == TcpState::Close && from != TcpState::Listen) {
                return Err(Malformed);
            }
            let summary = summary.map(|summary| {
                let end = Ending {
                    from,
                    error,
                    summary: &summary,
                };
                Box::new(end.summary(&record.socket, record.head.time))
            });
            let kind = EventKind::StateChange {
                from,
                to,
                error,
                summary,
            };
            tcp(&record.head, &record.socket, kind, clock).map(Some)
        }
        kind::ACCEPT => {
            let record: Tcp = read(bytes)?;
            tcp(&record.head, &record.socket, EventKind::Accept, clock).map(Some)
        }
        kind::CONNECT_FAILED_TCP => {
            let record: Tcp = read(bytes)?;
            let kind = connect_failed(record.socket.error.into())?;
            tcp(&record.head, &record.socket, kind, clock).map(Some)
        }
        kind::CONNECT_FAILED_UDP => {
            let record: Udp = read(bytes)?;
            let kind = connect_failed(record.amount)?;
            udp(&record, kind, clock).map(Some)
        }
        kind @ (kind::RETRANSMIT | kind::RESET_SENT | kind::RESET_RECEIVED) => {
            let record: Anomaly = read(bytes)?;
            let reset = |direction| EventKind::Reset {
                direction,
                reason: ResetReason::from_record(record.what),
            };
            let kind = match kind {
                kind::RETRANSMIT => EventKind::Retransmit {
                    what: retransmission(record.what)?,
                    packets: record.packets,
                    bytes: record.bytes,
                },
                kind::RESET_SENT => reset(ResetDirection::Sent),
                _ => reset(ResetDirection::Received),
            };
            tcp(&record.head, &record.socket, kind, clock).map(Some)
        }
        kind::LISTEN_OVERFLOW => {
            let record: Anomaly = read(bytes)?;
            let kind = EventKind::ListenOverflow;
            tcp(&record.head, &record.socket, kind, clock).map(Some)
        }
        kind::SAMPLE_TCP => {
            let record: Tcp = read(bytes)?;
            let mut kind = sample(record.socket.cookie);
            match &mut kind {
                Some(EventKind::Sample {
                    info: SampleInfo::Tcp(info),
                }) if info.tcp_state() == Some(TcpState::Listen) => {
                    info.drops = Some(record.socket.error);
                }
                _ => {}
            }
            kind.map(|kind| tcp(&record.head, &record.socket, kind, clock))
                .transpose()
        }
        kind::SAMPLE_UDP => {
            let record: Udp = read(bytes)?;
            sample(record.key)
                .map(|kind| udp(&record, kind, clock))
                .transpose()
        }
        kind @ kind::CONNECT..=kind::CLOSE => {
            let record: Udp = read(bytes)?;
            let (bytes, approximate) = (record.amount, record.marks & mark::APPROXIMATE != 0);
            let kind = match kind {
                kind::CONNECT => EventKind::Connect,
                kind::FLOW => EventKind::Flow {
                    approximate,
                    age: Duration::from_nanos(record.head.time.saturating_sub(record.amount)),
                    last: false,
                },
                kind::SEND => EventKind::Send { bytes },
                kind::RECEIVE => EventKind::Receive { bytes },
                _ => EventKind::Close {
                    drops: record.amount,
                    approximate,
                },
            };
            udp(&record, kind, clock).map(Some)
        }
        _ => Err(Malformed),
    }
}

fn retransmission(what: u32) -> Result<Option<Retransmission>, Malformed> {
    Ok(Some(match what {
        retransmission::UNKNOWN => return Ok(None),
        retransmission::TIMEOUT => Retransmission::Timeout,
        retransmission::FAST => Retransmission::Fast,
        retransmission::SYN => Retransmission::Syn,
        retransmission::SYN_ACK => Retransmission::SynAck,
        retransmission::PROBE => Retransmission::Probe,
        _ => return Err(Malformed),
    }))
}

fn connect_failed(errno: u64) -> Result<EventKind, Malformed> {
    match i32::try_from(errno) {
        Ok(error) if error != 0 => Ok(EventKind::ConnectFailed { error }),
        _ => Err(Malformed),
    }
}

fn read<T: FromBytes>(bytes: &[u8]) -> Result<T, Malformed> {
    T::read_from_bytes(bytes).map_err(|_| Malformed)
}

fn tcp(
    head: &Head,
    socket: &TcpSocket,
    kind: EventKind,
    clock: BootClock,
) -> Result<Decoded, Malformed> {
    let mut of_socket = tcp_socket(socket, head.time)?;
    if is_of_listener(&kind) {
        // The kernel's field still has the peer of an earlier connection of the socket.
        of_socket.remote = address(socket.family, [0; 4], 0, None)?;
    }
    let traffic = Traffic {
        tx_bytes: socket.tx_bytes,
        rx_bytes: socket.rx_bytes,
        tx_packets: socket.tx_packets.into(),
        rx_packets: socket.rx_packets.into(),
    };
    let used_by = (&socket.owner, &socket.user);
    Ok(Decoded {
        event: event(head, kind, used_by, of_socket, traffic, clock)?,
        lost_before: head.lost,
        flow: None,
        image: ImageKey::of(&socket.owner),
        is_first: false,
    })
}

fn udp(record: &Udp, kind: EventKind, clock: BootClock) -> Result<Decoded, Malformed> {
    let Udp {
        head,
        key,
        id,
        peer,
        ..
    } = *record;
    let scope = NonZeroU32::new(record.scope);
    let socket = Socket {
        protocol: Protocol::Udp,
        id,
        // The address of a kernel structure is not a cookie.
        cookie: (key >> 63 == 0).then_some(key),
        local: address(peer.family, record.local, record.local_port, scope)?,
        remote: address(peer.family, peer.address, peer.port, scope)?,
        uid: record.uid,
        netns: record.netns,
        netns_cookie: NonZeroU64::new(record.netns_cookie),
        cgroup: record.cgroup,
        device: NonZeroU32::new(record.device),
        age: Duration::from_nanos(head.time.saturating_sub(record.born)),
        older: is_older(record.older)?,
        direction: None,
    };
    let used_by = (&record.owner, &record.user);
    let traffic = traffic(record.traffic);
    Ok(Decoded {
        event: event(&head, kind, used_by, socket, traffic, clock)?,
        lost_before: head.lost,
        flow: Some(FlowKey {
            socket: FlowKey::socket(id, record.local_port),
            peer,
            scope: record.scope,
            local: if record.marks & mark::HIDES_LOCAL == 0 {
                record.local
            } else {
                [0; 4]
            },
        }),
        image: ImageKey::of(&record.owner),
        is_first: record.marks & mark::FIRST != 0,
    })
}

/// Returns the event of a record, whose socket has this owner and this user.
fn event(
    head: &Head,
    kind: EventKind,
    (owner, last): (&Owner, &tcp_udp_trace_common::User),
    socket: Socket,
    traffic: Traffic,
    clock: BootClock,
) -> Result<Event, Malformed> {
    let uptime = clock.uptime(head.time);
    let process = process(owner, clock)?;
    Ok(Event {
        time: clock.wall(uptime),
        uptime,
        kind,
        user: user(last, process.as_ref(), clock),
        process,
        socket,
        traffic,
    })
}

/// Returns the peer of a flow, if its address is valid.
pub(crate) fn peer(key: &FlowKey) -> Option<SocketAddr> {
    let Peer {
        address,
        port,
        family,
    } = key.peer;
    self::address(family, address, port, NonZeroU32::new(key.scope)).ok()
}

/// Returns the local address of a flow.
pub(crate) fn local(key: &FlowKey, words: [u32; 4]) -> Option<SocketAddr> {
    let scope = NonZeroU32::new(key.scope);
    address(key.peer.family, words, key.local_port(), scope).ok()
}

/// Converts the totals of a record.
pub(crate) fn traffic(totals: tcp_udp_trace_common::Traffic) -> Traffic {
    let tcp_udp_trace_common::Traffic {
        tx_bytes,
        rx_bytes,
        tx_packets,
        rx_packets,
    } = totals;
    Traffic {
        tx_bytes,
        rx_bytes,
        tx_packets,
        rx_packets,
    }
}

fn process(owner: &Owner, clock: BootClock) -> Result<Option<Process>, Malformed> {
    let origin = match owner.origin {
        origin::NONE => return Ok(None),
        origin::CREATOR => Origin::Creator,
        origin::ACCEPTOR => Origin::Acceptor,
        origin::USER => Origin::User,
        origin::SNAPSHOT => Origin::Snapshot,
        _ => return Err(Malformed),
    };
    let &Owner {
        pid,
        tid,
        uid,
        ref comm,
        started,
        cgroup,
        ..
    } = owner;
    // On CPUs with a weak memory order, the record may have been read during its write. All its
    // fields were 0 before the write.
    if [u64::from(pid), tid.into(), started].contains(&0) {
        return Ok(None);
    }
    Ok(Some(Process {
        pid,
        tid,
        uid,
        comm: Comm::from_bytes(comm.as_bytes()),
        origin,
        cgroup: (cgroup != 0).then_some(cgroup),
        started: clock.uptime(started),
        details: None,
    }))
}

/// Returns the user of a socket, if it is not the owner.
pub(crate) fn user(
    user: &tcp_udp_trace_common::User,
    owner: Option<&Process>,
    clock: BootClock,
) -> Option<User> {
    let (pid, tid) = (user.pid(), user.thread as u32);
    if pid == 0 || owner.is_some_and(|owner| owner.pid == pid) {
        return None;
    }
    // The record may have been read while programs wrote one or several users.
    (user.check == user.checksum()).then(|| User {
        pid,
        tid,
        uid: user.uid,
        comm: Comm::from_bytes(user.comm.as_bytes()),
        cgroup: (user.cgroup != 0).then_some(user.cgroup),
        started: clock.uptime(user.started),
    })
}

fn is_of_listener(kind: &EventKind) -> bool {
    match kind {
        EventKind::StateChange { from, to, .. } => matches!(
            (from, to),
            (TcpState::Close, TcpState::Listen) | (TcpState::Listen, TcpState::Close)
        ),
        EventKind::Sample {
            info: SampleInfo::Tcp(info),
        } => info.tcp_state() == Some(TcpState::Listen),
        _ => false,
    }
}

fn tcp_socket(socket: &TcpSocket, now: u64) -> Result<Socket, Malformed> {
    let device = NonZeroU32::new(socket.device);
    let addr = |words, port| address(socket.family, words, port, device);
    Ok(Socket {
        protocol: Protocol::Tcp,
        id: socket.id,
        cookie: (socket.cookie != 0).then_some(socket.cookie),
        local: addr(socket.local, socket.local_port)?,
        remote: addr(socket.remote, socket.remote_port)?,
        uid: socket.uid,
        netns: socket.netns,
        netns_cookie: NonZeroU64::new(socket.netns_cookie),
        cgroup: socket.cgroup,
        device,
        age: Duration::from_nanos(now.saturating_sub(socket.born)),
        older: is_older(socket.older)?,
        direction: direction(socket.direction)?,
    })
}

fn direction(number: u8) -> Result<Option<Direction>, Malformed> {
    match number {
        direction::UNKNOWN => Ok(None),
        direction::OUTBOUND => Ok(Some(Direction::Outbound)),
        direction::INBOUND => Ok(Some(Direction::Inbound)),
        direction::LISTENER => Ok(Some(Direction::Listener)),
        _ => Err(Malformed),
    }
}

fn is_older(known: u8) -> Result<Option<bool>, Malformed> {
    match known {
        older::NO => Ok(Some(false)),
        older::YES => Ok(Some(true)),
        older::UNKNOWN => Ok(None),
        _ => Err(Malformed),
    }
}

/// Returns an address. A link-local one belongs to the interface `scope`. An IPv4-mapped IPv6
/// address becomes the IPv4 address.
fn address(
    family: u16,
    words: [u32; 4],
    port: u16,
    scope: Option<NonZeroU32>,
) -> Result<SocketAddr, Malformed> {
    let bytes: [u8; 16] = zerocopy::transmute!(words);
    let ip = match family {
        AF_INET => {
            let [a, b, c, d, ..] = bytes;
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        }
        AF_INET6 => Ipv6Addr::from(bytes).to_canonical(),
        _ => return Err(Malformed),
    };
    Ok(match ip {
        IpAddr::V6(ip) if is_of_a_link(ip) => {
            SocketAddrV6::new(ip, port, 0, scope.map_or(0, NonZeroU32::get)).into()
        }
        ip => SocketAddr::new(ip, port),
    })
}

/// Returns whether the address needs an interface (`__ipv6_addr_needs_scope_id`).
fn is_of_a_link(ip: Ipv6Addr) -> bool {
    const NODE_LOCAL: u16 = 1;
    const LINK_LOCAL: u16 = 2;
    let first = ip.segments()[0];
    ip.is_unicast_link_local()
        || ip.is_multicast() && matches!(first & 0xf, NODE_LOCAL | LINK_LOCAL)
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use zerocopy::FromZeros as _;

    use super::*;
    use crate::event::tcp_info::TcpInfo;

    fn clock() -> BootClock {
        BootClock::new(
            UNIX_EPOCH + Duration::from_secs(1_000),
            Duration::from_secs(10),
        )
    }

    /// Decodes a record that is not a sample.
    fn decode(bytes: &[u8]) -> Result<Decoded, Malformed> {
        let decoded = super::decode(bytes, clock(), |_| None)?;
        Ok(decoded.expect("not a sample"))
    }

    fn record() -> End {
        let mut end = End::new_zeroed();
        let record = &mut end.change;
        record.head = Head {
            kind: kind::STATE_CHANGE,
            lost: 3,
            time: 11_000_000_000,
        };
        record.from = 2;
        record.to = 7;
        record.error = 111;
        record.socket.id = 12;
        record.socket.born = 10_999_999_999;
        record.socket.family = AF_INET;
        record.socket.local[0] = u32::from_ne_bytes([127, 0, 0, 1]);
        record.socket.remote[0] = u32::from_ne_bytes([10, 1, 2, 3]);
        record.socket.local_port = 40_000;
        record.socket.remote_port = 443;
        record.socket.owner.origin = origin::CREATOR;
        record.socket.owner.pid = 4242;
        record.socket.owner.tid = 4243;
        record.socket.owner.started = 5;
        record.socket.owner.comm = zerocopy::transmute!(*b"curl\0\0\0\0\0\0\0\0\0\0\0\0");
        end
    }

    fn words(address: &str) -> [u32; 4] {
        let address: Ipv6Addr = address.parse().expect("an address");
        zerocopy::transmute!(address.octets())
    }

    #[test]
    #[cfg_attr(miri, ignore = "has other words for an errno")]
    fn decodes_a_state_change() {
        let Decoded {
            event,
            lost_before,
            flow,
            ..
        } = decode(record().as_bytes()).expect("a well-formed record");
        assert_eq!((lost_before, flow), (3, None));
        assert_eq!(event.time, UNIX_EPOCH + Duration::from_secs(1_001));
        assert_eq!(
            event.to_string(),
            "1970-01-01T00:16:41.000000000Z tcp 127.0.0.1:40000 > 10.1.2.3:443 \
             SYN_SENT->CLOSE (Connection refused (os error 111)) by refused curl[4242] tx 0 B/0 rx 0 B/0"
        );
        assert_eq!(event.socket.age, Duration::from_nanos(1));
        assert_eq!(event.socket.cookie, None);
        assert!(event.is_end() && !event.is_close());
    }

    #[test]
    fn a_sample_and_its_answer_are_joined_by_the_cookie() {
        let mut record = Tcp::new_zeroed();
        record.head.kind = kind::SAMPLE_TCP;
        record.socket = self::record().change.socket;
        record.socket.cookie = 77;
        let info = SampleInfo::Tcp(Box::default());
        let known = |cookie| (cookie == 77).then(|| info.clone());
        let decoded = super::decode(record.as_bytes(), clock(), known);
        let decoded = decoded.expect("well-formed").expect("known");
        assert_eq!(decoded.event.kind, EventKind::Sample { info: info.clone() });
        assert_eq!(decoded.event.socket.cookie, Some(77));
        record.socket.cookie = 78;
        assert_eq!(super::decode(record.as_bytes(), clock(), known), Ok(None));

        // A listener, whose drops are in the record.
        record.socket.error = 5;
        let info = TcpInfo {
            state: 10,
            ..TcpInfo::default()
        };
        let listener = |_| Some(SampleInfo::Tcp(Box::new(info)));
        let decoded = super::decode(record.as_bytes(), clock(), listener);
        let drops = Some(5);
        let info = SampleInfo::Tcp(Box::new(TcpInfo { drops, ..info }));
        let kind = decoded.expect("well-formed").expect("known").event.kind;
        assert_eq!(kind, EventKind::Sample { info });
    }

    #[test]
    #[cfg_attr(miri, ignore = "has other words for an errno")]
    fn the_addresses_of_a_failed_connect_may_differ_in_family() {
        let mut record = Tcp::new_zeroed();
        record.head.kind = kind::CONNECT_FAILED_TCP;
        record.socket = self::record().change.socket;
        record.socket.family = AF_INET6;
        record.socket.local = words("::ffff:10.1.2.3");
        record.socket.remote = words("::1");
        assert_eq!(decode(record.as_bytes()), Err(Malformed), "no errno");
        record.socket.error = 97;
        let event = decode(record.as_bytes()).expect("well-formed").event;
        assert_eq!(event.kind, EventKind::ConnectFailed { error: 97 });
        let line = event.to_string();
        let expected = "tcp 10.1.2.3:40000 > [::1]:443 connect failed \
                        (Address family not supported by protocol (os error 97)) curl[4242]";
        assert!(line.contains(expected), "{line}");

        let mut record = Udp::new_zeroed();
        record.head.kind = kind::CONNECT_FAILED_UDP;
        record.peer.family = AF_INET;
        record.amount = u64::MAX;
        assert_eq!(decode(record.as_bytes()), Err(Malformed), "no errno");
        record.amount = 101;
        let event = decode(record.as_bytes()).expect("well-formed").event;
        assert_eq!(event.kind, EventKind::ConnectFailed { error: 101 });
        assert!(event.is_lifecycle() && !event.is_end());
    }

    #[test]
    fn age_relative_to_the_tracer_is_decoded() {
        for (written, read) in [
            (older::NO, Some(false)),
            (older::YES, Some(true)),
            (older::UNKNOWN, None),
        ] {
            let mut record = record();
            record.change.socket.older = written;
            let decoded = decode(record.as_bytes()).expect("a well-formed record");
            assert_eq!(decoded.event.socket.older, read);
        }
    }

    #[test]
    fn direction_is_decoded() {
        for (written, read) in [
            (direction::UNKNOWN, None),
            (direction::OUTBOUND, Some(Direction::Outbound)),
            (direction::INBOUND, Some(Direction::Inbound)),
            (direction::LISTENER, Some(Direction::Listener)),
        ] {
            let mut record = record();
            record.change.socket.direction = written;
            let decoded = decode(record.as_bytes()).expect("a well-formed record");
            assert_eq!(decoded.event.socket.direction, read);
        }
    }

    #[test]
    fn a_partly_written_owner_is_none() {
        let check = |clear: fn(&mut Owner)| {
            let mut record = record();
            clear(&mut record.change.socket.owner);
            let decoded = decode(record.as_bytes()).expect("a well-formed record");
            assert_eq!(decoded.event.process, None);
        };
        check(|owner| owner.origin = origin::NONE);
        check(|owner| owner.pid = 0);
        check(|owner| owner.tid = 0);
        check(|owner| owner.started = 0);
    }

    #[test]
    fn a_partly_written_user_and_the_owner_are_none() {
        let of = |pid, comm| {
            let mut user = tcp_udp_trace_common::User {
                thread: tcp_udp_trace_common::User::thread(pid, pid + 1),
                uid: 1000,
                check: 0,
                comm,
                started: 7,
                cgroup: 9,
            };
            user.check = user.checksum();
            user
        };
        let user = |raw| {
            let mut record = record();
            record.change.socket.user = raw;
            decode(record.as_bytes()).expect("well-formed").event.user
        };
        let (one, other) = (of(1, [1, 1]), of(2, [2, 2]));
        let found = user(one).expect("a user");
        assert_eq!((found.pid, found.tid, found.uid), (1, 2, 1000));
        assert_eq!(
            (found.cgroup, found.started),
            (Some(9), Duration::from_nanos(7))
        );
        assert_eq!(user(of(4242, [0; 2])), None, "the owner");
        assert_eq!(user(tcp_udp_trace_common::User::NONE), None);
        // Every mixture of two users.
        let words = |user| -> [u64; 6] { zerocopy::transmute!(user) };
        let (one, other) = (words(one), words(other));
        for mixture in 0..1_u32 << 6 {
            let mixed: [u64; 6] =
                std::array::from_fn(|at| [one, other][(mixture >> at & 1) as usize][at]);
            let is_whole = mixed == one || mixed == other;
            assert_eq!(user(zerocopy::transmute!(mixed)).is_some(), is_whole);
        }
    }

    #[test]
    fn shows_mapped_addresses_as_ipv4() {
        let mapped = words("::ffff:192.0.2.1");
        let v4 = SocketAddr::from(([192, 0, 2, 1], 80));
        assert_eq!(address(AF_INET6, mapped, 80, None), Ok(v4));
        let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, 80));
        assert_eq!(address(AF_INET6, words("::1"), 80, None), Ok(v6));
        assert_eq!(address(0, mapped, 80, None), Err(Malformed));
    }

    #[test]
    fn link_local_addresses_have_the_device_as_scope() {
        let device = NonZeroU32::new(2);
        for (ip, shown) in [
            ("fe80::9", "[fe80::9%2]:80"),
            ("febf::1", "[febf::1%2]:80"),
            ("ff02::fb", "[ff02::fb%2]:80"),
            ("ff12::1", "[ff12::1%2]:80"),
            ("ff01::1", "[ff01::1%2]:80"),
            ("ff05::1", "[ff05::1]:80"),
            ("fec0::1", "[fec0::1]:80"),
            ("2001:db8::1", "[2001:db8::1]:80"),
            ("::ffff:169.254.0.1", "169.254.0.1:80"),
        ] {
            let address = address(AF_INET6, words(ip), 80, device).expect("an address");
            assert_eq!(address.to_string(), shown);
        }
        let unknown = address(AF_INET6, words("fe80::9"), 80, None).expect("an address");
        assert_eq!(unknown.to_string(), "[fe80::9]:80");
    }

    #[test]
    fn only_the_end_of_a_connection_has_a_summary() {
        let mut end = record();
        assert_eq!(decode(end.change.as_bytes()), Err(Malformed));
        end.change.from = 10;
        assert_eq!(decode(end.as_bytes()), Err(Malformed), "a listener");
        assert!(decode(end.change.as_bytes()).is_ok());
        (end.change.from, end.change.to) = (2, 1);
        assert_eq!(decode(end.as_bytes()), Err(Malformed), "not an end");
        assert!(decode(end.change.as_bytes()).is_ok());
    }

    #[test]
    fn rejects_malformed_records() {
        let check = |break_it: fn(&mut StateChange)| {
            let mut record = record();
            break_it(&mut record.change);
            assert_eq!(decode(record.as_bytes()), Err(Malformed));
        };
        check(|r| r.head.kind = 0);
        check(|r| r.head.kind = kind::ACCEPT);
        check(|r| r.from = 0);
        check(|r| r.to = 13);
        check(|r| r.error = u32::MAX);
        check(|r| r.socket.family = 1);
        check(|r| r.socket.owner.origin = 9);
        check(|r| r.socket.older = 3);
        check(|r| r.socket.direction = 4);
    }
}
