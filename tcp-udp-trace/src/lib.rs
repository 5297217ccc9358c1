//! TCP and UDP socket events of the whole machine as async streams, by eBPF.
//!
//! ```no_run
//! use futures_util::StreamExt as _;
//! use tcp_udp_trace::TcpTracer;
//!
//! #[tokio::main]
//! async fn main() -> Result<(), tcp_udp_trace::Error> {
//!     let mut tcp = TcpTracer::builder().start().await?;
//!     while let Some(event) = tcp.next().await {
//!         println!("{event}");
//!     }
//!     Ok(())
//! }
//! ```
//!
//! Beside this crate it takes `futures-util`, and `tokio` with its features `macros` and `rt-multi-thread`. As root, it prints a line for each thing that happens to a TCP socket of the machine:
//!
//! ```text
//! 2026-11-22T01:00:38.558462946Z tcp 127.0.0.1:0 > 127.0.0.1:8123 CLOSE->SYN_SENT curl[32680] tx 0 B/0 rx 0 B/0
//! 2026-11-22T01:00:38.562871969Z tcp 127.0.0.1:60696 > 127.0.0.1:8123 LAST_ACK->CLOSE curl[32680] tx 87 B/6 rx 3609 B/6
//! ```
//!
//! # What you get
//!
//! - [`TcpTracer`]: every state change and every accept of every TCP socket; retransmissions and resets on request.
//! - [`UdpTracer`]: every UDP socket's connects, its end and its totals, and the totals of each of its flows; each datagram
//!   on request.
//! - Both: each `connect` that fails before it changes a socket ([`EventKind::ConnectFailed`]).
//! - Both: what was there before the tracer, and a sample of every live socket at the start and every 6.2 seconds
//!   ([`EventKind::Sample`]): `tcp_info`, queues, buffers.
//!
//! In every network namespace, with the process that owns the socket, its addresses, and the payload it has carried ([`Event`]). Both are
//! streams of the same event, so they merge. Starting is being ready: when [`start`](TcpTracerBuilder::start) returns, every hook is attached.
//!
//! # What you can rely on
//!
//! - A pid is right or absent: never the process that an interrupt happened to hit.
//! - Bytes are payload to the byte: no SYN, FIN or retransmission; no peek, no failed send. Datagrams are counted one by one.
//! - Nothing is lost without being counted ([`Stats`]) and standing in the stream ([`EventKind::Lost`]).
//! - A sample never delays or sheds another event, and never comes after the close of its socket.
//! - After [`close`](TcpTracer::close) or a drop, the kernel holds nothing of ours.
//! - Memory is bounded by what the builder was told.
//!
//! Where a kernel cannot give a number exactly, the event says so ([`EventKind::Flow`]), and [`TracerHandle::hooks`] says why.
//!
//! # Features
//!
//! - `serde`: `Serialize` and `Deserialize` for [`Event`], [`Stats`] and what is in them. Not a default feature.
//!
//! # Privileges
//!
//! Root, or `CAP_BPF` and `CAP_PERFMON`, and for UDP `CAP_NET_ADMIN` too. As root it can use classic tracepoints too, and sample other
//! network namespaces than its own; which capabilities that takes is in SECURITY.md, and what is lost without, the hooks' notes say. Before Linux 5.11
//! the limit on locked memory must be raised (`ulimit -l unlimited`). Once started, it does without any privilege (before 5.19: with
//! `CAP_BPF`). If something is missing, the [`Error`] says what.
//!
//! # Kernels
//!
//! Linux 5.10 or newer with BTF (`/sys/kernel/btf/vmlinux`), on x86_64 or aarch64; UDP takes cgroup v2. Nothing depends on a version: each hook is tried,
//! and [`TracerHandle::hooks`] says which were taken and what they cost. `docs/kernels.md` in the repository tells what each kernel gives. To build: stable Rust, and nothing
//! else, because the eBPF programs are part of the crate, compiled; on other systems than Linux it compiles, and `start` fails with
//! [`ErrorKind::Unsupported`].
//!
//! ## Development builds
//!
//! A start reads the kernel's BTF, which takes ten times as long without optimization: 0.2 s of CPU time for each tracer instead of 0.02 s.
//! In the `Cargo.toml` of your workspace, this makes it fast in development builds and tests, too:
//!
//! ```toml
//! [profile.dev.package]
//! tcp-udp-trace.opt-level = 3
//! aya-obj.opt-level = 3
//! ```
//!
//! It runs on Tokio, with I/O and time enabled. A tracer is `Send`; its stream may be polled from any task.
//!
//! # Cookbook
//!
//! ## Only closed connections, with their totals
//!
//! Filtered in the kernel: what is not wanted costs no room in the buffers and no wake-up. The filter
//! passes every change to or from `CLOSE`, also of listeners and of attempts to connect that failed.
//! [`Event::is_close`] is true of the ends of connections only.
//!
//! ```no_run
//! use futures_util::StreamExt as _;
//! use tcp_udp_trace::{Filter, Kind, TcpState, TcpTracer};
//!
//! # async fn run() -> Result<(), tcp_udp_trace::Error> {
//! let closes = Filter::new().kind(Kind::StateChange).state(TcpState::Close);
//! let mut tcp = TcpTracer::builder().filter(closes).sample_interval(None).start().await?;
//! while let Some(event) = tcp.next().await {
//!     if event.is_close() {
//!         println!("{} bytes out, {} in", event.traffic.tx_bytes, event.traffic.rx_bytes);
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! ## One process and its descendants
//!
//! ```no_run
//! # use tcp_udp_trace::{Filter, UdpTracer};
//! # async fn run(pid: u32) -> Result<(), tcp_udp_trace::Error> {
//! let udp = UdpTracer::builder().filter(Filter::new().pid_tree(pid)).start().await?;
//! # Ok(())
//! # }
//! ```
//!
//! [`TracerHandle::set_filter`] changes the filter while it runs; [`Filter`] also parses from text, such as `port=443 remote=10.0.0.0/8`.
//!
//! ## Both protocols in one stream
//!
//! ```no_run
//! use futures_util::{StreamExt as _, stream};
//! use tcp_udp_trace::{TcpTracer, UdpTracer};
//!
//! # async fn run() -> Result<(), tcp_udp_trace::Error> {
//! let tcp = TcpTracer::builder().start().await?;
//! let udp = UdpTracer::builder().start().await?;
//! let mut both = stream::select(tcp, udp);
//! while let Some(event) = both.next().await {
//!     println!("{event}");
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Each tracer yields its own events in the order in which the kernel wrote them. Between the events of
//! two tracers there is no order: under load, neighbours in the merged stream may be up to a second apart
//! in the wrong order. Compare [`Event::uptime`] where it matters. [`Socket::id`] tells sockets apart, and
//! says nothing of which began first: each CPU counts its own.
//!
//! ## Without async
//!
//! A task on the runtime reads the events of the kernel, so the runtime must run while the stream is
//! waited for. [`block_on`](https://docs.rs/tokio/1/tokio/runtime/struct.Runtime.html#method.block_on) of
//! the runtime does that, with a runtime of either kind:
//!
//! ```no_run
//! use futures_util::StreamExt as _;
//! use tcp_udp_trace::TcpTracer;
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let runtime = tokio::runtime::Runtime::new()?;
//!     let mut tcp = runtime.block_on(TcpTracer::builder().start())?;
//!     while let Some(event) = runtime.block_on(tcp.next()) {
//!         println!("{event}");
//!     }
//!     Ok(())
//! }
//! ```
//!
//! Another executor, such as `futures::executor::block_on_stream(tcp)`, works only while the runtime runs
//! on threads of its own: a multi-thread runtime that is not dropped. Beside a `current_thread` runtime
//! that nobody drives, it waits for ever.
//!
//! ## One tracer for several tasks
//!
//! A stream has one consumer. What hands events on decides what happens when somebody is slow; a `broadcast` channel tells a slow
//! receiver how many it has missed.
//!
//! ```no_run
//! use futures_util::StreamExt as _;
//! use std::sync::Arc;
//! use tcp_udp_trace::TcpTracer;
//! use tokio::sync::broadcast;
//!
//! # async fn run() -> Result<(), tcp_udp_trace::Error> {
//! let mut tcp = TcpTracer::builder().start().await?;
//! let (sender, _) = broadcast::channel(4096);
//! let (mut log, mut count) = (sender.subscribe(), sender.subscribe());
//! tokio::spawn(async move {
//!     while let Some(event) = tcp.next().await {
//!         // An error means that nobody listens at the moment.
//!         let _ = sender.send(Arc::new(event));
//!     }
//! });
//! tokio::spawn(async move { while let Ok(event) = log.recv().await { println!("{event}") } });
//! tokio::spawn(async move { while count.recv().await.is_ok() { /* … */ } });
//! # Ok(())
//! # }
//! ```
//!
//! ## When the consumer is slow
//!
//! The kernel never waits for the consumer. Events wait in the queue, up to
//! [`queue`](TcpTracerBuilder::queue) of them. While the queue is full, records stay in the buffer
//! between kernel and reader, [`ring_bytes`](TcpTracerBuilder::ring_bytes) large: by default another
//! 6,300 TCP events. Nothing is lost until three quarters of that buffer are filled. Only then the
//! oldest events in the queue are shed (or the newest, [`overflow`](TcpTracerBuilder::overflow)),
//! lifecycle events last. One [`Lost`](EventKind::Lost) stands in their place:
//!
//! ```no_run
//! # use futures_util::StreamExt as _;
//! # use tcp_udp_trace::{Event, EventKind, TcpTracer};
//! # async fn run(mut tcp: TcpTracer) {
//! while let Some(event) = tcp.next().await {
//!     match event.kind {
//!         // What is derived from the events so far has a hole here.
//!         EventKind::Lost { count, stage } => eprintln!("{count} events missing: the {stage} was full"),
//!         _ => { /* … */ }
//!     }
//! }
//! # }
//! ```
//!
//! Its stage says what helps: of the queue a faster consumer, a larger [`queue`](TcpTracerBuilder::queue) or a [`Filter`]; of the ring a larger
//! [`ring_bytes`](TcpTracerBuilder::ring_bytes). [`Stats`] has the sums, by kind of event.
//!
//! ## Containers and network namespaces
//!
//! Every namespace of the machine is seen, from wherever the tracer runs; [`Socket::netns`] and [`Socket::cgroup`] say whose an event is, and [`Filter::netns`] and
//! [`Filter::cgroup_path`] restrict it. [`Socket::netns_cookie`] distinguishes namespaces that have had
//! the same inode number. In a container the tracer needs its privileges in the initial user namespace, and `/sys/fs/cgroup` of the
//! host for UDP. A pid in a filter is a number of the tracer's own pid namespace. [`Process::pid`] is always that of the initial one, which
//! means something inside only in the host's pid namespace (`hostPID`).
//!
//! ```no_run
//! # use std::os::unix::fs::MetadataExt as _;
//! # use tcp_udp_trace::{Filter, TcpTracer};
//! # async fn run(pid: u32) -> Result<(), Box<dyn std::error::Error>> {
//! // The network namespace of a process; and a cgroup, here a service of systemd, as `/proc/PID/cgroup` shows it.
//! let netns = std::fs::metadata(format!("/proc/{pid}/ns/net"))?.ino().try_into()?;
//! let filter = Filter::new().netns(netns).cgroup_path("/system.slice/nginx.service");
//! let tcp = TcpTracer::builder().filter(filter).start().await?;
//! # Ok(())
//! # }
//! ```
//!
//! ## Without root
//!
//! Give the program its capabilities (`setcap cap_bpf,cap_perfmon,cap_net_admin+ep`, or a systemd unit with `AmbientCapabilities`), or start as root and drop them
//! after [`start`](TcpTracerBuilder::start). What the tracer does without is told:
//!
//! ```no_run
//! # use tcp_udp_trace::TcpTracer;
//! # async fn run() -> Result<(), tcp_udp_trace::Error> {
//! let tcp = TcpTracer::builder().start().await?;
//! for hook in tcp.handle().hooks() {
//!     if let Some(note) = &hook.note {
//!         eprintln!("{}: {note}", hook.signal);
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Versions
//!
//! Semantic versioning: what compiles and what events mean stays within a compatible version; kinds, fields, hooks and error kinds may be added, and the
//! text of messages and of `Display` may change. JSON that an older compatible version wrote can be read. The Rust version may rise in a
//! minor release. The programs and the library always come from the same release (`tcp-udp-trace-common` is not for anybody else).
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]
#![warn(
    clippy::exhaustive_enums,
    clippy::exhaustive_structs,
    clippy::must_use_candidate
)]
#![cfg_attr(
    not(target_os = "linux"),
    allow(dead_code, unused_imports, reason = "there, nothing can be started")
)]

mod builder;
mod comm;
#[cfg(target_os = "linux")]
mod decode;
#[cfg(target_os = "linux")]
mod details;
#[cfg(target_os = "linux")]
mod enrich;
mod error;
mod escape;
mod event;
mod filter;
#[cfg(target_os = "linux")]
mod flows;
#[cfg(all(any(test, fuzzing), target_os = "linux", feature = "serde"))]
#[doc(hidden)]
pub mod fuzzing;
mod hook;
#[cfg(target_os = "linux")]
mod images;
mod info;
#[cfg(feature = "serde")]
mod json;
#[cfg(target_os = "linux")]
mod kernel;
mod kind;
#[cfg(all(any(test, micro_bench), target_os = "linux"))]
#[doc(hidden)]
pub mod micro;
mod process;
mod progress;
mod queue;
#[cfg_attr(not(target_os = "linux"), path = "unsupported.rs")]
mod reader;
#[cfg(target_os = "linux")]
mod samples;
mod stats;
mod tcp_state;
mod time;
mod tracer;

pub use crate::{
    builder::{
        Buffer, DEFAULT_INTERVAL, DEFAULT_LATENCY, DEFAULT_MAX_FLOWS, DEFAULT_MAX_SOCKETS,
        DEFAULT_QUEUE, DEFAULT_RING_BYTES, DEFAULT_SAMPLE_INTERVAL, OverflowPolicy,
        TcpTracerBuilder, UdpTracerBuilder,
    },
    comm::{Comm, ParseCommError},
    error::{Error, ErrorKind},
    event::{Direction, Event, EventKind, LossStage, Protocol, Socket, Traffic},
    filter::{Family, Filter},
    hook::Hook,
    info::{SampleInfo, TcpInfo, UdpInfo},
    kind::{Fate, Fates, Kind, UnknownKind},
    process::{Origin, Process, ProcessDetails, User},
    stats::Stats,
    tcp_state::TcpState,
    tracer::{TcpTracer, TracerHandle, UdpTracer},
};
