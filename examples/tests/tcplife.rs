//! `tcplife`: one line for each connection, with the bytes that were sent.

use anyhow::{Context as _, ensure};

use crate::{
    tool::Tool,
    traffic::{Pair, here},
};

pub(crate) fn each_connection_is_one_line() -> anyhow::Result<()> {
    let mut tool = Tool::start(env!("CARGO_BIN_EXE_tcplife"), &["--filter", &here()?])?;
    let mut pair = Pair::new("life client", "life-server")?;
    let mut ends = Vec::new();
    for (up, down) in [(0, 0), (1, 70_000), (1_000_000, 3)] {
        let (client, server) = (pair.connection(up, down)?, pair.listener.local);
        let (near, far) = (pair.client.pid(), pair.server.pid());
        ends.push(format!("{near} life client {client} {server} {up} {down}"));
        ends.push(format!("{far} life-server {server} {client} {down} {up}"));
    }
    // No connections: nothing may be said of these.
    pair.fail_to_connect()?;
    pair.server.close(&pair.listener)?;
    tool.terminate()?;

    let mut lines = tool.output.rest();
    ensure!(lines.remove(0).contains("TX_BYTES"));
    let mut told = Vec::new();
    for line in lines {
        let words: Vec<_> = line.split_whitespace().collect();
        let (milliseconds, words) = words.split_last().context("an empty line")?;
        let milliseconds: f64 = milliseconds.parse()?;
        ensure!((0.0..60_000.0).contains(&milliseconds), "{line}");
        told.push(words.join(" "));
    }
    ends.sort();
    told.sort();
    ensure!(told == ends, "{told:#?} instead of {ends:#?}");
    Ok(())
}
