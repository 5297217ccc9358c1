//! Turns ring records, due flows and losses into events.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::time::{ClockId, clock_gettime};
use tcp_udp_trace_common::{Counters, kind as record};
use tokio::io::unix::AsyncFd;

use crate::{
    error::Error,
    event::{
        Event, EventKind, LossStage, Protocol,
        kind::{Counts, EventCountsByKind, Kind},
    },
    filter::Filter,
    kernel::{Kernel, Ring},
    pipeline::{
        clock::BootClock,
        decode::{Decoded, Malformed, decode},
        flows::Flows,
        images::Images,
        pending_samples::PendingSamples,
    },
    stats::Stats,
};

/// How many records the reader takes before it yields to other tasks.
pub(super) const BATCH: usize = 256;

/// The shortest time between two looks at the CPUs.
const FOLLOW_AFTER: Duration = Duration::from_millis(100);

/// Counts the events that reach user space, by kind.
#[derive(Debug, Default)]
struct Tally {
    emitted: Counts,
    /// The filter has removed them after they were counted as emitted.
    filtered: Counts,
}

/// The source of all events: the kernel side, and the state of the reader.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) kernel: Kernel,
    pub(super) ring: AsyncFd<Ring>,
    tally: Tally,
    malformed: u64,
    /// Losses in the ring that are already in the stream.
    lost: u64,
    /// The losses until the last look at the CPUs, and its time.
    followed: (u64, Option<Instant>),
    pub(super) protocol: Protocol,
    flows: Flows,
    samples: Arc<PendingSamples>,
    filter: Filter,
    images: Option<Images>,
}

impl Source {
    pub(super) fn new(
        kernel: Kernel,
        ring: AsyncFd<Ring>,
        protocol: Protocol,
        flows: Flows,
        samples: Arc<PendingSamples>,
        filter: Filter,
        images: Option<Images>,
    ) -> Self {
        Self {
            kernel,
            ring,
            tally: Tally::default(),
            malformed: 0,
            lost: 0,
            followed: (0, None),
            protocol,
            flows,
            samples,
            filter,
            images,
        }
    }

    /// Returns all counters except those of the queue and the sampler.
    pub(super) fn stats(&self) -> Stats {
        let Counters {
            lost: _,
            lost_of,
            lost_pieces: _,
            untracked,
            missed,
            unknown_family,
            untracked_processes,
            unassigned,
        } = self.kernel.counters();
        let rejected = self.kernel.rejected();
        let of = |counts: &[u64; record::COUNT], kind: Kind| {
            kind.records()
                .iter()
                .map(|&r| counts[r as usize])
                .sum::<u64>()
        };
        let kinds = EventCountsByKind::default().each(|kind, of_kind| {
            of_kind.ring_lost = of(&lost_of, kind);
            of_kind.emitted = self.tally.emitted.of(kind) + of_kind.ring_lost;
            of_kind.reader_filtered = self.tally.filtered.of(kind);
            of_kind.kernel_filtered = of(&rejected, kind);
        });
        Stats {
            malformed: self.malformed,
            kinds,
            untracked,
            missed,
            unknown_family,
            untracked_processes,
            flows_evicted: self.flows.evicted(),
            unassigned,
            recursion_misses: self.kernel.recursion_misses(),
            ..Stats::default()
        }
    }

    /// Returns whether so little room is left in the ring that the reader must take the records.
    pub(super) fn is_ring_nearly_full(&mut self) -> bool {
        self.ring
            .get_mut()
            .is_nearly_full(|| self.kernel.ring_fill())
    }

    /// Replaces the filter.
    pub(super) fn set_filter(&mut self, filter: Filter) -> Result<(), Error> {
        self.kernel.set_filter(&filter)?;
        self.filter = filter;
        Ok(())
    }

    pub(super) fn filter(&self) -> &Filter {
        &self.filter
    }

    /// Moves up to [`BATCH`] records to `batch`. Returns their number, and the number of samples
    /// among them. Fewer than [`BATCH`] means that the ring is empty.
    pub(super) fn read(&mut self, batch: &mut Vec<Event>) -> (usize, u64) {
        self.follow_cpus();
        let clock = clock().with_offset(self.kernel.time_offset);
        let Self {
            kernel,
            ring,
            tally,
            malformed,
            lost,
            flows,
            samples,
            images,
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
                if images.as_mut().is_some_and(|images| images.take(bytes)) {
                    return;
                }
                let Decoded {
                    mut event,
                    lost_before,
                    flow,
                    image,
                    is_first,
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
                if let (Some(process), Some(images)) = (&mut event.process, &mut *images) {
                    process.details = images.of(image);
                }
                if event.is_end() {
                    samples.forget(event.socket.cookie);
                }
                let before = batch.len();
                let mut shows_flows = false;
                match (&event.kind, flow) {
                    (EventKind::Flow { .. }, Some(flow)) => {
                        let stamp = stamp(event.time, event.uptime);
                        let emit = |event| batch.push(event);
                        flows.seen(flow, is_first, event, kernel, stamp, emit);
                    }
                    (EventKind::Close { .. }, Some(flow)) => {
                        // Before the flows are removed.
                        shows_flows = !kernel.passes(&event)
                            && flows.any(flow.id(), |event| kernel.passes(event));
                        let stamp = stamp(event.time, event.uptime);
                        // The programs have forgotten the socket.
                        flows.close(flow.id(), kernel, stamp, |flow| {
                            let user = event.user;
                            batch.push(Event { user, ..flow });
                        });
                        batch.push(event);
                    }
                    _ => batch.push(event),
                }
                admit(before, batch, kernel, shows_flows, tally);
            };
            if !ring.next(record) {
                return (taken, sampled);
            }
        }
        (BATCH, sampled)
    }

    /// Reports up to [`BATCH`] flows that are due, and returns the time until the next one is due.
    pub(super) fn report_flows(&mut self, batch: &mut Vec<Event>) -> Option<Duration> {
        let Self {
            kernel,
            flows,
            tally,
            ..
        } = self;
        // Without a scheduled flow, which is always so for TCP, no clock is read.
        flows.next_due()?;
        let (now, before) = (boottime(), batch.len());
        let stamp = stamp(clock().wall(now), now);
        flows.report(now, BATCH, kernel, stamp, |event| batch.push(event));
        admit(before, batch, kernel, false, tally);
        flows.next_due().map(|due| due.saturating_sub(now))
    }

    /// Makes the last reports of the tracer: changed flows, unless their totals may be wrong, and
    /// losses that no record has followed.
    pub(super) fn report_last(&mut self, with_flows: bool, batch: &mut Vec<Event>) {
        if with_flows {
            self.report_last_flows(batch);
        }
        let lost = self.kernel.counters().lost;
        self.report_losses(lost as u32, batch);
    }

    fn report_last_flows(&mut self, batch: &mut Vec<Event>) {
        let Self {
            kernel,
            flows,
            tally,
            ..
        } = self;
        let (now, before) = (boottime(), batch.len());
        flows.finish(kernel, stamp(clock().wall(now), now), |event| {
            batch.push(event)
        });
        admit(before, batch, kernel, false, tally);
    }

    /// If events were lost, looks for CPUs that have come online.
    fn follow_cpus(&mut self) {
        let (lost, at) = self.followed;
        if lost == self.lost || at.is_some_and(|at| at.elapsed() < FOLLOW_AFTER) {
            return;
        }
        self.followed = (self.lost, Some(Instant::now()));
        self.ring.get_mut().follow_cpus();
    }

    /// Reports losses that no record has followed yet. `lost` is the total, modulo 2³².
    pub(super) fn report_losses(&mut self, lost: u32, batch: &mut Vec<Event>) {
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
        self.follow_cpus();
    }
}

/// Counts the events of the batch from a position on, and removes those that the filter rejects.
/// User space produces some UDP events to which the programs did not apply the filter.
/// `shows_flows`: the end of a socket is among them, and the filter lets one of its flows pass.
fn admit(
    from: usize,
    batch: &mut Vec<Event>,
    kernel: &Kernel,
    shows_flows: bool,
    tally: &mut Tally,
) {
    let mut at = from;
    while let Some(event) = batch.get(at) {
        tally.emitted.add(event);
        let passes = match event.kind {
            EventKind::Close { .. } if shows_flows => kernel.passes_end_of_flows(event),
            EventKind::Flow { .. } | EventKind::Close { .. } => kernel.passes(event),
            _ => true,
        };
        if passes {
            at += 1;
        } else {
            tally.filtered.add(&batch.remove(at));
        }
    }
}

/// Returns the number of new losses. `lost` is the total, modulo 2³². 0 if that total is older than
/// `known`.
fn new_losses(known: &mut u64, lost: u32) -> u64 {
    let new = lost.wrapping_sub(*known as u32).cast_signed().max(0);
    *known += u64::from(new.unsigned_abs());
    u64::from(new.unsigned_abs())
}

/// Returns a function that gives an event this time.
fn stamp(time: SystemTime, uptime: Duration) -> impl FnMut(&mut Event) {
    move |event| {
        event.socket.age += uptime.saturating_sub(event.uptime);
        event.time = time;
        event.uptime = uptime;
    }
}

fn read_clock(id: ClockId) -> Duration {
    // Both clocks are older than BPF, so the error cannot happen.
    clock_gettime(id).map_or(Duration::ZERO, Duration::from)
}

/// Returns the time on the clock of the events.
fn boottime() -> Duration {
    read_clock(ClockId::CLOCK_BOOTTIME)
}

/// Reads the wall clock.
fn clock() -> BootClock {
    const ATTEMPTS: usize = 5;
    /// In so short a time, no other task has run on the CPU.
    const AT_ONCE: Duration = Duration::from_micros(20);
    let sample_clocks = || {
        let before = boottime();
        let wall = UNIX_EPOCH + read_clock(ClockId::CLOCK_REALTIME);
        (boottime().saturating_sub(before), wall, before)
    };
    // Another task may run between the reads of the two clocks. So the fastest of some pairs is
    // used.
    let mut best = sample_clocks();
    for _ in 1..ATTEMPTS {
        if best.0 <= AT_ONCE {
            break;
        }
        best = best.min(sample_clocks());
    }
    let (_, wall, uptime) = best;
    BootClock::new(wall, uptime)
}
