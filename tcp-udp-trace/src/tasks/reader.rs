//! The reader task moves records from the ring to the queue.
//!
//! The wake-up is the most expensive part of an event, so the programs wake the reader only if it
//! has armed the wake-up. After a pause, the reader arms it and sleeps. The first record wakes the
//! reader at once. From then on, the reader lets records gather for the latency of the settings,
//! and takes all of them. It arms the wake-up again only after a round without records.

use std::{
    future::{Future, poll_fn},
    io,
    pin::pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::{task, time::sleep};

use super::{
    process_details::Details,
    shared::Shared,
    source::{BATCH, Source},
};
use crate::{
    error::{Error, ErrorKind},
    event::Event,
};

/// The longest sleep of the reader without a wake-up. A record that is written at the instant of
/// the arming may wake no task. So the reader checks once soon, and then rarely.
const FIRST_NAP: Duration = Duration::from_millis(50);
const NAP: Duration = Duration::from_secs(5);

/// How often the reader checks that its programs are still attached, which takes a few microseconds
/// for each program at the cgroup.
const CHECK_AFTER: Duration = Duration::from_secs(1);

/// The programs and maps are removed from the kernel.
struct Gone;

/// The result of a read of the ring.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Drained {
    /// There were no records.
    Nothing,
    /// All records are in the queue.
    All,
    /// The queue is full, and the ring has room. Records stay in the ring.
    HeldUp,
}

pub(super) struct Reader {
    pub(super) shared: Arc<Shared>,
    pub(super) latency: Duration,
    pub(super) details: Option<Details>,
    pub(super) batch: Vec<Event>,
}

/// Ends the queue in every case, so that the consumer does not wait for events that will not come.
impl Drop for Reader {
    fn drop(&mut self) {
        let ended = Error::new(
            ErrorKind::NoRuntime,
            "the runtime was shut down while the tracer was in use",
        );
        self.shared.queue.push(&mut self.batch);
        self.shared.queue.finish(Err(ended));
    }
}

impl Reader {
    pub(super) async fn run(mut self) {
        let result = match self.read_until_stopped().await {
            Ok(()) | Err(None) => Ok(()),
            Err(Some(error)) => Err(error),
        };
        self.blocking(|shared| {
            if let Some(source) = &mut *shared.source() {
                source.kernel.detach();
            }
        })
        .await;
        // `Gone` means that the drop of the tracer has done the work.
        let _ = self.drain_rest(result.is_ok()).await;
        self.blocking(Shared::release).await;
        self.shared.queue.finish(result);
    }

    /// Reads until the tracer stops. `Err(None)`: the tracer was dropped.
    async fn read_until_stopped(&mut self) -> Result<(), Option<Error>> {
        let mut nap = FIRST_NAP;
        let mut checked = Instant::now();
        loop {
            if checked.elapsed() >= CHECK_AFTER {
                checked = Instant::now();
                self.check_attached()?;
            }
            let mut drained = self.drain().await?;
            let mut pause = self.latency;
            if drained == Drained::Nothing {
                self.arm()?;
                // A record may have arrived just before the wake-up was armed.
                drained = self.drain().await?;
                pause = nap;
                nap = NAP;
            }
            if drained != Drained::Nothing {
                nap = FIRST_NAP;
                pause = self.latency;
            }
            if self.shared.is_stopping() {
                return Ok(());
            }
            if drained == Drained::HeldUp {
                self.wait_for_room(FIRST_NAP).await?;
                continue;
            }
            let due = self.on_source(Source::report_flows)?;
            self.complete().await;
            if self.hand_over()? {
                self.wait(due.map_or(pause, |due| pause.min(due))).await?;
            }
        }
    }

    /// Moves records from the ring to the queue until the ring is empty or the queue is full.
    async fn drain(&mut self) -> Result<Drained, Gone> {
        let mut drained = Drained::Nothing;
        loop {
            if !self.hand_over()? {
                return Ok(Drained::HeldUp);
            }
            let (taken, sampled) = self.on_source(Source::read)?;
            self.complete().await;
            let is_handed_over = self.hand_over()?;
            if sampled > 0 {
                self.shared.samples.taken_in(sampled);
                self.shared.queue.changed.notify();
            }
            if !is_handed_over {
                return Ok(Drained::HeldUp);
            }
            if taken > 0 {
                drained = Drained::All;
            }
            if taken < BATCH {
                return Ok(drained);
            }
            task::yield_now().await;
        }
    }

    /// Moves the records that remained when the programs were detached, at the consumer's pace.
    /// After an error, the totals of flows may be wrong, and are not reported.
    async fn drain_rest(&mut self, with_flows: bool) -> Result<(), Gone> {
        while self.drain().await? == Drained::HeldUp {
            self.room().await;
        }
        self.on_source(|source, batch| source.report_last(with_flows, batch))?;
        self.complete().await;
        while !self.hand_over()? {
            self.room().await;
        }
        Ok(())
    }

    /// Adds process details to the events of the batch.
    async fn complete(&mut self) {
        if let Some(details) = &mut self.details {
            details.fill(&mut self.batch).await;
        }
    }

    /// Moves events of the batch to the queue as far as the queue has room. If the ring fills up,
    /// the other events are moved as well, and the queue sheds events. Returns false if events are
    /// left in the batch.
    fn hand_over(&mut self) -> Result<bool, Gone> {
        self.shared.queue.offer(&mut self.batch);
        if self.batch.is_empty() {
            return Ok(true);
        }
        let Some(source) = &mut *self.shared.source() else {
            return Err(Gone);
        };
        if source.is_ring_nearly_full() {
            self.shared.queue.push(&mut self.batch);
        }
        Ok(self.batch.is_empty())
    }

    /// Runs `f`, which may put events into the batch.
    fn on_source<T>(
        &mut self,
        f: impl FnOnce(&mut Source, &mut Vec<Event>) -> T,
    ) -> Result<T, Gone> {
        match &mut *self.shared.source() {
            Some(source) => Ok(f(source, &mut self.batch)),
            None => Err(Gone),
        }
    }

    /// Fails if another process has detached a program. The counts would no longer be right.
    fn check_attached(&mut self) -> Result<(), Option<Error>> {
        let check = |source: &mut Source, _: &mut Vec<Event>| {
            source.kernel.detached().map(|program| {
                let message = format!(
                    "another process has detached the program `{program}` from the cgroup, or has \
                     removed the cgroup: start the tracer again"
                );
                Error::new(ErrorKind::Attach, message)
            })
        };
        match self.on_source(check)? {
            Some(error) => Err(Some(error)),
            None => Ok(()),
        }
    }

    fn arm(&mut self) -> Result<(), Option<Error>> {
        let armed: io::Result<()> = self.on_source(|source, batch| {
            source.kernel.flush_log();
            let lost = source.kernel.arm()?;
            source.report_losses(lost, batch);
            Ok(())
        })?;
        armed.map_err(read_error)
    }

    /// Waits until the queue is at most half full.
    async fn room(&self) {
        poll_fn(|cx| self.shared.queue.poll_room(cx)).await;
    }

    /// Waits until the queue has room, another part of the ring is full, or the time is over.
    async fn wait_for_room(&self, time: Duration) -> Result<(), Option<Error>> {
        let mut wait = pin!(self.wait(time));
        poll_fn(|cx| match self.shared.queue.poll_room(cx) {
            Poll::Ready(()) => Poll::Ready(Ok(())),
            Poll::Pending => wait.as_mut().poll(cx),
        })
        .await
    }

    /// Waits for a wake-up, or until the time is over.
    async fn wait(&self, time: Duration) -> Result<(), Option<Error>> {
        let mut timer = pin!(sleep(time));
        let mut wake = pin!(self.shared.wake.notified());
        poll_fn(|cx| {
            if timer.as_mut().poll(cx).is_ready() || wake.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            self.poll_woken(cx)
        })
        .await
    }

    fn poll_woken(&self, cx: &mut Context<'_>) -> Poll<Result<(), Option<Error>>> {
        match &*self.shared.source() {
            Some(source) => source.ring.poll_read_ready(cx).map(|ready| {
                // Cleared before the read of the ring, so that a later wake-up is a new one.
                ready.map_err(read_error)?.clear_ready();
                Ok(())
            }),
            None => Poll::Ready(Err(None)),
        }
    }

    /// Runs blocking work on a thread of the blocking pool.
    async fn blocking(&self, f: impl FnOnce(&Shared) + Send + 'static) {
        let shared = Arc::clone(&self.shared);
        // It fails only if the runtime is being shut down. Then the drop of the tracer does the
        // work.
        let _ = task::spawn_blocking(move || f(&shared)).await;
    }
}

fn read_error(source: io::Error) -> Option<Error> {
    let message = "reading the buffer of records failed";
    Some(Error::new(ErrorKind::Read, message).with_source(source))
}

impl From<Gone> for Option<Error> {
    fn from(_: Gone) -> Self {
        None
    }
}
