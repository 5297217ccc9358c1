//! The command `prometheus`: serves the traffic of the machine's processes as metrics for
//! Prometheus, at `http://127.0.0.1:9798/metrics`.
//!
//! Each value of a label costs Prometheus a time series, and any user can start a process with a
//! new name. So only the first 100 process names (`--names`) have their own time series, and no
//! address or port is a label.
//!
//! ```text
//! tcp-udp-trace prometheus --retransmits
//! ```

use std::{collections::HashSet, fmt, net::SocketAddr, sync::Arc};

use crate::growth::Growth;
use axum::{Router, http::header::CONTENT_TYPE, routing::get};
use futures_util::{StreamExt as _, stream};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _, text::encode},
    metrics::{counter::ConstCounter, counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};
use tcp_udp_trace::{
    Comm, Event, EventKind, Filter, Protocol, SampleInfo, Stats, TcpState, TcpTracer, TracerHandle,
    UdpTracer,
};
use tokio::net::TcpListener;

/// Serve the traffic of the machine's processes as metrics for Prometheus.
///
/// Needs root, or CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The address to listen on.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9798")]
    listen: SocketAddr,
    /// How many process names have their own metrics. All further names are summed up as `other`.
    #[arg(long, value_name = "N", default_value_t = 100)]
    names: usize,
    /// Count TCP retransmissions.
    #[arg(long)]
    retransmits: bool,
    /// Only sockets that pass this filter, such as "cgroup=1234".
    #[arg(long, default_value = "")]
    filter: Filter,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let filter = args.filter.exclude_self();
    let listener = TcpListener::bind(args.listen).await?;
    let tcp = TcpTracer::builder().filter(filter.clone());
    let mut tcp = tcp.retransmits(args.retransmits).start().await?;
    let mut udp = UdpTracer::builder().filter(filter).start().await?;
    let handles = vec![tcp.handle(), udp.handle()];

    let mut registry = Registry::with_prefix("tcp_udp_trace");
    let mut metrics = Metrics::register(&mut registry, args.names);
    registry.register_collector(Box::new(Losses([tcp.handle(), udp.handle()])));
    let registry = Arc::new(registry);
    let scrape = async move || {
        let mut text = String::new();
        // Writing into a string cannot fail.
        let _ = encode(&mut text, &registry);
        const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        ([(CONTENT_TYPE, OPEN_METRICS)], text)
    };
    eprintln!("ready: http://{}/metrics", listener.local_addr()?);
    let server = axum::serve(listener, Router::new().route("/metrics", get(scrape)));
    tokio::spawn(server.into_future());

    crate::stop_at_signal(handles)?;
    let mut events = stream::select(&mut tcp, &mut udp);
    while let Some(event) = events.next().await {
        metrics.count(&event);
    }
    drop(events);
    tcp.close().await?;
    udp.close().await?;
    Ok(())
}

/// The label of a metric by process.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Of {
    process: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Bytes {
    process: String,
    protocol: &'static str,
    direction: &'static str,
}

/// The metrics, and the state that is needed to count them.
struct Metrics {
    bytes: Family<Bytes, Counter>,
    opened: Family<Of, Counter>,
    closed: Family<Of, Counter>,
    failed: Family<Of, Counter>,
    retransmits: Family<Of, Counter>,
    connections: Gauge,

    growth: Growth,
    /// The open connections, by socket id.
    open: HashSet<u64>,
    names: HashSet<Comm>,
    max_names: usize,
}

impl Metrics {
    fn register(registry: &mut Registry, max_names: usize) -> Self {
        let metrics = Self {
            bytes: Family::default(),
            opened: Family::default(),
            closed: Family::default(),
            failed: Family::default(),
            retransmits: Family::default(),
            connections: Gauge::default(),
            growth: Growth::default(),
            open: HashSet::new(),
            names: HashSet::new(),
            max_names,
        };
        registry.register_with_unit(
            "payload",
            "Payload that sockets have sent and received",
            Unit::Bytes,
            metrics.bytes.clone(),
        );
        for (name, help, family) in [
            (
                "tcp_connections_opened",
                "TCP connections established",
                &metrics.opened,
            ),
            (
                "tcp_connections_closed",
                "Established TCP connections that ended",
                &metrics.closed,
            ),
            (
                "tcp_connections_failed",
                "Attempts to connect by TCP that failed",
                &metrics.failed,
            ),
            (
                "tcp_retransmits",
                "TCP segments retransmitted, counted only with --retransmits",
                &metrics.retransmits,
            ),
        ] {
            registry.register(name, help, family.clone());
        }
        registry.register(
            "tcp_connections",
            "Open TCP connections, counted once for each end on this machine",
            metrics.connections.clone(),
        );
        metrics
    }

    fn count(&mut self, event: &Event) {
        use TcpState::{Close, Established, Listen, SynRecv, SynSent};
        let process = self.name(event);
        let of = Of {
            process: process.clone(),
        };
        match &event.kind {
            EventKind::StateChange {
                to: Established, ..
            } => {
                self.opened.get_or_create(&of).inc();
                self.open.insert(event.socket.id);
            }
            EventKind::StateChange {
                from, to: Close, ..
            } => match from {
                SynSent => drop(self.failed.get_or_create(&of).inc()),
                Listen | SynRecv => {}
                _ => {
                    self.closed.get_or_create(&of).inc();
                    self.open.remove(&event.socket.id);
                }
            },
            EventKind::Sample {
                info: SampleInfo::Tcp(info),
            } if info.state == Established as u8 => {
                // The connection may be older than the tracer.
                self.open.insert(event.socket.id);
            }
            EventKind::ConnectFailed { .. } if event.socket.protocol == Protocol::Tcp => {
                self.failed.get_or_create(&of).inc();
            }
            EventKind::Retransmit { .. } => drop(self.retransmits.get_or_create(&of).inc()),
            _ => {}
        }
        self.connections.set(self.open.len() as i64);
        let (tx, rx) = self.growth.of(event);
        let protocol = crate::transport(event);
        for (direction, bytes) in [("transmit", tx), ("receive", rx)] {
            if bytes > 0 {
                let labels = Bytes {
                    process: process.clone(),
                    protocol,
                    direction,
                };
                self.bytes.get_or_create(&labels).inc_by(bytes);
            }
        }
    }

    /// Returns the owner's name, or `other` if there are already `max_names` names.
    fn name(&mut self, event: &Event) -> String {
        let Some(process) = &event.process else {
            return "unknown".to_owned();
        };
        if !self.names.contains(&process.comm) {
            if self.names.len() >= self.max_names {
                return "other".to_owned();
            }
            self.names.insert(process.comm);
        }
        process.comm.to_string()
    }
}

/// The tracers' statistics, which are read at each scrape.
#[derive(Debug)]
struct Losses([TracerHandle; 2]);

impl Collector for Losses {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let mut sum = Stats::default();
        for handle in &self.0 {
            sum += handle.stats();
        }
        for (name, help, count) in [
            (
                "tracer_events_delivered",
                "Events that the tracers delivered to this program",
                sum.delivered,
            ),
            (
                "tracer_events_lost_ring",
                "Events lost because the buffer between kernel and reader was full",
                sum.ring_lost,
            ),
            (
                "tracer_events_lost_queue",
                "Events lost because this program was too slow",
                sum.queue_shed,
            ),
            (
                "tracer_sockets_untracked",
                "Times that a hook had no room to track a socket",
                sum.untracked,
            ),
            (
                "tracer_state_changes_missed",
                "State changes that no hook saw",
                sum.missed,
            ),
        ] {
            let counter = ConstCounter::new(count);
            let encoder = encoder.encode_descriptor(name, help, None, counter.metric_type())?;
            counter.encode(encoder)?;
        }
        Ok(())
    }
}
