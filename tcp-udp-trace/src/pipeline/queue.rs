//! The bounded queue between the reader and the consumer.
//!
//! While the queue is full, the reader keeps its events ([`Queue::offer`]) and waits
//! ([`Queue::poll_room`]). When the buffer behind the reader fills up as well, the reader pushes
//! more events than there is room for ([`Queue::push`]). Then the queue sheds the oldest event, as
//! the system that this crate re-implements did, or the newest event if so configured. Lifecycle
//! events are shed last. Shed events are counted. An [`EventKind::Lost`] stands in the stream at
//! their position.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard},
    task::{Context, Poll, Waker},
    time::{Duration, Instant, SystemTime},
};

use super::thread_notify::ThreadNotify;
use crate::{
    config::OverflowPolicy,
    error::Error,
    event::{Event, EventKind, LossStage, Protocol, kind},
    lock::lock,
};

/// The shortest time between two log lines about shed events.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct Queue {
    state: Mutex<State>,
    /// Notified when the queue has room to spare again, and at its end.
    pub(crate) changed: ThreadNotify,
}

#[derive(Debug)]
struct State {
    /// The events in their order, in two lanes. Lifecycle events outlive floods of the others.
    lifecycle: Lane,
    other: Lane,
    /// The gaps between the events, in their order. Two gaps have an event between them, so there
    /// is at most one gap more than events.
    gaps: VecDeque<Gap>,
    /// The position of the next event.
    next: u64,
    capacity: usize,
    policy: OverflowPolicy,
    counts: Counts,
    logged: Option<Instant>,
    consumer: Option<Waker>,
    /// The waker of the reader, while the reader waits for room.
    reader: Option<Waker>,
    /// The consumer is gone. New events are discarded.
    is_abandoned: bool,
    /// Set when no more events will come.
    end: Option<Result<(), Error>>,
}

/// Events with their positions, in ascending order.
type Lane = VecDeque<(u64, Event)>;

/// A gap: missing events.
#[derive(Debug)]
struct Gap {
    /// The positions of the first and the last missing event.
    first: u64,
    last: u64,
    /// How many events the queue has shed.
    queue: u64,
    /// How many events were lost before the queue.
    ring: u64,
    /// The time and the protocol of the last missing event.
    time: SystemTime,
    uptime: Duration,
    protocol: Protocol,
}

/// The counters of the queue, by kind of event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) delivered: kind::Counts,
    pub(crate) shed: kind::Counts,
    pub(crate) discarded: kind::Counts,
}

impl Queue {
    pub(crate) fn new(capacity: usize, policy: OverflowPolicy) -> Self {
        Self {
            state: Mutex::new(State {
                lifecycle: Lane::new(),
                other: Lane::new(),
                gaps: VecDeque::new(),
                next: 0,
                capacity,
                policy,
                counts: Counts::default(),
                logged: None,
                consumer: None,
                reader: None,
                is_abandoned: false,
                end: None,
            }),
            changed: ThreadNotify::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every method leaves the state consistent between two statements.
        lock(&self.state)
    }

    /// Appends as many events of the batch as there is room for, and wakes the consumer. The other
    /// events stay in the batch.
    pub(crate) fn offer(&self, batch: &mut Vec<Event>) {
        self.append(batch, State::room);
    }

    /// Appends a batch, sheds the events beyond the capacity, and wakes the consumer.
    pub(crate) fn push(&self, batch: &mut Vec<Event>) {
        self.append(batch, |_| usize::MAX);
    }

    fn append(&self, batch: &mut Vec<Event>, room: impl FnOnce(&State) -> usize) {
        if batch.is_empty() {
            return;
        }
        let mut state = self.lock();
        let appended = room(&state).min(batch.len());
        if appended == 0 {
            return;
        }
        let shed_before = state.counts.shed;
        for event in batch.drain(..appended) {
            state.push(event);
        }
        let shed = (state.counts.shed != shed_before)
            .then(|| state.shed_to_log())
            .flatten();
        let consumer = state.consumer.take();
        drop(state);
        if let Some(shed) = shed {
            log::warn!("the consumer is too slow: {shed} events shed so far");
        }
        if let Some(consumer) = consumer {
            consumer.wake();
        }
    }

    /// Returns the next event; `None` after the last one.
    pub(crate) fn poll_pop(&self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        let mut state = self.lock();
        if let Some(event) = state.pop() {
            if state.len() == state.room_to_spare() {
                let reader = state.reader.take();
                drop(state);
                self.changed.notify();
                if let Some(reader) = reader {
                    reader.wake();
                }
            }
            return Poll::Ready(Some(event));
        }
        if state.end.is_some() {
            return Poll::Ready(None);
        }
        if !state
            .consumer
            .as_ref()
            .is_some_and(|waker| waker.will_wake(cx.waker()))
        {
            state.consumer = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Ready when the queue is at most half full, or the consumer is gone. So the reader wakes once
    /// for many events.
    pub(crate) fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.lock();
        if state.is_abandoned || state.len() <= state.room_to_spare() {
            return Poll::Ready(());
        }
        state.reader = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Ends the queue: no more events will come. Only the first call counts.
    pub(crate) fn finish(&self, result: Result<(), Error>) {
        let mut state = self.lock();
        state.end.get_or_insert(result);
        let consumer = state.consumer.take();
        drop(state);
        self.changed.notify();
        if let Some(consumer) = consumer {
            consumer.wake();
        }
    }

    /// Returns whether the queue has room for samples: it is at most half full.
    pub(crate) fn has_room_to_spare(&self) -> bool {
        let state = self.lock();
        state.len() <= state.room_to_spare()
    }

    /// Returns whether no more events will come.
    pub(crate) fn is_ended(&self) -> bool {
        self.lock().end.is_some()
    }

    /// Returns whether the queue is empty and no more events will come.
    pub(crate) fn is_finished(&self) -> bool {
        let state = self.lock();
        state.end.is_some() && state.len() == 0 && state.gaps.is_empty()
    }

    /// Notes that the consumer is gone. Discards the events in the queue, and all later ones.
    pub(crate) fn abandon(&self) {
        let mut state = self.lock();
        state.is_abandoned = true;
        let State {
            lifecycle,
            other,
            counts,
            ..
        } = &mut *state;
        for (_, event) in lifecycle.drain(..).chain(other.drain(..)) {
            counts.discarded.add(&event);
        }
        state.gaps.clear();
        let reader = state.reader.take();
        drop(state);
        self.changed.notify();
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// Returns the error that ended the stream, if there was one. Only the first call returns it.
    pub(crate) fn take_result(&self) -> Result<(), Error> {
        self.lock().end.replace(Ok(())).unwrap_or(Ok(()))
    }

    pub(crate) fn counts(&self) -> Counts {
        self.lock().counts
    }
}

impl State {
    fn len(&self) -> usize {
        self.lifecycle.len() + self.other.len()
    }

    /// Returns how many events can be appended without shedding.
    fn room(&self) -> usize {
        if self.is_abandoned {
            usize::MAX
        } else {
            self.capacity - self.len()
        }
    }

    /// Returns the largest number of events with which the queue has room to spare.
    fn room_to_spare(&self) -> usize {
        self.capacity / 2
    }

    fn push(&mut self, event: Event) {
        let position = self.next;
        self.next += 1;
        if let EventKind::Lost { count, .. } = event.kind {
            if !self.is_abandoned {
                self.miss(position, &event, 0, count);
            }
            return;
        }
        if self.is_abandoned {
            self.counts.discarded.add(&event);
            return;
        }
        let is_lifecycle = event.is_lifecycle();
        if self.len() == self.capacity {
            let victim = match (self.policy, is_lifecycle) {
                (OverflowPolicy::ShedOldest, true) => self
                    .other
                    .pop_front()
                    .or_else(|| self.lifecycle.pop_front()),
                (OverflowPolicy::ShedOldest, false) => self.other.pop_front(),
                (OverflowPolicy::ShedNewest, true) => self.other.pop_back(),
                (OverflowPolicy::ShedNewest, false) => None,
            };
            self.counts
                .shed
                .add(victim.as_ref().map_or(&event, |(_, victim)| victim));
            match victim {
                Some((position, victim)) => self.miss(position, &victim, 1, 0),
                None => return self.miss(position, &event, 1, 0),
            }
        }
        let lane = if is_lifecycle {
            &mut self.lifecycle
        } else {
            &mut self.other
        };
        lane.push_back((position, event));
    }

    /// Notes missing events at this position.
    fn miss(&mut self, position: u64, event: &Event, queue: u64, ring: u64) {
        let (time, uptime) = (event.time, event.uptime);
        let at = self.gaps.partition_point(|gap| gap.last < position);
        let gap = Gap {
            first: position,
            last: position,
            queue,
            ring,
            time,
            uptime,
            protocol: event.socket.protocol,
        };
        self.gaps.insert(at, gap);
        // The later gap first, because its index changes afterwards.
        self.join(at);
        if let Some(before) = at.checked_sub(1) {
            self.join(before);
        }
    }

    /// Joins a gap and the next one, if no event stands between them.
    fn join(&mut self, at: usize) {
        let (Some(gap), Some(next)) = (self.gaps.get(at), self.gaps.get(at + 1)) else {
            return;
        };
        let (after, before) = (gap.last, next.first);
        let is_between = |lane: &Lane| {
            let next = lane.partition_point(|(position, _)| *position < after);
            lane.get(next)
                .is_some_and(|(position, _)| *position < before)
        };
        if is_between(&self.lifecycle) || is_between(&self.other) {
            return;
        }
        let Some(next) = self.gaps.remove(at + 1) else {
            return;
        };
        let gap = &mut self.gaps[at];
        *gap = Gap {
            first: gap.first,
            queue: gap.queue + next.queue,
            ring: gap.ring + next.ring,
            ..next
        };
    }

    fn pop(&mut self) -> Option<Event> {
        let position = |lane: &Lane| lane.front().map_or(u64::MAX, |(position, _)| *position);
        let (lifecycle, other) = (position(&self.lifecycle), position(&self.other));
        if let Some(gap) = self
            .gaps
            .front_mut()
            .filter(|gap| gap.first < lifecycle.min(other))
        {
            let (stage, count) = match gap.ring {
                0 => (LossStage::Queue, gap.queue),
                ring => (LossStage::Ring, ring),
            };
            let event = Event::gap(count, stage, gap.protocol, gap.time, gap.uptime);
            if gap.ring > 0 && gap.queue > 0 {
                gap.ring = 0;
            } else {
                self.gaps.pop_front();
            }
            return Some(event);
        }
        let lane = if lifecycle < other {
            &mut self.lifecycle
        } else {
            &mut self.other
        };
        let (_, event) = lane.pop_front()?;
        self.counts.delivered.add(&event);
        Some(event)
    }

    /// Returns the number of shed events, if it is time to log it again.
    fn shed_to_log(&mut self) -> Option<u64> {
        let now = Instant::now();
        if self
            .logged
            .is_some_and(|logged| now - logged < LOG_INTERVAL)
        {
            return None;
        }
        self.logged = Some(now);
        Some(self.counts.shed.total())
    }
}

#[cfg(test)]
mod tests;
