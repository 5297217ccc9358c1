//! Events of invented sockets, for tests.

use std::{
    net::SocketAddr,
    time::{Duration, UNIX_EPOCH},
};

use crate::event::{
    Event, EventKind, LossStage, Protocol, Traffic,
    process::{Origin, Process},
    sample_info::SampleInfo,
    tcp_info::TcpInfo,
    tcp_state::TcpState,
};

/// Returns a gap of a protocol at this second.
pub(super) fn gap(protocol: Protocol, second: u64) -> Event {
    let uptime = Duration::from_secs(second);
    Event::gap(1, LossStage::Queue, protocol, UNIX_EPOCH + uptime, uptime)
}

/// Returns an event of a socket that began at second `born`.
pub(super) fn event(protocol: Protocol, id: u64, [born, now]: [u64; 2], kind: EventKind) -> Event {
    let mut event = gap(protocol, now);
    event.kind = kind;
    event.socket.id = id;
    event.socket.older = Some(false);
    event.socket.age = Duration::from_secs(now - born);
    event
}

pub(super) fn change(from: TcpState, to: TcpState) -> EventKind {
    let (error, summary) = (None, None);
    EventKind::StateChange {
        from,
        to,
        error,
        summary,
    }
}

pub(super) fn retransmit() -> EventKind {
    EventKind::Retransmit {
        what: None,
        packets: 1,
        bytes: 1,
    }
}

pub(super) fn sample() -> EventKind {
    let info = TcpInfo {
        state: TcpState::Established as u8,
        ..TcpInfo::default()
    };
    EventKind::Sample {
        info: SampleInfo::Tcp(Box::new(info)),
    }
}

/// Returns the kind of a flow's report that comes this many seconds after its first datagram.
pub(super) fn flow(age: u64, last: bool) -> EventKind {
    EventKind::Flow {
        approximate: false,
        age: Duration::from_secs(age),
        last,
    }
}

pub(super) fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

pub(super) fn process(pid: u32) -> Process {
    Process {
        pid,
        tid: pid,
        uid: 0,
        comm: "test".parse().expect("a name"),
        origin: Origin::Creator,
        cgroup: None,
        started: Duration::ZERO,
        details: None,
    }
}

/// Returns traffic whose four numbers are this one.
pub(super) fn traffic(number: u64) -> Traffic {
    Traffic {
        tx_bytes: number,
        rx_bytes: number,
        tx_packets: number,
        rx_packets: number,
    }
}

/// Random numbers, the same in each run.
pub(super) struct Random(pub(super) u64);

impl Random {
    /// Returns a number below `end`.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % end
    }

    /// Returns true once in `times`.
    pub(super) fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}
