//! The builders of the tracers.

use std::{path::PathBuf, time::Duration};

use crate::{
    blocking::BlockingTracer,
    config::{Buffer, Config, OverflowPolicy},
    error::Error,
    event::Protocol,
    filter::Filter,
    tracer::{TcpTracer, Tracer, UdpTracer},
};

/// Generates a builder with the settings that both protocols have.
macro_rules! builder {
    ($(#[$doc:meta])* $builder:ident, $tracer:ident, $protocol:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone)]
        #[must_use = "a builder does nothing until `start`"]
        pub struct $builder {
            config: Config,
        }

        impl $tracer {
            /// Returns a builder with default settings.
            pub fn builder() -> $builder {
                $builder::new()
            }
        }

        impl $builder {
            fn new() -> Self {
                Self { config: Config::new($protocol) }
            }

            /// Sets how many decoded events may wait for the consumer. 1 to 16,777,216, default
            /// [`DEFAULT_QUEUE`](crate::DEFAULT_QUEUE).
            ///
            /// While the queue is full, records stay in the buffer between kernel and reader
            /// ([`ring_bytes`](Self::ring_bytes)), and 256 events stay with the reader. When three
            /// quarters of that buffer are full, the queue sheds events
            /// ([`overflow`](Self::overflow)), and a [`Lost`](crate::EventKind::Lost) stands in
            /// their place. The tracer logs that at most every 10 s.
            pub fn queue(mut self, events: usize) -> Self {
                self.config.queue = events;
                self
            }

            /// Selects the events that the queue sheds when the queue is full and the buffer behind
            /// it fills up. Default: the oldest.
            pub fn overflow(mut self, policy: OverflowPolicy) -> Self {
                self.config.overflow = policy;
                self
            }

            /// Selects the buffer between kernel and reader. Default: the ring buffer, or perf
            /// buffers if the kernel has no ring buffer, or one that programs must not use.
            /// [`TracerHandle::hooks`](crate::TracerHandle::hooks) names the buffer in use.
            pub fn buffer(mut self, buffer: Buffer) -> Self {
                self.config.buffer = Some(buffer);
                self
            }

            /// Sets the size of the buffer between kernel and reader; one event takes at most 304
            /// bytes. 4,096 to 1,073,741,824, rounded up to a power of two, default
            /// [`DEFAULT_RING_BYTES`](crate::DEFAULT_RING_BYTES).
            ///
            /// The last eighth is reserved for lifecycle events: state changes to or from `CLOSE`,
            /// `LISTEN` and `ESTABLISHED`, accepts, failed connects, and closes of UDP sockets. A
            /// ring buffer has a second ring beside it, a quarter as large. The second ring takes
            /// only the ends of sockets that find the first ring full. These ends come a little
            /// late, but at their position in time. So while the reader does not run, no flood of
            /// other events costs the end of a socket. The room suffices for this number of ends:
            /// with the default 2,586 of TCP, or 3,072 of UDP.
            pub fn ring_bytes(mut self, bytes: u32) -> Self {
                self.config.ring_bytes = bytes;
                self
            }

            /// Sets how many sockets the tracer remembers at a time, from the beginning of their
            /// life to its end. 1 to 16,777,216, default
            /// [`DEFAULT_MAX_SOCKETS`](crate::DEFAULT_MAX_SOCKETS).
            ///
            /// Each takes at most 550 bytes of kernel memory, of which the start allocates at most
            /// 32.
            /// Before Linux 6.1, each takes at most 290 bytes, and the start allocates all of it.
            ///
            /// The last eighth is for users who have less than a 64th of them, so that no user can
            /// take the room of others ([`Stats::untracked`](crate::Stats::untracked)).
            pub fn max_sockets(mut self, sockets: u32) -> Self {
                self.config.max_sockets = sockets;
                self
            }

            /// Sets how long events may gather before the reader takes them. At most 1 s, default
            /// [`DEFAULT_LATENCY`](crate::DEFAULT_LATENCY).
            ///
            /// The first event after a pause is never delayed. In a steady stream, each event waits
            /// at most this long. With [`Duration::ZERO`], the reader takes each event at once, and
            /// each event costs a wake-up.
            pub fn latency(mut self, latency: Duration) -> Self {
                self.config.latency = latency;
                self
            }

            /// Sets how often the tracer reports each live socket as a
            /// [`Sample`](crate::EventKind::Sample). 100 ms to 1 day, default
            /// [`DEFAULT_SAMPLE_INTERVAL`](crate::DEFAULT_SAMPLE_INTERVAL). `None` disables
            /// samples.
            ///
            /// The first samples come at the start. If a round takes longer than the interval,
            /// because there are many sockets or the consumer is slow, the next round starts later.
            pub fn sample_interval(mut self, every: impl Into<Option<Duration>>) -> Self {
                self.config.sample_interval = every.into();
                self
            }

            /// Sets whether events have the executable, the command line, the parent, the container
            /// and the systemd unit of each owner ([`ProcessDetails`](crate::ProcessDetails)).
            /// Default no.
            ///
            /// The kernel side reads them when the process becomes the owner, so even a short-lived
            /// process has them. If the kernel side cannot read them, the reader looks into
            /// `/proc`. The events wait for that, at most 50 ms. A process that has ended or
            /// changed its name by then has no details. The tracer remembers the last 4,096
            /// processes. In `/proc`, other users' processes need `CAP_SYS_PTRACE`. In a time
            /// namespace, they need Linux 5.11.
            ///
            /// Kernels before about 6.5, and 7.2, verify the programs that report this for minutes.
            /// On these kernels the reader uses `/proc` alone, when it wakes. Most short-lived
            /// processes have no details there.
            pub fn process_details(mut self, process_details: bool) -> Self {
                self.config.process_details = process_details;
                self
            }

            /// Sets which events the tracer reports. Default: all.
            /// [`TracerHandle::set_filter`](crate::TracerHandle::set_filter) changes the filter
            /// later.
            pub fn filter(mut self, filter: Filter) -> Self {
                self.config.filter = filter;
                self
            }

            /// Sets a file with the running kernel's BTF, for a kernel that has none of its own in
            /// `/sys/kernel/btf/vmlinux`. Default: no file.
            ///
            /// The file is raw BTF, as the unpacked archives of [BTFHub] are, or an ELF file with a
            /// section `.BTF`, as `vmlinux` is. Where the kernel has BTF of its own, that is used,
            /// so the same setting serves a whole fleet.
            ///
            /// The file must be that of the running kernel's very build. With another one, the
            /// programs read wrong fields, and events are wrong.
            ///
            /// A kernel without BTF has no BTF tracepoints and no iterators.
            /// [`TracerHandle::hooks`](crate::TracerHandle::hooks) reports the consequences: there
            /// are no samples, and sockets older than the tracer have no owner until they are used.
            ///
            /// [BTFHub]: https://github.com/aquasecurity/btfhub-archive
            pub fn btf(mut self, path: impl Into<PathBuf>) -> Self {
                self.config.btf = Some(path.into());
                self
            }

            /// Loads and attaches the eBPF programs. Every hook is attached when this returns.
            ///
            /// The blocking work runs on a thread of the runtime's blocking pool. The runtime must
            /// run as long as the program reads the stream: see [without
            /// async](crate#without-async).
            ///
            /// # Errors
            ///
            /// The [kind](crate::ErrorKind) is one of these: `InvalidConfig`, `InvalidFilter`,
            /// `NoRuntime`, `Permission` (`CAP_BPF` or another capability is missing),
            /// `Unsupported` (not Linux, no BTF, kernel before 5.10), `Load`, `Attach`.
            ///
            /// # Cancel safety
            ///
            /// If the future is dropped, the tracer detaches every hook that it has attached.
            pub async fn start(self) -> Result<$tracer, Error> {
                Tracer::start(self.config.validate()?).await.map($tracer::from)
            }

            /// Like [`start`](Self::start), for a program without a runtime: returns an iterator of
            /// events.
            ///
            /// The tracer gets a thread and a runtime of its own. The call blocks the calling
            /// thread until every hook is attached. If it is a thread of a runtime, it blocks that,
            /// too.
            ///
            /// # Errors
            ///
            /// Those of [`start`](Self::start). `NoRuntime` means that the thread or the runtime
            /// cannot be made.
            pub fn blocking(self) -> Result<BlockingTracer, Error> {
                BlockingTracer::start(self.config.validate()?)
            }
        }
    };
}

builder! {
    /// Configures and starts a [`TcpTracer`]. [`start`](Self::start) checks the settings.
    TcpTracerBuilder, TcpTracer, Protocol::Tcp
}

builder! {
    /// Configures and starts a [`UdpTracer`]. [`start`](Self::start) checks the settings.
    UdpTracerBuilder, UdpTracer, Protocol::Udp
}

impl TcpTracerBuilder {
    /// Sets whether each retransmission is an event
    /// ([`EventKind::Retransmit`](crate::EventKind::Retransmit)). Default no.
    pub fn retransmits(mut self, retransmits: bool) -> Self {
        self.config.retransmits = retransmits;
        self
    }

    /// Sets whether each reset that a socket sends or receives is an event
    /// ([`EventKind::Reset`](crate::EventKind::Reset)). Default no.
    pub fn resets(mut self, resets: bool) -> Self {
        self.config.resets = resets;
        self
    }

    /// Sets whether each segment that a listener drops because its queue is full is an event
    /// ([`EventKind::ListenOverflow`](crate::EventKind::ListenOverflow)). Default no. This needs
    /// kprobes.
    pub fn listen_overflows(mut self, listen_overflows: bool) -> Self {
        self.config.listen_overflows = listen_overflows;
        self
    }

    /// Sets whether the ends of connections are the only events: each change to `CLOSE` with its
    /// [`Summary`](crate::Summary). Default no.
    ///
    /// Each connection, and each attempt at one that failed after its SYN, has exactly one event.
    /// There is none for a listener. The kernel side still remembers every socket, but skips the
    /// changes of the state in between, and there are no samples and no events on request.
    /// [`Socket`](crate::Socket), owner and traffic are as complete as without this setting.
    pub fn summaries_only(mut self, summaries_only: bool) -> Self {
        self.config.summaries_only = summaries_only;
        self
    }
}

impl UdpTracerBuilder {
    /// Sets the shortest time between two reports of a flow's totals
    /// ([`EventKind::Flow`](crate::EventKind::Flow)). 10 ms to 1 h, default
    /// [`DEFAULT_INTERVAL`](crate::DEFAULT_INTERVAL).
    pub fn interval(mut self, interval: Duration) -> Self {
        self.config.interval = interval;
        self
    }

    /// Sets whether each datagram is an event of its own ([`Send`](crate::EventKind::Send) and
    /// [`Receive`](crate::EventKind::Receive)), in addition to the totals. Default no.
    pub fn per_datagram(mut self, per_datagram: bool) -> Self {
        self.config.per_datagram = per_datagram;
        self
    }

    /// Sets how many flows the tracer remembers at a time. 1 to 16,777,216, default
    /// [`DEFAULT_MAX_FLOWS`](crate::DEFAULT_MAX_FLOWS).
    ///
    /// Beyond that number, the least recently used flow makes room after a last report
    /// ([`Stats::flows_evicted`](crate::Stats::flows_evicted)). The order of use is exact to one
    /// [interval](Self::interval). It is a flow of the user who has the most, so no user can take
    /// the room of others.
    ///
    /// Each flow takes at most 230 bytes of kernel memory, of which the start allocates at most 32.
    /// Before Linux 6.1, the start allocates all of it. In addition, there is room for up to 16,384
    /// flows that have just begun, and for flows that the filter rejects: up to 16,384, or 2,048 if
    /// the tracer starts without a filter. The start allocates the latter.
    ///
    /// In the process, each live flow takes at most 610 bytes, and each socket that has flows takes
    /// 560, until they end.
    pub fn max_flows(mut self, flows: u32) -> Self {
        self.config.max_flows = flows;
        self
    }
}

#[cfg(test)]
mod tests {
    use tcp_udp_trace_common::StateChange;

    use super::*;
    use crate::{
        config::{DEFAULT_RING_BYTES, LATE_SHARE},
        error::ErrorKind,
    };

    /// The crate's documentation says how many TCP events fit into the default ring before the
    /// queue sheds.
    #[test]
    fn the_default_ring_holds_the_documented_events() {
        const HEADER: usize = 8;
        let record = size_of::<StateChange>() + HEADER;
        let events = DEFAULT_RING_BYTES as usize / 4 * 3 / record;
        assert_eq!(events / 100 * 100, 6_300);
    }

    #[test]
    fn documented_sizes_follow_from_the_records() {
        use tcp_udp_trace_common::{End, Udp};
        // The size of a record in a ring buffer, with the kernel's header.
        let [tcp, udp] = [size_of::<End>(), size_of::<Udp>()].map(|size| size as u32 + 8);
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
    fn errors_name_the_setting_out_of_range() {
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
