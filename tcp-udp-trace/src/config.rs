//! The settings of a tracer, their defaults and their ranges.

use std::{ops::RangeInclusive, path::PathBuf, time::Duration};

use crate::{
    error::{Error, ErrorKind},
    event::Protocol,
    filter::Filter,
};

/// The default of `queue`: how many decoded events may wait for the consumer.
pub const DEFAULT_QUEUE: usize = 1024;
/// The default of `ring_bytes`: the size of the buffer between kernel and reader, in bytes.
pub const DEFAULT_RING_BYTES: u32 = 2 << 20;
/// The second ring, for the ends of sockets, has this fraction of `ring_bytes`.
pub(crate) const LATE_SHARE: u32 = 4;
/// The default of `max_sockets`: how many sockets a tracer remembers at a time.
pub const DEFAULT_MAX_SOCKETS: u32 = 65_536;
/// The default of `latency`: how long events may gather before the reader takes them.
pub const DEFAULT_LATENCY: Duration = Duration::from_millis(20);
/// The default of `interval`: the shortest time between two reports of a UDP flow.
pub const DEFAULT_INTERVAL: Duration = Duration::from_secs(1);
/// The default of `sample_interval`: the time between two samples of a live socket.
pub const DEFAULT_SAMPLE_INTERVAL: Duration = Duration::from_millis(6200);
/// The default of `max_flows`: how many UDP flows a tracer remembers at a time.
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

/// Selects the events that the queue sheds when the queue is full and the buffer behind it fills
/// up.
///
/// Both policies shed lifecycle events last: state changes to or from `CLOSE`, `LISTEN` and
/// `ESTABLISHED`, accepts, failed connects, and the closes of UDP sockets. The queue sheds them
/// only if it contains no other events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum OverflowPolicy {
    /// Shed the oldest events. The consumer gets the newest ones.
    #[default]
    ShedOldest,
    /// Shed the newest events. The consumer gets the oldest ones.
    ShedNewest,
}

/// The kind of buffer between the programs in the kernel and the reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Buffer {
    /// A BPF ring buffer that all CPUs share. Linux has it since 5.8, but some vendors' kernels
    /// lack it. Events come in the order in which the kernel reserved space for them.
    Ring,
    /// Two perf buffers for each CPU, for kernels without a ring buffer.
    ///
    /// The reader sorts the available events by time. The events of one socket always come in
    /// order. Two unrelated events may be swapped if one was still being written while the reader
    /// read the other.
    ///
    /// The costs:
    ///
    /// - An event takes about 80 ns longer.
    /// - The online CPUs share [`ring_bytes`](crate::TcpTracerBuilder::ring_bytes) equally. Each
    ///   share is rounded up to a power of two and to a page. A busy CPU may lose events while
    ///   other CPUs have room. Each CPU has an additional eighth of its share (at least a page) for
    ///   lifecycle events.
    /// - Each CPU needs two file descriptors and locked memory. More than
    ///   `kernel.perf_event_mlock_kb` (516 KiB for each CPU) and `ulimit -l` allow together needs
    ///   `CAP_IPC_LOCK`. While the queue is full, the reader moves the records to its own memory,
    ///   up to twice as much.
    /// - The first events on a CPU that comes online after the start are lost, and counted. The
    ///   reader then makes buffers for the CPU, which needs the privileges of the start.
    /// - A sample may take the room of an event: at most an eighth of a CPU's share at a time.
    /// - The programs count anomalies ([`Stats`](crate::Stats)), but do not log them.
    Perf,
}

/// All settings of a tracer, for both protocols.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) protocol: Protocol,
    pub(crate) queue: usize,
    pub(crate) overflow: OverflowPolicy,
    /// `None` selects the best buffer that the kernel has.
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
    /// A file with the kernel's BTF, for a kernel that has none.
    pub(crate) btf: Option<PathBuf>,
    pub(crate) retransmits: bool,
    pub(crate) resets: bool,
    pub(crate) listen_overflows: bool,
    pub(crate) summaries_only: bool,
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
            btf: None,
            retransmits: false,
            resets: false,
            listen_overflows: false,
            summaries_only: false,
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
