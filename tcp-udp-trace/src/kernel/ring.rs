//! The buffers between the programs and the reader.

use std::os::fd::{AsRawFd, RawFd};

use aya::{
    Ebpf,
    maps::{Array, Map, MapData, MapType, RingBuf},
    sys::is_map_supported,
};

use tcp_udp_trace_common::Head;
use zerocopy::FromBytes as _;

use super::{
    errors,
    maps::{SHARE, take_map},
    perf::Perf,
};
use crate::{
    config::{Buffer, Config},
    error::{Error, ErrorKind},
    hook::Hook,
};

/// The records that the programs have written.
pub(crate) enum Ring {
    Ring(Rings),
    Perf(Perf),
}

/// The ring, and the second ring for the ends of sockets that found the first one full.
pub(crate) struct Rings {
    /// In the order in which the kernel reserved space for them.
    events: RingBuf<MapData>,
    late: RingBuf<MapData>,
    /// The first late record, until all older records have been taken.
    waiting: Option<OwnedRecord>,
    /// A record that was taken too early, because the late one is older.
    next: Option<OwnedRecord>,
}

/// A record, and its time.
struct OwnedRecord {
    time: u64,
    bytes: Box<[u8]>,
}

impl OwnedRecord {
    fn new(record: &[u8]) -> Self {
        // `decode` rejects a record that is too short for a time.
        let time = Head::read_from_prefix(record).map_or(0, |(head, _)| head.time);
        Self {
            time,
            bytes: record.into(),
        }
    }
}

impl Rings {
    fn next(&mut self, take: impl FnOnce(&[u8])) -> bool {
        let Self {
            events,
            late,
            waiting,
            next,
        } = self;
        if let Some(next) = next.take() {
            take(&next.bytes);
            return true;
        }
        if waiting.is_none() {
            *waiting = late.next().map(|record| OwnedRecord::new(&record));
        }
        match (events.next(), waiting.take()) {
            (Some(event), None) => take(&event),
            (Some(event), Some(first)) => {
                let event = OwnedRecord::new(&event);
                if event.time < first.time {
                    take(&event.bytes);
                    *waiting = Some(first);
                } else {
                    take(&first.bytes);
                    *next = Some(event);
                }
            }
            (None, Some(late)) => take(&late.bytes),
            (None, None) => return false,
        }
        true
    }
}

/// Returns the chosen buffer, or the best one that this kernel has.
///
/// # Errors
///
/// The chosen buffer is a ring buffer whose writers sleep, which could stop the machine.
pub(super) fn choose(chosen: Option<Buffer>, ring_sleeps: bool) -> Result<Buffer, Error> {
    match chosen {
        Some(Buffer::Ring) if ring_sleeps => Err(Error::new(
            ErrorKind::Unsupported,
            "the ring buffer of this real-time kernel sleeps where programs must not: choose perf buffers \
             (`Buffer::Perf`), or no buffer",
        )),
        Some(buffer) => Ok(buffer),
        None if ring_sleeps => Ok(Buffer::Perf),
        // If the check fails, the load reports the reason.
        None if is_map_supported(MapType::RingBuf).unwrap_or(true) => Ok(Buffer::Ring),
        None => Ok(Buffer::Perf),
    }
}

/// Returns the hook that names the buffer in use.
pub(super) fn hook(buffer: Buffer, ring_sleeps: bool) -> Hook {
    const COST: &str = "an event takes about 80 ns longer, and each CPU has a share of the room";
    let reason = if ring_sleeps {
        "the ring buffer of this real-time kernel sleeps"
    } else {
        "no ring buffer"
    };
    let (map, note) = match buffer {
        Buffer::Ring => ("map:ringbuf", None),
        Buffer::Perf => ("map:perf_event_array", Some(format!("{reason}: {COST}"))),
    };
    Hook {
        signal: "buffer".into(),
        programs: vec![map.into()],
        note,
    }
}

impl Ring {
    pub(super) fn open(ebpf: &mut Ebpf, buffer: Buffer, config: &Config) -> Result<Self, Error> {
        match buffer {
            Buffer::Ring => Ok(Self::Ring(Rings {
                events: take_map(ebpf, "EVENTS", RingBuf::try_from)?,
                late: take_map(ebpf, "LATE", RingBuf::try_from)?,
                waiting: None,
                next: None,
            })),
            Buffer::Perf => {
                let mut take = |name| {
                    take_map(ebpf, name, |map| match map {
                        Map::PerfEventArray(map) => Array::try_from(Map::Array(map)),
                        map => Array::try_from(map),
                    })
                };
                let maps = [take("EVENTS")?, take("URGENT")?];
                Perf::open(maps, config.ring_bytes as usize)
                    .map(Self::Perf)
                    .map_err(|source| errors::of_perf_buffer(&source).with_source(source))
            }
        }
    }

    /// Returns the number of buffers of equal size: one, or one for each CPU.
    pub(crate) fn parts(&self) -> usize {
        match self {
            Self::Ring(_) => 1,
            Self::Perf(perf) => perf.cpus(),
        }
    }

    /// Makes buffers for the CPUs that have come online, whose events were lost so far.
    pub(crate) fn follow_cpus(&mut self) {
        match self {
            Self::Ring(_) => {}
            Self::Perf(perf) => perf.follow_cpus(),
        }
    }

    /// Returns whether three quarters are full, so that the reader must take records now. Records
    /// other than lifecycle records find no room in the last eighth.
    pub(crate) fn is_nearly_full(&mut self, ring_fill: impl FnOnce() -> Option<u32>) -> bool {
        const LIMIT: u32 = SHARE - SHARE / 4;
        match self {
            // Without an answer, records are safer in the queue.
            Self::Ring(_) => ring_fill().is_none_or(|eighths| eighths >= LIMIT),
            Self::Perf(perf) => perf.is_nearly_full(),
        }
    }

    /// Passes the next record to `take`. Returns false if there is none.
    pub(crate) fn next(&mut self, take: impl FnOnce(&[u8])) -> bool {
        match self {
            Self::Ring(rings) => rings.next(take),
            Self::Perf(perf) => perf.next(take),
        }
    }
}

/// Readable when the programs wake the reader.
impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Ring(rings) => rings.events.as_raw_fd(),
            Self::Perf(perf) => perf.as_raw_fd(),
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").finish_non_exhaustive()
    }
}
