//! Tests of `top`: the picture and the screen show the processes and their bytes.

use std::{
    env, fs,
    io::{Read as _, Write as _},
    net::SocketAddr,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use integration_tests::{actor, netns::ip};

use crate::{
    tool::{Folder, PROGRAM, Tool},
    traffic::{Connection, Pair, datagrams, here},
};

/// The variable with a path at which the picture is kept, for the README:
/// `TOP_SVG=docs/top.svg cargo xtask test --local picture`.
const KEEP: &str = "TOP_SVG";

/// Two processes with a connection: client, server, their addresses, bytes to the server and bytes
/// to the client.
type Talk<'a> = (&'a str, &'a str, &'a str, &'a str, u64, u64);

#[rustfmt::skip]
const TALKS: [Talk<'_>; 4] = [
    ("chromium", "nginx", "198.51.100.23:50114", "192.0.2.10:443", 4_000, 610_000),
    ("billing", "postgres", "192.0.2.31:38822", "192.0.2.20:5432", 9_000, 88_000),
    ("worker", "redis-server", "192.0.2.32:55760", "192.0.2.21:6379", 37_000, 21_000),
    ("restic", "sshd", "203.0.113.80:60342", "192.0.2.40:22", 260_000, 300),
];

/// Starts the two processes of a talk, and connects them.
fn talk(&(client, server, from, to, ..): &Talk<'_>) -> anyhow::Result<(Pair, Connection)> {
    let (from, to): (SocketAddr, SocketAddr) = (from.parse()?, to.parse()?);
    for address in [from, to] {
        // This fails if an earlier pair has added the address.
        let _ = ip(&format!("addr add {}/32 dev lo", address.ip()));
    }
    let mut pair = Pair::at(client, server, to)?;
    let socket = pair.client.bind(from)?;
    let connect = actor::Command::Connect(socket.fd, pair.listener.local);
    let client = pair.client.socket(connect)?;
    let server = pair.server.accept(&pair.listener)?;
    pair.server.close(&pair.listener)?;
    Ok((pair, Connection { client, server }))
}

pub(crate) fn picture_shows_processes_and_bytes() -> anyhow::Result<()> {
    let folder = Folder::new("top")?;
    let kept = env::var_os(KEEP).map(PathBuf::from);
    let file = kept
        .clone()
        .unwrap_or_else(|| folder.path().join("top.svg"));
    let seconds = if kept.is_some() { "55" } else { "4" };
    let file_name = file.to_str().context("the path is not UTF-8")?;
    let filter = here()?;
    let args = [
        "--filter",
        &filter,
        "--picture",
        file_name,
        "--after",
        seconds,
    ];
    let mut tool = Tool::start("top", &args)?;
    // These transfers are complete when the picture is drawn.
    let mut done = Pair::new("rsync", "rsyncd")?;
    done.connection(7_654_321, 4_321)?;
    let _alive = datagrams("chronyd", "ntpd", &[48; 100])?;
    // These transfers continue until the picture is drawn.
    let mut talks = Vec::new();
    for each in &TALKS {
        talks.push((talk(each)?, each));
    }
    for turn in 0.. {
        if !tool.is_running()? {
            break;
        }
        for (phase, ((pair, connection), talk)) in (0_u8..).zip(&mut talks) {
            let (.., up, down) = **talk;
            // The rates vary, so that the curves are not flat.
            let wave = 1.0
                + 0.6 * (f64::from(turn) / 25.0 + f64::from(phase)).sin()
                + 0.35 * (f64::from(turn) / 7.0 * f64::from(phase + 1)).sin();
            let part = |bytes: u64| (bytes as f64 * wave.max(0.05)) as u64;
            pair.exchange(connection, part(up), part(down))?;
        }
        thread::sleep(Duration::from_millis(60));
    }
    tool.end()?;

    let picture = fs::read_to_string(&file)?;
    ensure!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
    for (client, server, ..) in TALKS {
        for name in [client, server] {
            ensure!(
                picture.contains(&format!(">{name}</text>")),
                "no {name} in {picture}"
            );
        }
    }
    // Each process and each flow has a line with its bytes.
    for (name, bytes) in [
        ("rsync", ["7.7", "4.3"]),
        ("rsyncd", ["4.3", "7.7"]),
        ("chronyd", ["4.8", "·"]),
        ("ntpd", ["·", "4.8"]),
    ] {
        let rows = rows_of(&picture, name);
        ensure!(rows.len() == 2, "{name} has {rows:?}");
        for row in rows {
            let totals: Vec<_> = row.iter().filter(|word| bytes.contains(word)).collect();
            ensure!(totals.ends_with(&[&bytes[0], &bytes[1]]), "{row:?}");
        }
    }
    Ok(())
}

/// Returns the words of each line of the picture that has this word. The words of a line have the
/// same height.
fn rows_of<'a>(picture: &'a str, word: &str) -> Vec<Vec<&'a str>> {
    let text = |line: &'a str| {
        let (_, rest) = line.strip_prefix("<text ")?.split_once(" y=\"")?;
        let (height, rest) = rest.split_once('"')?;
        let (_, text) = rest.strip_suffix("</text>")?.split_once('>')?;
        Some((height, text))
    };
    let texts: Vec<_> = picture.lines().filter_map(text).collect();
    let rows = texts.chunk_by(|(above, _), (below, _)| above == below);
    rows.map(|row| row.iter().map(|(_, text)| *text).collect::<Vec<_>>())
        .filter(|row| row.contains(&word))
        .collect()
}

/// Runs `top` in a pseudo-terminal, which `script` (util-linux) makes.
pub(crate) fn screen_ends_with_q() -> anyhow::Result<()> {
    let command = format!(
        "stty rows 40 cols 120; exec {PROGRAM} top --filter '{}'",
        here()?
    );
    let mut terminal = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .env("TERM", "xterm-256color")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("needs `script` (util-linux, in Debian bsdutils)")?;
    let mut keys = terminal.stdin.take().context("no input")?;
    let mut screen = terminal.stdout.take().context("no output")?;
    let mut shown = String::new();
    let mut wait_for = |expected: &str| -> anyhow::Result<()> {
        let mut bytes = [0; 4096];
        while !shown.contains(expected) {
            let count = screen.read(&mut bytes)?;
            ensure!(count > 0, "no {expected} in {shown:?}");
            shown += &String::from_utf8_lossy(&bytes[..count]);
        }
        Ok(())
    };
    // `top` draws the screen only after its hooks are attached.
    wait_for("RECEIVED/s")?;
    let mut pair = Pair::new("top-client", "top-server")?;
    pair.connection(123_456, 0)?;
    wait_for("top-client")?;
    wait_for("123.5")?;
    keys.write_all(b"q")?;
    let status = terminal.wait()?;
    ensure!(status.success(), "{status}");
    Ok(())
}

/// Checks that `top` refuses to draw its screen into a pipe.
pub(crate) fn pipe_is_refused() -> anyhow::Result<()> {
    let output = Command::new(PROGRAM).arg("top").output()?;
    ensure!(output.status.code() == Some(1) && output.stdout.is_empty());
    ensure!(String::from_utf8(output.stderr)?.contains("--picture"));
    Ok(())
}
