//! Tests of `trace`: its JSON can be deserialized, and it ends without an error.

use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use tcp_udp_trace::{Event, Protocol};

use crate::{
    tool::{PROGRAM, Tool},
    traffic::{Pair, datagrams, here},
};

pub(crate) fn json_has_the_bytes() -> anyhow::Result<()> {
    let filter = here()?;
    let mut tool = Tool::start("trace", &["--json", "--filter", &filter])?;
    let mut pair = Pair::new("trace-client", "trace-server")?;
    let client = pair.connection(12_345, 678)?;
    datagrams("trace-client", "trace-server", &[7, 0, 900])?;
    tool.terminate()?;
    let stats = tool.stats()?;
    let mut events = Vec::<Event>::new();
    for line in tool.output.rest() {
        events.push(serde_json::from_str(&line).context(line)?);
    }
    ensure!(stats.delivered == events.len() as u64, "{stats:?}");
    let close = |protocol, name: &str| {
        let mut closes = events.iter().filter(|event| {
            let owner = event
                .process
                .as_ref()
                .map(|process| process.comm.to_string());
            event.is_end()
                && event.socket.protocol == protocol
                && event.socket.local != pair.listener.local
                && owner.as_deref() == Some(name)
        });
        closes
            .next()
            .with_context(|| format!("{name} has not closed"))
    };
    let event = close(Protocol::Tcp, "trace-client")?;
    ensure!(event.socket.local == client, "{event}");
    ensure!(
        (event.traffic.tx_bytes, event.traffic.rx_bytes) == (12_345, 678),
        "{event}"
    );
    ensure!(
        event
            .process
            .as_ref()
            .is_some_and(|process| process.pid == pair.client.pid())
    );
    let event = close(Protocol::Udp, "trace-server")?;
    ensure!(
        (event.traffic.rx_bytes, event.traffic.rx_packets) == (907, 3),
        "{event}"
    );
    Ok(())
}

pub(crate) fn ends_after_its_duration() -> anyhow::Result<()> {
    let mut tool = Tool::start("trace", &["--duration", "0.1", "--port", "1"])?;
    tool.end()
}

/// Checks that `trace` ends after its reader, as in `trace | head`.
pub(crate) fn ends_when_its_reader_does() -> anyhow::Result<()> {
    let mut reader = Command::new("true").stdin(Stdio::piped()).spawn()?;
    let output = reader
        .stdin
        .take()
        .context("the reader has no standard input")?;
    reader.wait()?;
    let mut trace = Command::new(PROGRAM);
    let trace = trace.args(["trace", "--port", "1"]);
    let mut tool = Tool::start_to(trace, output.into())?;
    tool.end()
}
