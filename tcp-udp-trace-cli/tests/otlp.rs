//! Tests of `otlp` with a collector: the counters and log records match the traffic.

use std::{
    collections::BTreeMap,
    env, fs,
    process::Command,
    sync::{Arc, Mutex},
};

use anyhow::{Context as _, ensure};
use integration_tests::kernel::captures_images;
use opentelemetry_proto::tonic::{
    collector::{
        logs::v1::{
            ExportLogsServiceRequest, ExportLogsServiceResponse,
            logs_service_server::{LogsService, LogsServiceServer},
        },
        metrics::v1::{
            ExportMetricsServiceRequest, ExportMetricsServiceResponse,
            metrics_service_server::{MetricsService, MetricsServiceServer},
        },
    },
    common::v1::{KeyValue, any_value::Value},
    metrics::v1::{metric::Data, number_data_point},
    resource::v1::Resource,
};
use tokio::runtime::Runtime;
use tonic::{
    Request, Response, Status,
    codec::CompressionEncoding,
    transport::{Server, server::TcpIncoming},
};

use crate::{
    tool::{Folder, PROGRAM, Tool},
    traffic::{Pair, datagrams, here},
};

/// A collector of metrics and log records.
#[derive(Debug, Clone, Default)]
pub(crate) struct Collector(pub(crate) Arc<Mutex<Collected>>);

#[derive(Debug, Default)]
pub(crate) struct Collected {
    /// The last value of each sum, by its name and attributes.
    pub(crate) sums: BTreeMap<String, i64>,
    /// The attributes of each record.
    pub(crate) records: Vec<BTreeMap<String, String>>,
    services: Vec<String>,
}

impl Collector {
    /// Serves on a free port of the calling thread's network namespace. Returns the address.
    pub(crate) fn serve(&self, runtime: &Runtime) -> anyhow::Result<String> {
        let _context = runtime.enter();
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse()?)?;
        let address = incoming.local_addr()?;
        let server = Server::builder()
            .add_service(
                MetricsServiceServer::new(self.clone())
                    .accept_compressed(CompressionEncoding::Gzip),
            )
            .add_service(
                LogsServiceServer::new(self.clone()).accept_compressed(CompressionEncoding::Gzip),
            );
        runtime.spawn(server.serve_with_incoming(incoming));
        Ok(format!("http://{address}"))
    }
}

impl Collected {
    fn resource(&mut self, resource: Option<Resource>) {
        let attributes = resource
            .map(|resource| resource.attributes)
            .unwrap_or_default();
        self.services
            .extend(text(attributes).remove("service.name"));
    }
}

fn text(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |value| match value {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::DoubleValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    };
    let pair = |pair: KeyValue| (pair.key, text(pair.value.and_then(|any| any.value)));
    attributes.into_iter().map(pair).collect()
}

#[tonic::async_trait]
impl MetricsService for Collector {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        let mut collected = self.0.lock().unwrap();
        for resource in request.into_inner().resource_metrics {
            collected.resource(resource.resource);
            let scopes = resource.scope_metrics.into_iter();
            for metric in scopes.flat_map(|scope| scope.metrics) {
                let Some(Data::Sum(sum)) = metric.data else {
                    return Err(Status::invalid_argument(metric.name));
                };
                for point in sum.data_points {
                    let Some(number_data_point::Value::AsInt(value)) = point.value else {
                        return Err(Status::invalid_argument(metric.name));
                    };
                    let attributes = text(point.attributes).into_values();
                    let name = format!(
                        "{} {}",
                        metric.name,
                        attributes.collect::<Vec<_>>().join(" ")
                    );
                    collected.sums.insert(name, value);
                }
            }
        }
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Collector {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        let mut collected = self.0.lock().unwrap();
        for resource in request.into_inner().resource_logs {
            collected.resource(resource.resource);
            let scopes = resource.scope_logs.into_iter();
            for record in scopes.flat_map(|scope| scope.log_records) {
                if record.event_name != "tcp_udp_trace.tcp.close" || record.time_unix_nano == 0 {
                    return Err(Status::invalid_argument(record.event_name));
                }
                collected.records.push(text(record.attributes));
            }
        }
        Ok(Response::new(Default::default()))
    }
}

pub(crate) fn collector_gets_everything_by_the_end() -> anyhow::Result<()> {
    // This program is both client and server.
    let us = this_program()?;
    check(&mut Command::new(PROGRAM), [&us, &us])
}

pub(crate) fn this_program() -> anyhow::Result<String> {
    let program = env::current_exe()?;
    let name = program.file_name().context("no name")?;
    Ok(name.to_string_lossy().into_owned())
}

/// Checks `otlp` with the three capabilities that the manifests in `deploy/` grant. If the eBPF
/// programs cannot report executables on this kernel, those of processes with more privileges are
/// unknown, and `otlp` falls back to their `comm`.
pub(crate) fn three_capabilities_are_enough() -> anyhow::Result<()> {
    // Root without capabilities may have no access to the build folder.
    let folder = Folder::new("otlp")?;
    let program = folder.path().join("otlp");
    fs::copy(PROGRAM, &program)?;
    let mut command = Command::new("setpriv");
    for set in ["--inh-caps", "--bounding-set"] {
        command.arg(format!("{set}=-all,+bpf,+perfmon,+net_admin"));
    }
    command.arg("--no-new-privs").arg(program);
    let us = this_program()?;
    let names = if captures_images()? {
        [us.as_str(); 2]
    } else {
        ["otlp-client", "otlp-server"]
    };
    check(&mut command, names)
}

/// Runs `otlp` by this command, during traffic of a client and a server with these executable
/// names. Checks the sums and log records that the collector received.
fn check(command: &mut Command, names: [&str; 2]) -> anyhow::Result<()> {
    let collector = Collector::default();
    // The runtime's threads inherit the network namespace of this thread.
    let runtime = Runtime::new()?;
    let endpoint = collector.serve(&runtime)?;
    let filter = format!("{} comm=otlp-client,otlp-server", here()?);
    command.args(["otlp", "--filter", &filter]);
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint);
    let mut tool = Tool::start_with(command)?;
    let mut pair = Pair::new("otlp-client", "otlp-server")?;
    let client = pair.connection(100_000, 5)?;
    let open = pair.connect()?;
    pair.exchange(&open, 7, 8)?;
    // The name of an executable can be looked up only while the process runs.
    let _alive = datagrams("otlp-client", "otlp-server", &[1, 0, 300])?;
    pair.fail_to_connect()?;
    pair.close(&open)?;
    // The first periodic export would come much later.
    tool.terminate()?;
    runtime.shutdown_background();

    let collected = collector.0.lock().unwrap();
    ensure!(!collected.services.is_empty());
    ensure!(
        collected
            .services
            .iter()
            .all(|name| name == "tcp-udp-trace")
    );
    let [client_name, server_name] = names;
    let mut expected = BTreeMap::new();
    for (sum, name, value) in [
        ("process.network.io transmit tcp", client_name, 100_007),
        ("process.network.io receive tcp", client_name, 13),
        ("process.network.io transmit tcp", server_name, 13),
        ("process.network.io receive tcp", server_name, 100_007),
        ("process.network.io transmit udp", client_name, 301),
        ("process.network.io receive udp", server_name, 301),
        ("tcp_udp_trace.connection.opened", client_name, 2),
        ("tcp_udp_trace.connection.opened", server_name, 2),
        ("tcp_udp_trace.connection.failed", client_name, 1),
        ("tcp_udp_trace.connection.closed", client_name, 3),
        ("tcp_udp_trace.connection.closed", server_name, 2),
        ("tcp_udp_trace.event.lost", "queue", 0),
        ("tcp_udp_trace.event.lost", "ring", 0),
    ] {
        *expected.entry(format!("{sum} {name}")).or_default() += value;
    }
    ensure!(
        collected.sums == expected,
        "{:#?} instead of {expected:#?}",
        collected.sums
    );

    ensure!(collected.records.len() == 5, "{:#?}", collected.records);
    let of = |expected: &[(&str, &str)]| {
        let is_it = |record: &&BTreeMap<String, String>| {
            let has =
                |(key, value): &(&str, &str)| record.get(*key).map(|text| &**text) == Some(value);
            expected.iter().all(has)
        };
        let mut found = collected.records.iter().filter(is_it);
        found
            .next()
            .with_context(|| format!("no {expected:?} in {:#?}", collected.records))
    };
    let pid = pair.client.pid().to_string();
    let (port, listener) = (
        client.port().to_string(),
        pair.listener.local.port().to_string(),
    );
    let record = of(&[
        ("network.transport", "tcp"),
        ("network.type", "ipv4"),
        ("network.local.address", "127.0.0.1"),
        ("network.local.port", &port),
        ("network.peer.address", "127.0.0.1"),
        ("network.peer.port", &listener),
        ("process.pid", &pid),
        ("process.executable.name", client_name),
        ("tcp_udp_trace.comm", "otlp-client"),
        ("tcp_udp_trace.tx_bytes", "100000"),
        ("tcp_udp_trace.rx_bytes", "5"),
    ])?;
    ensure!(record["tcp_udp_trace.duration_s"].parse::<f64>()? < 60.0);
    ensure!(!record.contains_key("error.type"));
    of(&[
        ("tcp_udp_trace.comm", "otlp-server"),
        ("tcp_udp_trace.rx_bytes", "7"),
    ])?;
    of(&[("process.pid", &pid), ("error.type", "ECONNREFUSED")])?;
    Ok(())
}
