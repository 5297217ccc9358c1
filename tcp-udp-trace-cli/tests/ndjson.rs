//! Tests of `ndjson`: every event is one whole line in one file, and the oldest files are removed.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};
use tcp_udp_trace::{Event, Stats};

use crate::{
    tool::{Folder, Tool},
    traffic::{Pair, datagrams, here},
};

const CONNECTIONS: u64 = 40;

/// Runs `ndjson` during traffic. Returns the bytes (sent, received) of each socket, and the final
/// statistics.
fn run(file: &Path, max_bytes: u64, keep: u32) -> anyhow::Result<(BTreeSet<(u64, u64)>, Stats)> {
    let (filter, file) = (here()?, file.to_str().context("the path is not UTF-8")?);
    let (max_bytes, keep) = (max_bytes.to_string(), keep.to_string());
    let args = [
        file,
        "--filter",
        &filter,
        "--max-bytes",
        &max_bytes,
        "--keep",
        &keep,
    ];
    let mut tool = Tool::start("ndjson", &args)?;
    let mut pair = Pair::new("json-client", "json-server")?;
    let mut sent = BTreeSet::new();
    for n in 0..CONNECTIONS {
        let (up, down) = (n * 1000, n);
        pair.connection(up, down)?;
        sent.extend([(up, down), (down, up)]);
    }
    datagrams("json-client", "json-server", &[0, 1, 1000])?;
    sent.extend([(1001, 0), (0, 1001)]);
    // No wait: all events until now must be in the files.
    tool.terminate()?;
    Ok((sent, tool.stats()?))
}

/// Returns `FILE`, `FILE.1` and so on.
fn number(file: &Path, number: usize) -> PathBuf {
    match number {
        0 => file.to_owned(),
        _ => PathBuf::from(format!("{}.{number}", file.display())),
    }
}

pub(crate) fn no_line_is_lost_or_cut() -> anyhow::Result<()> {
    const MAX_BYTES: u64 = 5000;
    let folder = Folder::new("ndjson-lines")?;
    let file = folder.path().join("events");
    let (sent, stats) = run(&file, MAX_BYTES, 10_000)?;
    let files: Vec<_> = (0..)
        .map(|n| number(&file, n))
        .take_while(|path| path.exists())
        .collect();
    ensure!(files.len() > 10, "only {} files", files.len());
    ensure!(folder.count()? == files.len());
    let (mut events, mut gaps) = (Vec::<Event>::new(), 0);
    // The oldest file first.
    for path in files.iter().rev() {
        let text = fs::read_to_string(path)?;
        ensure!(text.len() as u64 <= MAX_BYTES && text.ends_with('\n'));
        for line in text.lines() {
            let event: Event = serde_json::from_str(line).with_context(|| line.to_owned())?;
            match event.process {
                None => gaps += 1,
                Some(_) => events.push(event),
            }
        }
    }
    ensure!(gaps == 0);
    ensure!(stats.delivered == events.len() as u64, "{stats:?}");
    ensure!(
        stats.emitted == stats.delivered + stats.reader_filtered,
        "{stats:?}"
    );
    let ends = events.iter().filter(|event| event.is_end());
    let reported: BTreeSet<_> = ends
        .map(|event| (event.traffic.tx_bytes, event.traffic.rx_bytes))
        .collect();
    ensure!(reported == sent, "{reported:?} instead of {sent:?}");
    for protocol in [tcp_udp_trace::Protocol::Tcp, tcp_udp_trace::Protocol::Udp] {
        let of_one = events
            .iter()
            .filter(|event| event.socket.protocol == protocol);
        let closes = of_one.filter(|event| event.is_end());
        let of_one: Vec<_> = closes.map(|event| event.uptime).collect();
        ensure!(of_one.is_sorted(), "{protocol} is out of order");
    }
    Ok(())
}

pub(crate) fn oldest_files_are_removed() -> anyhow::Result<()> {
    let folder = Folder::new("ndjson-keep")?;
    let file = folder.path().join("events");
    for _ in 0..2 {
        run(&file, 5000, 2)?;
        ensure!(folder.count()? == 3);
        for n in 0..3 {
            let text = fs::read_to_string(number(&file, n))?;
            for line in text.lines() {
                serde_json::from_str::<Event>(line)?;
            }
        }
    }
    Ok(())
}

/// Checks that a run appends to the file. If an earlier run was killed in the middle of a line, the
/// run starts a new line.
pub(crate) fn existing_content_is_kept() -> anyhow::Result<()> {
    const CUT: &str = "{\"time\":";
    let folder = Folder::new("ndjson-stays")?;
    let file = folder.path().join("events");
    fs::write(&file, CUT)?;
    let (_, stats) = run(&file, 100_000_000, 1)?;
    let text = fs::read_to_string(&file)?;
    let mut lines = text.lines();
    ensure!(lines.next() == Some(CUT));
    let count = lines
        .map(serde_json::from_str::<Event>)
        .filter(Result::is_ok)
        .count();
    ensure!(count as u64 == stats.delivered, "{count} of {stats:?}");
    Ok(())
}
