//! Checks that a program traces a connection of known size.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::process::{Ended, lines, wait_for_line};

/// A number that no other connection of the port has.
const BYTES: usize = 54_321;
const TIMEOUT: Duration = Duration::from_secs(60);

/// Runs `tracer` with the arguments of `trace`, makes a connection, and waits until both ends
/// reported its bytes. The tracer must be in the network namespace of this process.
pub(super) fn is_traced(mut tracer: Command) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen")?;
    let address = listener.local_addr()?;
    let filter = format!("port={}", address.port());
    tracer.args(["trace", "--json", "--filter", &filter]);
    let mut child = Ended(
        tracer
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start the tracer")?,
    );
    let events = lines(child.0.stdout.take().context("no standard output")?, |_| ());
    let messages = lines(child.0.stderr.take().context("no standard error")?, |_| ());
    wait_for_line(&messages, TIMEOUT, |line| line.starts_with("ready:"))?;
    let server = thread::spawn(move || -> Result<usize> {
        let mut bytes = Vec::new();
        Ok(listener.accept()?.0.read_to_end(&mut bytes)?)
    });
    TcpStream::connect(address)?.write_all(&[0; BYTES])?;
    let received = server.join().ok().context("the server panicked")??;
    ensure!(received == BYTES, "{received} bytes arrived");
    let mut missing = vec![("tx_bytes", false), ("rx_bytes", true)];
    wait_for_line(&events, TIMEOUT, |line| {
        let event: Value = serde_json::from_str(line).unwrap_or_default();
        let is_server = event["socket"]["local"] == address.to_string();
        if event["kind"]["to"] == "CLOSE" {
            missing.retain(|(direction, of_server)| {
                *of_server != is_server || event["traffic"][direction] != BYTES
            });
        }
        missing.is_empty()
    })
}
