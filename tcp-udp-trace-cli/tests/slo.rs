//! Tests of `slo`: the times and failures of the test's attempts to connect.

use std::{net::SocketAddr, time::Instant};

use anyhow::{Context as _, ensure};
use integration_tests::actor::Command;
use serde_json::Value;

use crate::{
    tool::Tool,
    traffic::{Pair, here},
};

const CONNECTIONS: u64 = 4;

/// Runs `slo` during some connections, an attempt that is refused, and one without a route. Returns
/// the lines of the output, and the time that all connections together took, in microseconds.
fn run(format: &[&str]) -> anyhow::Result<(Vec<String>, f64)> {
    let filter = here()?;
    let args = [&["--duration", "60", "--filter", &filter], format].concat();
    let mut tool = Tool::start("slo", &args)?;
    let mut pair = Pair::new("slo-client", "slo-server")?;
    let begin = Instant::now();
    for _ in 0..CONNECTIONS {
        pair.connection(10, 10)?;
    }
    let took = begin.elapsed().as_nanos() as f64 / 1_000.0;
    pair.fail_to_connect()?;
    let nowhere: SocketAddr = "192.0.2.7:80".parse()?;
    let socket = pair.client.open(nowhere)?;
    pair.client.fail(Command::Connect(socket.fd, nowhere))?;
    pair.client.close(&socket)?;
    tool.terminate()?;
    Ok((tool.output.rest(), took))
}

pub(crate) fn times_and_failures_by_network() -> anyhow::Result<()> {
    let (lines, took) = run(&["--json"])?;
    ensure!(lines.len() == 1, "{lines:#?}");
    let report: Value = serde_json::from_str(&lines[0])?;
    let networks = report["networks"].as_array().context("no networks")?;
    ensure!(networks.len() == 2, "{networks:#?}");
    let near = &networks[0];
    ensure!(
        near["network"] == "127.0.0.0/24"
            && near["attempts"] == CONNECTIONS + 1
            && near["failed"] == 1
            && near["failures"]["ECONNREFUSED"] == 1,
        "{near:#}"
    );
    let mut least = 0.0;
    for name in ["p50_us", "p90_us", "p99_us", "max_us"] {
        let time = near[name].as_f64().with_context(|| name.to_owned())?;
        ensure!(
            time > 0.0 && time >= least && time <= took,
            "{took} us in all: {near:#}"
        );
        least = time;
    }
    let far = &networks[1];
    ensure!(
        far["network"] == "192.0.2.0/24"
            && far["attempts"] == 1
            && far["failures"]["ENETUNREACH"] == 1
            && far["p50_us"].is_null(),
        "{far:#}"
    );
    ensure!(report["stats"]["queue_shed"] == 0, "{report:#}");
    Ok(())
}

pub(crate) fn text_has_the_same() -> anyhow::Result<()> {
    let (lines, _) = run(&["--prefix4", "8"])?;
    ensure!(
        lines.len() == 3 && lines[0].starts_with("NETWORK"),
        "{lines:#?}"
    );
    let words: Vec<_> = lines[1].split_whitespace().collect();
    ensure!(words[..3] == ["127.0.0.0/8", "5", "1"], "{lines:#?}");
    ensure!(words[7..] == ["ECONNREFUSED", "1"], "{lines:#?}");
    let words: Vec<_> = lines[2].split_whitespace().collect();
    let expected = [
        "192.0.0.0/8",
        "1",
        "1",
        "-",
        "-",
        "-",
        "-",
        "ENETUNREACH",
        "1",
    ];
    ensure!(words == expected, "{lines:#?}");
    Ok(())
}
