//! Tests of shedding, gaps and wake-ups.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Wake,
};

use super::*;
use crate::error::ErrorKind;

fn event(id: u64) -> Event {
    let mut event = Event::gap(
        0,
        LossStage::Ring,
        Protocol::Tcp,
        SystemTime::UNIX_EPOCH,
        Duration::from_nanos(id),
    );
    event.kind = EventKind::Connect;
    event.socket.id = id;
    event
}

fn lifecycle(id: u64) -> Event {
    let mut event = event(id);
    event.kind = EventKind::Accept;
    event
}

/// Returns the counts of delivered, shed and discarded events.
fn totals(queue: &Queue) -> [u64; 3] {
    let Counts {
        delivered,
        shed,
        discarded,
    } = queue.counts();
    [delivered, shed, discarded].map(|counts| counts.total())
}

fn queue(capacity: usize) -> Queue {
    Queue::new(capacity, OverflowPolicy::ShedOldest)
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

/// Returns the ids of the events. A gap is the negative of its count.
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
fn sheds_the_oldest_and_leaves_a_gap() {
    let queue = queue(3);
    queue.push(&mut (1..=5).map(event).collect());
    assert_eq!(drain(&queue), [-2, 3, 4, 5]);
    queue.push(&mut vec![event(6)]);
    assert_eq!(drain(&queue), [6]);
    assert_eq!(totals(&queue), [4, 2, 0]);
}

#[test]
fn a_shed_gap_stays_a_gap() {
    let queue = queue(2);
    queue.push(&mut vec![lost_in_ring(10), event(1), event(2), event(3)]);
    assert_eq!(drain(&queue), [-10, -1, 2, 3]);
    queue.push(&mut vec![lost_in_ring(7), event(4), event(5)]);
    assert_eq!(drain(&queue), [-7, 4, 5]);
    assert_eq!(totals(&queue), [4, 1, 0]);
}

#[test]
fn lifecycle_events_outlive_a_flood() {
    let queue = queue(4);
    queue.push(&mut vec![event(1), lifecycle(2), event(3), lifecycle(4)]);
    queue.push(&mut (5..100).map(event).collect());
    queue.push(&mut vec![lifecycle(100)]);
    // Missing: 1 before 2, 3 before 4, and all of the flood but its last one.
    assert_eq!(drain(&queue), [-1, 2, -1, 4, -94, 99, 100]);
    queue.push(&mut (1..=6).map(lifecycle).collect());
    queue.push(&mut vec![event(7)]);
    // Only lifecycle events: the queue sheds the oldest of them, but none for another event.
    assert_eq!(drain(&queue), [-2, 3, 4, 5, 6, -1]);
    assert_eq!(totals(&queue)[1], 96 + 3);
}

#[test]
fn sheds_the_newest_if_configured() {
    let queue = Queue::new(3, OverflowPolicy::ShedNewest);
    queue.push(&mut (1..=5).map(event).collect());
    assert_eq!(drain(&queue), [1, 2, 3, -2]);
    queue.push(&mut vec![
        event(1),
        event(2),
        event(3),
        lifecycle(4),
        event(5),
    ]);
    assert_eq!(drain(&queue), [1, 2, -1, 4, -1]);
    queue.push(&mut (1..=5).map(lifecycle).collect());
    assert_eq!(drain(&queue), [1, 2, 3, -2]);
}

#[test]
fn gaps_without_an_event_between_them_join() {
    let queue = queue(2);
    queue.push(&mut vec![
        event(1),
        lost_in_ring(10),
        lifecycle(2),
        event(3),
        event(4),
    ]);
    // Event 1 and the ring's ten are one gap. Event 3 is another gap, after 2.
    assert_eq!(drain(&queue), [-10, -1, 2, -1, 4]);
}

#[test]
fn there_are_never_more_gaps_than_events() {
    let queue = queue(8);
    let mixed = |n: u64| match n % 7 {
        0 => lifecycle(n),
        3 => lost_in_ring(1),
        _ => event(n),
    };
    let all = if cfg!(miri) { 200 } else { 10_000 };
    for n in 0..all {
        queue.push(&mut vec![mixed(n)]);
        let state = queue.lock();
        assert!(state.gaps.len() <= state.len() + 1, "{}", state.gaps.len());
    }
    let [_, shed, _] = totals(&queue);
    let mut sum = 0_u64;
    let mut cx = Context::from_waker(Waker::noop());
    while let Poll::Ready(Some(event)) = queue.poll_pop(&mut cx) {
        sum += match event.kind {
            EventKind::Lost { count, .. } => count,
            _ => 1,
        };
    }
    assert_eq!(sum, all);
    let lost_in_ring = all.div_ceil(7);
    assert_eq!(shed + 8 + lost_in_ring, all);
}

#[test]
fn ends_after_the_last_event_and_keeps_the_error() {
    let queue = queue(2);
    queue.push(&mut vec![event(1)]);
    queue.finish(Err(Error::new(ErrorKind::Read, "broken")));
    queue.finish(Ok(()));
    assert!(!queue.is_finished());
    assert_eq!(drain(&queue), [1]);
    assert!(queue.is_finished());
    assert_eq!(
        queue.take_result().map_err(|e| e.kind()),
        Err(ErrorKind::Read)
    );
}

#[test]
fn counts_discarded_events() {
    let queue = queue(2);
    queue.push(&mut vec![event(1), event(2), event(3)]);
    queue.abandon();
    assert_eq!(totals(&queue), [0, 1, 2]);
    // The reader need not wait for a consumer that is gone.
    queue.offer(&mut vec![event(4), lost_in_ring(5), event(6), event(7)]);
    assert_eq!(totals(&queue), [0, 1, 5]);
    assert_eq!(drain(&queue), [0; 0]);
}

#[test]
fn leaves_events_without_room_to_the_reader() {
    let queue = queue(4);
    let mut batch = (1..=7).map(event).collect();
    queue.offer(&mut batch);
    assert_eq!(batch, [event(5), event(6), event(7)]);
    let (reader, wakes) = counting_waker();
    let mut cx = Context::from_waker(&reader);
    assert!(queue.poll_room(&mut cx).is_pending());
    let mut consumer = Context::from_waker(Waker::noop());
    assert!(queue.poll_pop(&mut consumer).is_ready());
    assert_eq!(wakes(), 0, "there is room for one event only");
    assert!(queue.poll_pop(&mut consumer).is_ready());
    assert_eq!(wakes(), 1, "half of the queue is free");
    assert!(queue.poll_room(&mut cx).is_ready());
    queue.offer(&mut batch);
    assert_eq!(batch, [event(7)]);
    assert!(queue.poll_room(&mut cx).is_pending());
    queue.abandon();
    assert_eq!(wakes(), 2, "the consumer is gone");
    assert_eq!(totals(&queue), [2, 0, 4]);
}

/// A waker that counts its wake-ups.
fn counting_waker() -> (Waker, impl Fn() -> usize) {
    struct Count(AtomicUsize);
    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    let count = Arc::new(Count(AtomicUsize::new(0)));
    let waker = Waker::from(Arc::clone(&count));
    (waker, move || count.0.load(Ordering::Relaxed))
}

#[test]
fn wakes_the_consumer_once_per_batch() {
    let (waker, wakes) = counting_waker();
    let queue = queue(8);
    assert!(
        queue
            .poll_pop(&mut Context::from_waker(&waker))
            .is_pending()
    );
    queue.push(&mut vec![event(1), event(2)]);
    queue.push(&mut vec![event(3)]);
    assert_eq!(wakes(), 1);
}
