//! The settings of a tracer.

use std::{ops::RangeInclusive, time::Duration};

use crate::{Error, ErrorKind, Filter, Protocol, TcpTracer, UdpTracer, tracer::Tracer};

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
/// The range of `max_sockets` and [`max_flows`](UdpTracerBuilder::max_flows).
const ENTRIES: RangeInclusive<u32> = 1..=1 << 24;
/// The range of `latency`.
const LATENCY: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(1);
/// The range of [`interval`](UdpTracerBuilder::interval).
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
    /// - [`ring_bytes`](TcpTracerBuilder::ring_bytes) is shared equally among the CPUs that are online, each share rounded up to a power of
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

    fn validate(self) -> Result<Self, Error> {
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

/// A builder with the settings that both protocols have.
macro_rules! builder {
    ($(#[$doc:meta])* $builder:ident, $tracer:ident, $protocol:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone)]
        #[must_use = "a builder does nothing until `start`"]
        pub struct $builder {
            config: Config,
        }

        impl $builder {
            pub(crate) fn new() -> Self {
                Self { config: Config::new($protocol) }
            }

            /// How many decoded events may wait for the consumer. 1 to 16,777,216, default
            /// [`DEFAULT_QUEUE`].
            ///
            /// While the queue is full, records stay in the buffer between kernel and reader
            /// ([`ring_bytes`](Self::ring_bytes)), and 256 events with the reader. Once three quarters
            /// of that buffer are filled, events are shed ([`overflow`](Self::overflow)), and a
            /// [`Lost`](crate::EventKind::Lost) stands in their place. That is logged, at most every
            /// 10 s.
            pub fn queue(mut self, events: usize) -> Self {
                self.config.queue = events;
                self
            }

            /// Which events are shed when the queue is full and the buffer behind it fills up. Default
            /// the oldest.
            pub fn overflow(mut self, policy: OverflowPolicy) -> Self {
                self.config.overflow = policy;
                self
            }

            /// What is between kernel and reader. Default the ring buffer, and perf buffers where the kernel has none;
            /// [`TracerHandle::hooks`](crate::TracerHandle::hooks) says which.
            pub fn buffer(mut self, buffer: Buffer) -> Self {
                self.config.buffer = Some(buffer);
                self
            }

            /// The size of the buffer between kernel and reader; one event takes at most 256 bytes.
            /// 4,096 to 1,073,741,824, rounded up to a power of two, default
            /// [`DEFAULT_RING_BYTES`].
            ///
            /// The last eighth is kept for what begins or ends something: state changes to or from
            /// `CLOSE`, `LISTEN` and `ESTABLISHED`, accepts, connects that failed, and closes of
            /// UDP sockets. Beside a ring buffer there is another one a quarter as large, for
            /// nothing but the ends of sockets that find the first one full. They come a little
            /// late, in their place. So while the reader does not run, no flood of other events
            /// costs the end of a socket, until so many sockets have ended: with the default 3,171
            /// of TCP, or 3,072 of UDP.
            pub fn ring_bytes(mut self, bytes: u32) -> Self {
                self.config.ring_bytes = bytes;
                self
            }

            /// How many sockets are remembered at a time, from the beginning of their life to its
            /// end; at most 280 bytes of kernel memory each, taken at the start. 1 to 16,777,216,
            /// default [`DEFAULT_MAX_SOCKETS`].
            pub fn max_sockets(mut self, sockets: u32) -> Self {
                self.config.max_sockets = sockets;
                self
            }

            /// How long events may gather before the reader takes them. The first event after a pause is never delayed;
            /// while they come one after the other, each waits at most this long. [`Duration::ZERO`] takes each
            /// at once, at the price of a wake-up each. At most 1 s, default [`DEFAULT_LATENCY`].
            pub fn latency(mut self, latency: Duration) -> Self {
                self.config.latency = latency;
                self
            }

            /// How often each live socket is looked at and reported as a [`Sample`](crate::EventKind::Sample), the first time when the
            /// tracer starts; `None` for never. A round that takes longer, because there are many sockets or the consumer is slow, puts off
            /// the next one. 100 ms to 1 day, default [`DEFAULT_SAMPLE_INTERVAL`].
            pub fn sample_interval(mut self, every: impl Into<Option<Duration>>) -> Self {
                self.config.sample_interval = every.into();
                self
            }

            /// Whether to report the executable and the command line of each owner
            /// ([`ProcessDetails`](crate::ProcessDetails)). The kernel's side reads them when the process
            /// becomes the owner, so they are there though the process ends at once. Where it cannot, the
            /// reader looks into `/proc`: the events wait for that, at most 50 ms, and a process that has
            /// ended or renamed itself by then has none. The last 4,096 processes are remembered. In
            /// `/proc`, other users' processes take `CAP_SYS_PTRACE`, in a time namespace Linux 5.11.
            /// Default no.
            ///
            /// Kernels before about 6.5, and 7.2, verify the programs that report this for minutes. There
            /// `/proc` alone is read, when the reader wakes, and most processes that end at once have
            /// no details.
            pub fn process_details(mut self, process_details: bool) -> Self {
                self.config.process_details = process_details;
                self
            }

            /// Which events to report; [`TracerHandle::set_filter`](crate::TracerHandle::set_filter) changes it later. Default all.
            pub fn filter(mut self, filter: Filter) -> Self {
                self.config.filter = filter;
                self
            }

            /// Loads and attaches the eBPF programs. When it returns, every hook is attached: there is nothing to wait
            /// for.
            ///
            /// The work that blocks is done on a thread of the runtime's blocking pool. The stream needs the
            /// runtime to run, as long as it is read: see [without async](crate#without-async).
            ///
            /// # Errors
            ///
            /// The [kind](ErrorKind) tells them apart: `InvalidConfig`, `InvalidFilter`, `NoRuntime`, `Permission` (`CAP_BPF` or another capability
            /// is missing), `Unsupported` (not Linux, no BTF, kernel before 5.10), `Load`, `Attach`.
            ///
            /// # Cancel safety
            ///
            /// If the future is dropped, whatever it has attached is detached again.
            pub async fn start(self) -> Result<$tracer, Error> {
                Tracer::start(self.config.validate()?).await.map($tracer::from)
            }
        }
    };
}

builder! {
    /// Sets up a [`TcpTracer`]. Everything is checked in [`start`](Self::start).
    TcpTracerBuilder, TcpTracer, Protocol::Tcp
}

builder! {
    /// Sets up a [`UdpTracer`]. Everything is checked in [`start`](Self::start).
    UdpTracerBuilder, UdpTracer, Protocol::Udp
}

impl TcpTracerBuilder {
    /// Whether each retransmission is an event ([`EventKind::Retransmit`](crate::EventKind::Retransmit)). Default no.
    pub fn retransmits(mut self, retransmits: bool) -> Self {
        self.config.retransmits = retransmits;
        self
    }

    /// Whether each reset that a socket sends or receives is an event ([`EventKind::Reset`](crate::EventKind::Reset)). Default no.
    pub fn resets(mut self, resets: bool) -> Self {
        self.config.resets = resets;
        self
    }
}

impl UdpTracerBuilder {
    /// How often the totals of a flow are reported at most ([`EventKind::Flow`](crate::EventKind::Flow)). 10 ms to 1 h, default
    /// [`DEFAULT_INTERVAL`].
    pub fn interval(mut self, interval: Duration) -> Self {
        self.config.interval = interval;
        self
    }

    /// Whether each datagram is an event of its own ([`Send`](crate::EventKind::Send) and
    /// [`Receive`](crate::EventKind::Receive)), beside the totals. Default no.
    pub fn per_datagram(mut self, per_datagram: bool) -> Self {
        self.config.per_datagram = per_datagram;
        self
    }

    /// How many flows are remembered at a time; beyond that the least recently used make room, to
    /// the [interval](Self::interval), after a last report
    /// ([`Stats::flows_evicted`](crate::Stats::flows_evicted)). 1 to 16,777,216, default
    /// [`DEFAULT_MAX_FLOWS`].
    ///
    /// At most 200 bytes of kernel memory each, taken at the start, also for up to 16,384 more that
    /// have just begun, and for up to 16,384 that the filter does not want. At most 600 bytes of
    /// the process for each live flow, and 500 for each socket that has one, until they end.
    pub fn max_flows(mut self, flows: u32) -> Self {
        self.config.max_flows = flows;
        self
    }
}

#[cfg(test)]
mod tests {
    use tcp_udp_trace_common::StateChange;

    use super::*;

    /// The crate's documentation says how many TCP events the default ring holds before the queue sheds.
    #[test]
    fn default_ring_holds_what_the_documentation_says() {
        const HEADER: usize = 8;
        let record = size_of::<StateChange>() + HEADER;
        let events = DEFAULT_RING_BYTES as usize / 4 * 3 / record;
        assert_eq!(events / 100 * 100, 6_300);
    }

    #[test]
    fn documented_sizes_follow_from_the_records() {
        use tcp_udp_trace_common::{StateChange, Udp};
        // What a record takes of a ring buffer, with the kernel's header.
        let [tcp, udp] = [size_of::<StateChange>(), size_of::<Udp>()].map(|size| size as u32 + 8);
        let room = DEFAULT_RING_BYTES / 8 + DEFAULT_RING_BYTES / LATE_SHARE;
        let ends = [room / tcp, room / udp].map(|n| format!("{},{:03}", n / 1000, n % 1000));
        let text = include_str!("builder.rs").replace("///", " ");
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        for words in [
            format!(
                "with the default {} of TCP, or {} of UDP.",
                ends[0], ends[1]
            ),
            format!("one event takes at most {} bytes.", tcp.max(udp)),
        ] {
            assert!(text.contains(&words), "the documentation must say: {words}");
        }
        assert_eq!(LATE_SHARE, 4, "a quarter");
    }

    #[test]
    fn settings_out_of_range_name_themselves() {
        let check = |config: Config, named: &str| {
            let error = config.validate().expect_err(named);
            assert_eq!(error.kind(), ErrorKind::InvalidConfig);
            assert!(error.to_string().starts_with(named), "{error}");
        };
        check(TcpTracer::builder().queue(0).config, "queue is 0");
        check(TcpTracer::builder().queue(usize::MAX).config, "queue is");
        check(
            TcpTracer::builder().ring_bytes(100).config,
            "ring_bytes is 100",
        );
        check(
            TcpTracer::builder().max_sockets(0).config,
            "max_sockets is 0",
        );
        check(
            TcpTracer::builder().latency(Duration::from_secs(2)).config,
            "latency is 2s",
        );
        check(
            TcpTracer::builder().sample_interval(Duration::ZERO).config,
            "sample_interval is 0ns",
        );
        check(
            UdpTracer::builder().interval(Duration::ZERO).config,
            "interval is 0ns",
        );
        check(UdpTracer::builder().max_flows(0).config, "max_flows is 0");
    }
}
