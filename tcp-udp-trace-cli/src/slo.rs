//! The command `slo`: how long TCP connections take to be established, and how many fail, by remote
//! network.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    net::IpAddr,
    time::Duration,
};

use nix::errno::Errno;
use serde::Serialize;
use tcp_udp_trace::{Event, EventKind, Filter, Kind, Protocol, Stats, TcpState, TcpTracer};

/// Print how long connecting takes and how often it fails, by remote network.
///
/// The command traces for `--duration`, or until Ctrl-C, and then prints one line for each network
/// to which a process of this machine connected by TCP.
///
/// The time is that from `connect` to the end of the handshake: the round trip to the server, and
/// the waits for SYN segments that were lost. Percentiles are right to 3 %, the maximum is exact. A
/// failed attempt has no time. Its reason is the error of `connect`, or `closed` if the program
/// closed the socket before the handshake ended.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many seconds to trace.
    #[arg(long, value_name = "SECS", value_parser = crate::trace::seconds, default_value = "10")]
    duration: Duration,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// The length of the prefix of an IPv4 network. 32 is one address.
    #[arg(long, value_name = "BITS", default_value_t = 24,
          value_parser = clap::value_parser!(u8).range(0..=32))]
    prefix4: u8,
    /// The length of the prefix of an IPv6 network. 128 is one address.
    #[arg(long, value_name = "BITS", default_value_t = 48,
          value_parser = clap::value_parser!(u8).range(0..=128))]
    prefix6: u8,
    /// The most lines to print. One more line sums up the rest.
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    max: usize,
    /// Only sockets that pass this filter, such as "comm=nginx remote=10.0.0.0/8".
    #[arg(long, value_name = "FILTER", default_value = "")]
    filter: Filter,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let kinds = [Kind::StateChange, Kind::ConnectFailed];
    let filter = kinds.into_iter().fold(args.filter.clone(), Filter::kind);
    let tracer = TcpTracer::builder().filter(filter).sample_interval(None);
    let mut tracer = tracer.start().await?;
    let handle = tracer.handle();
    crate::stop_at_signal(vec![handle.clone()])?;
    eprintln!("ready");
    tokio::spawn(async move {
        tokio::time::sleep(args.duration).await;
        handle.stop();
    });
    let mut networks = Networks::new(&args);
    while let Some(event) = tracer.next().await {
        networks.count(&event);
    }
    let report = networks.report(tracer.close().await?);
    let mut out = io::stdout().lock();
    if args.json {
        serde_json::to_writer(&mut out, &report).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        report.text(&mut out)?;
    }
    eprintln!("stats: {}", serde_json::to_string(&report.stats)?);
    Ok(())
}

/// The attempts to connect to each network.
struct Networks {
    prefix4: u8,
    prefix6: u8,
    max: usize,
    of: BTreeMap<(IpAddr, u8), Attempts>,
    /// Those to all networks beyond `max`.
    others: Attempts,
}

/// The attempts to connect to one network.
#[derive(Debug, Default)]
struct Attempts {
    times: Histogram,
    /// The failed attempts, by reason.
    failures: BTreeMap<String, u64>,
}

impl Networks {
    fn new(args: &Args) -> Self {
        Self {
            prefix4: args.prefix4,
            prefix6: args.prefix6,
            max: args.max,
            of: BTreeMap::new(),
            others: Attempts::default(),
        }
    }

    fn count(&mut self, event: &Event) {
        use TcpState::{Close, SynSent};
        let errno = |error: i32| format!("{:?}", Errno::from_raw(error));
        let failure = match event.kind {
            EventKind::StateChange {
                from: SynSent,
                to: Close,
                error,
                ..
            } => Some(error.map_or_else(|| "closed".to_owned(), errno)),
            EventKind::ConnectFailed { error } if event.socket.protocol == Protocol::Tcp => {
                Some(errno(error))
            }
            EventKind::StateChange { from: SynSent, .. } if event.is_open() => None,
            _ => return,
        };
        let network = self.network(event.socket.remote.ip());
        let has_room = self.of.len() < self.max || self.of.contains_key(&network);
        let attempts = if has_room {
            self.of.entry(network).or_default()
        } else {
            &mut self.others
        };
        match failure {
            Some(reason) => *attempts.failures.entry(reason).or_default() += 1,
            // The beginning of an older attempt is unknown.
            None if event.socket.older == Some(false) => attempts.times.add(event.socket.age),
            None => {}
        }
    }

    /// Returns the network of an address, and the length of its prefix.
    fn network(&self, address: IpAddr) -> (IpAddr, u8) {
        match address {
            IpAddr::V4(v4) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix4));
                let network = u32::from(v4) & mask.unwrap_or(0);
                (IpAddr::V4(network.into()), self.prefix4)
            }
            IpAddr::V6(v6) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix6));
                let network = u128::from(v6) & mask.unwrap_or(0);
                (IpAddr::V6(network.into()), self.prefix6)
            }
        }
    }

    /// Returns the report, the networks with the most attempts first.
    fn report(self, stats: Stats) -> Report {
        let lines = self.of.into_iter();
        let lines = lines.map(|((ip, bits), of)| of.line(format!("{ip}/{bits}")));
        let mut networks: Vec<_> = lines.collect();
        networks.sort_by_key(|line| std::cmp::Reverse(line.attempts));
        let others = self.others.line("(others)".to_owned());
        networks.extend(Some(others).filter(|others| others.attempts > 0));
        Report { networks, stats }
    }
}

impl Attempts {
    fn line(self, network: String) -> Line {
        let failed = self.failures.values().sum();
        let micros = |percent| self.times.percentile(percent).map(micros);
        Line {
            network,
            attempts: self.times.count + failed,
            failed,
            p50_us: micros(50),
            p90_us: micros(90),
            p99_us: micros(99),
            max_us: micros(100),
            failures: self.failures,
        }
    }
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1_000.0
}

/// Counts durations in steps of 3 %.
#[derive(Debug, Default)]
struct Histogram {
    /// How many durations each step has. Its key is the number of the step.
    steps: BTreeMap<u32, u64>,
    count: u64,
    longest: Duration,
}

impl Histogram {
    fn add(&mut self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        *self.steps.entry(step(nanos)).or_default() += 1;
        self.count += 1;
        self.longest = self.longest.max(time);
    }

    /// Returns a duration that so many percent do not exceed; `None` if there are no durations.
    fn percentile(&self, percent: u64) -> Option<Duration> {
        let rank = (self.count * percent).div_ceil(100).max(1);
        let mut seen = 0;
        let mut steps = self.steps.iter();
        let (&step, _) = steps.find(|(_, count)| {
            seen += **count;
            seen >= rank
        })?;
        Some(Duration::from_nanos(end_of(step)).min(self.longest))
    }
}

/// Returns the number of the step of a duration: its six highest bits, and how many follow them.
fn step(nanos: u64) -> u32 {
    let follow = (u64::BITS - nanos.leading_zeros()).saturating_sub(6);
    follow * 32 + (nanos >> follow) as u32
}

/// Returns the longest duration of a step.
fn end_of(step: u32) -> u64 {
    let follow = (step / 32).saturating_sub(1);
    let bits = u64::from(step - follow * 32);
    (bits << follow) | ((1 << follow) - 1)
}

/// The content of the output.
#[derive(Debug, Serialize)]
struct Report {
    networks: Vec<Line>,
    stats: Stats,
}

#[derive(Debug, Serialize)]
struct Line {
    network: String,
    attempts: u64,
    failed: u64,
    p50_us: Option<f64>,
    p90_us: Option<f64>,
    p99_us: Option<f64>,
    max_us: Option<f64>,
    failures: BTreeMap<String, u64>,
}

impl Report {
    fn text(&self, out: &mut impl Write) -> io::Result<()> {
        let widths = self.networks.iter().map(|line| line.network.len());
        let width = widths.max().unwrap_or(0).max("NETWORK".len());
        writeln!(
            out,
            "{:width$} {:>8} {:>8} {:>10} {:>10} {:>10} {:>10}  FAILURES",
            "NETWORK", "ATTEMPTS", "FAILED", "P50_MS", "P90_MS", "P99_MS", "MAX_MS"
        )?;
        for line in &self.networks {
            let times = [line.p50_us, line.p90_us, line.p99_us, line.max_us];
            let [p50, p90, p99, max] = times.map(|time| match time {
                Some(micros) => format!("{:.3}", micros / 1_000.0),
                None => "-".to_owned(),
            });
            let failures = line.failures.iter();
            let failures = failures.map(|(reason, count)| format!("{reason} {count}"));
            let failures = failures.collect::<Vec<_>>().join(", ");
            let text = format!(
                "{:width$} {:>8} {:>8} {p50:>10} {p90:>10} {p99:>10} {max:>10}  {failures}",
                line.network, line.attempts, line.failed
            );
            writeln!(out, "{}", text.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_right_to_three_percent() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.percentile(50), None);
        for number in 1..=1_000 {
            histogram.add(Duration::from_micros(number * 7));
        }
        for percent in [1, 50, 90, 99, 100] {
            let exact = Duration::from_micros(percent * 70);
            let found = histogram.percentile(percent).unwrap();
            assert!(
                found >= exact && found <= exact * 103 / 100,
                "{percent}: {found:?}"
            );
        }
        assert_eq!(
            histogram.percentile(100),
            Some(Duration::from_micros(7_000))
        );
    }

    #[test]
    fn each_duration_is_in_its_step() {
        let mut last = 0;
        for bits in 0..64 {
            for nanos in [1 << bits, (1 << bits) + 1, (1_u64 << bits).wrapping_sub(1)] {
                let (step, end) = (step(nanos), end_of(step(nanos)));
                assert!(end >= nanos && end - nanos <= nanos / 32, "{nanos}");
                last = last.max(step);
            }
        }
        assert!(end_of(step(u64::MAX)) == u64::MAX && last < 2_048);
    }

    #[test]
    fn networks_of_addresses() {
        let of = |prefix4, prefix6, address: &str| {
            let networks = Networks {
                prefix4,
                prefix6,
                max: 1,
                of: BTreeMap::new(),
                others: Attempts::default(),
            };
            let (network, bits) = networks.network(address.parse().unwrap());
            format!("{network}/{bits}")
        };
        assert_eq!(of(24, 48, "10.1.2.3"), "10.1.2.0/24");
        assert_eq!(of(0, 48, "10.1.2.3"), "0.0.0.0/0");
        assert_eq!(of(32, 48, "10.1.2.3"), "10.1.2.3/32");
        assert_eq!(of(24, 48, "2001:db8:1:2::3"), "2001:db8:1::/48");
        assert_eq!(of(24, 0, "2001:db8:1:2::3"), "::/0");
        assert_eq!(of(24, 128, "::1"), "::1/128");
    }
}
