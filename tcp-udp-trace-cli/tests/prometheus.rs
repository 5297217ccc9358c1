//! Tests of `prometheus`: the counters match the traffic.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use integration_tests::{
    actor::Actor,
    netns::{FAR, ip, veth},
    tcp_info,
};

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
    let mut tool = Tool::start("prometheus", &args)?;
    let mut pair = Pair::new("prom-client", "prom-server")?;
    let open = pair.connect()?;
    pair.connection(100_000, 5)?;
    datagrams("prom-client", "prom-server", &[1, 0, 300])?;
    pair.fail_to_connect()?;
    wait_for(&tool, &[("tcp_connections", 2.0)])?;
    pair.exchange(&open, 3, 20_000)?;
    pair.close(&open)?;
    // A third name, with `--names 2`.
    datagrams("prom-late", "prom-server", &[10])?;

    let bytes = |process, protocol, direction| {
        format!(
            r#"payload_bytes_total{{process="{process}",protocol="{protocol}",direction="{direction}"}}"#
        )
    };
    let connections =
        |change, process| format!(r#"tcp_connections_{change}_total{{process="{process}"}}"#);
    let expected = [
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
    let expected: BTreeMap<_, _> = expected
        .into_iter()
        .map(|(name, value)| (name, f64::from(value)))
        .collect();
    let own: Vec<_> = expected
        .iter()
        .map(|(name, value)| (&**name, *value))
        .collect();
    wait_for(&tool, &own)?;
    let scraped = scrape(&tool)?;
    let labelled = |metrics: &BTreeMap<String, f64>| -> BTreeMap<_, _> {
        metrics
            .clone()
            .into_iter()
            .filter(|(name, _)| name.contains('{'))
            .collect()
    };
    ensure!(
        labelled(&scraped) == expected,
        "{scraped:#?} instead of {expected:#?}"
    );
    for (name, value) in [
        ("tcp_connections", 0.0),
        ("tracer_events_lost_ring_total", 0.0),
        ("tracer_events_lost_queue_total", 0.0),
    ] {
        ensure!(scraped.get(name) == Some(&value), "{name} in {scraped:#?}");
    }
    ensure!(scraped["tracer_events_delivered_total"] > 20.0);
    tool.terminate()
}

/// Removes the address of the far end for a while, so that the kernel retransmits the data.
pub(crate) fn retransmissions_are_counted() -> anyhow::Result<()> {
    let far = veth()?;
    let filter = format!("{} comm=prom-resender", here()?);
    let args = [
        "--listen",
        "127.0.0.1:0",
        "--retransmits",
        "--filter",
        &filter,
    ];
    let mut tool = Tool::start("prometheus", &args)?;
    let client = Actor::spawn("prom-resender")?;
    let mut server = far.run(|| Actor::spawn("prom-far"))?;
    let listener = server.listen(SocketAddr::new(FAR.parse()?, 0))?;
    let mut pair = Pair {
        client,
        server,
        listener,
    };
    let connection = pair.connect()?;
    let socket = pair.client.lend(&connection.client)?;
    let resent = || -> anyhow::Result<u64> {
        let info = tcp_info::of(&socket)?;
        let total = info.iter().find(|(name, _)| *name == "total_retrans");
        total.map(|(_, total)| *total).context("no total_retrans")
    };
    far.run(|| ip(&format!("addr del {FAR}/24 dev far0")))?;
    pair.client.send(&connection.client, 1000)?;
    while resent()? < 2 {
        thread::sleep(Duration::from_millis(10));
    }
    far.run(|| ip(&format!("addr add {FAR}/24 dev far0")))?;
    pair.server.receive(&connection.server, 1000)?;
    let resent = resent()? as f64;
    let name = r#"tcp_retransmits_total{process="prom-resender"}"#;
    wait_for(&tool, &[(name, resent)])?;
    tool.terminate()
}

/// Scrapes until all of these metrics have these values.
fn wait_for(tool: &Tool, expected: &[(&str, f64)]) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let scraped = scrape(tool)?;
        if expected
            .iter()
            .all(|(name, value)| scraped.get(*name) == Some(value))
        {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{scraped:#?} instead of {expected:#?}"
        );
        thread::sleep(Duration::from_millis(50));
    }
}

/// Returns the metrics, without the prefix that all of them have.
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
