//! What the tasks of a tracer, its stream and its handles share.

use std::{
    fs::File,
    io,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use tokio::sync::{Notify, oneshot};

use super::source::Source;
use crate::{
    config::Config,
    error::{Error, ErrorKind},
    event::Protocol,
    filter::Filter,
    hook::Hook,
    kernel::SampleScope,
    lock::lock,
    pipeline::{pending_samples::PendingSamples, queue::Queue},
    stats::Stats,
};

/// See the module.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) protocol: Protocol,
    pub(crate) queue: Queue,
    pub(crate) samples: Arc<PendingSamples>,
    pub(crate) limits: Limits,
    pub(crate) sample_scope: SampleScope,
    /// `None` once everything of ours has left the kernel.
    source: Mutex<Option<Source>>,
    hooks: Vec<Hook>,
    /// The counts when everything left the kernel.
    last: Mutex<Stats>,
    stopping: AtomicBool,
    /// There is something for the reader to do, though no record has woken it.
    pub(crate) wake: Notify,
    /// The thread of the round of samples that was begun last.
    round: Mutex<Option<thread::JoinHandle<()>>>,
}

/// What the settings mean for a round of samples.
#[derive(Debug)]
pub(crate) struct Limits {
    /// How many sockets of a namespace may be known at a time.
    pub(crate) sockets: usize,
    /// How many may be written into the ring in one go: neither that nor the queue shall be filled by them.
    pub(crate) step: usize,
}

impl Limits {
    /// `parts` is how many parts the ring has, of which a walk fills one.
    pub(super) fn new(config: &Config, parts: usize) -> Self {
        /// The longest, with its header.
        const RECORD: usize = 8 + size_of::<tcp_udp_trace_common::Udp>();
        let (ring, queue) = (config.ring_bytes as usize / parts, config.queue);
        Self {
            sockets: config.max_sockets as usize,
            step: (ring / RECORD / 8).min(queue / 4).max(1),
        }
    }
}

impl Shared {
    pub(super) fn new(
        queue: Queue,
        limits: Limits,
        samples: Arc<PendingSamples>,
        source: Source,
    ) -> Self {
        Self {
            protocol: source.protocol,
            queue,
            samples,
            limits,
            sample_scope: source.kernel.sample_scope(),
            hooks: source.kernel.hooks().to_vec(),
            source: Mutex::new(Some(source)),
            last: Mutex::new(Stats::default()),
            stopping: AtomicBool::new(false),
            wake: Notify::new(),
            round: Mutex::new(None),
        }
    }

    /// Whether it was told to come to its end.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    pub(super) fn source(&self) -> MutexGuard<'_, Option<Source>> {
        lock(&self.source)
    }

    pub(crate) fn hooks(&self) -> &[Hook] {
        &self.hooks
    }

    pub(crate) fn stats(&self) -> Stats {
        let stats = match &*self.source() {
            Some(source) => source.stats(),
            None => *lock(&self.last),
        };
        let counts = self.queue.counts();
        let kinds = stats.kinds.each(|kind, of_kind| {
            of_kind.delivered = counts.delivered.of(kind);
            of_kind.queue_shed = counts.shed.of(kind);
            of_kind.discarded = counts.discarded.of(kind);
        });
        let mut stats = stats.with_kinds(kinds);
        let samples = self.samples.counts();
        stats.sample_rounds = samples.rounds;
        stats.sample_last_round = samples.last_round;
        stats.sample_faults = samples.faults;
        stats.sample_malformed = samples.malformed;
        stats
    }

    /// Blocks for some milliseconds.
    pub(crate) fn set_filter(&self, filter: Filter) -> Result<(), Error> {
        match &mut *self.source() {
            Some(source) => source.set_filter(filter),
            None => Err(Error::new(ErrorKind::Ended, "the tracer has ended")),
        }
    }

    /// The filter, while the tracer runs.
    pub(crate) fn filter(&self) -> Option<Filter> {
        self.source().as_ref().map(|source| source.filter().clone())
    }

    /// Lets the reader detach, take what was already produced, and end the stream.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.wake.notify_one();
        self.queue.changed.notify();
    }

    /// Whether the tracer is at its end, and nothing new should begin.
    pub(crate) fn is_over(&self) -> bool {
        self.is_stopping() || self.queue.is_ended()
    }

    /// Takes everything of ours out of the kernel, now.
    pub(crate) fn release(&self) {
        self.stop();
        if let Some(source) = self.source().take() {
            *lock(&self.last) = source.stats();
        }
        // What it had open, too.
        if let Some(round) = self.round().take() {
            // A panic there has been reported, and there is nothing to be done about it.
            let _ = round.join();
        }
    }

    fn round(&self) -> MutexGuard<'_, Option<thread::JoinHandle<()>>> {
        lock(&self.round)
    }

    /// Runs a round of samples on a thread of its own, unless the tracer is over; the receiver hears of its end.
    pub(crate) fn begin_round(
        self: &Arc<Self>,
        run: impl FnOnce(&Self) + Send + 'static,
    ) -> Option<oneshot::Receiver<()>> {
        let mut round = self.round();
        if self.is_over() {
            return None;
        }
        let (end, ended) = oneshot::channel();
        let shared = Arc::clone(self);
        let thread = thread::Builder::new()
            .name("samples".into())
            .spawn(move || {
                run(&shared);
                // Before the other end hears of it: the last owner of all this must not be this thread.
                drop(shared);
                // Nobody listens any more if the task was ended.
                let _ = end.send(());
            });
        match thread {
            Ok(thread) => *round = Some(thread),
            Err(error) => {
                self.samples.count(|counts| counts.faults += 1);
                log::warn!("no thread for a round of samples: {error}");
            }
        }
        Some(ended)
    }

    /// Opens a walk through the sockets of the calling thread's network namespace: each that is known is written into the ring when
    /// the file is read, and is a byte there.
    pub(crate) fn open_socket_iter(&self) -> io::Result<File> {
        match &mut *self.source() {
            Some(source) => source.kernel.open_socket_iter(),
            None => Err(io::Error::other("the tracer is over")),
        }
    }
}
