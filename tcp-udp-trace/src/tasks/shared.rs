//! The state that the tasks of a tracer, its stream and its handles share.

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
    kernel::{SampleScope, TcpSockets},
    lock::lock,
    pipeline::{pending_samples::PendingSamples, queue::Queue},
    stats::Stats,
};

/// The shared state of a tracer.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) protocol: Protocol,
    pub(crate) queue: Queue,
    pub(crate) samples: Arc<PendingSamples>,
    pub(crate) limits: Limits,
    pub(crate) sample_scope: SampleScope,
    /// `None` after the programs and maps have been removed from the kernel.
    source: Mutex<Option<Source>>,
    hooks: Vec<Hook>,
    /// The counters at that time.
    last: Mutex<Stats>,
    stopping: AtomicBool,
    /// Wakes the reader for work without a record.
    pub(crate) wake: Notify,
    /// The thread of the last round of samples.
    round: Mutex<Option<thread::JoinHandle<()>>>,
}

/// The limits of a round of samples, from the settings.
#[derive(Debug)]
pub(crate) struct Limits {
    /// How many answers of one namespace are kept at a time.
    pub(crate) sockets: usize,
    /// How many samples may be written into the ring in one step, so that they fill neither ring
    /// nor queue.
    pub(crate) step: usize,
}

impl Limits {
    /// `parts` is the number of buffers. The iterator fills one of them.
    pub(super) fn new(config: &Config, parts: usize) -> Self {
        /// The size of the longest record with its header.
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

    /// Returns whether the tracer is to stop.
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

    /// Returns the filter; `None` after the tracer has ended.
    pub(crate) fn filter(&self) -> Option<Filter> {
        self.source().as_ref().map(|source| source.filter().clone())
    }

    /// Lets the reader detach the programs, take the remaining records, and end the stream.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.wake.notify_one();
        self.queue.changed.notify();
    }

    /// Returns whether the tracer ends, so that no new work should begin.
    pub(crate) fn is_over(&self) -> bool {
        self.is_stopping() || self.queue.is_ended()
    }

    /// Removes the programs and maps from the kernel at once.
    pub(crate) fn release(&self) {
        self.stop();
        if let Some(source) = self.source().take() {
            *lock(&self.last) = source.stats();
        }
        // The thread of the round has open files.
        if let Some(round) = self.round().take() {
            // A panic of the thread has been reported already.
            let _ = round.join();
        }
    }

    fn round(&self) -> MutexGuard<'_, Option<thread::JoinHandle<()>>> {
        lock(&self.round)
    }

    /// Runs a round of samples on a thread of its own, unless the tracer is over. The receiver is
    /// notified of the end of the round.
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
                // Before the notification, because this thread must not be the last owner of the
                // shared state.
                drop(shared);
                // There is no receiver if the task was aborted.
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

    /// See [`Kernel::tcp_sockets`](crate::kernel::Kernel::tcp_sockets).
    pub(crate) fn tcp_sockets(&self) -> Option<Arc<TcpSockets>> {
        self.source().as_ref()?.kernel.tcp_sockets()
    }

    /// See [`Kernel::check_gone`](crate::kernel::Kernel::check_gone).
    pub(crate) fn check_gone(&self, address: u64, search: u32) -> io::Result<bool> {
        match &*self.source() {
            Some(source) => source.kernel.check_gone(address, search),
            None => Ok(false),
        }
    }

    /// Opens the iterator over the sockets of the calling thread's network namespace. A read of the
    /// file writes a record of each known socket into the ring, and returns one byte for each.
    pub(crate) fn open_socket_iter(&self) -> io::Result<File> {
        match &mut *self.source() {
            Some(source) => source.kernel.open_socket_iter(),
            None => Err(io::Error::other("the tracer is over")),
        }
    }
}
