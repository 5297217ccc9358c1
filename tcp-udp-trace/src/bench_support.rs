//! Functions that the micro-benchmarks in `benches/micro.rs` call. They are compiled for the
//! benchmarks only, and are no part of the API.

#![allow(
    clippy::missing_panics_doc,
    reason = "a panic is the report of a failure"
)]

use std::{
    task::{Context, Poll, Waker},
    time::{Duration, UNIX_EPOCH},
};

use tcp_udp_trace_common::{AF_INET, StateChange, Tcp, Udp, kind, origin};
use zerocopy::{FromZeros as _, IntoBytes as _};

use crate::{
    config::OverflowPolicy,
    event::Event,
    pipeline::{clock::BootClock, decode::decode, queue::Queue},
};

/// Returns a record of a state change, as the ring passes it on.
#[must_use]
pub fn state_change() -> Vec<u8> {
    let mut record = StateChange::new_zeroed();
    record.head.kind = kind::STATE_CHANGE;
    (record.from, record.to) = (1, 4);
    record.socket.family = AF_INET;
    record.socket.owner.origin = origin::CREATOR;
    record.socket.owner.comm = zerocopy::transmute!(*b"curl\0\0\0\0\0\0\0\0\0\0\0\0");
    record.as_bytes().to_vec()
}

/// Returns a record of an accept.
#[must_use]
pub fn accept() -> Vec<u8> {
    let mut record = Tcp::new_zeroed();
    record.head.kind = kind::ACCEPT;
    record.socket.family = AF_INET;
    record.as_bytes().to_vec()
}

/// Returns a record of a datagram.
#[must_use]
pub fn send() -> Vec<u8> {
    let mut record = Udp::new_zeroed();
    record.head.kind = kind::SEND;
    record.peer.family = AF_INET;
    record.as_bytes().to_vec()
}

/// Decodes a record that is not a sample's.
#[must_use]
pub fn event(record: &[u8]) -> Event {
    let clock = BootClock::new(UNIX_EPOCH, Duration::ZERO);
    let decoded = decode(record, clock, |_| None);
    decoded.expect("well-formed").expect("not a sample").event
}

/// The queue between the reader and the consumer.
#[derive(Debug)]
pub struct BenchQueue(Queue);

impl BenchQueue {
    /// Makes an empty queue.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self(Queue::new(capacity, OverflowPolicy::ShedOldest))
    }

    /// Appends a batch, as the reader does.
    pub fn push(&self, batch: &mut Vec<Event>) {
        self.0.push(batch);
    }

    /// Takes all events, as the consumer does.
    pub fn take_all(&self, mut take: impl FnMut(Event)) {
        let mut context = Context::from_waker(Waker::noop());
        while let Poll::Ready(Some(event)) = self.0.poll_pop(&mut context) {
            take(event);
        }
    }
}
