//! Tests of `depmap`: each process and its peers, with the bytes and connections of the test.

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use crate::{
    tool::Tool,
    traffic::{Pair, datagrams, here},
};

/// Runs `depmap` during two connections and a UDP flow of three datagrams. Returns the server's TCP
/// port and the lines of the output.
fn run(format: &[&str]) -> anyhow::Result<(u16, Vec<String>)> {
    let filter = format!("{} comm=map-client,map-server", here()?);
    let args = [&["--duration", "60", "--filter", &filter], format].concat();
    let mut tool = Tool::start("depmap", &args)?;
    let mut pair = Pair::new("map-client", "map-server")?;
    pair.connection(100_000, 5)?;
    pair.connection(23, 0)?;
    pair.fail_to_connect()?;
    datagrams("map-client", "map-server", &[7, 0, 900])?;
    // The signal comes long before the duration of 60 seconds is over.
    tool.terminate()?;
    Ok((pair.listener.local.port(), tool.output.rest()))
}

pub(crate) fn client_and_server_have_the_bytes() -> anyhow::Result<()> {
    let (port, lines) = run(&["--json"])?;
    ensure!(lines.len() == 1, "{lines:#?}");
    let report: Value = serde_json::from_str(&lines[0])?;
    let edges = report["edges"].as_array().context("no edges")?;
    let edge = |process, protocol, direction| {
        let mut found = edges.iter().filter(|edge| {
            edge["process"] == process
                && edge["protocol"] == protocol
                && edge["direction"] == direction
        });
        let edge = found.next().cloned();
        edge.with_context(|| format!("no {process} {direction} in {edges:#?}"))
    };
    ensure!(edges.len() == 4, "{edges:#?}");
    let expected = json!({
        "process": "map-client", "protocol": "tcp", "direction": "outbound", "peer": "127.0.0.1",
        "port": port, "connections": 2, "tx_bytes": 100_023, "rx_bytes": 5,
    });
    let client = edge("map-client", "tcp", "outbound")?;
    ensure!(client == expected, "{client:#} instead of {expected:#}");
    // The port is the server's: the two clients' ports differ.
    let expected = json!({
        "process": "map-server", "protocol": "tcp", "direction": "inbound", "peer": "127.0.0.1",
        "port": port, "connections": 2, "tx_bytes": 5, "rx_bytes": 100_023,
    });
    let server = edge("map-server", "tcp", "inbound")?;
    ensure!(server == expected, "{server:#} instead of {expected:#}");
    let (client, server) = (
        edge("map-client", "udp", "outbound")?,
        edge("map-server", "udp", "inbound")?,
    );
    ensure!(
        client["tx_bytes"] == 907 && client["connections"] == 1,
        "{client:#}"
    );
    ensure!(
        server["rx_bytes"] == 907 && server["port"] == client["port"],
        "{server:#}"
    );
    ensure!(report["stats"]["queue_shed"] == 0, "{report:#}");
    Ok(())
}

pub(crate) fn other_formats_have_the_same() -> anyhow::Result<()> {
    let (port, lines) = run(&[])?;
    let words = |line: &String| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let lines: Vec<_> = lines.iter().map(words).collect();
    let expected = format!("map-client tcp out 127.0.0.1 {port} 2 100023 5");
    ensure!(lines.len() == 5 && lines.contains(&expected), "{lines:#?}");

    let (port, lines) = run(&["--dot"])?;
    let graph = lines.join("\n");
    let edge =
        format!(r#""map-client" -> "127.0.0.1:{port}" [label="tcp 2 x, tx 100023 B, rx 5 B"]"#);
    ensure!(graph.contains(&edge), "no {edge} in {graph}");
    ensure!(
        graph.starts_with("digraph") && graph.ends_with('}'),
        "{graph}"
    );
    Ok(())
}
