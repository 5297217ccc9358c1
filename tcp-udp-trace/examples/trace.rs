//! Prints the socket events of the running machine. The command `tcp-udp-trace trace` is this file.
//!
//! ```text
//! cargo run --release --example trace -- --json --port 443
//! ```
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "this is a program for a terminal"
)]

use std::{
    error::Error,
    fmt::Write as _,
    io::{self, ErrorKind, Write as _},
    os::fd::AsFd as _,
    path::PathBuf,
    pin::pin,
    process::ExitCode,
    task::Poll,
    time::Duration,
};

use clap::Parser;
use futures_util::{FutureExt as _, Stream, StreamExt as _, poll, stream};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout},
    sys::resource::{RLIM_INFINITY, Resource, setrlimit},
};
use tcp_udp_trace::{
    Buffer, DEFAULT_QUEUE, Event, Filter, Stats, TcpTracer, TracerHandle, UdpTracer,
    consumer::merge,
};
use tokio::signal::unix::{SignalKind, signal};

/// Print the socket events of the running machine.
///
/// Needs root, or CAP_BPF and CAP_PERFMON.
#[derive(Parser)]
pub(crate) struct Args {
    /// Trace TCP. Both protocols are traced unless one is named.
    #[arg(long)]
    tcp: bool,
    /// Trace UDP.
    #[arg(long)]
    udp: bool,
    /// Print each datagram, not only the totals of flows and sockets.
    #[arg(long)]
    per_datagram: bool,
    /// Print TCP retransmissions.
    #[arg(long)]
    retransmits: bool,
    /// Print TCP resets.
    #[arg(long)]
    resets: bool,
    /// Print each segment that a listener drops because its queue is full.
    #[arg(long)]
    listen_overflows: bool,
    /// Print only the ends of TCP connections, each with its summary.
    #[arg(long)]
    summaries_only: bool,
    /// The shortest time between two reports of a UDP flow.
    #[arg(long, value_name = "SECS", value_parser = seconds, default_value = "1")]
    interval: Duration,
    /// Look up the program, the container and the systemd unit of each process. Only JSON shows
    /// them.
    #[arg(long)]
    process_details: bool,
    /// Print one JSON object per line.
    #[arg(long)]
    json: bool,
    /// The time between two samples of each live socket.
    #[arg(long, value_name = "SECS|off", value_parser = seconds_or_off, default_value = "6.2")]
    sample: Sample,
    /// End after this time.
    #[arg(long, value_name = "SECS", value_parser = seconds)]
    duration: Option<Duration>,
    /// The number of events that may wait to be printed.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_QUEUE)]
    queue: usize,
    /// The buffer between kernel and reader. Default: the ring buffer, if the kernel has one.
    #[arg(long, value_name = "ring|perf", value_parser = buffer)]
    buffer: Option<Buffer>,
    /// A file with the kernel's BTF, for a kernel that has none of its own.
    #[arg(long, value_name = "PATH")]
    btf: Option<PathBuf>,
    /// Print only the events of sockets that this process owns. The pid is a number of this
    /// program's pid namespace.
    #[arg(long, value_name = "N")]
    pid: Vec<u32>,
    /// Print only the events of sockets with this port on either side.
    #[arg(long, value_name = "N")]
    port: Vec<u16>,
    /// Print only the events that pass this filter, such as
    /// "pid_tree=1234 remote=10.0.0.0/8 kind=accept,close". It has any of pid, pid_tree, uid, comm,
    /// port, local, remote, not_local, not_remote, cgroup and cgroup_tree (an id or an absolute
    /// path), netns, family, kind, state, direction, one_in, only_self, exclude_self,
    /// exclude_loopback. A pid is a number of this program's pid namespace.
    #[arg(long, value_name = "FILTER", default_value = "")]
    filter: Filter,
}

/// The time between two samples. `None` disables them.
#[derive(Clone, Copy)]
struct Sample(Option<Duration>);

impl Args {
    fn filter(&self) -> Filter {
        let filter = self
            .pid
            .iter()
            .fold(self.filter.clone(), |f, &pid| f.pid(pid));
        self.port.iter().fold(filter, |f, &port| f.port(port))
    }
}

pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text
        .parse()
        .map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

fn seconds_or_off(text: &str) -> Result<Sample, String> {
    match text {
        "off" => Ok(Sample(None)),
        text => seconds(text).map(|every| Sample(Some(every))),
    }
}

fn buffer(text: &str) -> Result<Buffer, String> {
    match text {
        "ring" => Ok(Buffer::Ring),
        "perf" => Ok(Buffer::Perf),
        _ => Err("neither ring nor perf".into()),
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    match trace(&Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of the pipe is gone, as in `trace | head`.
        Err(error) if error.downcast_ref().is_some_and(is_broken_pipe) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", describe(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// Returns an error and its causes in one line.
pub(crate) fn describe(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        // The verifier's log may stand in the lines after the first.
        text.push_str(error.to_string().lines().next().unwrap_or_default());
        source = error.source();
    }
    text
}

/// How often a program that has nothing to print checks whether its output still has a reader.
pub(crate) const CHECK_OUTPUT: Duration = Duration::from_secs(1);

/// Returns whether standard output is a pipe whose reader has gone away.
pub(crate) fn output_is_closed() -> io::Result<bool> {
    let stdout = io::stdout();
    let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
    nix::poll::poll(&mut fds, PollTimeout::ZERO)?;
    Ok(fds[0]
        .revents()
        .is_some_and(|events| events.contains(PollFlags::POLLERR)))
}

fn is_broken_pipe(error: &io::Error) -> bool {
    error.kind() == ErrorKind::BrokenPipe
}

/// Prints events until the options or a signal end it.
pub(crate) async fn trace(args: &Args) -> Result<(), Box<dyn Error + Send + Sync>> {
    // Before Linux 5.11, maps count against this limit. A library must not change the limit, but a
    // program may.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);

    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut tcp = None;
    if args.tcp || !args.udp {
        let mut builder = TcpTracer::builder().queue(args.queue);
        if let Some(buffer) = args.buffer {
            builder = builder.buffer(buffer);
        }
        if let Some(btf) = &args.btf {
            builder = builder.btf(btf);
        }
        let builder = builder
            .filter(args.filter())
            .retransmits(args.retransmits)
            .resets(args.resets)
            .listen_overflows(args.listen_overflows)
            .summaries_only(args.summaries_only)
            .sample_interval(args.sample.0)
            .process_details(args.process_details);
        tcp = Some(builder.start().await?);
    }
    let mut udp = None;
    if args.udp || !args.tcp {
        let mut builder = UdpTracer::builder().queue(args.queue);
        if let Some(buffer) = args.buffer {
            builder = builder.buffer(buffer);
        }
        if let Some(btf) = &args.btf {
            builder = builder.btf(btf);
        }
        let builder = builder
            .filter(args.filter())
            .sample_interval(args.sample.0)
            .process_details(args.process_details)
            .interval(args.interval)
            .per_datagram(args.per_datagram);
        udp = Some(builder.start().await?);
    }
    let handles = [
        ("tcp", tcp.as_ref().map(TcpTracer::handle)),
        ("udp", udp.as_ref().map(UdpTracer::handle)),
    ];
    let mut ready = String::from("ready:");
    for (protocol, handle) in &handles {
        let Some(handle) = handle else { continue };
        write!(ready, " {protocol}")?;
        for hook in handle.hooks() {
            write!(ready, " {hook}")?;
        }
    }
    writeln!(io::stderr(), "{ready}")?;
    let stop = || {
        handles
            .iter()
            .flat_map(|(_, handle)| handle)
            .for_each(TracerHandle::stop)
    };

    let mut over = pin!(
        async {
            let duration = async {
                match args.duration {
                    Some(duration) => tokio::time::sleep(duration).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = duration => {}
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        }
        .fuse()
    );

    let mut check_output = tokio::time::interval(CHECK_OUTPUT);
    let mut events = merge(events(&mut tcp), events(&mut udp));
    let mut out = io::BufWriter::new(io::stdout().lock());
    loop {
        // Available events are printed without a flush of each line. The flush comes before a wait.
        let event = match poll!(events.next()) {
            Poll::Ready(event) => event,
            Poll::Pending => {
                out.flush()?;
                tokio::select! {
                    event = events.next() => event,
                    () = &mut over => {
                        stop();
                        continue;
                    }
                    _ = check_output.tick() => {
                        if output_is_closed()? {
                            return Ok(());
                        }
                        continue;
                    }
                }
            }
        };
        if poll!(&mut over).is_ready() {
            stop();
        }
        let Some(event) = event else { break };
        if args.json {
            serde_json::to_writer(&mut out, &event).map_err(io::Error::from)?;
            writeln!(out)?;
        } else {
            writeln!(out, "{event}")?;
        }
    }
    out.flush()?;
    drop(events);
    let mut stats = Stats::default();
    if let Some(tcp) = tcp {
        stats += tcp.close().await?;
    }
    if let Some(udp) = udp {
        stats += udp.close().await?;
    }
    writeln!(io::stderr(), "stats: {}", serde_json::to_string(&stats)?)?;
    Ok(())
}

/// Returns the events of a tracer. Without a tracer, there are none.
fn events<S: Stream<Item = Event> + Unpin>(tracer: &mut Option<S>) -> impl Stream<Item = Event> {
    stream::iter(tracer).flatten()
}
