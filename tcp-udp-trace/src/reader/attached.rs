//! What is in the kernel, as the reader sees it: records, due totals, losses.

use std::{
    fs,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::time::{ClockId, clock_gettime};
use tcp_udp_trace_common::Counters;
use tokio::io::unix::AsyncFd;

use crate::{
    Event, EventKind, LossStage, Protocol, Stats,
    decode::{Decoded, Malformed, decode},
    flows::Flows,
    kernel::{Kernel, Ring},
    samples::Samples,
    time::{BootClock, namespace_offset},
};

/// How many records are taken in one go, between two chances for other tasks to run.
pub(super) const BATCH: usize = 256;

#[derive(Debug)]
pub(super) struct Attached {
    pub(super) kernel: Kernel,
    pub(super) ring: AsyncFd<Ring>,
    decoded: u64,
    malformed: u64,
    /// Losses in the ring that the stream has been told of.
    lost: u64,
    pub(super) protocol: Protocol,
    flows: Flows,
    samples: Arc<Samples>,
    /// Of this process's time namespace.
    time_offset: i64,
}

impl Attached {
    pub(super) fn new(
        kernel: Kernel,
        ring: AsyncFd<Ring>,
        protocol: Protocol,
        flows: Flows,
        samples: Arc<Samples>,
    ) -> Self {
        Self {
            kernel,
            ring,
            decoded: 0,
            malformed: 0,
            lost: 0,
            protocol,
            flows,
            samples,
            // The file tells the namespace of the children, which is that of a process that was started in its own.
            time_offset: namespace_offset(
                &fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default(),
            ),
        }
    }

    pub(super) fn stats(&self) -> Stats {
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
    pub(super) fn read(&mut self, batch: &mut Vec<Event>) -> (usize, u64) {
        let clock = clock().with_offset(self.time_offset);
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
    pub(super) fn report_flows(&mut self, batch: &mut Vec<Event>) -> Option<Duration> {
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
    pub(super) fn report_last(&mut self, batch: &mut Vec<Event>) {
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
    let uptime = boottime();
    BootClock::new(UNIX_EPOCH + read_clock(ClockId::CLOCK_REALTIME), uptime)
}
