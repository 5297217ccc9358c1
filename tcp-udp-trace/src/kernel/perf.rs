//! Perf buffers: for each CPU a large one, which records go into quietly, and a small one, whose records wake the reader.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, RawFd},
};

use aya::{
    maps::{
        MapData, PerfEventArray,
        perf::{PerfBufferError, PerfEvent, PerfEventArrayBuffer},
    },
    util::online_cpus,
};
use nix::{
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags},
    unistd::{SysconfVar, sysconf},
};
use tcp_udp_trace_common::{Head, Udp};
use zerocopy::FromBytes as _;

use super::SHARE;

/// How large the buffers are.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    cpus: Vec<u32>,
    page: usize,
    /// Pages of a large buffer.
    pages: usize,
}

impl Layout {
    /// Shares `bytes` among the CPUs.
    pub(super) fn new(bytes: u32) -> io::Result<Self> {
        let cpus = online_cpus().map_err(|(_, error)| error)?;
        let page = sysconf(SysconfVar::PAGE_SIZE)?.and_then(|page| usize::try_from(page).ok());
        let page = page.ok_or(io::ErrorKind::Unsupported)?;
        // As the kernel wants it.
        let pages = (bytes as usize / cpus.len().max(1) / page).next_power_of_two();
        Ok(Self { cpus, page, pages })
    }

    /// The size of a large buffer.
    pub(super) fn bytes_per_cpu(&self) -> u32 {
        u32::try_from(self.pages * self.page).unwrap_or(u32::MAX)
    }
}

/// The records of all CPUs, in the order of their times.
pub(crate) struct Perf {
    buffers: Vec<PerfEventArrayBuffer<MapData>>,
    /// Of the small buffers.
    wakes: Epoll,
    /// Taken from the buffers; the first `in_order` are older than all that could still be in them.
    taken: VecDeque<Record>,
    in_order: usize,
}

struct Record {
    time: u64,
    length: usize,
    bytes: [u8; size_of::<Udp>()],
}

impl Perf {
    pub(super) fn open(
        mut events: PerfEventArray<MapData>,
        mut urgent: PerfEventArray<MapData>,
        layout: &Layout,
    ) -> Result<Self, PerfBufferError> {
        let wakes = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(io::Error::from)?;
        let mut buffers = Vec::with_capacity(2 * layout.cpus.len());
        for &cpu in &layout.cpus {
            buffers.push(events.open(cpu, Some(layout.pages))?);
            let small = (layout.pages / SHARE as usize).max(1);
            let small = urgent.open(cpu, Some(small))?;
            // Nobody asks which one it was.
            let interest = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0);
            wakes.add(&small, interest).map_err(io::Error::from)?;
            buffers.push(small);
        }
        Ok(Self {
            buffers,
            wakes,
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
        let taken = &mut self.taken;
        for buffer in &mut self.buffers {
            buffer.for_each(|event| match event {
                PerfEvent::Sample { head, tail } => taken.push_back(Record::new(head, tail)),
                // The programs have counted them themselves.
                PerfEvent::Lost { .. } => {}
            });
        }
    }
}

impl Record {
    /// A record that is in two parts where the buffer's end is.
    fn new(head: &[u8], tail: &[u8]) -> Self {
        // A record is words of 8 bytes; the kernel adds 4, for what follows to begin at such a word.
        let length = (head.len() + tail.len()) & !7;
        let mut bytes = [0; size_of::<Udp>()];
        // One that is longer is none of ours.
        let length = if length <= bytes.len() { length } else { 0 };
        let (first, second) = bytes[..length].split_at_mut(head.len().min(length));
        first.copy_from_slice(&head[..first.len()]);
        second.copy_from_slice(&tail[..second.len()]);
        let time = Head::read_from_prefix(&bytes).map_or(0, |(head, _)| head.time);
        Self {
            time,
            length,
            bytes,
        }
    }
}

impl AsRawFd for Perf {
    fn as_raw_fd(&self) -> RawFd {
        self.wakes.0.as_raw_fd()
    }
}
