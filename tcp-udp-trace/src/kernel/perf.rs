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

use super::SHARE;

/// The kind of what a program has written, in a buffer (`perf_event.h`).
const PERF_RECORD_SAMPLE: u32 = 9;

/// The records of all CPUs, in the order of their times.
pub(crate) struct Perf {
    buffers: Vec<Sampler>,
    /// Readable when one of the buffers wakes its reader.
    wakes: Epoll,
    /// The maps of the buffers: they forget them when they are closed.
    _maps: [BufferMap; 2],
    /// Taken from the buffers; the first `in_order` are older than all that could still be in them.
    taken: VecDeque<Record>,
    in_order: usize,
}

/// A map that tells the programs the buffer (its descriptor) of each CPU. For aya, one of integers.
pub(super) type BufferMap = Array<MapData, RawFd>;

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
            wakes,
            _maps: maps,
            taken: VecDeque::new(),
            in_order: 0,
        })
    }

    /// Hands the next record to `take`; false if there is none.
    pub(super) fn next(&mut self, take: impl FnOnce(&[u8])) -> bool {
        if self.in_order == 0 {
            self.collect();
            let Some(newest) = self.taken.iter().map(|record| record.time).max() else {
                return false;
            };
            // Once more: what came before one of these records is in its buffer by now, though that may have been looked at
            // before. What is newer waits for the next time.
            self.collect();
            let taken = self.taken.make_contiguous();
            taken.sort_by_key(|record| record.time);
            self.in_order = taken.partition_point(|record| record.time <= newest);
        }
        let Some(record) = self.taken.pop_front() else {
            return false;
        };
        self.in_order -= 1;
        take(&record.bytes[..record.length]);
        true
    }

    /// Takes what is in the buffers.
    fn collect(&mut self) {
        for buffer in &mut self.buffers {
            while let Some(record) = buffer.next_record() {
                // The kernel also tells of the records that it had no room for: the programs have counted those themselves.
                if record.ty() == PERF_RECORD_SAMPLE {
                    self.taken.extend(Record::new(&record.to_contiguous()));
                }
            }
        }
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
