//! The figures of a run, and their medians.

use std::{fmt, time::Duration};

/// The results of one run of a workload under one subject.
#[derive(Debug)]
pub(crate) struct Measured {
    /// Units a second.
    pub(crate) rate: f64,
    /// Time of all its programs in the kernel together.
    pub(crate) ns_per_event: f64,
    pub(crate) runs_per_event: f64,
    /// CPU time of the tracer's process: user and system together, and user alone.
    pub(crate) cpu_us_per_event: f64,
    pub(crate) user_us_per_event: f64,
    pub(crate) rss_kb: u64,
    /// From the start of the process to its first hook, or until it reports that it is ready.
    pub(crate) ready: Duration,
    /// How long `start` took.
    pub(crate) start: Option<Duration>,
    /// The share of the real events that were reported.
    pub(crate) seen: Option<f64>,
    /// Events that the subject reports as lost.
    pub(crate) lost: Option<u64>,
}

/// The same figures of every round.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    pub(crate) rate: Series,
    /// The rate, as a share of that without a tracer in the same round.
    pub(crate) kept: Series,
    pub(crate) ns: Series,
    pub(crate) runs: Series,
    pub(crate) cpu_us: Series,
    pub(crate) user_us: Series,
    pub(crate) rss_mb: Series,
    pub(crate) ready_ms: Series,
    pub(crate) start_ms: Series,
    pub(crate) seen: Series,
    pub(crate) lost: Series,
}

impl Figures {
    pub(crate) fn add(&mut self, measured: &Measured, untraced: f64) {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        self.rate.add(measured.rate);
        self.kept.add(100.0 * measured.rate / untraced);
        self.ns.add(measured.ns_per_event);
        self.runs.add(measured.runs_per_event);
        self.cpu_us.add(measured.cpu_us_per_event);
        self.user_us.add(measured.user_us_per_event);
        self.rss_mb.add(measured.rss_kb as f64 / 1024.0);
        self.ready_ms.add(ms(measured.ready));
        self.start_ms.add(measured.start.map(ms));
        self.seen.add(measured.seen.map(|seen| 100.0 * seen));
        self.lost.add(measured.lost.map(|lost| lost as f64));
    }
}

/// One figure, of each round. Shown as `median (least–most)` with as many decimals as the format
/// says.
#[derive(Debug, Default)]
pub(crate) struct Series(Vec<f64>);

impl Series {
    pub(crate) fn add(&mut self, value: impl Into<Option<f64>>) {
        let Some(value) = value.into() else { return };
        let at = self.0.partition_point(|other| *other < value);
        self.0.insert(at, value);
    }

    pub(crate) fn median(&self) -> Option<f64> {
        let middle = self.0.len() / 2;
        let upper = self.0.get(middle)?;
        if self.0.len() % 2 == 1 {
            return Some(*upper);
        }
        Some(f64::midpoint(self.0[middle - 1], *upper))
    }

    pub(crate) fn range(&self) -> Option<(f64, f64)> {
        Some((*self.0.first()?, *self.0.last()?))
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Some(median), Some((least, most))) = (self.median(), self.range()) else {
            return f.write_str("–");
        };
        let decimals = f.precision().unwrap_or(0);
        write!(f, "{median:.decimals$}")?;
        if self.0.len() > 1 && format!("{least:.decimals$}") != format!("{most:.decimals$}") {
            write!(f, " ({least:.decimals$}–{most:.decimals$})")?;
        }
        Ok(())
    }
}
