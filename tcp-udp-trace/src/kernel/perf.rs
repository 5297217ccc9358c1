//! Perf buffers: for each CPU a large one, which records go into quietly, and a small one, for what wakes the reader.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, RawFd},
};

use aya::{
    maps::{Array, MapData},
    util::online_cpus,
};
use nix::sys::epoll::{self, Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollOp};
use perf_event::{Builder, SampleFlag, Sampler, events::Software};
use tcp_udp_trace_common::{Head, Udp};
use zerocopy::FromBytes as _;

use super::maps::SHARE;

/// No machine has larger pages. A buffer has one at least.
const MAX_PAGE: usize = 64 << 10;

/// The kind of what a program has written, in a buffer (`perf_event.h`).
const PERF_RECORD_SAMPLE: u32 = 9;

/// The records of all CPUs, in the order of their times.
pub(crate) struct Perf {
    buffers: Vec<Sampler>,
    /// None of them holds more bytes.
    most: usize,
    /// How many of the largest records the large buffers hold together.
    capacity: usize,
    /// Readable when one of the buffers wakes its reader.
    wakes: Epoll,
    /// The maps of the buffers: they forget them when they are closed.
    _maps: [BufferMap; 2],
    taken: Taken,
}

/// A map that tells the programs the buffer (its descriptor) of each CPU. For aya, one of integers.
pub(super) type BufferMap = Array<MapData, RawFd>;

/// What a program has written.
struct Record {
    time: u64,
    length: usize,
    bytes: [u8; size_of::<Udp>()],
}

impl Perf {
    /// Makes the buffers for the maps of the large and of the small ones; together the large ones have `bytes`, or some more.
    pub(super) fn open(mut maps: [BufferMap; 2], bytes: usize) -> io::Result<Self> {
        let cpus = online_cpus().map_err(|(_, error)| error)?;
        let large = (bytes / cpus.len().max(1)).next_power_of_two();
        let small = large / SHARE as usize;
        let wakes = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut buffers = Vec::with_capacity(2 * cpus.len());
        for cpu in cpus {
            for (map, bytes, wake_at) in [(0, large, small), (1, small, 1)] {
                let buffer = buffer(cpu, bytes, wake_at)?;
                watch(&wakes, &buffer)?;
                maps[map]
                    .set(cpu, buffer.as_raw_fd(), 0)
                    .map_err(io::Error::other)?;
                buffers.push(buffer);
            }
        }
        Ok(Self {
            buffers,
            most: large.max(MAX_PAGE),
            capacity: bytes / size_of::<Udp>(),
            wakes,
            _maps: maps,
            taken: Taken::default(),
        })
    }

    /// How many CPUs have buffers.
    pub(super) fn cpus(&self) -> usize {
        (self.buffers.len() / 2).max(1)
    }

    /// Takes the records out of the buffers, whose fill level cannot be read, and returns whether the
    /// reader's own memory now holds three quarters of what the buffers can hold.
    pub(super) fn is_nearly_full(&mut self) -> bool {
        for buffer in &mut self.buffers {
            empty(buffer, self.most, &mut self.taken.records);
        }
        self.taken.records.len() >= self.capacity / 4 * 3
    }

    /// Hands the next record to `take`; false if there is none.
    pub(super) fn next(&mut self, take: impl FnOnce(&[u8])) -> bool {
        let (buffers, most) = (&mut self.buffers, self.most);
        let next = self.taken.next(|taken| {
            for buffer in buffers.iter_mut() {
                empty(buffer, most, taken);
            }
        });
        let Some(record) = next else { return false };
        take(&record.bytes[..record.length]);
        true
    }
}

/// Takes the records out of a buffer that has `most` bytes.
fn empty(buffer: &mut Sampler, most: usize, taken: &mut VecDeque<Record>) {
    let mut left = most;
    // All that is there; but not what is being written meanwhile, which would keep us here for ever.
    while left > 0 {
        let Some(record) = buffer.next_record() else {
            return;
        };
        left = left.saturating_sub(record.len());
        // The kernel also tells of the records that it had no room for: the programs have counted those themselves.
        if record.ty() == PERF_RECORD_SAMPLE {
            taken.extend(Record::new(&record.to_contiguous()));
        }
    }
}

/// The records that were taken from the buffers.
#[derive(Default)]
struct Taken {
    records: VecDeque<Record>,
    /// So many of them may be handed on: what came before them is here too.
    in_order: usize,
}

impl Taken {
    /// The next record in the order of time, where `empty` empties all buffers, one after the other.
    fn next(&mut self, mut empty: impl FnMut(&mut VecDeque<Record>)) -> Option<Record> {
        if self.in_order == 0 {
            empty(&mut self.records);
            let newest = self.records.iter().map(|record| record.time).max()?;
            // Once more: what came before any of these records is in its buffer by now, though that may have been looked at
            // before. What is newer waits for the next time.
            empty(&mut self.records);
            let records = self.records.make_contiguous();
            records.sort_by_key(|record| record.time);
            self.in_order = records.partition_point(|record| record.time <= newest);
        }
        self.in_order -= 1;
        self.records.pop_front()
    }
}

/// Makes a buffer of at least so many bytes, which wakes its reader each time that it has filled by `wake_at` bytes.
fn buffer(cpu: u32, bytes: usize, wake_at: usize) -> io::Result<Sampler> {
    Builder::new(Software::BPF_OUTPUT)
        .any_pid()
        .one_cpu(cpu as usize)
        .sample_period(1)
        .sample(SampleFlag::RAW)
        .wakeup_watermark(wake_at)
        .enabled(true)
        .build()?
        // In whole pages.
        .sampled(bytes)
}

/// Makes `wakes` readable whenever the buffer wakes its reader.
fn watch(wakes: &Epoll, buffer: &Sampler) -> nix::Result<()> {
    // Nobody asks which one it was.
    let mut interest = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0);
    #[allow(
        deprecated,
        reason = "its successor wants a borrowed descriptor, which this type does not give"
    )]
    epoll::epoll_ctl(
        wakes.0.as_raw_fd(),
        EpollOp::EpollCtlAdd,
        buffer.as_raw_fd(),
        &mut interest,
    )
}

impl Record {
    /// What is in a sample of a buffer: a length of 4 bytes, the record, and 4 bytes for the whole to be words of 8. None, if it is only
    /// a bell.
    fn new(sample: &[u8]) -> Option<Self> {
        let words = sample.get(4..sample.len().saturating_sub(4))?;
        if words.is_empty() {
            return None;
        }
        let mut bytes = [0; size_of::<Udp>()];
        // One that is longer is none of ours.
        let length = if words.len() <= bytes.len() {
            words.len()
        } else {
            0
        };
        bytes[..length].copy_from_slice(&words[..length]);
        let time = Head::read_from_prefix(&bytes).map_or(0, |(head, _)| head.time);
        Some(Self {
            time,
            length,
            bytes,
        })
    }
}

impl AsRawFd for Perf {
    fn as_raw_fd(&self) -> RawFd {
        self.wakes.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(time: u64) -> Record {
        Record {
            time,
            length: 0,
            bytes: [0; size_of::<Udp>()],
        }
    }

    /// On the first CPU something happens just after its buffer was emptied, and causes something on the second one, whose buffer is
    /// emptied then.
    #[test]
    fn effect_waits_for_its_cause() {
        let mut rounds = [vec![20, 40], vec![10, 30, 50], vec![60], vec![55], vec![]].into_iter();
        let mut taken = Taken::default();
        let mut next = || {
            let record = taken.next(|records| {
                let times = rounds.next().expect("no further round is needed");
                records.extend(times.into_iter().map(record));
            });
            record.map(|record| record.time)
        };
        for time in [10, 20, 30, 40, 50, 55, 60] {
            assert_eq!(next(), Some(time));
        }
        assert_eq!(next(), None);
    }

    #[test]
    fn samples_are_unpacked() {
        let sample = |words: &[u64]| {
            let mut sample = vec![0xaa; 4];
            words
                .iter()
                .for_each(|word| sample.extend(word.to_ne_bytes()));
            sample.extend([0xbb; 4]);
            sample
        };
        assert!(Record::new(&sample(&[])).is_none(), "a bell");
        assert!(Record::new(&[]).is_none());
        let record = Record::new(&sample(&[1, 2, 3])).expect("a record");
        assert_eq!((record.time, record.length), (2, 24));
        assert_eq!(record.bytes[16..24], 3_u64.to_ne_bytes());
        let record = Record::new(&sample(&[7; 100])).expect("something");
        assert_eq!(record.length, 0, "it is too long");
    }
}
