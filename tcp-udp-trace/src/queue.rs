//! The bounded queue between the reader and the consumer.
//!
//! When it is full it sheds the oldest event, as the system that this crate re-implements did; unlike there,
//! what was shed is counted and stands in the stream as [`EventKind::Lost`], where it is missing.

use std::{
    collections::VecDeque,
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use crate::{Error, Event, EventKind, LossStage, progress::Progress};

#[derive(Debug)]
pub(crate) struct Queue {
    state: Mutex<State>,
    /// Told when the queue gets room to spare, and at its end.
    pub(crate) progress: Progress,
}

#[derive(Debug)]
struct State {
    events: VecDeque<Event>,
    capacity: usize,
    /// What was shed from the front and not yet reported.
    gap: Gap,
    counts: Counts,
    consumer: Option<Waker>,
    /// Set when no more events will come.
    end: Option<Result<(), Error>>,
}

/// Events that are missing at the front of the queue.
#[derive(Debug, Default)]
struct Gap {
    queue: u64,
    /// Losses before the queue, whose own `Lost` was shed.
    ring: u64,
    /// The youngest event missing.
    last: Option<Event>,
}

/// What has become of the events so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) delivered: u64,
    pub(crate) shed: u64,
    pub(crate) discarded: u64,
}

impl Queue {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            state: Mutex::new(State {
                events: VecDeque::new(),
                capacity,
                gap: Gap::default(),
                counts: Counts::default(),
                consumer: None,
                end: None,
            }),
            progress: Progress::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No invariant spans a panic: every method leaves the state whole between two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends a batch, shedding the oldest events beyond the capacity, and wakes the consumer.
    pub(crate) fn push(&self, batch: &mut Vec<Event>) {
        if batch.is_empty() {
            return;
        }
        let mut state = self.lock();
        for event in batch.drain(..) {
            if state.events.len() == state.capacity {
                state.shed_oldest();
            }
            state.events.push_back(event);
        }
        let consumer = state.consumer.take();
        drop(state);
        if let Some(consumer) = consumer {
            consumer.wake();
        }
    }

    /// Takes the next event; `None` after the last.
    pub(crate) fn poll_pop(&self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        let mut state = self.lock();
        if let Some(event) = state.pop() {
            let has_room_now = state.events.len() == state.room_to_spare();
            drop(state);
            if has_room_now {
                self.progress.made();
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

    /// No more events will come. Only the first call counts.
    pub(crate) fn finish(&self, result: Result<(), Error>) {
        let mut state = self.lock();
        state.end.get_or_insert(result);
        let consumer = state.consumer.take();
        drop(state);
        self.progress.made();
        if let Some(consumer) = consumer {
            consumer.wake();
        }
    }

    /// Whether events that could come later just as well may come now: the queue is at most half full.
    pub(crate) fn has_room_to_spare(&self) -> bool {
        let state = self.lock();
        state.events.len() <= state.room_to_spare()
    }

    /// Whether no more events will come.
    pub(crate) fn is_ended(&self) -> bool {
        self.lock().end.is_some()
    }

    /// Whether nothing is left and no more will come.
    pub(crate) fn is_finished(&self) -> bool {
        let state = self.lock();
        state.end.is_some() && state.events.is_empty() && state.gap.last.is_none()
    }

    /// Throws away what nobody will take, and gives the error that ended the stream, if one did.
    pub(crate) fn discard(&self) -> Result<(), Error> {
        let mut state = self.lock();
        while let Some(event) = state.events.pop_front() {
            state.counts.discarded += u64::from(!is_lost(&event));
        }
        state.gap = Gap::default();
        state.end.replace(Ok(())).unwrap_or(Ok(()))
    }

    pub(crate) fn counts(&self) -> Counts {
        self.lock().counts
    }
}

impl State {
    /// How many events may be in the queue for it to have room to spare.
    fn room_to_spare(&self) -> usize {
        self.capacity / 2
    }

    fn shed_oldest(&mut self) {
        let Some(event) = self.events.pop_front() else {
            return;
        };
        if let EventKind::Lost { count, .. } = event.kind {
            self.gap.ring += count;
        } else {
            self.gap.queue += 1;
            self.counts.shed += 1;
        }
        self.gap.last = Some(event);
    }

    fn pop(&mut self) -> Option<Event> {
        if let Some(last) = &self.gap.last {
            let lost = |count, stage| Event::lost(count, stage, last);
            if self.gap.ring > 0 {
                let count = mem::take(&mut self.gap.ring);
                return Some(lost(count, LossStage::Ring));
            }
            let event = lost(self.gap.queue, LossStage::Queue);
            self.gap = Gap::default();
            if !matches!(event.kind, EventKind::Lost { count: 0, .. }) {
                return Some(event);
            }
        }
        let event = self.events.pop_front()?;
        self.counts.delivered += u64::from(!is_lost(&event));
        Some(event)
    }
}

fn is_lost(event: &Event) -> bool {
    matches!(event.kind, EventKind::Lost { .. })
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        task::Wake,
        time::{Duration, SystemTime},
    };

    use super::*;
    use crate::{ErrorKind, Protocol};

    fn event(id: u64) -> Event {
        let mut event = Event::gap(
            0,
            LossStage::Ring,
            Protocol::Tcp,
            SystemTime::UNIX_EPOCH,
            Duration::from_nanos(id),
        );
        event.kind = EventKind::Accept;
        event.socket.id = id;
        event
    }

    fn lost_in_ring(count: u64) -> Event {
        Event::gap(
            count,
            LossStage::Ring,
            Protocol::Tcp,
            SystemTime::UNIX_EPOCH,
            Duration::ZERO,
        )
    }

    /// The ids of the events; a gap as the negative of its count.
    fn drain(queue: &Queue) -> Vec<i64> {
        let mut shown = Vec::new();
        let mut cx = Context::from_waker(Waker::noop());
        while let Poll::Ready(Some(event)) = queue.poll_pop(&mut cx) {
            shown.push(match event.kind {
                EventKind::Lost { count, .. } => -(count as i64),
                _ => event.socket.id as i64,
            });
        }
        shown
    }

    #[test]
    fn sheds_the_oldest_and_says_so_where_they_are_missing() {
        let queue = Queue::new(3);
        queue.push(&mut (1..=5).map(event).collect());
        assert_eq!(drain(&queue), [-2, 3, 4, 5]);
        queue.push(&mut vec![event(6)]);
        assert_eq!(drain(&queue), [6]);
        assert_eq!(
            queue.counts(),
            Counts {
                delivered: 4,
                shed: 2,
                discarded: 0
            }
        );
    }

    #[test]
    fn a_shed_gap_stays_a_gap() {
        let queue = Queue::new(2);
        queue.push(&mut vec![lost_in_ring(10), event(1), event(2), event(3)]);
        assert_eq!(drain(&queue), [-10, -1, 2, 3]);
        queue.push(&mut vec![lost_in_ring(7), event(4), event(5)]);
        assert_eq!(drain(&queue), [-7, 4, 5]);
        assert_eq!(
            queue.counts(),
            Counts {
                delivered: 4,
                shed: 1,
                discarded: 0
            }
        );
    }

    #[test]
    fn ends_after_the_last_event_and_keeps_the_error() {
        let queue = Queue::new(2);
        queue.push(&mut vec![event(1)]);
        queue.finish(Err(Error::new(ErrorKind::Read, "broken")));
        queue.finish(Ok(()));
        assert!(!queue.is_finished());
        assert_eq!(drain(&queue), [1]);
        assert!(queue.is_finished());
        assert_eq!(queue.discard().map_err(|e| e.kind()), Err(ErrorKind::Read));
    }

    #[test]
    fn counts_what_is_thrown_away() {
        let queue = Queue::new(2);
        queue.push(&mut vec![event(1), event(2), event(3)]);
        assert!(queue.discard().is_ok());
        assert_eq!(
            queue.counts(),
            Counts {
                delivered: 0,
                shed: 1,
                discarded: 2
            }
        );
    }

    #[test]
    fn wakes_the_consumer_once_a_batch() {
        struct Count(AtomicUsize);
        impl Wake for Count {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(Arc::clone(&count));
        let queue = Queue::new(8);
        assert!(
            queue
                .poll_pop(&mut Context::from_waker(&waker))
                .is_pending()
        );
        queue.push(&mut vec![event(1), event(2)]);
        queue.push(&mut vec![event(3)]);
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
    }
}
