//! What is in the kernel, as the reader sees it: records, due totals, losses.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::time::{ClockId, clock_gettime};
use tcp_udp_trace_common::{Counters, kind as record};
use tokio::io::unix::AsyncFd;

use crate::{
    Error, Event, EventKind, Fates, Filter, Kind, LossStage, Protocol, Stats,
    decode::{Decoded, Malformed, decode},
    flows::Flows,
    images::Images,
    kernel::{Kernel, Ring},
    kind::Counts,
    samples::Samples,
    time::BootClock,
};

/// How many records are taken in one go, between two chances for other tasks to run.
pub(super) const BATCH: usize = 256;

#[derive(Debug)]
pub(super) struct Attached {
    pub(super) kernel: Kernel,
    pub(super) ring: AsyncFd<Ring>,
    emitted: Counts,
    filtered: Counts,
    malformed: u64,
    /// Losses in the ring that the stream has been told of.
    lost: u64,
    pub(super) protocol: Protocol,
    flows: Flows,
    samples: Arc<Samples>,
    filter: Filter,
    images: Option<Images>,
}

impl Attached {
    pub(super) fn new(
        kernel: Kernel,
        ring: AsyncFd<Ring>,
        protocol: Protocol,
        flows: Flows,
        samples: Arc<Samples>,
        filter: Filter,
        images: Option<Images>,
    ) -> Self {
        Self {
            kernel,
            ring,
            emitted: Counts::default(),
            filtered: Counts::default(),
            malformed: 0,
            lost: 0,
            protocol,
            flows,
            samples,
            filter,
            images,
        }
    }

    /// All counts but those of the queue and the enrichment.
    pub(super) fn stats(&self) -> Stats {
        let Counters {
            lost: _,
            lost_of,
            lost_pieces: _,
            untracked,
            missed,
            unknown_family,
            untracked_kin,
            unassigned,
        } = self.kernel.counters();
        let rejected = self.kernel.rejected();
        let of = |counts: &[u64; record::COUNT], kind: Kind| {
            kind.records()
                .iter()
                .map(|&r| counts[r as usize])
                .sum::<u64>()
        };
        let kinds = Fates::default().each(|kind, fate| {
            fate.ring_lost = of(&lost_of, kind);
            fate.emitted = self.emitted.of(kind) + fate.ring_lost;
            fate.filtered = self.filtered.of(kind);
            fate.rejected = of(&rejected, kind);
        });
        Stats {
            malformed: self.malformed,
            kinds,
            untracked,
            missed,
            unknown_family,
            untracked_processes: untracked_kin,
            flows_evicted: self.flows.evicted(),
            unassigned,
            recursion_misses: self.kernel.recursion_misses(),
            ..Stats::default()
        }
    }

    /// Whether so little room is left between the programs and the reader that records must not stay
    /// there.
    pub(super) fn is_ring_nearly_full(&mut self) -> bool {
        self.ring.get_mut().is_nearly_full(&self.kernel)
    }

    /// Only what this filter lets pass is reported from now on.
    pub(super) fn set_filter(&mut self, filter: Filter) -> Result<(), Error> {
        self.kernel.set_filter(&filter)?;
        self.filter = filter;
        Ok(())
    }

    pub(super) fn filter(&self) -> &Filter {
        &self.filter
    }

    /// Moves up to [`BATCH`] records to `batch`: how many, and how many of them are samples. Fewer means that the ring is empty.
    pub(super) fn read(&mut self, batch: &mut Vec<Event>) -> (usize, u64) {
        let clock = clock().with_offset(self.kernel.time_offset);
        let Self {
            kernel,
            ring,
            emitted,
            filtered,
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
                        // Before the flows go.
                        shows_flows = !kernel.wants(&event)
                            && flows.any(flow.socket, |event| kernel.wants(event));
                        let stamp = stamp(event.time, event.uptime);
                        // The programs have forgotten the socket.
                        flows.close(flow.socket, kernel, stamp, |flow| {
                            let user = event.user;
                            batch.push(Event { user, ..flow });
                        });
                        batch.push(event);
                    }
                    _ => batch.push(event),
                }
                admit(before, batch, kernel, shows_flows, emitted, filtered);
            };
            if !ring.next(record) {
                return (taken, sampled);
            }
        }
        (BATCH, sampled)
    }

    /// Reports up to [`BATCH`] flows whose date has come, and says how long it is to the next date.
    pub(super) fn report_flows(&mut self, batch: &mut Vec<Event>) -> Option<Duration> {
        let Self {
            kernel,
            flows,
            emitted,
            filtered,
            ..
        } = self;
        // No clock is read where no flow waits for its date, which for TCP is always.
        flows.next_due()?;
        let (now, before) = (boottime(), batch.len());
        let stamp = stamp(clock().wall(now), now);
        flows.report(now, BATCH, kernel, stamp, |event| batch.push(event));
        admit(before, batch, kernel, false, emitted, filtered);
        flows.next_due().map(|due| due.saturating_sub(now))
    }

    /// Reports what nobody will report any more: changed flows, and losses that no record has followed.
    pub(super) fn report_last(&mut self, batch: &mut Vec<Event>) {
        let Self {
            kernel,
            flows,
            emitted,
            filtered,
            ..
        } = self;
        let (now, before) = (boottime(), batch.len());
        flows.finish(kernel, stamp(clock().wall(now), now), |event| {
            batch.push(event)
        });
        admit(before, batch, kernel, false, emitted, filtered);
        let lost = self.kernel.counters().lost;
        self.report_losses(lost as u32, batch);
    }

    /// Tells the stream of losses that no record has followed yet, given how many there were in all, modulo 2³².
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
    }
}

/// Counts what stands in the batch from here on, and takes out again what the filter does not want: user space produces events of UDP that the
/// programs did not decide about. `shows_flows`: the end of a socket is among them, and the filter lets one of its flows pass.
fn admit(
    from: usize,
    batch: &mut Vec<Event>,
    kernel: &Kernel,
    shows_flows: bool,
    emitted: &mut Counts,
    filtered: &mut Counts,
) {
    let mut at = from;
    while let Some(event) = batch.get(at) {
        emitted.add(event);
        let passes = match event.kind {
            EventKind::Close { .. } if shows_flows => kernel.wants_end_of_flows(event),
            EventKind::Flow { .. } | EventKind::Close { .. } => kernel.wants(event),
            _ => true,
        };
        if passes {
            at += 1;
        } else {
            filtered.add(&batch.remove(at));
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

fn read_clock(id: ClockId) -> Duration {
    // Both clocks have been there since before BPF: the error cannot happen.
    clock_gettime(id).map_or(Duration::ZERO, Duration::from)
}

/// The time on the clock of the events.
fn boottime() -> Duration {
    read_clock(ClockId::CLOCK_BOOTTIME)
}

/// The wall clock as it is set now.
fn clock() -> BootClock {
    const LOOKS: usize = 5;
    /// Nobody else has run meanwhile.
    const AT_ONCE: Duration = Duration::from_micros(20);
    let look = || {
        let before = boottime();
        let wall = UNIX_EPOCH + read_clock(ClockId::CLOCK_REALTIME);
        (boottime().saturating_sub(before), wall, before)
    };
    // Somebody else may run between a look at one clock and one at the other: of some pairs, the one that took least.
    let mut best = look();
    for _ in 1..LOOKS {
        if best.0 <= AT_ONCE {
            break;
        }
        best = best.min(look());
    }
    let (_, wall, uptime) = best;
    BootClock::new(wall, uptime)
}
