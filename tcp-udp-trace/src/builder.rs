//! The settings of a tracer.

use std::time::Duration;

use crate::{Error, ErrorKind, TcpTracer};

/// How many events may wait for the consumer before the oldest are shed.
pub const DEFAULT_QUEUE: usize = 1024;
/// The size of the buffer between kernel and reader, in bytes.
pub const DEFAULT_RING_BYTES: u32 = 2 << 20;
/// How many sockets are remembered at a time.
pub const DEFAULT_MAX_SOCKETS: u32 = 65_536;
/// How long events may gather before the reader takes them, while they come one after the other.
pub const DEFAULT_LATENCY: Duration = Duration::from_millis(20);

/// The largest [`queue`](TcpTracerBuilder::queue).
const MAX_QUEUE: usize = 1 << 24;
/// The range of [`ring_bytes`](TcpTracerBuilder::ring_bytes).
const RING_BYTES: std::ops::RangeInclusive<u32> = 4096..=1 << 30;
/// The range of [`max_sockets`](TcpTracerBuilder::max_sockets).
const MAX_SOCKETS: std::ops::RangeInclusive<u32> = 1..=1 << 24;
/// The largest [`latency`](TcpTracerBuilder::latency).
const MAX_LATENCY: Duration = Duration::from_secs(1);

/// Validated settings.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) queue: usize,
    pub(crate) ring_bytes: u32,
    pub(crate) max_sockets: u32,
    pub(crate) latency: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            queue: DEFAULT_QUEUE,
            ring_bytes: DEFAULT_RING_BYTES,
            max_sockets: DEFAULT_MAX_SOCKETS,
            latency: DEFAULT_LATENCY,
        }
    }
}

impl Config {
    fn validate(self) -> Result<Self, Error> {
        let invalid = |what: String| Err(Error::new(ErrorKind::InvalidConfig, what));
        let Self {
            queue,
            ring_bytes,
            max_sockets,
            latency,
        } = self;
        if !(1..=MAX_QUEUE).contains(&queue) {
            return invalid(format!(
                "queue is {queue}: it must be 1 to {MAX_QUEUE} events"
            ));
        }
        if !RING_BYTES.contains(&ring_bytes) {
            return invalid(format!(
                "ring_bytes is {ring_bytes}: it must be {RING_BYTES:?} bytes"
            ));
        }
        if !MAX_SOCKETS.contains(&max_sockets) {
            return invalid(format!(
                "max_sockets is {max_sockets}: it must be {MAX_SOCKETS:?} sockets"
            ));
        }
        if latency > MAX_LATENCY {
            return invalid(format!(
                "latency is {latency:?}: it must be at most {MAX_LATENCY:?}"
            ));
        }
        Ok(self)
    }
}

/// Sets up a [`TcpTracer`]. Everything is checked in [`start`](Self::start).
#[derive(Debug, Clone, Default)]
#[must_use = "a builder does nothing until `start`"]
pub struct TcpTracerBuilder {
    config: Config,
}

impl TcpTracerBuilder {
    /// How many events may wait for the consumer; beyond that the oldest are shed, and a
    /// [`Lost`](crate::EventKind::Lost) stands in their place. 1 to 16,777,216, default [`DEFAULT_QUEUE`].
    pub fn queue(mut self, events: usize) -> Self {
        self.config.queue = events;
        self
    }

    /// The size of the buffer between kernel and reader; one event takes at most 168 bytes. 4,096 to 1,073,741,824,
    /// rounded up to a power of two, default [`DEFAULT_RING_BYTES`].
    pub fn ring_bytes(mut self, bytes: u32) -> Self {
        self.config.ring_bytes = bytes;
        self
    }

    /// How many sockets are remembered at a time, from the beginning of their life to its end; about 128 bytes of
    /// kernel memory each, taken at the start. 1 to 16,777,216, default [`DEFAULT_MAX_SOCKETS`].
    pub fn max_sockets(mut self, sockets: u32) -> Self {
        self.config.max_sockets = sockets;
        self
    }

    /// How long events may gather before the reader takes them. The first event after a pause is never delayed; while
    /// they come one after the other, each waits at most this long. [`Duration::ZERO`] takes each at once,
    /// at the price of a wake-up each. At most 1 s, default [`DEFAULT_LATENCY`].
    pub fn latency(mut self, latency: Duration) -> Self {
        self.config.latency = latency;
        self
    }

    /// Loads and attaches the eBPF programs. When it returns, every hook is attached: there is nothing to wait for.
    ///
    /// The work that blocks is done on a thread of the runtime's blocking pool.
    ///
    /// # Errors
    ///
    /// The [kind](ErrorKind) tells them apart: `InvalidConfig`, `NoRuntime`, `Permission` (`CAP_BPF` or
    /// `CAP_PERFMON` is missing), `Unsupported` (not Linux, no BTF, kernel before 5.10), `Load`, `Attach`.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, whatever it has attached is detached again.
    pub async fn start(self) -> Result<TcpTracer, Error> {
        TcpTracer::start(self.config.validate()?).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_out_of_range_name_themselves() {
        let check = |builder: TcpTracerBuilder, named: &str| {
            let error = builder.config.validate().expect_err(named);
            assert_eq!(error.kind(), ErrorKind::InvalidConfig);
            assert!(error.to_string().starts_with(named), "{error}");
        };
        check(TcpTracer::builder().queue(0), "queue is 0");
        check(TcpTracer::builder().queue(usize::MAX), "queue is");
        check(TcpTracer::builder().ring_bytes(100), "ring_bytes is 100");
        check(TcpTracer::builder().max_sockets(0), "max_sockets is 0");
        check(
            TcpTracer::builder().latency(Duration::from_secs(2)),
            "latency is 2s",
        );
    }
}
