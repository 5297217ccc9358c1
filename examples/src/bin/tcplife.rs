//! One line for each TCP connection when it ends: whose it was, what it carried, how long it lived.
//!
//! A connection that was there before this program lived longer than it can tell: its time has a `>`.
//!
//! The filter works in the kernel: of everything that happens to a socket, only its beginning and its end reach this program.
//!
//! ```text
//! cargo run --release --package examples --bin tcplife -- --filter port=443
//! ```
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "it is a program for a terminal"
)]

use clap::Parser;
use futures_util::StreamExt as _;
use tcp_udp_trace::{Event, EventKind, Filter, Kind, TcpState, TcpTracer};

/// Print each TCP connection of the machine when it ends. Needs root, or CAP_BPF and CAP_PERFMON.
#[derive(Parser)]
struct Args {
    /// Only connections that pass this filter, such as "comm=nginx remote=10.0.0.0/8".
    #[arg(long, default_value = "")]
    filter: Filter,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    examples::raise_memlock_limit();
    let mut tracer = TcpTracer::builder()
        .filter(args.filter.kind(Kind::StateChange).state(TcpState::Close))
        .sample_interval(None)
        .start()
        .await?;
    examples::stop_at_signal(vec![tracer.handle()])?;
    eprintln!("ready");
    println!(
        "{:>7} {:15} {:>21} {:>21} {:>12} {:>12} {:>12}",
        "PID", "COMM", "LOCAL", "REMOTE", "TX_BYTES", "RX_BYTES", "MS"
    );
    while let Some(event) = tracer.next().await {
        match event.kind {
            EventKind::StateChange { .. } if event.is_close() => print(&event),
            EventKind::Lost { .. } => eprintln!("{event}"),
            _ => {}
        }
    }
    tracer.close().await?;
    Ok(())
}

fn print(event: &Event) {
    let (pid, comm) = event.process.as_ref().map_or_else(
        || ("-".to_owned(), "-".to_owned()),
        |process| (process.pid.to_string(), process.comm.to_string()),
    );
    // When a connection began that is older than the tracer is not known: it lived longer than this.
    let mark = match event.socket.older {
        Some(false) => "",
        _ => ">",
    };
    let age = format!("{mark}{:.3}", event.socket.age.as_secs_f64() * 1000.0);
    println!(
        "{pid:>7} {comm:15} {:>21} {:>21} {:>12} {:>12} {age:>12}",
        event.socket.local.to_string(),
        event.socket.remote.to_string(),
        event.traffic.tx_bytes,
        event.traffic.rx_bytes,
    );
}
