//! One line for each TCP connection when it ends: whose it was, what it carried, how long it lived.
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
            EventKind::StateChange { from, .. } if event.is_close() && was_connected(from) => {
                print(&event);
            }
            EventKind::Lost { .. } => eprintln!("{event}"),
            _ => {}
        }
    }
    tracer.close().await?;
    Ok(())
}

/// Whether a socket that closed in this state was one end of a connection: not a listener, nor an attempt that failed.
fn was_connected(last: TcpState) -> bool {
    use TcpState::{Listen, NewSynRecv, SynRecv, SynSent};
    !matches!(last, Listen | SynSent | SynRecv | NewSynRecv)
}

fn print(event: &Event) {
    let (pid, comm) = event.process.as_ref().map_or_else(
        || ("-".to_owned(), "-".to_owned()),
        |process| (process.pid.to_string(), process.comm.to_string()),
    );
    println!(
        "{pid:>7} {comm:15} {:>21} {:>21} {:>12} {:>12} {:>12.3}",
        event.socket.local.to_string(),
        event.socket.remote.to_string(),
        event.traffic.tx_bytes,
        event.traffic.rx_bytes,
        event.socket.age.as_secs_f64() * 1000.0,
    );
}
