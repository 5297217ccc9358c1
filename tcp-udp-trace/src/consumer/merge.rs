//! Two streams as one, in the order of time.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use futures_core::{FusedStream, Stream};
use tokio::{
    runtime::Handle,
    time::{Instant, Sleep, sleep},
};

use crate::event::Event;

/// The default of [`Merge::hold`].
pub const DEFAULT_HOLD: Duration = Duration::from_millis(50);

/// Merges two streams of events, such as those of a [`TcpTracer`](crate::TcpTracer) and a
/// [`UdpTracer`](crate::UdpTracer), into one in the order of [`Event::uptime`].
///
/// # Order
///
/// If both streams have an event, the earlier one comes first. If only one stream has an event, the
/// event waits for an event of the other stream, until it is as old as [`hold`](Merge::hold): the
/// other tracer may not have read an earlier record yet. A consumer that is too slow changes
/// nothing, because the events of both streams are there then.
///
/// So the merged stream is as ordered as each of the two, as long as each event reaches its
/// tracer's queue within `hold`. If it takes longer, because the machine was too busy to run the
/// tracer's reader, the event comes as soon as it is there, after later ones of the other stream.
///
/// One tracer yields its events in the order in which the kernel wrote them. That is nearly the
/// order of their times: a program reads the clock shortly before it writes its record, and another
/// CPU may be faster. The reader stamps the reports of UDP flows that it makes itself, and a record
/// of the same moment may follow.
///
/// # Latency
///
/// While both streams have events, an event waits for the next one of the other stream. While the
/// other stream has none, each event comes `hold` after its time. Outside of a Tokio runtime no
/// event waits.
///
/// # Examples
///
/// ```no_run
/// use tcp_udp_trace::{TcpTracer, UdpTracer, consumer::merge};
///
/// # async fn run() -> Result<(), tcp_udp_trace::Error> {
/// let mut tcp = TcpTracer::builder().start().await?;
/// let mut udp = UdpTracer::builder().start().await?;
/// let mut both = merge(&mut tcp, &mut udp);
/// while let Some(event) = both.next().await {
///     println!("{event}");
/// }
/// tcp.close().await?;
/// udp.close().await?;
/// # Ok(())
/// # }
/// ```
pub fn merge<A, B>(one: A, two: B) -> Merge<A, B>
where
    A: Stream<Item = Event>,
    B: Stream<Item = Event>,
{
    Merge {
        one: Side::new(one),
        two: Side::new(two),
        hold: DEFAULT_HOLD,
        timer: None,
        is_waiting: false,
    }
}

/// Two streams in the order of time, from [`merge`].
///
/// It ends when both streams have ended. It takes one event ahead from each stream, so a drop
/// before the end loses up to two events.
#[derive(Debug)]
#[must_use = "a tracer without a consumer fills its queue"]
pub struct Merge<A, B> {
    one: Side<A>,
    two: Side<B>,
    hold: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    /// Whether the timer runs for the only event that is there.
    is_waiting: bool,
}

/// One of the streams.
#[derive(Debug)]
struct Side<S> {
    stream: S,
    /// Its next event.
    head: Option<Event>,
    is_over: bool,
}

impl<S: Stream<Item = Event> + Unpin> Side<S> {
    fn poll(&mut self, cx: &mut Context<'_>) {
        if self.head.is_some() || self.is_over {
            return;
        }
        if let Poll::Ready(head) = Pin::new(&mut self.stream).poll_next(cx) {
            self.is_over = head.is_none();
            self.head = head;
        }
    }
}

impl<S> Side<S> {
    fn new(stream: S) -> Self {
        Self {
            stream,
            head: None,
            is_over: false,
        }
    }

    fn is_terminated(&self) -> bool {
        self.is_over && self.head.is_none()
    }
}

impl<A, B> Merge<A, B>
where
    A: Stream<Item = Event> + Unpin,
    B: Stream<Item = Event> + Unpin,
{
    /// Sets how old an event becomes at most before it no longer waits for the other stream.
    /// Default [`DEFAULT_HOLD`].
    ///
    /// It should be more than twice the [`latency`](crate::TcpTracerBuilder::latency) of the
    /// tracers, and 50 ms longer with
    /// [`process_details`](crate::TcpTracerBuilder::process_details). With [`Duration::ZERO`] no
    /// event waits.
    pub fn hold(mut self, hold: Duration) -> Self {
        self.hold = hold;
        self
    }

    /// Returns the next event; `None` after the end of both streams.
    ///
    /// # Cancel safety
    ///
    /// A future that is dropped loses no event.
    #[allow(
        clippy::should_implement_trait,
        reason = "it is the `next` of a stream"
    )]
    pub fn next(&mut self) -> impl Future<Output = Option<Event>> + Unpin {
        poll_fn(|cx| Pin::new(&mut *self).poll_next(cx))
    }

    /// Ready when the only event that is there has waited long enough.
    fn poll_hold(&mut self, time: SystemTime, cx: &mut Context<'_>) -> Poll<()> {
        if !self.is_waiting {
            // After a step of the clock, the event may seem to be younger than it is.
            let age = time.elapsed().unwrap_or_default();
            let rest = self.hold.saturating_sub(age);
            if rest.is_zero() || Handle::try_current().is_err() {
                return Poll::Ready(());
            }
            match &mut self.timer {
                Some(timer) => timer.as_mut().reset(Instant::now() + rest),
                None => self.timer = Some(Box::pin(sleep(rest))),
            }
            self.is_waiting = true;
        }
        match &mut self.timer {
            Some(timer) => timer.as_mut().poll(cx),
            None => Poll::Ready(()),
        }
    }
}

impl<A, B> Stream for Merge<A, B>
where
    A: Stream<Item = Event> + Unpin,
    B: Stream<Item = Event> + Unpin,
{
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        let this = &mut *self;
        this.one.poll(cx);
        this.two.poll(cx);
        let takes_one = match (&this.one.head, &this.two.head) {
            (Some(one), Some(two)) => one.uptime <= two.uptime,
            (Some(_), None) if this.two.is_over => true,
            (None, Some(_)) if this.one.is_over => false,
            (Some(only), None) | (None, Some(only)) => {
                let (time, takes_one) = (only.time, this.one.head.is_some());
                match this.poll_hold(time, cx) {
                    Poll::Ready(()) => takes_one,
                    Poll::Pending => return Poll::Pending,
                }
            }
            (None, None) if this.one.is_over && this.two.is_over => return Poll::Ready(None),
            (None, None) => return Poll::Pending,
        };
        this.is_waiting = false;
        Poll::Ready(if takes_one {
            this.one.head.take()
        } else {
            this.two.head.take()
        })
    }
}

impl<A, B> FusedStream for Merge<A, B>
where
    A: Stream<Item = Event> + Unpin,
    B: Stream<Item = Event> + Unpin,
{
    fn is_terminated(&self) -> bool {
        self.one.is_terminated() && self.two.is_terminated()
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use futures_util::{StreamExt as _, stream};

    use super::*;
    use crate::event::{LossStage, Protocol};

    /// Returns an event at this time after the boot, and with this wall clock.
    fn at(protocol: Protocol, uptime: u64, time: SystemTime) -> Event {
        let uptime = Duration::from_millis(uptime);
        Event::gap(1, LossStage::Ring, protocol, time, uptime)
    }

    fn millis(events: &[Event]) -> Vec<u128> {
        events
            .iter()
            .map(|event| event.uptime.as_millis())
            .collect()
    }

    #[tokio::test]
    async fn recorded_streams_are_merged_by_time() {
        let of = |times: &'static [u64]| {
            stream::iter(times.iter().map(|&ms| at(Protocol::Tcp, ms, UNIX_EPOCH)))
        };
        let merged = merge(of(&[1, 4, 9]), of(&[2, 3, 5, 20, 21]));
        let merged: Vec<_> = merged.collect().await;
        assert_eq!(millis(&merged), [1, 2, 3, 4, 5, 9, 20, 21]);
        let mut none = merge(of(&[]), of(&[]));
        assert!(!none.is_terminated() && none.next().await.is_none() && none.is_terminated());
    }

    /// An event waits for a late one of the other stream, but not longer than documented.
    #[tokio::test(start_paused = true)]
    async fn an_event_waits_until_it_is_old_enough() {
        let late = |after: u64, uptime: u64| {
            Box::pin(stream::once(async move {
                sleep(Duration::from_millis(after)).await;
                at(Protocol::Udp, uptime, SystemTime::now())
            }))
        };
        for (after, expected) in [(30, [1, 5]), (70, [5, 1])] {
            let now = stream::iter([at(Protocol::Tcp, 5, SystemTime::now())]);
            let mut merged = merge(now, late(after, 1));
            let begin = Instant::now();
            let first = merged.next().await.expect("an event");
            // The wall clock is not paused, so the event has aged a little before.
            let waited = begin.elapsed();
            assert!(
                waited <= DEFAULT_HOLD && waited >= Duration::from_millis(20),
                "{waited:?}"
            );
            let second = merged.next().await.expect("an event");
            assert_eq!(millis(&[first, second]), expected);
        }
        // An old event, as from a slow consumer, does not wait.
        let old = stream::iter([at(Protocol::Tcp, 5, UNIX_EPOCH)]);
        let mut merged = merge(old, late(30, 1));
        let begin = Instant::now();
        assert_eq!(millis(&[merged.next().await.expect("an event")]), [5]);
        assert_eq!(begin.elapsed(), Duration::ZERO);
    }
}
