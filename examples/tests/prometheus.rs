//! `prometheus`: the counters are what was sent.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::TcpStream,
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};

use crate::{
    tool::{PATIENCE, Tool},
    traffic::{Pair, datagrams, here},
};

pub(crate) fn counters_have_the_bytes() -> anyhow::Result<()> {
    let filter = format!("{} comm=prom-client,prom-server,prom-late", here()?);
    let args = [
        "--listen",
        "127.0.0.1:0",
        "--names",
        "2",
        "--filter",
        &filter,
    ];
    let mut tool = Tool::start(env!("CARGO_BIN_EXE_prometheus"), &args)?;
    let mut pair = Pair::new("prom-client", "prom-server")?;
    let open = pair.connect()?;
    pair.connection(100_000, 5)?;
    datagrams("prom-client", "prom-server", &[1, 0, 300])?;
    pair.fail_to_connect()?;
    wait_for(&tool, &[("tcp_connections", 2.0)])?;
    pair.exchange(&open, 3, 20_000)?;
    pair.close(&open)?;
    // One name too many.
    datagrams("prom-late", "prom-server", &[10])?;

    let bytes = |process, protocol, direction| {
        format!(
            r#"payload_bytes_total{{process="{process}",protocol="{protocol}",direction="{direction}"}}"#
        )
    };
    let connections =
        |what, process| format!(r#"tcp_connections_{what}_total{{process="{process}"}}"#);
    let wanted = [
        (bytes("prom-client", "tcp", "transmit"), 100_003),
        (bytes("prom-client", "tcp", "receive"), 20_005),
        (bytes("prom-server", "tcp", "transmit"), 20_005),
        (bytes("prom-server", "tcp", "receive"), 100_003),
        (bytes("prom-client", "udp", "transmit"), 301),
        (bytes("prom-server", "udp", "receive"), 311),
        (bytes("other", "udp", "transmit"), 10),
        (connections("opened", "prom-client"), 2),
        (connections("opened", "prom-server"), 2),
        (connections("closed", "prom-client"), 2),
        (connections("closed", "prom-server"), 2),
        (connections("failed", "prom-client"), 1),
    ];
    let wanted: BTreeMap<_, _> = wanted
        .into_iter()
        .map(|(name, value)| (name, f64::from(value)))
        .collect();
    let own: Vec<_> = wanted
        .iter()
        .map(|(name, value)| (&**name, *value))
        .collect();
    wait_for(&tool, &own)?;
    let told = scrape(&tool)?;
    let labelled = |metrics: &BTreeMap<String, f64>| -> BTreeMap<_, _> {
        metrics
            .clone()
            .into_iter()
            .filter(|(name, _)| name.contains('{'))
            .collect()
    };
    ensure!(
        labelled(&told) == wanted,
        "{told:#?} instead of {wanted:#?}"
    );
    for (name, value) in [
        ("tcp_connections", 0.0),
        ("tracer_events_lost_ring_total", 0.0),
        ("tracer_events_lost_queue_total", 0.0),
    ] {
        ensure!(told.get(name) == Some(&value), "{name} in {told:#?}");
    }
    ensure!(told["tracer_events_delivered_total"] > 20.0);
    tool.terminate()
}

/// Scrapes until all of these are so.
fn wait_for(tool: &Tool, wanted: &[(&str, f64)]) -> anyhow::Result<()> {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let told = scrape(tool)?;
        if wanted
            .iter()
            .all(|(name, value)| told.get(*name) == Some(value))
        {
            return Ok(());
        }
        ensure!(
            std::time::Instant::now() < deadline,
            "{told:#?} instead of {wanted:#?}"
        );
        thread::sleep(Duration::from_millis(50));
    }
}

/// The metrics, without the prefix that all of them have.
fn scrape(tool: &Tool) -> anyhow::Result<BTreeMap<String, f64>> {
    let address = tool
        .ready
        .trim_start_matches("ready: http://")
        .trim_end_matches("/metrics");
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    let (head, body) = response.split_once("\r\n\r\n").context("no response")?;
    ensure!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    ensure!(body.ends_with("# EOF\n"), "{body}");
    let mut metrics = BTreeMap::new();
    for line in body.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').context("no value")?;
        let name = name
            .strip_prefix("tcp_udp_trace_")
            .with_context(|| line.to_owned())?;
        metrics.insert(name.to_owned(), value.parse()?);
    }
    Ok(metrics)
}
