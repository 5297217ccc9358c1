//! Tests of `life`: one line for each connection, with the bytes that were sent.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail, ensure};

use crate::{
    tool::{PROGRAM, Tool},
    traffic::{Pair, here},
};

pub(crate) fn each_connection_is_one_line() -> anyhow::Result<()> {
    let mut tool = Tool::start("life", &["--filter", &here()?])?;
    let mut pair = Pair::new("life client", "life-server")?;
    let mut ends = Vec::new();
    for (up, down) in [(0, 0), (1, 70_000), (1_000_000, 3)] {
        let (client, server) = (pair.connection(up, down)?, pair.listener.local);
        let (near, far) = (pair.client.pid(), pair.server.pid());
        ends.push(format!(
            "{near} life client out {client} {server} {up} {down}"
        ));
        ends.push(format!(
            "{far} life-server in {server} {client} {down} {up}"
        ));
    }
    // A failed attempt and a listener are no connections: they must not have a line.
    pair.fail_to_connect()?;
    pair.server.close(&pair.listener)?;
    tool.terminate()?;

    let mut lines = tool.output.rest();
    ensure!(lines.remove(0).contains("TX_BYTES"));
    let mut lives = Vec::new();
    for line in lines {
        let words: Vec<_> = line.split_whitespace().collect();
        let (milliseconds, words) = words.split_last().context("an empty line")?;
        let milliseconds: f64 = milliseconds.parse()?;
        ensure!((0.0..60_000.0).contains(&milliseconds), "{line}");
        let (words, quality) = words.split_at(words.len() - 3);
        let [rtt, retransmitted, end] = quality else {
            bail!("{line}");
        };
        let rtt: f64 = rtt.parse()?;
        ensure!((0.0..60_000.0).contains(&rtt), "{line}");
        // The client closes first.
        let is_client = words.contains(&"out");
        ensure!(*end == if is_client { "local" } else { "peer" }, "{line}");
        ensure!(retransmitted.parse::<u32>().is_ok(), "{line}");
        lives.push(words.join(" "));
    }
    ends.sort();
    lives.sort();
    ensure!(lives == ends, "{lives:#?} instead of {ends:#?}");
    Ok(())
}

/// Checks the mark `>` of a connection whose duration is unknown.
pub(crate) fn connection_older_than_the_tracer_is_marked() -> anyhow::Result<()> {
    let mut pair = Pair::new("old client", "old-server")?;
    let old = pair.connect()?;
    let mut tool = Tool::start("life", &["--filter", &here()?])?;
    let young = pair.connect()?;
    pair.close(&old)?;
    pair.close(&young)?;
    tool.terminate()?;

    let mut lines = tool.output.rest();
    ensure!(lines.remove(0).contains("TX_BYTES"));
    ensure!(lines.len() == 4, "{lines:#?}");
    for line in lines {
        let is_old = line.contains(&old.client.local.to_string());
        let time = line.split_whitespace().last().context("an empty line")?;
        ensure!(time.starts_with('>') == is_old, "{line}");
    }
    Ok(())
}

/// Checks that `life` ends after its reader, as in `life | head -1`, even if no connection ends.
pub(crate) fn ends_when_its_reader_does() -> anyhow::Result<()> {
    let mut life = Command::new(PROGRAM)
        .args(["life", "--filter", "port=1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut output = BufReader::new(life.stdout.take().context("no output")?);
    output.read_line(&mut String::new())?;
    drop(output);
    let output = life.wait_with_output()?;
    ensure!(
        output.status.success() && output.stderr == b"ready\n",
        "{output:?}"
    );
    Ok(())
}
