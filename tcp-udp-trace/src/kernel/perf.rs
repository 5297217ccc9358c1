//! Perf buffers: each CPU has a large one, whose records do not wake the reader, and a small one,
//! whose records do.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, RawFd},
    time::Duration,
};

use aya::{
    maps::{Array, MapData},
    util::online_cpus,
};
use nix::{
    errno::Errno,
    sys::epoll::{self, Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollOp},
};
use perf_event::{Builder, SampleFlag, Sampler, events::Software};
use tcp_udp_trace_common::{End, Head};
use zerocopy::FromBytes as _;

use super::maps::SHARE;

/// The largest page size of any machine. A buffer has at least one page.
const MAX_PAGE: usize = 64 << 10;

/// The type of a program's record in a buffer (`perf_event.h`).
const PERF_RECORD_SAMPLE: u32 = 9;

/// The records of all CPUs, in the order of their times.
pub(crate) struct Perf {
    cpus: Vec<Cpu>,
    /// The sizes of the large and of the small buffer of a CPU, in bytes.
    sizes: [usize; 2],
    /// At least the size of the largest buffer in bytes.
    most: usize,
    /// How many records of the largest size fit into all large buffers together.
    capacity: usize,
    /// Readable when one of the buffers wakes its reader.
    wakes: Epoll,
    /// The maps of the buffers. A map drops its buffers when it is closed.
    maps: [BufferMap; 2],
    taken: Taken,
    /// A CPU has no buffers because they could not be made.
    has_warned: bool,
}

/// The buffers of a CPU.
struct Cpu {
    number: u32,
    /// The large and the small one.
    buffers: [Sampler; 2],
    /// How long the first event was enabled when it was last checked. The kernel disables it when
    /// the CPU goes offline, for ever.
    enabled: Option<Duration>,
}

/// A map that gives the programs the buffer of each CPU, by its descriptor. For aya, it is a map of
/// integers.
pub(super) type BufferMap = Array<MapData, RawFd>;

/// The record of a program.
struct Record {
    time: u64,
    length: usize,
    bytes: [u8; size_of::<End>()],
}

impl Perf {
    /// Makes the large and the small buffers, and puts them into their maps. The large ones
    /// together have at least `bytes`.
    pub(super) fn open(maps: [BufferMap; 2], bytes: usize) -> io::Result<Self> {
        let cpus = online_cpus().map_err(|(_, error)| error)?;
        let large = (bytes / cpus.len().max(1)).next_power_of_two();
        let mut perf = Self {
            cpus: Vec::with_capacity(cpus.len()),
            sizes: [large, large / SHARE as usize],
            most: large.max(MAX_PAGE),
            capacity: bytes / size_of::<End>(),
            wakes: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            maps,
            taken: Taken::default(),
            has_warned: false,
        };
        for cpu in cpus {
            perf.add(cpu)?;
        }
        Ok(perf)
    }

    /// Makes the buffers of a CPU, unless the CPU has just gone offline.
    fn add(&mut self, number: u32) -> io::Result<()> {
        let [large, small] = self.sizes;
        let buffers =
            buffer(number, large, small).and_then(|large| Ok([large, buffer(number, small, 1)?]));
        let buffers = match buffers {
            Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => return Ok(()),
            buffers => buffers?,
        };
        for (map, buffer) in self.maps.iter_mut().zip(&buffers) {
            watch(&self.wakes, buffer)?;
            map.set(number, buffer.as_raw_fd(), 0)
                .map_err(io::Error::other)?;
        }
        self.cpus.push(Cpu {
            number,
            buffers,
            enabled: None,
        });
        Ok(())
    }

    /// Makes the buffers of CPUs that have come online since the last call. A CPU that went and
    /// came back in between is noticed by the call after the next.
    pub(super) fn follow_cpus(&mut self) {
        let Ok(online) = online_cpus() else { return };
        let Self {
            cpus, most, taken, ..
        } = self;
        cpus.retain_mut(|cpu| {
            let is_alive = online.contains(&cpu.number) && cpu.is_alive();
            if !is_alive {
                cpu.empty(*most, &mut taken.records);
            }
            is_alive
        });
        for number in online {
            if self.cpus.iter().any(|cpu| cpu.number == number) {
                continue;
            }
            if let Err(error) = self.add(number) {
                // A later call tries again, but one warning is enough.
                if !std::mem::replace(&mut self.has_warned, true) {
                    log::warn!("the events on CPU {number} are lost: no perf buffer: {error}");
                }
            }
        }
    }

    /// Returns how many CPUs have buffers.
    pub(super) fn cpus(&self) -> usize {
        self.cpus.len().max(1)
    }

    /// Takes the records out of the buffers, whose fill level cannot be read, and returns whether
    /// the reader's own memory now holds three quarters of what the buffers can hold.
    pub(super) fn is_nearly_full(&mut self) -> bool {
        for cpu in &mut self.cpus {
            cpu.empty(self.most, &mut self.taken.records);
        }
        self.taken.records.len() >= self.capacity / 4 * 3
    }

    /// Passes the next record to `take`. Returns false if there is none.
    pub(super) fn next(&mut self, take: impl FnOnce(&[u8])) -> bool {
        let (cpus, most) = (&mut self.cpus, self.most);
        let next = self.taken.next(|taken| {
            for cpu in cpus.iter_mut() {
                cpu.empty(most, taken);
            }
        });
        let Some(record) = next else { return false };
        take(&record.bytes[..record.length]);
        true
    }
}

impl Cpu {
    /// Takes the records out of both buffers, each of at most `most` bytes.
    fn empty(&mut self, most: usize, taken: &mut VecDeque<Record>) {
        for buffer in &mut self.buffers {
            empty(buffer, most, taken);
        }
    }

    /// Returns whether the kernel has enabled the buffers since the last call.
    fn is_alive(&mut self) -> bool {
        let read = self.buffers[0].as_counter_mut().read_full();
        let enabled = read.ok().and_then(|read| read.time_enabled());
        let before = std::mem::replace(&mut self.enabled, enabled);
        enabled.is_none() || enabled != before
    }
}

/// Takes the records out of a buffer of at most `most` bytes.
fn empty(buffer: &mut Sampler, most: usize, taken: &mut VecDeque<Record>) {
    let mut left = most;
    // Takes the present records, but not those that are written in the meantime, or the loop might
    // never end.
    while left > 0 {
        let Some(record) = buffer.next_record() else {
            return;
        };
        left = left.saturating_sub(record.len());
        // The kernel also reports records for which it had no room. The programs have counted
        // these.
        if record.ty() == PERF_RECORD_SAMPLE {
            taken.extend(Record::new(&record.to_contiguous()));
        }
    }
}

/// The records that were taken from the buffers.
#[derive(Default)]
struct Taken {
    records: VecDeque<Record>,
    /// The number of records that are in their final order, because all earlier ones are here.
    in_order: usize,
}

impl Taken {
    /// Returns the next record in the order of time. `empty` empties all buffers, one after the
    /// other.
    fn next(&mut self, mut empty: impl FnMut(&mut VecDeque<Record>)) -> Option<Record> {
        if self.in_order == 0 {
            empty(&mut self.records);
            let newest = self.records.iter().map(|record| record.time).max()?;
            // The second pass finds every record that is older than one of these, because it is in
            // its buffer by now. Newer records wait for the next call.
            empty(&mut self.records);
            let records = self.records.make_contiguous();
            records.sort_by_key(|record| record.time);
            self.in_order = records.partition_point(|record| record.time <= newest);
        }
        self.in_order -= 1;
        self.records.pop_front()
    }
}

/// Makes a buffer of at least `bytes` bytes. It wakes its reader each time that another `wake_at`
/// bytes are full.
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
    // The caller does not need to know which buffer it was.
    let mut interest = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0);
    #[allow(
        deprecated,
        reason = "its successor requires a borrowed descriptor, which this type does not give"
    )]
    epoll::epoll_ctl(
        wakes.0.as_raw_fd(),
        EpollOp::EpollCtlAdd,
        buffer.as_raw_fd(),
        &mut interest,
    )
}

impl Record {
    /// Unpacks a sample of a buffer: a length of 4 bytes, the record, and 4 bytes of padding to
    /// words of 8. `None` if the sample only wakes the reader.
    fn new(sample: &[u8]) -> Option<Self> {
        let words = sample.get(4..sample.len().saturating_sub(4))?;
        if words.is_empty() {
            return None;
        }
        let mut bytes = [0; size_of::<End>()];
        // A longer one is not a record of the programs.
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
            bytes: [0; size_of::<End>()],
        }
    }

    /// An event on the first CPU, just after its buffer was emptied, causes an event on the second
    /// CPU, whose buffer is emptied next.
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
        assert!(
            Record::new(&sample(&[])).is_none(),
            "it only wakes the reader"
        );
        assert!(Record::new(&[]).is_none());
        let record = Record::new(&sample(&[1, 2, 3])).expect("a record");
        assert_eq!((record.time, record.length), (2, 24));
        assert_eq!(record.bytes[16..24], 3_u64.to_ne_bytes());
        let record = Record::new(&sample(&[7; 100])).expect("something");
        assert_eq!(record.length, 0, "it is too long");
    }
}
