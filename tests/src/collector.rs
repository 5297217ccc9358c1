//! A tracer that collects the events of a test.

use std::{
    fmt::Write as _,
    num::NonZeroUsize,
    sync::{Arc, Condvar, Mutex, MutexGuard, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{bail, ensure};
use tcp_udp_trace::{
    Buffer, Error, Event, EventKind, Filter, Kind, Stats, TcpState, TcpTracer, TcpTracerBuilder,
    TracerHandle, UdpTracer, UdpTracerBuilder,
};

use crate::{
    actor::Actor,
    any_tracer::{Tracer, collect},
    expected_udp::ObservedUdp,
    netns::Netns,
    observed_tcp::ObservedTcp,
    sample_order::{self, SampleOrder},
    suite::buffer,
    tcp_pair::loopback,
};

/// How long a test waits for its next event. Emulated machines are slow, and some of these events
/// come from timers of the kernel.
const PATIENCE: Duration = Duration::from_secs(60);

/// Room for all events of the machine while a test runs: no event that a test counts may be
/// dropped.
const QUEUE: usize = 1 << 20;
const RING: u32 = 16 << 20;
/// The default interval of samples: every test has samples, whatever its topic is.
const BACKGROUND_INTERVAL: Duration = Duration::from_secs(2);
/// The interval in tests that wait for samples.
pub const SAMPLE_INTERVAL: Duration = Duration::from_millis(300);

/// A running tracer. It collects the events of some network namespaces, at first that of the thread
/// that started it.
#[derive(Debug)]
pub struct Collector {
    shared: Arc<Shared>,
    handle: TracerHandle,
    /// `None` after the thread was joined.
    thread: Option<JoinHandle<anyhow::Result<Stats>>>,
    began: SystemTime,
    ready: SystemTime,
}

#[derive(Debug, Default)]
struct Shared {
    collected: Mutex<Collected>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Collected {
    namespaces: Vec<u32>,
    /// The events without the samples.
    events: Vec<Event>,
    samples: Vec<SampleOrder>,
    /// How many of `events` are the end of a socket.
    closes: usize,
    /// How many events of the whole machine came, without gaps.
    delivered: u64,
    /// How many events the gaps stand for.
    lost: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Collected> {
        self.collected.lock().unwrap()
    }

    fn put(&self, event: Event) {
        let mut collected = self.lock();
        if let EventKind::Lost { count, .. } = event.kind {
            collected.lost += count;
            return;
        }
        collected.delivered += 1;
        if collected.namespaces.contains(&event.socket.netns) {
            if matches!(event.kind, EventKind::Sample { .. }) {
                let position = collected.events.len();
                collected.samples.push(SampleOrder { event, position });
                self.changed.notify_all();
                return;
            }
            // No test waits for the end of a child that was never established: see
            // `ObservedTcp::nothing_else`.
            let is_stillborn = matches!(
                event.kind,
                EventKind::StateChange {
                    from: TcpState::SynRecv,
                    to: TcpState::Close,
                    ..
                }
            );
            collected.closes += usize::from(event.is_end() && !is_stillborn);
            collected.events.push(event);
            self.changed.notify_all();
        }
    }
}

impl Collector {
    /// Starts a tracer that reports all of TCP from now on.
    pub fn start() -> anyhow::Result<Self> {
        Self::start_with(|builder| builder)
    }

    /// Like [`start`](Self::start), with samples at a short interval.
    pub fn start_sampling() -> anyhow::Result<Self> {
        Self::start_with(|builder| builder.sample_interval(SAMPLE_INTERVAL))
    }

    /// Like [`start`](Self::start), with other settings.
    pub fn start_with(
        settings: impl FnOnce(TcpTracerBuilder) -> TcpTracerBuilder + Send + 'static,
    ) -> anyhow::Result<Self> {
        let builder = tcp().queue(QUEUE).ring_bytes(RING);
        Self::spawn(async || {
            settings(builder.sample_interval(BACKGROUND_INTERVAL))
                .start()
                .await
        })
    }

    /// Starts a tracer that reports all of UDP from now on.
    pub fn start_udp() -> anyhow::Result<Self> {
        Self::start_udp_with(|builder| builder)
    }

    /// Like [`start_udp`](Self::start_udp), with other settings.
    pub fn start_udp_with(
        settings: impl FnOnce(UdpTracerBuilder) -> UdpTracerBuilder + Send + 'static,
    ) -> anyhow::Result<Self> {
        let builder = udp().queue(QUEUE).ring_bytes(RING);
        Self::spawn(async || {
            settings(builder.sample_interval(BACKGROUND_INTERVAL))
                .start()
                .await
        })
    }

    fn spawn<T: Tracer>(
        start: impl AsyncFnOnce() -> Result<T, Error> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let namespaces = vec![Netns::current()?.inode()?];
        let shared = Arc::new(Shared {
            collected: Mutex::new(Collected {
                namespaces,
                ..Collected::default()
            }),
            changed: Condvar::new(),
        });
        let began = SystemTime::now();
        let (ready, started) = mpsc::channel();
        let thread = thread::Builder::new().name("trace".into()).spawn({
            let shared = Arc::clone(&shared);
            move || collect(start, |event| shared.put(event), &ready)
        })?;
        match started.recv() {
            Ok(handle) => Ok(Self {
                shared,
                handle,
                thread: Some(thread),
                began,
                ready: SystemTime::now(),
            }),
            Err(_) => match thread.join().unwrap() {
                Ok(stats) => bail!("the tracer ended at once: {stats:?}"),
                Err(error) => Err(error),
            },
        }
    }

    /// Collects the events of this namespace as well.
    pub fn also(&self, netns: u32) {
        self.shared.lock().namespaces.push(netns);
    }

    /// Returns the time at which the tracer was ready, or a little later.
    #[must_use]
    pub fn ready(&self) -> SystemTime {
        self.ready
    }

    /// Returns the handle of the tracer.
    #[must_use]
    pub fn handle(&self) -> &TracerHandle {
        &self.handle
    }

    /// Waits until an event matches.
    pub fn wait_for(&self, what: &str, is_it: impl Fn(&Event) -> bool) -> anyhow::Result<()> {
        self.wait(what, |collected| collected.events.iter().any(&is_it))
    }

    /// Waits for a sample that matches and is wholly younger than the call. The first sample that
    /// comes may hold values that the kernel read before the call.
    pub fn wait_for_sample(
        &self,
        what: &str,
        is_it: impl Fn(&Event) -> bool,
    ) -> anyhow::Result<Event> {
        let now = SystemTime::now();
        let find = |collected: &Collected| {
            let events = collected.samples.iter().map(|sample| &sample.event);
            let mut found = events.filter(|event| event.time > now && is_it(event));
            let first = found.next()?;
            found
                .find(|event| event.socket.id == first.socket.id)
                .cloned()
        };
        self.wait(&format!("sample of {what}"), |collected| {
            find(collected).is_some()
        })?;
        Ok(find(&self.shared.lock()).expect("an earlier wait found it"))
    }

    /// Returns the events so far, without the samples.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        self.shared.lock().events.clone()
    }

    /// Sets the tracer's filter.
    pub fn set_filter(&self, filter: Filter) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        Ok(runtime.block_on(self.handle.set_filter(filter))?)
    }

    /// Lets a process listen until an event comes with its process details. The first events do not
    /// wait for the details for long.
    pub fn details_of(&self, actor: &mut Actor) -> anyhow::Result<Event> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let listener = actor.listen(loopback(false))?;
            actor.close(&listener)?;
            let is_its_end =
                |event: &&Event| event.is_end() && event.socket.local == listener.local;
            self.wait_for("end of a listener", |event| is_its_end(&event))?;
            let collected = self.shared.lock();
            let end = collected
                .events
                .iter()
                .rfind(is_its_end)
                .expect("an earlier wait found it");
            let mut processes = end.process.iter();
            if processes.any(|process| process.details.is_some()) {
                return Ok(end.clone());
            }
        }
        bail!("no details of {}", actor.pid())
    }

    /// Returns the samples so far.
    #[must_use]
    pub fn samples(&self) -> Vec<Event> {
        let collected = self.shared.lock();
        collected
            .samples
            .iter()
            .map(|sample| sample.event.clone())
            .collect()
    }

    /// Waits until this many sockets are closed.
    pub fn wait_closed(&self, closes: usize) -> anyhow::Result<()> {
        self.wait(&format!("{closes} closed sockets"), |collected| {
            collected.closes >= closes
        })
    }

    /// Waits until this many events have come. Returns all events so far.
    pub fn wait_count(&self, events: usize) -> anyhow::Result<Vec<Event>> {
        self.wait(&format!("{events} events"), |collected| {
            collected.events.len() >= events
        })?;
        Ok(self.events())
    }

    /// Ends the tracer, and returns all its events. The tracer's counts must add up, with nothing
    /// lost.
    pub fn finish_all(self) -> anyhow::Result<Vec<Event>> {
        self.finish_in_order(0)
    }

    /// Waits until this many sockets are closed, ends the tracer, and returns its events by socket.
    ///
    /// Everything that the kernel produced until then is among them, so there can be neither more
    /// nor less than expected. The tracer's counts must add up, with nothing lost.
    pub fn finish(self, closes: usize) -> anyhow::Result<ObservedTcp> {
        let began = self.began;
        Ok(ObservedTcp::new(self.finish_in_order(closes)?, began))
    }

    /// Like [`finish`](Self::finish), for UDP.
    pub fn finish_udp(self, closes: usize) -> anyhow::Result<ObservedUdp> {
        let (began, names_every_peer) = (self.began, self.names_every_peer());
        let handle = self.handle.clone();
        let events = self.finish_in_order(closes)?;
        Ok(ObservedUdp::new(
            events,
            began,
            names_every_peer,
            handle.stats(),
        ))
    }

    /// Whether the tracer sees each datagram that an application takes from its socket, on this
    /// kernel. Otherwise the tracer sees only the return value of the call, and reports so: it does
    /// not name a peer whose address the application did not request, and counts merged datagrams
    /// as one.
    #[must_use]
    pub fn names_every_peer(&self) -> bool {
        let hooks = self.handle.hooks();
        let programs = hooks
            .iter()
            .filter(|hook| hook.signal == "receive")
            .flat_map(|hook| &hook.programs);
        let sees =
            |program: &String| program.starts_with("kprobe:") || program.starts_with("fentry:");
        programs.into_iter().any(sees)
    }

    /// Like [`finish`](Self::finish), with the events in the order in which they came.
    pub fn finish_in_order(mut self, closes: usize) -> anyhow::Result<Vec<Event>> {
        self.wait_closed(closes)?;
        let stats = self.stop().expect("it runs").unwrap()?;
        let collected = std::mem::take(&mut *self.shared.lock());
        check(&stats, &collected)?;
        sample_order::check(&collected.samples, &collected.events)?;
        Ok(collected.events)
    }

    /// Ends the tracer, if it still runs.
    fn stop(&mut self) -> Option<thread::Result<anyhow::Result<Stats>>> {
        let thread = self.thread.take()?;
        self.handle.stop();
        Some(thread.join())
    }

    fn wait(&self, what: &str, is_done: impl Fn(&Collected) -> bool) -> anyhow::Result<()> {
        let mut collected = self.shared.lock();
        let mut seen = (collected.events.len(), Instant::now());
        while !is_done(&collected) {
            let changed = self.shared.changed.wait_timeout(collected, PATIENCE);
            collected = changed.unwrap().0;
            // Samples come at all times.
            if collected.events.len() > seen.0 {
                seen = (collected.events.len(), Instant::now());
            }
            if seen.1.elapsed() > PATIENCE && !is_done(&collected) {
                let hooks = self
                    .handle
                    .hooks()
                    .iter()
                    .fold(String::new(), |list, hook| format!("{list} {hook}"));
                let stats = self.handle.stats();
                let events = show(&collected.events);
                bail!("no {what} after {PATIENCE:?}; hooks:{hooks}; {stats:?}; events:{events}");
            }
        }
        Ok(())
    }
}

/// Ends the tracer of a test that failed: other tests would take its BPF objects for theirs.
impl Drop for Collector {
    fn drop(&mut self) {
        drop(self.stop());
    }
}

/// Returns a builder for a TCP tracer of this thread's test.
pub fn tcp() -> TcpTracerBuilder {
    let builder = TcpTracer::builder();
    match buffer() {
        Some(buffer) => builder.buffer(buffer),
        None => builder,
    }
}

/// Returns a builder for a UDP tracer of this thread's test.
pub fn udp() -> UdpTracerBuilder {
    let builder = UdpTracer::builder();
    match buffer() {
        Some(buffer) => builder.buffer(buffer),
        None => builder,
    }
}

/// Returns the setting of `ring_bytes` that gives the records of one CPU this much room.
#[must_use]
pub fn bytes_for_a_cpu(bytes: u32) -> u32 {
    let cpus = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    match buffer() {
        Some(Buffer::Perf) => bytes * cpus as u32,
        _ => bytes,
    }
}

fn check(stats: &Stats, collected: &Collected) -> anyhow::Result<()> {
    check_conservation(stats)?;
    let lost = [
        stats.ring_lost,
        stats.queue_shed,
        stats.malformed,
        stats.discarded,
        collected.lost,
    ];
    ensure!(
        lost == [0; 5],
        "something was lost: {stats:?}, gaps of {}",
        collected.lost
    );
    ensure!(
        stats.delivered == collected.delivered,
        "{} came, but {stats:?}",
        collected.delivered
    );
    Ok(())
}

/// Checks that the final counters of a tracer account for every event.
pub fn check_conservation(stats: &Stats) -> anyhow::Result<()> {
    let Stats {
        emitted,
        delivered,
        ring_lost,
        queue_shed,
        reader_filtered,
        malformed,
        discarded,
        ..
    } = stats;
    ensure!(
        *emitted == delivered + ring_lost + queue_shed + reader_filtered + malformed + discarded,
        "{stats:?} do not add up"
    );
    let mut sum = 0;
    for &kind in Kind::ALL {
        let counts = stats.kinds[kind];
        sum += counts.emitted;
        ensure!(
            counts.emitted
                == counts.delivered
                    + counts.ring_lost
                    + counts.queue_shed
                    + counts.reader_filtered
                    + counts.discarded,
            "{kind} does not add up: {stats:?}"
        );
    }
    ensure!(
        *emitted == sum + malformed,
        "the kinds do not add up: {stats:?}"
    );
    Ok(())
}

/// Returns the kind of an event without the summary of a connection, which differs from tracer to
/// tracer: two tracers read the clock at different moments.
#[must_use]
pub fn without_summary(event: &Event) -> EventKind {
    let mut kind = event.kind.clone();
    if let EventKind::StateChange { summary, .. } = &mut kind {
        *summary = None;
    }
    kind
}

/// Formats events: one a line, the last 200 of them, with the fields that `Display` leaves out.
#[must_use]
pub fn show(events: &[Event]) -> String {
    let hidden = events.len().saturating_sub(200);
    let mut text = if hidden == 0 {
        String::new()
    } else {
        format!("\n  … {hidden} more …")
    };
    for event in &events[hidden..] {
        let socket = &event.socket;
        let _ = write!(
            text,
            "\n  #{} {event}; {:?} {:?}",
            socket.id,
            event.process,
            (socket.uid, socket.netns)
        );
    }
    text
}
