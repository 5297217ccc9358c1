//! What is between the programs and the reader.

use std::os::fd::{AsRawFd, RawFd};

use aya::{
    Ebpf,
    maps::{Array, Map, MapData, MapType, RingBuf},
    sys::is_map_supported,
};

use super::{perf::Perf, refusal, take_map};
use crate::{Buffer, Error, Hook, builder::Config};

/// The records that the programs have written.
pub(crate) enum Ring {
    /// In the order in which the kernel made room for them.
    Ring(RingBuf<MapData>),
    Perf(Perf),
}

/// The best buffer that this kernel has.
pub(super) fn best() -> Buffer {
    // Where it cannot be asked, loading will tell why.
    if is_map_supported(MapType::RingBuf).unwrap_or(true) {
        Buffer::Ring
    } else {
        Buffer::Perf
    }
}

/// Tells which buffer is in use.
pub(super) fn hook(buffer: Buffer) -> Hook {
    let (map, note) = match buffer {
        Buffer::Ring => ("map:ringbuf", None),
        Buffer::Perf => (
            "map:perf_event_array",
            Some(
                "no ring buffer: an event takes about 80 ns longer, and each CPU has a share of the room",
            ),
        ),
    };
    Hook {
        signal: "buffer".into(),
        programs: vec![map.into()],
        note: note.map(Into::into),
    }
}

impl Ring {
    pub(super) fn open(ebpf: &mut Ebpf, buffer: Buffer, config: &Config) -> Result<Self, Error> {
        match buffer {
            Buffer::Ring => take_map(ebpf, "EVENTS", RingBuf::try_from).map(Self::Ring),
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
                    .map_err(|source| refusal::of_perf_buffer(&source).with_source(source))
            }
        }
    }

    /// How many buffers of equal size it is: one, or one for each CPU.
    pub(crate) fn parts(&self) -> usize {
        match self {
            Self::Ring(_) => 1,
            Self::Perf(perf) => perf.cpus(),
        }
    }

    /// Hands the next record to `take`; false if there is none.
    pub(crate) fn next(&mut self, take: impl FnOnce(&[u8])) -> bool {
        match self {
            Self::Ring(ring) => match ring.next() {
                Some(record) => {
                    take(&record);
                    true
                }
                None => false,
            },
            Self::Perf(perf) => perf.next(take),
        }
    }
}

/// Readable when the programs wake the reader.
impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Ring(ring) => ring.as_raw_fd(),
            Self::Perf(perf) => perf.as_raw_fd(),
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").finish_non_exhaustive()
    }
}
