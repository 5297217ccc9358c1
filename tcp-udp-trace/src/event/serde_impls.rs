//! The JSON form of fields whose types have no suitable form of their own.

use std::{
    ffi::OsString,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
};

use super::escape::{Escaped, unescape};
use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

/// A `SystemTime` as RFC 3339 in UTC with nanoseconds.
pub(crate) mod rfc3339 {
    use super::*;
    use std::time::SystemTime;

    pub(crate) fn serialize<S: Serializer>(time: &SystemTime, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&crate::event::rfc3339::Rfc3339(*time))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<SystemTime, D::Error> {
        let text = String::deserialize(d)?;
        humantime::parse_rfc3339(&text).map_err(D::Error::custom)
    }
}

/// A `Duration` as a number of nanoseconds.
pub(crate) mod nanos {
    use super::*;
    use std::time::Duration;

    pub(crate) fn serialize<S: Serializer>(duration: &Duration, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        u64::deserialize(d).map(Duration::from_nanos)
    }
}

macro_rules! some_duration {
    ($(#[$doc:meta])* $name:ident, $write:ident, $read:ident) => {
        $(#[$doc])*
        pub(crate) mod $name {
            use super::*;
            use std::time::Duration;

            pub(crate) fn serialize<S: Serializer>(
                duration: &Option<Duration>,
                s: S,
            ) -> Result<S::Ok, S::Error> {
                match duration {
                    Some(duration) => {
                        s.serialize_u64(u64::try_from(duration.$write()).unwrap_or(u64::MAX))
                    }
                    None => s.serialize_none(),
                }
            }

            pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
                d: D,
            ) -> Result<Option<Duration>, D::Error> {
                Ok(Option::<u64>::deserialize(d)?.map(Duration::$read))
            }
        }
    };
}

some_duration!(
    /// A `Duration` as a number of nanoseconds, or `null`.
    some_nanos,
    as_nanos,
    from_nanos
);
some_duration!(
    /// A `Duration` as a number of microseconds, or `null`.
    some_micros,
    as_micros,
    from_micros
);

/// Untrusted words, as strings that are safe to show.
pub(crate) mod words {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(words: &[OsString], s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(
            words
                .iter()
                .map(|word| Escaped(word.as_bytes()).to_string()),
        )
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<OsString>, D::Error> {
        let words = Vec::<String>::deserialize(d)?;
        words.iter().map(|word| as_it_was(word)).collect()
    }
}

/// An untrusted path, in the same form.
pub(crate) mod path {
    use super::*;
    use std::path::PathBuf;

    pub(crate) fn serialize<S: Serializer>(
        path: &Option<PathBuf>,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        match path {
            Some(path) => s.collect_str(&Escaped(path.as_os_str().as_bytes())),
            None => s.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        d: D,
    ) -> Result<Option<PathBuf>, D::Error> {
        let path = Option::<String>::deserialize(d)?;
        path.map(|path| as_it_was(&path).map(PathBuf::from))
            .transpose()
    }
}

/// Returns the original bytes of a string that shows them.
fn as_it_was<E: serde::de::Error>(shown: &str) -> Result<OsString, E> {
    let bytes =
        unescape(shown).ok_or_else(|| E::custom("a backslash that is not part of \\xNN"))?;
    Ok(OsString::from_vec(bytes))
}

impl serde::Serialize for super::comm::Comm {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for super::comm::Comm {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        num::{NonZeroU32, NonZeroU64},
        time::{Duration, UNIX_EPOCH},
    };

    use serde_json::{Value, json};

    use crate::{
        event::{
            Direction, Event, EventKind, LossStage, Protocol, ResetDirection, Retransmission,
            Socket, Traffic,
            process::{Origin, Process, User},
            summary::{EndedBy, Summary},
            tcp_state::TcpState,
        },
        stats::Stats,
    };

    fn event(kind: EventKind) -> Event {
        Event {
            time: UNIX_EPOCH + Duration::new(1_769_860_800, 123_456_789),
            uptime: Duration::from_nanos(81_234_567_890),
            kind,
            process: Some(Process {
                pid: 4242,
                tid: 4243,
                uid: 1000,
                comm: "curl".parse().expect("a name"),
                origin: Origin::Creator,
                cgroup: Some(7),
                started: Duration::from_nanos(99),
                details: None,
            }),
            user: Some(User {
                pid: 4300,
                tid: 4301,
                uid: 1001,
                comm: "worker".parse().expect("a name"),
                cgroup: Some(8),
                started: Duration::from_nanos(100),
            }),
            socket: Socket {
                protocol: Protocol::Tcp,
                id: 12,
                cookie: Some(77),
                local: "127.0.0.1:40000".parse().expect("an address"),
                remote: "[fe80::9%2]:443".parse().expect("an address"),
                uid: 1000,
                netns: 4_026_531_840,
                netns_cookie: NonZeroU64::new(5),
                cgroup: 1,
                device: NonZeroU32::new(2),
                age: Duration::from_nanos(1234),
                older: Some(true),
                direction: Some(Direction::Outbound),
            },
            traffic: Traffic {
                tx_bytes: 1,
                rx_bytes: 2,
                tx_packets: 3,
                rx_packets: 4,
            },
        }
    }

    /// Checks that the event's JSON has this `kind`, and that it is read back as the same event.
    fn check(kind: EventKind, expected: Value) {
        let event = event(kind);
        let written = serde_json::to_string(&event).expect("an event can be written");
        let value: Value = serde_json::from_str(&written).expect("JSON");
        assert_eq!(value["kind"], expected);
        let read: Event = serde_json::from_str(&written).expect("the written JSON can be read");
        assert_eq!(read, event);
    }

    #[test]
    fn an_event_has_the_documented_form() {
        let kind = EventKind::StateChange {
            from: TcpState::SynSent,
            to: TcpState::Established,
            error: None,
            summary: None,
        };
        assert_eq!(
            serde_json::to_value(event(kind)).expect("an event can be written"),
            json!({
                "time": "2026-01-31T12:00:00.123456789Z", "uptime_ns": 81_234_567_890_u64,
                "kind": {"type": "state_change", "from": "SYN_SENT", "to": "ESTABLISHED", "error": null, "summary": null},
                "process": {"pid": 4242, "tid": 4243, "uid": 1000, "comm": "curl", "origin": "creator", "cgroup": 7, "started_ns": 99},
                "user": {"pid": 4300, "tid": 4301, "uid": 1001, "comm": "worker", "cgroup": 8, "started_ns": 100},
                "socket": {
                    "protocol": "tcp", "id": 12, "cookie": 77, "local": "127.0.0.1:40000", "remote": "[fe80::9%2]:443",
                    "uid": 1000, "netns": 4_026_531_840_u32, "netns_cookie": 5, "cgroup": 1, "device": 2,
                    "age_ns": 1234, "older": true, "direction": "outbound"
                },
                "traffic": {"tx_bytes": 1, "rx_bytes": 2, "tx_packets": 3, "rx_packets": 4}
            })
        );
    }

    #[test]
    fn every_kind_is_written_and_read_back() {
        let (from, to) = (TcpState::FinWait1, TcpState::Close);
        check(
            EventKind::StateChange {
                from,
                to,
                error: Some(104),
                summary: Some(Box::new(Summary {
                    handshake: Some(Duration::from_nanos(1_001)),
                    established: None,
                    srtt: Some(Duration::from_micros(7)),
                    min_rtt: None,
                    rttvar: Some(Duration::from_micros(3)),
                    retransmitted_packets: 4,
                    retransmitted_bytes: 5,
                    lost_packets: 6,
                    out_of_order: 8,
                    ended_by: Some(EndedBy::PeerReset),
                    reset_reason: None,
                })),
            },
            json!({
                "type": "state_change", "from": "FIN_WAIT1", "to": "CLOSE", "error": 104,
                "summary": {
                    "handshake_ns": 1001, "established_ns": null, "srtt_us": 7, "min_rtt_us": null,
                    "rttvar_us": 3, "retransmitted_packets": 4, "retransmitted_bytes": 5,
                    "lost_packets": 6, "out_of_order": 8, "ended_by": "peer_reset",
                    "reset_reason": null
                }
            }),
        );
        check(
            EventKind::Retransmit {
                what: Some(Retransmission::SynAck),
                packets: 1,
                bytes: 0,
            },
            json!({"type": "retransmit", "what": "syn_ack", "packets": 1, "bytes": 0}),
        );
        check(
            EventKind::Reset {
                direction: ResetDirection::Sent,
                reason: serde_json::from_str("\"TCP_STATE\"").expect("a reason"),
            },
            json!({"type": "reset", "direction": "sent", "reason": "TCP_STATE"}),
        );
        check(
            EventKind::ListenOverflow,
            json!({"type": "listen_overflow"}),
        );
        check(EventKind::Accept, json!({"type": "accept"}));
        check(EventKind::Connect, json!({"type": "connect"}));
        check(
            EventKind::ConnectFailed { error: 101 },
            json!({"type": "connect_failed", "error": 101}),
        );
        check(
            EventKind::Flow {
                approximate: true,
                age: Duration::from_nanos(7),
                last: false,
            },
            json!({"type": "flow", "approximate": true, "age_ns": 7, "last": false}),
        );
        check(
            EventKind::Send { bytes: 9 },
            json!({"type": "send", "bytes": 9}),
        );
        check(
            EventKind::Receive { bytes: 0 },
            json!({"type": "receive", "bytes": 0}),
        );
        check(
            EventKind::Close {
                drops: 3,
                approximate: false,
            },
            json!({"type": "close", "drops": 3, "approximate": false}),
        );
        check(
            EventKind::Lost {
                count: 5,
                stage: LossStage::Queue,
            },
            json!({"type": "lost", "count": 5, "stage": "queue"}),
        );
    }

    #[test]
    fn an_unknown_process_and_a_hostile_name() {
        let mut unknown = event(EventKind::Accept);
        unknown.process = None;
        unknown.socket.cookie = None;
        let value = serde_json::to_value(&unknown).expect("an event can be written");
        assert_eq!(
            (&value["process"], &value["socket"]["cookie"]),
            (&Value::Null, &Value::Null)
        );
        assert_eq!(
            serde_json::from_value::<Event>(value).expect("read back"),
            unknown
        );

        let mut hostile = event(EventKind::Accept);
        if let Some(process) = &mut hostile.process {
            process.comm = super::super::comm::Comm::from_bytes(b"\x1b]0;x\x07\xff\"\\\n");
        }
        let written = serde_json::to_string(&hostile).expect("an event can be written");
        assert!(
            written.bytes().all(|byte| (0x20..0x7f).contains(&byte)),
            "{written}"
        );
        assert_eq!(
            serde_json::from_str::<Event>(&written).expect("read back"),
            hostile
        );
    }

    #[test]
    fn a_socket_without_the_newer_fields_is_read() {
        let mut value = serde_json::to_value(event(EventKind::Accept)).expect("written");
        let socket = value["socket"].as_object_mut().expect("a socket");
        socket.remove("older").expect("it is written");
        socket.remove("direction").expect("it is written");
        socket.remove("device").expect("it is written");
        socket.remove("netns_cookie").expect("it is written");
        let read: Event = serde_json::from_value(value).expect("JSON of version 0.1");
        assert_eq!((read.socket.older, read.socket.device), (None, None));
        assert_eq!(read.socket.direction, None);
        assert_eq!(read.socket.netns_cookie, None);
    }

    #[test]
    fn malformed_json_is_an_error() {
        for text in ["{}", "null", "[]", "{\"kind\":{\"type\":\"no_such\"}}"] {
            assert!(serde_json::from_str::<Event>(text).is_err(), "{text}");
        }
        assert!(serde_json::from_str::<Stats>("{\"emitted\":-1}").is_err());
    }
}
