//! Prints one line for each TCP connection when it ends: owner, the side that started it (`out` is
//! this side), addresses, bytes, smoothed round-trip time, retransmitted segments, how it ended,
//! duration. The command `tcp-udp-trace life` is this file.
//!
//! The duration of a connection that is older than the tracer is unknown. It has a `>`.
//!
//! The filter works in the kernel: of all events of a socket, only its end reaches this program.
//!
//! ```text
//! cargo run --release --example tcplife -- --filter port=443
//! ```
#![allow(clippy::print_stderr, reason = "it is a program for a terminal")]

use std::{
    error::Error,
    io::{self, Write},
};

use clap::Parser;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use tcp_udp_trace::{
    Direction, EndedBy, Event, EventKind, Filter, Kind, Summary, TcpState, TcpTracer,
};
use tokio::signal::unix::{SignalKind, signal};

/// Print each TCP connection of the machine when it ends.
///
/// Needs root, or CAP_BPF and CAP_PERFMON.
#[derive(Parser)]
pub(crate) struct Args {
    /// Only connections that pass this filter, such as "comm=nginx remote=10.0.0.0/8".
    #[arg(long, default_value = "")]
    filter: Filter,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    // Before Linux 5.11, maps count against this limit. Only a program may change it.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    life(Args::parse()).await
}

/// Prints connections until SIGINT or SIGTERM.
pub(crate) async fn life(args: Args) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut tracer = TcpTracer::builder()
        .filter(args.filter.kind(Kind::StateChange).state(TcpState::Close))
        .sample_interval(None)
        .start()
        .await?;
    let handle = tracer.handle();
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        // The stream yields the events until now, and ends.
        handle.stop();
    });
    eprintln!("ready");
    let mut out = io::stdout();
    writeln!(
        out,
        "{:>7} {:15} {:3} {:>21} {:>21} {:>12} {:>12} {:>8} {:>7} {:12} {:>12}",
        "PID",
        "COMM",
        "DIR",
        "LOCAL",
        "REMOTE",
        "TX_BYTES",
        "RX_BYTES",
        "RTT_MS",
        "RETRANS",
        "END",
        "MS"
    )?;
    while let Some(event) = tracer.next().await {
        match event.kind {
            EventKind::StateChange { ref summary, .. } if event.is_close() => {
                print(&mut out, &event, summary.as_deref())?;
            }
            EventKind::Lost { .. } => eprintln!("{event}"),
            _ => {}
        }
    }
    tracer.close().await?;
    Ok(())
}

fn print(out: &mut impl Write, event: &Event, summary: Option<&Summary>) -> io::Result<()> {
    let (pid, comm) = event.process.as_ref().map_or_else(
        || ("-".to_owned(), "-".to_owned()),
        |process| (process.pid.to_string(), process.comm.to_string()),
    );
    let direction = match event.socket.direction {
        Some(Direction::Outbound) => "out",
        Some(Direction::Inbound) => "in",
        _ => "?",
    };
    let rtt = summary.and_then(|summary| summary.srtt);
    let rtt = rtt.map_or_else(
        || "-".to_owned(),
        |rtt| format!("{:.3}", rtt.as_secs_f64() * 1000.0),
    );
    let retransmitted = summary.map_or_else(
        || "-".to_owned(),
        |summary| summary.retransmitted_packets.to_string(),
    );
    let ended_by = summary.and_then(|summary| summary.ended_by);
    let end = ended_by.map_or("-", EndedBy::name);
    let mark = match event.socket.older {
        Some(false) => "",
        _ => ">",
    };
    let age = format!("{mark}{:.3}", event.socket.age.as_secs_f64() * 1000.0);
    writeln!(
        out,
        "{pid:>7} {comm:15} {direction:3} {:>21} {:>21} {:>12} {:>12} \
         {rtt:>8} {retransmitted:>7} {end:12} {age:>12}",
        event.socket.local.to_string(),
        event.socket.remote.to_string(),
        event.traffic.tx_bytes,
        event.traffic.rx_bytes,
    )
}
