//! The command `otlp`: sends the traffic of the machine's processes as metrics, and each TCP
//! connection that ends as a log record, to an OpenTelemetry collector, by OTLP over gRPC.
//!
//! The environment variables of OpenTelemetry configure the export (in brackets the default):
//! `OTEL_EXPORTER_OTLP_ENDPOINT` (`http://localhost:4317`), `OTEL_METRIC_EXPORT_INTERVAL`
//! (60000 ms), `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`.
//!
//! Each metric has at most 2,000 sets of attributes. The rest is summed up
//! (`otel.metric.overflow`). A log record waits for the collector in a queue of
//! `OTEL_BLRP_MAX_QUEUE_SIZE` (2,048) records, and is dropped if the queue is full.
//!
//! ```text
//! OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4317 tcp-udp-trace otlp
//! ```

use std::{env, ffi::OsStr, io};

use crate::growth::Growth;
use anyhow::Context as _;
use futures_util::{StreamExt as _, stream};
use nix::errno::Errno;
use opentelemetry::{
    KeyValue,
    logs::{AnyValue, LogRecord as _, Logger as _, LoggerProvider as _, Severity},
    metrics::{Counter, Meter, MeterProvider as _},
};
use opentelemetry_otlp::{LogExporter, MetricExporter};
use opentelemetry_sdk::{
    Resource,
    logs::{SdkLogger, SdkLoggerProvider},
    metrics::SdkMeterProvider,
};
use opentelemetry_semantic_conventions::{attribute, metric};
use tcp_udp_trace::{
    Event, EventKind, Filter, Process, Protocol, Stats, TcpState, TcpTracer, TracerHandle,
    UdpTracer,
};
use tracing_subscriber::filter::LevelFilter;

/// Send metrics and TCP connections of the machine's processes to an OpenTelemetry collector.
///
/// Needs root, or CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only sockets that pass this filter, such as "remote=10.0.0.0/8".
    #[arg(long, default_value = "")]
    filter: Filter,
}

const NAME: &str = "tcp-udp-trace";

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    // Prints warnings, such as that the collector is unreachable, or that a tracer sheds events.
    tracing_subscriber::fmt()
        .with_max_level(LevelFilter::WARN)
        .with_writer(io::stderr)
        .init();
    let mut resource = Resource::builder();
    if env::var_os("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name(NAME);
    }
    let resource = resource.build();
    let meters = SdkMeterProvider::builder()
        .with_periodic_exporter(MetricExporter::builder().with_tonic().build()?)
        .with_resource(resource.clone())
        .build();
    let loggers = SdkLoggerProvider::builder()
        .with_batch_exporter(LogExporter::builder().with_tonic().build()?)
        .with_resource(resource)
        .build();

    // Otherwise the traffic to the collector would cause events itself.
    let filter = args.filter.exclude_self();
    let tcp = TcpTracer::builder().filter(filter.clone());
    let mut tcp = tcp.process_details(true).start().await?;
    let udp = UdpTracer::builder().filter(filter);
    let mut udp = udp.process_details(true).start().await?;
    let handles = vec![tcp.handle(), udp.handle()];
    let mut export = Export::new(&meters.meter(NAME), loggers.logger(NAME), handles.clone());
    crate::stop_at_signal(handles)?;
    eprintln!("ready");
    let mut events = stream::select(&mut tcp, &mut udp);
    while let Some(event) = events.next().await {
        export.event(&event);
    }
    drop(events);
    tcp.close().await?;
    udp.close().await?;
    // `shutdown` blocks until the collector has received the rest.
    let flushed = tokio::task::spawn_blocking(move || (loggers.shutdown(), meters.shutdown()));
    let (records, metrics) = flushed.await?;
    records
        .and(metrics)
        .context("the collector has not received everything")
}

/// Turns events into metrics and log records.
struct Export {
    bytes: Counter<u64>,
    opened: Counter<u64>,
    failed: Counter<u64>,
    logger: SdkLogger,
    growth: Growth,
}

impl Export {
    fn new(meter: &Meter, logger: SdkLogger, handles: Vec<TracerHandle>) -> Self {
        let connections = |name, description| {
            let counter = meter.u64_counter(name).with_unit("{connection}");
            counter.with_description(description).build()
        };
        let opened = connections(
            "tcp_udp_trace.connection.opened",
            "TCP connections established",
        );
        let failed = connections(
            "tcp_udp_trace.connection.failed",
            "Attempts to connect by TCP that failed",
        );
        let lost = meter.u64_observable_counter("tcp_udp_trace.event.lost");
        let lost = lost.with_unit("{event}").with_callback(move |lost| {
            let mut stats = Stats::default();
            for handle in &handles {
                stats += handle.stats();
            }
            for (stage, count) in [("ring", stats.ring_lost), ("queue", stats.queue_shed)] {
                lost.observe(count, &[KeyValue::new("tcp_udp_trace.stage", stage)]);
            }
        });
        lost.with_description("Events that the tracers lost")
            .build();
        let bytes = meter.u64_counter(metric::PROCESS_NETWORK_IO);
        Self {
            bytes: bytes.with_unit("By").with_description("Payload").build(),
            opened,
            failed,
            logger,
            growth: Growth::default(),
        }
    }

    fn event(&mut self, event: &Event) {
        use TcpState::{Close, Established, Listen, SynRecv, SynSent};
        let name = executable_name(event.process.as_ref());
        let by_name = [KeyValue::new(
            attribute::PROCESS_EXECUTABLE_NAME,
            name.clone(),
        )];
        match event.kind {
            EventKind::StateChange {
                to: Established, ..
            } => self.opened.add(1, &by_name),
            EventKind::StateChange {
                from,
                to: Close,
                error,
                ..
            } => {
                if from == SynSent {
                    self.failed.add(1, &by_name);
                }
                if !matches!(from, Listen | SynRecv) {
                    self.log_close(event, &name, error);
                }
            }
            EventKind::ConnectFailed { .. } if event.socket.protocol == Protocol::Tcp => {
                self.failed.add(1, &by_name);
            }
            _ => {}
        }
        let [by_name] = by_name;
        let (tx, rx) = self.growth.of(event);
        for (direction, bytes) in [("transmit", tx), ("receive", rx)] {
            if bytes > 0 {
                let attributes = [
                    by_name.clone(),
                    KeyValue::new(attribute::NETWORK_TRANSPORT, crate::transport(event)),
                    KeyValue::new(attribute::NETWORK_IO_DIRECTION, direction),
                ];
                self.bytes.add(bytes, &attributes);
            }
        }
    }

    fn log_close(&self, event: &Event, name: &str, error: Option<i32>) {
        let (socket, traffic) = (&event.socket, &event.traffic);
        let family = if socket.local.is_ipv4() {
            "ipv4"
        } else {
            "ipv6"
        };
        let mut record = self.logger.create_log_record();
        record.set_event_name("tcp_udp_trace.tcp.close");
        record.set_timestamp(event.time);
        record.set_severity_number(Severity::Info);
        record.set_body(event.to_string().into());
        let text = |value: String| AnyValue::from(value);
        // The conversion is exact below 2⁶³.
        let number = |value: u64| AnyValue::Int(value as i64);
        record.add_attributes([
            (attribute::NETWORK_TRANSPORT, "tcp".into()),
            (attribute::NETWORK_TYPE, family.into()),
            (
                attribute::NETWORK_LOCAL_ADDRESS,
                text(socket.local.ip().to_string()),
            ),
            (
                attribute::NETWORK_LOCAL_PORT,
                number(socket.local.port().into()),
            ),
            (
                attribute::NETWORK_PEER_ADDRESS,
                text(socket.remote.ip().to_string()),
            ),
            (
                attribute::NETWORK_PEER_PORT,
                number(socket.remote.port().into()),
            ),
            (attribute::PROCESS_EXECUTABLE_NAME, text(name.to_owned())),
            ("tcp_udp_trace.tx_bytes", number(traffic.tx_bytes)),
            ("tcp_udp_trace.rx_bytes", number(traffic.rx_bytes)),
            (
                "tcp_udp_trace.duration_s",
                AnyValue::Double(socket.age.as_secs_f64()),
            ),
        ]);
        if let Some(process) = &event.process {
            record.add_attribute(attribute::PROCESS_PID, number(process.pid.into()));
            record.add_attribute("tcp_udp_trace.comm", text(process.comm.to_string()));
        }
        if let Some(error) = error {
            let errno = Errno::from_raw(error);
            record.add_attribute(attribute::ERROR_TYPE, text(format!("{errno:?}")));
        }
        self.logger.emit(record);
    }
}

/// Returns the file name of the process's executable. If that is unknown, returns its `comm`.
fn executable_name(process: Option<&Process>) -> String {
    let Some(process) = process else {
        return "unknown".to_owned();
    };
    let details = process.details.as_ref();
    let path = details.and_then(|details| details.exe.as_deref());
    match path
        .and_then(|path| path.file_name())
        .and_then(OsStr::to_str)
    {
        Some(name) => name.trim_end_matches(" (deleted)").to_owned(),
        None => process.comm.to_string(),
    }
}
