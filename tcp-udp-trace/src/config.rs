//! The settings of a tracer, their defaults and their ranges.

use std::{ops::RangeInclusive, time::Duration};

use crate::{
    error::{Error, ErrorKind},
    event::Protocol,
    filter::Filter,
};

/// How many decoded events may wait for the consumer.
pub const DEFAULT_QUEUE: usize = 1024;
/// The size of the buffer between kernel and reader, in bytes.
pub const DEFAULT_RING_BYTES: u32 = 2 << 20;
/// Of how many parts of that size another ring is one, for the ends of sockets.
pub(crate) const LATE_SHARE: u32 = 4;
/// How many sockets are remembered at a time.
pub const DEFAULT_MAX_SOCKETS: u32 = 65_536;
/// How long events may gather before the reader takes them, while they come one after the other.
pub const DEFAULT_LATENCY: Duration = Duration::from_millis(20);
/// How often the totals of a UDP flow are reported at most.
pub const DEFAULT_INTERVAL: Duration = Duration::from_secs(1);
/// How often each live socket is sampled.
pub const DEFAULT_SAMPLE_INTERVAL: Duration = Duration::from_millis(6200);
/// How many UDP flows are remembered at a time.
pub const DEFAULT_MAX_FLOWS: u32 = 65_536;

/// The range of `queue`.
const QUEUE: RangeInclusive<usize> = 1..=1 << 24;
/// The range of `ring_bytes`.
const RING_BYTES: RangeInclusive<u32> = 4096..=1 << 30;
/// The range of `max_sockets` and [`max_flows`](crate::UdpTracerBuilder::max_flows).
const ENTRIES: RangeInclusive<u32> = 1..=1 << 24;
/// The range of `latency`.
const LATENCY: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(1);
/// The range of [`interval`](crate::UdpTracerBuilder::interval).
const INTERVAL: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(3600);

/// The range of `sample_interval`.
const SAMPLE_INTERVAL: RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(86_400);

/// Which events are shed when the queue is full and the buffer behind it fills up.
///
/// Either way, events that tell the beginning or the end of something go last: state changes to or
/// from `CLOSE`, `LISTEN` and `ESTABLISHED`, accepts, connects that failed, and the closes of UDP
/// sockets. They are shed only if the queue is full of nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum OverflowPolicy {
    /// The oldest: the consumer finds what happened last.
    #[default]
    ShedOldest,
    /// The newest: the consumer finds what happened first.
    ShedNewest,
}

/// What is between the programs in the kernel and the reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Buffer {
    /// A BPF ring buffer, common to all CPUs. Since Linux 5.8; some vendors' kernels lack it. Events come in the order in which the kernel
    /// made room for them.
    Ring,
    /// Two perf buffers for each CPU, where the kernel has no ring buffer.
    ///
    /// Events are put in the order of their times as far as they are there. What happens to one socket always comes in order; events that
    /// have nothing to do with each other may be the wrong way round, if one was still being written while the other was read.
    ///
    /// What it costs:
    ///
    /// - An event takes about 80 ns longer.
    /// - [`ring_bytes`](crate::TcpTracerBuilder::ring_bytes) is shared equally among the CPUs that are online, each share rounded up to a power of
    ///   two and to a page: a busy CPU may lose events while others have room. Each CPU has an eighth of its share (at least a page) in
    ///   addition, for what begins or ends something.
    /// - Two descriptors for each CPU, and locked memory: if it is more than `kernel.perf_event_mlock_kb` (516 KiB, for each CPU) and
    ///   `ulimit -l` allow together, it takes `CAP_IPC_LOCK`. While the queue is full, the reader
    ///   moves the records to its own memory, up to twice as much.
    /// - What happens on a CPU that is brought up after the start is lost, and counted.
    /// - A sample may take the room of an event: at most an eighth of a CPU's share at a time.
    /// - What the programs find strange is not logged, only counted ([`Stats`](crate::Stats)).
    Perf,
}

/// All settings, of either protocol.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) protocol: Protocol,
    pub(crate) queue: usize,
    pub(crate) overflow: OverflowPolicy,
    /// The best that the kernel has, unless one is named.
    pub(crate) buffer: Option<Buffer>,
    pub(crate) ring_bytes: u32,
    pub(crate) max_sockets: u32,
    pub(crate) latency: Duration,
    pub(crate) sample_interval: Option<Duration>,
    pub(crate) process_details: bool,
    pub(crate) interval: Duration,
    pub(crate) per_datagram: bool,
    pub(crate) max_flows: u32,
    pub(crate) filter: Filter,
    pub(crate) retransmits: bool,
    pub(crate) resets: bool,
}

impl Config {
    pub(crate) fn new(protocol: Protocol) -> Self {
        Self {
            protocol,
            queue: DEFAULT_QUEUE,
            overflow: OverflowPolicy::default(),
            buffer: None,
            ring_bytes: DEFAULT_RING_BYTES,
            max_sockets: DEFAULT_MAX_SOCKETS,
            latency: DEFAULT_LATENCY,
            sample_interval: Some(DEFAULT_SAMPLE_INTERVAL),
            process_details: false,
            interval: DEFAULT_INTERVAL,
            per_datagram: false,
            max_flows: DEFAULT_MAX_FLOWS,
            filter: Filter::new(),
            retransmits: false,
            resets: false,
        }
    }

    pub(crate) fn validate(self) -> Result<Self, Error> {
        check("queue", self.queue, &QUEUE)?;
        check("ring_bytes", self.ring_bytes, &RING_BYTES)?;
        check("max_sockets", self.max_sockets, &ENTRIES)?;
        check("latency", self.latency, &LATENCY)?;
        if let Some(every) = self.sample_interval {
            check("sample_interval", every, &SAMPLE_INTERVAL)?;
        }
        check("interval", self.interval, &INTERVAL)?;
        check("max_flows", self.max_flows, &ENTRIES)?;
        self.filter.compile()?;
        Ok(self)
    }
}

fn check<T: PartialOrd + std::fmt::Debug>(
    name: &str,
    value: T,
    range: &RangeInclusive<T>,
) -> Result<(), Error> {
    if range.contains(&value) {
        return Ok(());
    }
    let (from, to) = (range.start(), range.end());
    Err(Error::new(
        ErrorKind::InvalidConfig,
        format!("{name} is {value:?}: it must be {from:?} to {to:?}"),
    ))
}
