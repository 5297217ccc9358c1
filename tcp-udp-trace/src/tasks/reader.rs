//! The reader task: from the ring to the queue.
//!
//! Waking up is the most expensive thing about an event, so the programs wake the reader only when it asks.
//! After a pause it asks for the next record and sleeps; the first one wakes it at once; from then on it lets records gather
//! for the latency that the user allows, takes them all, and asks again only when a round brought nothing.

use std::{
    future::{Future, poll_fn},
    io,
    pin::pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
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

/// How long the reader sleeps when nothing happens. It does not have to wake at all, but for a record that was
/// being written just while it asked to be woken; so it looks once soon, and then rarely.
const FIRST_NAP: Duration = Duration::from_millis(50);
const NAP: Duration = Duration::from_secs(5);

/// Everything of ours has left the kernel.
struct Gone;

/// How the records that the reader found have ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Drained {
    /// There were none.
    Nothing,
    /// All of them are in the queue.
    All,
    /// The queue is full, and the ring has room: records stay there.
    HeldUp,
}

pub(super) struct Reader {
    pub(super) shared: Arc<Shared>,
    pub(super) latency: Duration,
    pub(super) details: Option<Details>,
    pub(super) batch: Vec<Event>,
}

/// However the task ends, nobody must wait for events that will not come.
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
            Err(Some(source)) => Err(Error::new(
                ErrorKind::Read,
                "reading the buffer of records failed",
            )
            .with_source(source)),
        };
        self.blocking(|shared| {
            if let Some(source) = &mut *shared.source() {
                source.kernel.detach();
            }
        })
        .await;
        // A `Gone` is the work of the tracer's drop, which leaves nothing to do.
        let _ = self.drain_rest().await;
        self.blocking(Shared::release).await;
        self.shared.queue.finish(result);
    }

    /// Reads until told to stop. `Err(None)`: the tracer was dropped.
    async fn read_until_stopped(&mut self) -> Result<(), Option<io::Error>> {
        let mut nap = FIRST_NAP;
        loop {
            let mut drained = self.drain().await?;
            let mut pause = self.latency;
            if drained == Drained::Nothing {
                self.arm()?;
                // A record may have come just before the programs knew that we want to be woken.
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

    /// Moves the records that were there when the programs were detached, at the consumer's pace.
    async fn drain_rest(&mut self) -> Result<(), Gone> {
        while self.drain().await? == Drained::HeldUp {
            self.room().await;
        }
        self.on_source(Source::report_last)?;
        self.complete().await;
        while !self.hand_over()? {
            self.room().await;
        }
        Ok(())
    }

    /// Completes the events of the batch.
    async fn complete(&mut self) {
        if let Some(details) = &mut self.details {
            details.fill(&mut self.batch).await;
        }
    }

    /// Moves the batch to the queue: as far as the queue has room, and the rest too if the ring fills
    /// up, by shedding others. False if events are left in the batch.
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

    fn arm(&mut self) -> Result<(), Option<io::Error>> {
        let armed: io::Result<()> = self.on_source(|source, batch| {
            source.kernel.flush_log();
            let lost = source.kernel.arm()?;
            source.report_losses(lost, batch);
            Ok(())
        })?;
        armed.map_err(Some)
    }

    /// Waits until the queue has room for a while.
    async fn room(&self) {
        poll_fn(|cx| self.shared.queue.poll_room(cx)).await;
    }

    /// Waits until the queue has room, the ring has filled by another part, or the time is over.
    async fn wait_for_room(&self, time: Duration) -> Result<(), Option<io::Error>> {
        let mut wait = pin!(self.wait(time));
        poll_fn(|cx| match self.shared.queue.poll_room(cx) {
            Poll::Ready(()) => Poll::Ready(Ok(())),
            Poll::Pending => wait.as_mut().poll(cx),
        })
        .await
    }

    /// Waits until somebody wakes us, or the time is over.
    async fn wait(&self, time: Duration) -> Result<(), Option<io::Error>> {
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

    fn poll_woken(&self, cx: &mut Context<'_>) -> Poll<Result<(), Option<io::Error>>> {
        match &*self.shared.source() {
            Some(source) => source.ring.poll_read_ready(cx).map(|ready| {
                // Cleared before the ring is read: a wake-up after this is a new one.
                ready.map_err(Some)?.clear_ready();
                Ok(())
            }),
            None => Poll::Ready(Err(None)),
        }
    }

    /// Does what blocks on a thread that may.
    async fn blocking(&self, f: impl FnOnce(&Shared) + Send + 'static) {
        let shared = Arc::clone(&self.shared);
        // It fails only if the runtime is being shut down; then the tracer's drop does the work.
        let _ = task::spawn_blocking(move || f(&shared)).await;
    }
}

impl From<Gone> for Option<io::Error> {
    fn from(_: Gone) -> Self {
        None
    }
}
