//! The reader task: from the ring to the queue.
//!
//! Waking up is the most expensive thing about an event, so the programs wake the reader only when it asks.
//! After a pause it asks for the next record and sleeps; the first one wakes it at once; from then on it lets records gather
//! for the latency that the user allows, takes them all, and asks again only when a round brought nothing.

use std::{
    fs::File,
    future::{Future, poll_fn},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::time::{ClockId, clock_gettime};
use tcp_udp_trace_common::Counters;
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Handle,
    sync::{Notify, oneshot},
    task::{self, JoinHandle},
    time::sleep,
};

use crate::{
    Error, ErrorKind, Event, EventKind, Hook, LossStage, Protocol, Stats,
    builder::Config,
    decode::{Decoded, Malformed, decode},
    details::Details,
    enrich,
    flows::Flows,
    kernel::{Kernel, Ring},
    queue::Queue,
    samples::Samples,
    time::BootClock,
};

/// How many records are taken in one go, between two chances for other tasks to run.
const BATCH: usize = 256;
/// How long the reader sleeps when nothing happens. It does not have to wake at all, but for a record that was
/// being written just while it asked to be woken; so it looks once soon, and then rarely.
const FIRST_NAP: Duration = Duration::from_millis(50);
const NAP: Duration = Duration::from_secs(1);

/// What the tasks, the stream and the handles share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) protocol: Protocol,
    pub(crate) queue: Queue,
    pub(crate) samples: Arc<Samples>,
    pub(crate) limits: Limits,
    /// Whether samples can be taken of other network namespaces than the process's own.
    pub(crate) samples_everywhere: bool,
    /// `None` once everything of ours has left the kernel.
    attached: Mutex<Option<Attached>>,
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
    fn new(config: &Config) -> Self {
        const RECORD: usize = 184;
        let (ring, queue) = (config.ring_bytes as usize, config.queue);
        Self {
            sockets: config.max_sockets as usize,
            step: (ring / RECORD / 8).min(queue / 4).clamp(1, BATCH),
        }
    }
}

#[derive(Debug)]
struct Attached {
    kernel: Kernel,
    ring: AsyncFd<Ring>,
    decoded: u64,
    malformed: u64,
    /// Losses in the ring that the stream has been told of.
    lost: u64,
    protocol: Protocol,
    flows: Flows,
    samples: Arc<Samples>,
}

/// The tasks of a tracer.
#[derive(Debug)]
pub(crate) struct Tasks {
    pub(crate) reader: JoinHandle<()>,
    pub(crate) enrichment: Option<JoinHandle<()>>,
}

/// Everything of ours has left the kernel.
struct Gone;

/// Loads, attaches and starts to read.
pub(crate) async fn start(config: Config) -> Result<(Arc<Shared>, Tasks), Error> {
    let no_runtime = |what| Error::new(ErrorKind::NoRuntime, what);
    let runtime = Handle::try_current().map_err(|source| {
        no_runtime("no Tokio runtime here: call `start` from within one").with_source(source)
    })?;
    let Config {
        protocol,
        queue,
        overflow,
        latency,
        interval,
        sample_interval,
        process_details,
        max_flows,
        ..
    } = config;
    let limits = Limits::new(&config);
    let (kernel, ring) = runtime
        .spawn_blocking(move || Kernel::start(&config))
        .await
        .map_err(|source| {
            no_runtime("the runtime was shut down during the start").with_source(source)
        })??;
    // Tokio panics when its drivers are off, and offers no way to ask.
    let ring = catch_unwind(AssertUnwindSafe(|| {
        drop(sleep(Duration::ZERO));
        #[allow(
            deprecated,
            reason = "its successor is unsafe; the ring owns its descriptor and keeps it open"
        )]
        AsyncFd::with_interest(ring, Interest::READABLE)
    }))
    .map_err(|_| {
        no_runtime("this Tokio runtime has I/O or time disabled: build it with `enable_all`")
    })?
    .map_err(|source| {
        Error::new(ErrorKind::Read, "cannot wait for the ring buffer").with_source(source)
    })?;

    let samples = Arc::new(Samples::default());
    let shared = Arc::new(Shared {
        protocol,
        queue: Queue::new(queue, overflow),
        samples: Arc::clone(&samples),
        limits,
        samples_everywhere: kernel.samples_everywhere(),
        hooks: kernel.hooks().to_vec(),
        attached: Mutex::new(Some(Attached {
            kernel,
            ring,
            decoded: 0,
            malformed: 0,
            lost: 0,
            protocol,
            flows: Flows::new(interval, max_flows as usize),
            samples,
        })),
        last: Mutex::new(Stats::default()),
        stopping: AtomicBool::new(false),
        wake: Notify::new(),
        round: Mutex::new(None),
    });
    let reader = Reader {
        shared: Arc::clone(&shared),
        latency,
        details: process_details.then(Details::default),
        batch: Vec::with_capacity(BATCH),
    };
    let tasks = Tasks {
        reader: runtime.spawn(reader.run()),
        enrichment: sample_interval
            .map(|every| runtime.spawn(enrich::run(Arc::clone(&shared), every))),
    };
    Ok((shared, tasks))
}

impl Shared {
    fn attached(&self) -> MutexGuard<'_, Option<Attached>> {
        // No invariant spans a panic here.
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn hooks(&self) -> &[Hook] {
        &self.hooks
    }

    pub(crate) fn stats(&self) -> Stats {
        let mut stats = match &*self.attached() {
            Some(attached) => attached.stats(),
            None => *self.last.lock().unwrap_or_else(PoisonError::into_inner),
        };
        let counts = self.queue.counts();
        stats.delivered = counts.delivered;
        stats.queue_shed = counts.shed;
        stats.discarded = counts.discarded;
        let samples = self.samples.counts();
        stats.sample_rounds = samples.rounds;
        stats.sample_last_round = samples.last_round;
        stats.sample_faults = samples.faults;
        stats.sample_malformed = samples.malformed;
        stats
    }

    /// Lets the reader detach, take what was already produced, and end the stream.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.wake.notify_one();
        self.queue.progress.made();
    }

    /// Whether the tracer is at its end, and nothing new should begin.
    pub(crate) fn is_over(&self) -> bool {
        self.stopping.load(Ordering::Relaxed) || self.queue.is_ended()
    }

    /// Takes everything of ours out of the kernel, now.
    pub(crate) fn release(&self) {
        self.stop();
        if let Some(attached) = self.attached().take() {
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = attached.stats();
        }
        // What it had open, too.
        if let Some(round) = self.round().take() {
            // A panic there has been reported, and there is nothing to be done about it.
            let _ = round.join();
        }
    }

    fn round(&self) -> MutexGuard<'_, Option<thread::JoinHandle<()>>> {
        // No invariant spans a panic here.
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a round of samples, unless the tracer is over; the receiver hears of its end.
    pub(crate) fn begin_round(self: &Arc<Self>) -> Option<oneshot::Receiver<()>> {
        let mut round = self.round();
        if self.is_over() {
            return None;
        }
        let (end, ended) = oneshot::channel();
        let shared = Arc::clone(self);
        let thread = thread::Builder::new()
            .name("samples".into())
            .spawn(move || {
                enrich::round(&shared);
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
    pub(crate) fn walk(&self) -> io::Result<File> {
        match &mut *self.attached() {
            Some(attached) => attached.kernel.walk(),
            None => Err(io::Error::other("the tracer is over")),
        }
    }
}

impl Attached {
    fn stats(&self) -> Stats {
        let Counters {
            lost,
            untracked,
            missed,
            unknown_family,
        } = self.kernel.counters();
        Stats {
            emitted: self.decoded + self.malformed + lost,
            ring_lost: lost,
            malformed: self.malformed,
            untracked,
            missed,
            unknown_family,
            flows_evicted: self.flows.evicted(),
            recursion_misses: self.kernel.recursion_misses(),
            ..Stats::default()
        }
    }

    /// Moves up to [`BATCH`] records to `batch`: how many, and how many of them are samples. Fewer means that the ring is empty.
    fn read(&mut self, batch: &mut Vec<Event>) -> (usize, u64) {
        let clock = clock();
        let Self {
            kernel,
            ring,
            decoded,
            malformed,
            lost,
            flows,
            samples,
            ..
        } = self;
        let mut sampled = 0;
        let ring = ring.get_mut();
        for taken in 0..BATCH {
            let record = |bytes: &[u8]| {
                let info = |cookie| {
                    sampled += 1;
                    samples.take(cookie)
                };
                let Decoded {
                    event,
                    lost_before,
                    flow,
                } = match decode(bytes, clock, info) {
                    Ok(Some(decoded)) => decoded,
                    Ok(None) => return,
                    Err(Malformed) => {
                        *malformed += 1;
                        return;
                    }
                };
                let gap = new_losses(lost, lost_before);
                if gap > 0 {
                    batch.push(Event::lost(gap, LossStage::Ring, &event));
                }
                if event.is_close() {
                    samples.forget(event.socket.cookie);
                }
                let before = batch.len();
                match (&event.kind, flow) {
                    (EventKind::Flow { .. }, Some(flow)) => {
                        flows.seen(flow, event, kernel, |event| batch.push(event));
                    }
                    (EventKind::Close { .. }, Some(flow)) => {
                        let stamp = stamp(event.time, event.uptime);
                        flows.close(flow.socket, kernel, stamp, |event| batch.push(event));
                        batch.push(event);
                    }
                    _ => batch.push(event),
                }
                *decoded += (batch.len() - before) as u64;
            };
            if !ring.next(record) {
                return (taken, sampled);
            }
        }
        (BATCH, sampled)
    }

    /// Reports up to [`BATCH`] flows whose date has come, and says how long it is to the next date.
    fn report_flows(&mut self, batch: &mut Vec<Event>) -> Option<Duration> {
        let Self {
            kernel,
            flows,
            decoded,
            ..
        } = self;
        // No clock is read where no flow waits for its date, which for TCP is always.
        flows.next_due()?;
        let (now, before) = (boottime(), batch.len());
        let stamp = stamp(clock().wall(now), now);
        flows.report(now, BATCH, kernel, stamp, |event| batch.push(event));
        *decoded += (batch.len() - before) as u64;
        flows.next_due().map(|due| due.saturating_sub(now))
    }

    /// Reports what nobody will report any more: changed flows, and losses that no record has followed.
    fn report_last(&mut self, batch: &mut Vec<Event>) {
        let Self {
            kernel,
            flows,
            decoded,
            ..
        } = self;
        let (now, before) = (boottime(), batch.len());
        flows.finish(kernel, stamp(clock().wall(now), now), |event| {
            batch.push(event)
        });
        *decoded += (batch.len() - before) as u64;
        let lost = self.kernel.counters().lost;
        self.report_losses(lost as u32, batch);
    }

    /// Tells the stream of losses that no record has followed yet, given how many there were in all, modulo 2³².
    fn report_losses(&mut self, lost: u32, batch: &mut Vec<Event>) {
        let gap = new_losses(&mut self.lost, lost);
        if gap > 0 {
            let uptime = boottime();
            batch.push(Event::gap(
                gap,
                LossStage::Ring,
                self.protocol,
                clock().wall(uptime),
                uptime,
            ));
        }
    }
}

/// How many losses are new, given how many there were in all, modulo 2³². None, if that was counted before `known`.
fn new_losses(known: &mut u64, lost: u32) -> u64 {
    let new = lost.wrapping_sub(*known as u32).cast_signed().max(0);
    *known += u64::from(new.unsigned_abs());
    u64::from(new.unsigned_abs())
}

/// Gives an event this time.
fn stamp(time: SystemTime, uptime: Duration) -> impl FnMut(&mut Event) {
    move |event| {
        event.socket.age += uptime.saturating_sub(event.uptime);
        event.time = time;
        event.uptime = uptime;
    }
}

struct Reader {
    shared: Arc<Shared>,
    latency: Duration,
    details: Option<Details>,
    batch: Vec<Event>,
}

/// However the task ends, nobody must wait for events that will not come.
impl Drop for Reader {
    fn drop(&mut self) {
        let ended = Error::new(
            ErrorKind::NoRuntime,
            "the runtime was shut down while the tracer was in use",
        );
        self.shared.queue.finish(Err(ended));
    }
}

impl Reader {
    async fn run(mut self) {
        let result = match self.read_until_stopped().await {
            Ok(()) | Err(None) => Ok(()),
            Err(Some(source)) => Err(
                Error::new(ErrorKind::Read, "reading the ring buffer failed").with_source(source),
            ),
        };
        self.blocking(|shared| {
            if let Some(attached) = &mut *shared.attached() {
                attached.kernel.detach();
            }
        })
        .await;
        if self.drain().await.is_ok() {
            self.with_attached(Attached::report_last)
                .unwrap_or_default();
            self.hand_over().await;
        }
        self.blocking(Shared::release).await;
        self.shared.queue.finish(result);
    }

    /// Reads until told to stop. `Err(None)`: the tracer was dropped.
    async fn read_until_stopped(&mut self) -> Result<(), Option<io::Error>> {
        let mut nap = FIRST_NAP;
        loop {
            let mut taken = self.drain().await?;
            let mut pause = self.latency;
            if taken == 0 {
                self.arm()?;
                self.hand_over().await;
                // A record may have come just before the programs knew that we want to be woken.
                taken = self.drain().await?;
                pause = nap;
                nap = NAP;
            }
            if taken > 0 {
                nap = FIRST_NAP;
                pause = self.latency;
            }
            if self.shared.stopping.load(Ordering::Relaxed) {
                return Ok(());
            }
            let due = self.with_attached(Attached::report_flows)?;
            self.hand_over().await;
            if let Some(due) = due {
                pause = pause.min(due);
            }
            self.wait(pause).await?;
        }
    }

    /// Takes all records that are in the ring, and says how many.
    async fn drain(&mut self) -> Result<usize, Gone> {
        let mut total = 0;
        loop {
            let (taken, sampled) = self.with_attached(Attached::read)?;
            self.hand_over().await;
            if sampled > 0 {
                self.shared.samples.taken_in(sampled);
                self.shared.queue.progress.made();
            }
            total += taken;
            if taken < BATCH {
                return Ok(total);
            }
            task::yield_now().await;
        }
    }

    /// Hands over what is in the batch.
    async fn hand_over(&mut self) {
        if let Some(details) = &mut self.details {
            details.fill(&mut self.batch).await;
        }
        self.shared.queue.push(&mut self.batch);
    }

    /// Runs `f`, which may put events into the batch.
    fn with_attached<T>(
        &mut self,
        f: impl FnOnce(&mut Attached, &mut Vec<Event>) -> T,
    ) -> Result<T, Gone> {
        match &mut *self.shared.attached() {
            Some(attached) => Ok(f(attached, &mut self.batch)),
            None => Err(Gone),
        }
    }

    fn arm(&mut self) -> Result<(), Option<io::Error>> {
        let armed: io::Result<()> = self.with_attached(|attached, batch| {
            attached.kernel.flush_log();
            let lost = attached.kernel.arm()?;
            attached.report_losses(lost, batch);
            Ok(())
        })?;
        armed.map_err(Some)
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
        match &*self.shared.attached() {
            Some(attached) => attached.ring.poll_read_ready(cx).map(|ready| {
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

fn read_clock(id: ClockId) -> Duration {
    // Both clocks have been there since before BPF: the error cannot happen.
    clock_gettime(id).map_or(Duration::ZERO, Duration::from)
}

/// The time on the clock of the kernel's records.
fn boottime() -> Duration {
    read_clock(ClockId::CLOCK_BOOTTIME)
}

/// The wall clock as it is set now.
fn clock() -> BootClock {
    let uptime = boottime();
    BootClock::new(UNIX_EPOCH + read_clock(ClockId::CLOCK_REALTIME), uptime)
}
