//! Tests with programs that others wrote: Prometheus scrapes `prometheus`, the collector Rotel
//! receives `otlp`, and DuckDB reads the files of `ndjson`.
//!
//! `cargo xtask collectors` installs the programs and names their folder in [`FOLDER`].

use std::{
    env, fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::{
    otlp::{Collected, Collector, this_program},
    tool::{Folder, PATIENCE, PROGRAM, Tool},
    traffic::{Pair, datagrams, here},
};

/// The variable with the folder of a Python environment that has the packages `rotel` and `duckdb`.
const FOLDER: &str = "TUT_COLLECTORS";

/// Whether the programs are installed.
pub(crate) fn are_here() -> bool {
    env::var_os(FOLDER).is_some()
}

fn python() -> anyhow::Result<PathBuf> {
    let folder = env::var_os(FOLDER).context("no folder")?;
    Ok(Path::new(&folder).join("bin/python"))
}

/// A running service. It is killed when dropped.
struct Service(Child);

impl Service {
    /// Starts a program that writes to a file of this name, and waits until it accepts connections.
    fn start(command: &mut Command, log: &Path, address: &str) -> anyhow::Result<Self> {
        let log = fs::File::options().append(true).create(true).open(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("{command:?}"))?;
        let mut service = Self(child);
        wait("no connection to the service", || {
            let ended = service.0.try_wait()?;
            ensure!(ended.is_none(), "the service ended: {ended:?}");
            Ok(TcpStream::connect(address).is_ok())
        })?;
        Ok(service)
    }

    /// Starts Rotel, which receives at `address` and forwards to `to`.
    fn rotel(address: &str, to: &str, folder: &Path) -> anyhow::Result<Self> {
        let find =
            "import pathlib, rotel; print(pathlib.Path(rotel.__file__).parent / 'rotel-agent')";
        let output = Command::new(python()?).args(["-c", find]).output()?;
        let agent = String::from_utf8(output.stdout)?;
        let mut command = Command::new(agent.trim());
        command
            .args([
                "start",
                "--exporter",
                "otlp",
                "--otlp-grpc-endpoint",
                address,
            ])
            .args(["--otlp-http-endpoint", "127.0.0.1:4319"])
            .args(["--otlp-exporter-endpoint", to]);
        Self::start(&mut command, &folder.join("rotel.log"), address)
    }

    /// Starts Prometheus with the configuration and the data of this folder.
    fn prometheus(address: &str, folder: &Path) -> anyhow::Result<Self> {
        let mut command = Command::new("prometheus");
        command
            .arg(format!(
                "--config.file={}",
                folder.join("prometheus.yml").display()
            ))
            .arg(format!(
                "--storage.tsdb.path={}",
                folder.join("data").display()
            ))
            .arg(format!("--web.listen-address={address}"));
        Self::start(&mut command, &folder.join("prometheus.log"), address)
    }

    /// Sends SIGTERM, and waits for the end.
    fn stop(mut self) -> anyhow::Result<()> {
        kill(Pid::from_raw(self.0.id().try_into()?), Signal::SIGTERM)?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // The program may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until `is_so`.
fn wait(otherwise: &str, mut is_so: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !is_so()? {
        ensure!(Instant::now() < deadline, "{otherwise}");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

pub(crate) fn prometheus_has_the_bytes() -> anyhow::Result<()> {
    let folder = Folder::new("prometheus")?;
    let filter = format!("{} comm=real-client,real-server", here()?);
    let mut tool = Tool::start("prometheus", &["--filter", &filter])?;
    fs::write(
        folder.path().join("prometheus.yml"),
        "scrape_configs:\n- job_name: sockets\n  scrape_interval: 1s\n  static_configs:\n  - targets: [127.0.0.1:9798]\n",
    )?;
    let address = "127.0.0.1:9090";
    let service = Service::prometheus(address, folder.path())?;
    let mut pair = Pair::new("real-client", "real-server")?;
    let open = pair.connect()?;
    pair.exchange(&open, 100_000, 5)?;
    pair.fail_to_connect()?;
    let bytes = |process: &str, direction: &str| {
        format!(
            r#"tcp_udp_trace_payload_bytes_total{{process="{process}",protocol="tcp",direction="{direction}"}}"#
        )
    };
    let sent = bytes("real-client", "transmit");
    wait_for_answer(address, &sent, 100_000)?;
    wait_for_answer(address, "tcp_udp_trace_tcp_connections", 2)?;
    // The counters go on while Prometheus is away.
    service.stop()?;
    pair.exchange(&open, 11, 20_000)?;
    pair.close(&open)?;
    let service = Service::prometheus(address, folder.path())?;
    for (query, value) in [
        (sent.as_str(), 100_011),
        (&bytes("real-client", "receive"), 20_005),
        (&bytes("real-server", "transmit"), 20_005),
        (&bytes("real-server", "receive"), 100_011),
        ("sum(tcp_udp_trace_tcp_connections_closed_total)", 2),
        ("sum(tcp_udp_trace_tcp_connections_failed_total)", 1),
        ("tcp_udp_trace_tcp_connections", 0),
        ("tcp_udp_trace_tracer_events_lost_ring_total", 0),
        ("tcp_udp_trace_tracer_events_lost_queue_total", 0),
        // Every process name that has metrics, as `--names` bounds them.
        (
            "count(count by (process) ({job=\"sockets\",process!=\"\"}))",
            2,
        ),
    ] {
        wait_for_answer(address, query, value)?;
    }
    service.stop()?;
    tool.terminate()
}

/// Queries Prometheus until the answer is this number.
fn wait_for_answer(address: &str, query: &str, value: i64) -> anyhow::Result<()> {
    let mut last = Value::Null;
    let result = wait("not the expected answer", || {
        last = answer(address, query)?;
        Ok(last == Value::from(value.to_string()))
    });
    result.with_context(|| format!("{query} is {last}, not {value}"))
}

fn answer(address: &str, query: &str) -> anyhow::Result<Value> {
    let encoded: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
    let mut stream = TcpStream::connect(address)?;
    write!(
        stream,
        "GET /api/v1/query?query={encoded} HTTP/1.0\r\nHost: localhost\r\n\r\n"
    )?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    let (_, body) = response.split_once("\r\n\r\n").context("no response")?;
    // Prometheus answers with an error until it has read its data.
    let body: Value = serde_json::from_str(body).unwrap_or_default();
    Ok(body["data"]["result"][0]["value"][1].clone())
}

/// Starts `otlp` with an endpoint and short intervals.
fn otlp(endpoint: &str) -> anyhow::Result<Tool> {
    let filter = format!("{} comm=real-client,real-server", here()?);
    let mut command = Command::new(PROGRAM);
    command
        .args(["otlp", "--filter", &filter])
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{endpoint}"))
        .env("OTEL_METRIC_EXPORT_INTERVAL", "500")
        .env("OTEL_BLRP_SCHEDULE_DELAY", "200");
    Tool::start_with(&mut command)
}

const ROTEL: &str = "127.0.0.1:4317";

fn sum(collected: &Collected, name: &str) -> i64 {
    let sums = collected.sums.iter();
    let of_name = sums.filter(|(key, _)| key.starts_with(name));
    of_name.map(|(_, value)| value).sum()
}

/// Makes twenty connections, three datagrams, and a connection that is refused. Returns the
/// processes, which still run.
fn act() -> anyhow::Result<Pair> {
    let mut pair = Pair::new("real-client", "real-server")?;
    for up in 1..=20 {
        pair.connection(up * 1000, up)?;
    }
    datagrams("real-client", "real-server", &[1, 0, 300])?;
    pair.fail_to_connect()?;
    Ok(pair)
}

pub(crate) fn rotel_passes_on_everything() -> anyhow::Result<()> {
    let folder = Folder::new("rotel")?;
    let (collector, runtime) = (Collector::default(), Runtime::new()?);
    let rotel = Service::rotel(ROTEL, &collector.serve(&runtime)?, folder.path())?;
    let mut tool = otlp(ROTEL)?;
    let _pair = act()?;
    tool.terminate()?;
    // It sends what it has before it ends.
    rotel.stop()?;
    let collected = collector.0.lock().unwrap();
    let us = this_program()?;
    for (name, value) in [
        (&*format!("process.network.io transmit tcp {us}"), 210_210),
        (&format!("process.network.io receive tcp {us}"), 210_210),
        (&format!("tcp_udp_trace.connection.opened {us}"), 40),
        (&format!("tcp_udp_trace.connection.failed {us}"), 1),
        (&format!("tcp_udp_trace.connection.closed {us}"), 41),
        ("tcp_udp_trace.event.lost", 0),
    ] {
        let arrived = sum(&collected, name);
        let log = fs::read_to_string(folder.path().join("rotel.log"))?;
        ensure!(
            arrived == value,
            "{name}: {arrived} in {:#?}\n{log}",
            collected.sums
        );
    }
    ensure!(collected.records.len() == 41, "{:#?}", collected.records);
    let sent = collected.records.iter().filter_map(|record| {
        let is_client = record.get("tcp_udp_trace.comm")? == "real-client";
        is_client.then(|| record["tcp_udp_trace.tx_bytes"].parse::<i64>().ok())?
    });
    ensure!(sent.sum::<i64>() == 210_000);
    runtime.shutdown_background();
    Ok(())
}

/// The collector is away at first, arrives, and is restarted. The totals are complete in the end.
/// The log records that were made meanwhile are lost, but counted, and standard error says so.
pub(crate) fn absence_is_noticed_and_made_up_for() -> anyhow::Result<()> {
    let folder = Folder::new("rotel-away")?;
    let (collector, runtime) = (Collector::default(), Runtime::new()?);
    let to = collector.serve(&runtime)?;
    let mut tool = otlp(ROTEL)?;
    let mut pair = Pair::new("real-client", "real-server")?;
    pair.connection(1000, 1)?;
    tool.errors
        .find(|line| line.contains("BatchLogProcessor.ExportError"))?;
    let closed = |expected| {
        let arrived = || {
            sum(
                &collector.0.lock().unwrap(),
                "tcp_udp_trace.connection.closed",
            )
        };
        wait("the collector has other totals", || {
            Ok(arrived() == expected)
        })
    };
    let first = Service::rotel(ROTEL, &to, folder.path())?;
    pair.connection(2000, 2)?;
    closed(4)?;
    first.stop()?;
    pair.connection(4000, 4)?;
    tool.errors
        .find(|line| line.contains("BatchLogProcessor.ExportError"))?;
    let second = Service::rotel(ROTEL, &to, folder.path())?;
    pair.connection(8000, 8)?;
    closed(8)?;
    tool.terminate()?;
    second.stop()?;
    let collected = collector.0.lock().unwrap();
    let sent = sum(&collected, "process.network.io transmit tcp");
    ensure!(sent == 15_015, "{:#?}", collected.sums);
    ensure!(sum(&collected, "tcp_udp_trace.event.lost") == 0);
    // Those of the second and the fourth connection arrived.
    let received = collected.records.len();
    ensure!((4..8).contains(&received), "{:#?}", collected.records);
    runtime.shutdown_background();
    Ok(())
}

/// The collector accepts connections and never answers. The tracer goes on and loses no event. At
/// its end, the program reports that the collector has not received everything.
pub(crate) fn silence_does_not_stall_the_tracer() -> anyhow::Result<()> {
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let mut tool = otlp(&silent.local_addr()?.to_string())?;
    let mut pair = Pair::new("real-client", "real-server")?;
    // More records than the queue has room for.
    for _ in 0..1500 {
        pair.connection(1, 1)?;
    }
    tool.errors
        .find(|line| line.contains("LogDroppingStarted"))?;
    tool.signal()?;
    let ended = tool.end().err().context("the program ended with success")?;
    let text = format!("{ended:#}");
    ensure!(text.contains("exit status: 1"), "{text}");
    ensure!(text.contains("has not received everything"), "{text}");
    ensure!(!text.contains("sheds"), "{text}");
    Ok(())
}

/// Runs the queries of docs/queries.md on the files of `ndjson` and compares the answers with the
/// traffic.
pub(crate) fn duckdb_answers_the_page() -> anyhow::Result<()> {
    let folder = Folder::new("duckdb")?;
    let host = folder.path().join("hosts/alpha");
    fs::create_dir_all(&host)?;
    let file = host.join("events.ndjson");
    let filter = format!("{} comm=real-client,real-server", here()?);
    let file = file.to_str().context("the path is not UTF-8")?;
    let args = [
        file,
        "--filter",
        &filter,
        "--max-bytes",
        "5000",
        "--keep",
        "1000",
    ];
    let mut tool = Tool::start("ndjson", &args)?;
    let _pair = act()?;
    tool.terminate()?;

    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/queries.md");
    let script = "import sys, duckdb, json\n\
        page = open(sys.argv[1]).read()\n\
        page = page.replace(\"'10.20.%'\", \"'127.%'\")\n\
        page = page.replace('time::DATE = current_date - 1', 'true')\n\
        blocks = [part.split('```')[0] for part in page.split('```sql\\n')[1:]]\n\
        db = duckdb.connect()\n\
        for block in blocks:\n\
        \x20   rows = db.execute(block).fetchall()\n\
        \x20   print(json.dumps(rows, default=str))\n";
    let output = Command::new(python()?)
        .current_dir(folder.path())
        .args(["-c", script])
        .arg(page)
        .output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{errors}");
    let answers: Vec<Value> = String::from_utf8(output.stdout)?
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    // Host, process, bytes sent. The first block makes the view, and answers with a number of rows.
    let expected = serde_json::json!([
        ["alpha", "real-client", 210_301],
        ["alpha", "real-server", 210]
    ]);
    ensure!(answers.get(1) == Some(&expected), "{answers:#?}");
    // Process, peer, ECONNREFUSED, count.
    let failed = serde_json::json!([["alpha", "real-client", "127.0.0.1", 111, 1]]);
    ensure!(answers.get(2) == Some(&failed), "{answers:#?}");
    Ok(())
}
