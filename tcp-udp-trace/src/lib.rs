//! Trace every TCP and UDP socket of a Linux machine from Rust.
//!
//! The crate yields socket events as async streams: state changes, accepts, UDP flows and closes.
//! Each event has the owning process and exact payload byte counts. The kernel side is eBPF.
//!
//! ```no_run
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
//! This program depends on this crate, and on `tokio` with the features `macros` and
//! `rt-multi-thread`. As root, it prints one line for each event of a TCP socket of the machine:
//!
//! ```text
//! 2026-11-22T01:00:38.558462946Z tcp 127.0.0.1:0 > 127.0.0.1:8123 CLOSE->SYN_SENT curl[32680]
//! 2026-11-22T01:00:38.562871969Z tcp 127.0.0.1:60696 > 127.0.0.1:8123 LAST_ACK->CLOSE curl[32680]
//! ```
//!
//! The traffic of the socket, which follows on each line, is left out here. That of the second line
//! is `tx 87 B/6 rx 3609 B/6` (bytes and packets).
//!
//! # Events
//!
//! - [`TcpTracer`] yields every state change and every accept of every TCP socket. Retransmissions
//!   and resets are events on request.
//! - [`UdpTracer`] yields the connects and the close of every UDP socket, its totals, and the
//!   totals of each of its flows. Each datagram is an event on request.
//! - Both yield each `connect` that fails before it changes a socket
//!   ([`EventKind::ConnectFailed`]).
//! - Both know the sockets that are older than the tracer. They sample every live socket at the
//!   start and every 6.2 seconds ([`EventKind::Sample`]): `tcp_info`, queues, buffers.
//!
//! An [`Event`] has the process that owns the socket, the socket's addresses, and the payload that
//! the socket has carried. The events come from every network namespace. Both streams yield the
//! same type, so they can be [merged](consumer::merge). When [`start`](TcpTracerBuilder::start)
//! returns, every hook is attached.
//!
//! # Guarantees
//!
//! - A pid is right or absent. It is never the process that an interrupt happened to hit.
//! - Byte counts are exact payload: no SYN, FIN or retransmission, no peek, no failed send.
//!   Datagrams are counted one by one.
//! - Every lost event is counted ([`Stats`]) and stands in the stream ([`EventKind::Lost`]).
//! - A sample never delays or sheds another event, and never comes after the close of its socket.
//! - After [`close`](TcpTracer::close) or a drop, the kernel holds no program and no map of the
//!   tracer.
//! - The settings of the builder bound the memory.
//!
//! If a kernel cannot give an exact number, the event says so ([`EventKind::Flow`]), and
//! [`TracerHandle::hooks`] says why.
//!
//! # Features
//!
//! - `serde`: `Serialize` and `Deserialize` for [`Event`], [`Stats`] and the types of their fields.
//! - `replay`: [`consumer`]`::replay`, which reads recorded events. It implies `serde`.
//!
//! None is a default feature.
//!
//! # Privileges
//!
//! A tracer needs root, or `CAP_BPF` and `CAP_PERFMON`. UDP needs `CAP_NET_ADMIN` as well. Root can
//! also use classic tracepoints and sample other network namespaces than its own. SECURITY.md lists
//! the capabilities for that, and the notes of the hooks name the loss without them. Before Linux
//! 5.11, the limit on locked memory must be raised (`ulimit -l unlimited`). After the start, a
//! tracer needs no privilege (before 5.19: `CAP_BPF`). The [`Error`] names a missing privilege.
//!
//! # Kernels
//!
//! A tracer needs Linux 5.10 or newer with BTF (`/sys/kernel/btf/vmlinux`, or a file:
//! [`TcpTracerBuilder::btf`]), on x86_64 or aarch64.
//! UDP needs cgroup v2. No code depends on a kernel version: the tracer tries each hook.
//! [`TracerHandle::hooks`] returns the hooks in use and their cost. `docs/kernels.md` in the
//! repository lists the hooks of each kernel.
//!
//! The build needs stable Rust only, because the crate contains the compiled eBPF programs. On
//! other systems than Linux the crate compiles, and `start` fails with [`ErrorKind::Unsupported`].
//!
//! ## Development builds
//!
//! A start reads the kernel's BTF. Without optimization, that takes 0.2 s of CPU time for each
//! tracer instead of 0.02 s. These lines in the `Cargo.toml` of your workspace make it fast in
//! development builds and tests, too:
//!
//! ```toml
//! [profile.dev.package]
//! tcp-udp-trace.opt-level = 3
//! aya-obj.opt-level = 3
//! ```
//!
//! # Runtime
//!
//! A tracer runs on Tokio, with I/O and time enabled. It is `Send`, and any task may poll its
//! stream. A program without a runtime uses [`blocking`](TcpTracerBuilder::blocking).
//!
//! # Cookbook
//!
//! ## Only closed connections, with their totals
//!
//! The kernel side applies the filter. A rejected event takes no room in the buffers and wakes no
//! task. This filter passes every change to or from `CLOSE`, also those of listeners and of failed
//! attempts to connect. [`Event::is_close`] is true only for the ends of connections.
//!
//! ```no_run
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
//! [`TracerHandle::set_filter`] changes the filter of a running tracer. [`Filter`] also parses from
//! text, such as `port=443 remote=10.0.0.0/8`.
//!
//! ## Both protocols in one stream
//!
//! ```no_run
//! use tcp_udp_trace::{TcpTracer, UdpTracer, consumer::merge};
//!
//! # async fn run() -> Result<(), tcp_udp_trace::Error> {
//! let tcp = TcpTracer::builder().start().await?;
//! let udp = UdpTracer::builder().start().await?;
//! let mut both = merge(tcp, udp);
//! while let Some(event) = both.next().await {
//!     println!("{event}");
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Each tracer yields its events in the order in which the kernel wrote them. [`consumer::merge`]
//! keeps the order of time between the two. Other ways to merge streams yield whatever is there
//! first. Under load, neighbours may then be in the wrong order by up to a second. [`Socket::id`]
//! identifies a socket, but does not order sockets by age, because each CPU has its own counter.
//!
//! ## Counters and open connections
//!
//! The traffic of an event is a total. [`consumer::Growth`] turns totals into increments, and
//! [`consumer::Connections`] is the set of connections that are open now:
//!
//! ```no_run
//! use std::collections::HashMap;
//! use tcp_udp_trace::{TcpTracer, consumer::{Connections, Growth}};
//!
//! # async fn run() -> Result<(), tcp_udp_trace::Error> {
//! let mut tcp = TcpTracer::builder().start().await?;
//! let (mut growth, mut open) = (Growth::new(), Connections::new());
//! let mut sent_by_name = HashMap::new();
//! while let Some(event) = tcp.next().await {
//!     let added = growth.add(&event).traffic;
//!     if let Some(process) = &event.process {
//!         *sent_by_name.entry(process.comm).or_insert(0) += added.tx_bytes;
//!     }
//!     if let Some(ended) = open.add(&event) {
//!         println!("{} has ended, {} are open", ended.socket.remote, open.len());
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! ## Tests without root
//!
//! With the feature `replay`, `consumer::replay` reads events that `trace --json` has recorded.
//! Write the consumer for any source of events, and test it with a file:
//!
//! ```
//! use tcp_udp_trace::Event;
//!
//! fn count_closes(events: impl Iterator<Item = Event>) -> usize {
//!     events.filter(Event::is_close).count()
//! }
//!
//! # #[cfg(feature = "replay")]
//! # {
//! # let file = &b""[..];
//! let events = tcp_udp_trace::consumer::replay(file).into_iter();
//! assert_eq!(count_closes(events.map(Result::unwrap)), 0);
//! # }
//! ```
//!
//! The iterator of [`blocking`](TcpTracerBuilder::blocking) fits the same function. An async
//! program takes an `impl Stream<Item = Event>` in the same way.
//!
//! ## Without async
//!
//! [`blocking`](TcpTracerBuilder::blocking) starts a tracer that is an [`Iterator`]. The program
//! needs no other crate:
//!
//! ```no_run
//! use tcp_udp_trace::TcpTracer;
//!
//! fn main() -> Result<(), tcp_udp_trace::Error> {
//!     for event in TcpTracer::builder().blocking()? {
//!         println!("{event}");
//!     }
//!     Ok(())
//! }
//! ```
//!
//! A thread of the tracer reads the kernel's records. A program that has a Tokio runtime already
//! can use its
//! [`block_on`](https://docs.rs/tokio/1/tokio/runtime/struct.Runtime.html#method.block_on) with
//! [`TcpTracer::next`] instead. Another executor, such as
//! `futures::executor::block_on_stream(tcp)`, needs a multi-thread runtime that is not dropped.
//! With a `current_thread` runtime that no thread drives, it waits for ever.
//!
//! ## One tracer for several tasks
//!
//! A stream has one consumer. To share events, forward them through a channel. A `broadcast`
//! channel drops events for a slow receiver, and returns their number to that receiver.
//!
//! ```no_run
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
//!         // An error means that the channel has no receiver at the moment.
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
//! The kernel never waits for the consumer. Events wait in the queue, which holds up to
//! [`queue`](TcpTracerBuilder::queue) events. While the queue is full, records stay in the buffer
//! between kernel and reader. Its size is [`ring_bytes`](TcpTracerBuilder::ring_bytes), which by
//! default has room for another 6,300 TCP events. No event is lost until three quarters of that
//! buffer are full. Then the queue sheds its oldest events (or the newest,
//! [`overflow`](TcpTracerBuilder::overflow)), lifecycle events last. One [`Lost`](EventKind::Lost)
//! stands in their place:
//!
//! ```no_run
//! # use tcp_udp_trace::{Event, EventKind, TcpTracer};
//! # async fn run(mut tcp: TcpTracer) {
//! while let Some(event) = tcp.next().await {
//!     match event.kind {
//!         // State that the program derived from earlier events is incomplete from here on.
//!         EventKind::Lost { count, stage } => {
//!             eprintln!("{count} events missing: the {stage} was full");
//!         }
//!         _ => { /* … */ }
//!     }
//! }
//! # }
//! ```
//!
//! The remedy depends on the stage. If the queue was full, use a faster consumer, a larger
//! [`queue`](TcpTracerBuilder::queue) or a [`Filter`]. If the ring was full, use a larger
//! [`ring_bytes`](TcpTracerBuilder::ring_bytes). [`Stats`] has the sums by kind of event.
//!
//! ## Containers and network namespaces
//!
//! A tracer sees every namespace of the machine, in whatever namespace it runs. [`Socket::netns`]
//! and [`Socket::cgroup`] identify the namespace and the cgroup of an event. [`Filter::netns`] and
//! [`Filter::cgroup_tree_path`] restrict the events to some of them: a pod, a slice or a unit, with
//! the cgroups below it. [`Filter::cgroup_path`] selects one cgroup alone.
//! [`Socket::netns_cookie`] distinguishes namespaces that have had the same inode number.
//!
//! With [`process_details`](TcpTracerBuilder::process_details), [`ProcessDetails`] has the id of
//! the owner's container and its systemd unit. `docs/events.md` in the repository shows how to join
//! them with the names of Kubernetes.
//!
//! In a container, the tracer needs its privileges in the initial user namespace. For UDP it also
//! needs the host's `/sys/fs/cgroup`. A pid in a filter is a number of the tracer's own pid
//! namespace. [`Process::pid`] is always a number of the initial pid namespace. Inside a container,
//! that number is useful only if the container shares the host's pid namespace (`hostPID`).
//!
//! ```no_run
//! # use std::os::unix::fs::MetadataExt as _;
//! # use tcp_udp_trace::{Filter, TcpTracer};
//! # async fn run(pid: u32) -> Result<(), Box<dyn std::error::Error>> {
//! // The network namespace of a process, and a service's cgroup as `/proc/PID/cgroup` shows it.
//! let netns = std::fs::metadata(format!("/proc/{pid}/ns/net"))?.ino().try_into()?;
//! let filter = Filter::new().netns(netns).cgroup_tree_path("/system.slice/nginx.service");
//! let tcp = TcpTracer::builder().filter(filter).start().await?;
//! # Ok(())
//! # }
//! ```
//!
//! ## Without root
//!
//! Give the program its capabilities (`setcap cap_bpf,cap_perfmon,cap_net_admin+ep`, or a systemd
//! unit with `AmbientCapabilities`). Or start as root, and drop the privileges after
//! [`start`](TcpTracerBuilder::start). The notes of the hooks name the loss:
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
//! The crate follows semantic versioning. Within compatible versions, code that compiles continues
//! to compile, and events keep their meaning. Kinds, fields, hooks and error kinds may be added.
//! The text of messages and of `Display` may change. A newer compatible version reads the JSON of
//! an older one. The required Rust version may rise in a minor release. The programs and the
//! library always come from the same release. `tcp-udp-trace-common` is not a public API.

// Layers, each uses only those after it:
// fuzzing, bench_support -> builder -> blocking -> tracer -> tasks -> kernel, sock_diag
// -> pipeline, netns -> consumer -> config -> filter, stats -> event, error, hook, lock
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]
#![warn(
    clippy::exhaustive_enums,
    clippy::exhaustive_structs,
    clippy::must_use_candidate
)]
#![cfg_attr(
    not(target_os = "linux"),
    allow(
        dead_code,
        unused_imports,
        reason = "on other systems, no tracer can start"
    )
)]

#[cfg(all(any(test, micro_bench), target_os = "linux"))]
#[doc(hidden)]
pub mod bench_support;
mod blocking;
mod builder;
mod config;
pub mod consumer;
mod error;
mod event;
mod filter;
#[cfg(all(any(test, fuzzing), target_os = "linux", feature = "replay"))]
#[doc(hidden)]
pub mod fuzzing;
mod hook;
#[cfg(target_os = "linux")]
mod kernel;
mod lock;
#[cfg(target_os = "linux")]
mod netns;
mod pipeline;
#[cfg(target_os = "linux")]
mod sock_diag;
mod stats;
#[cfg_attr(not(target_os = "linux"), path = "tasks/unsupported.rs")]
mod tasks;
mod tracer;

pub use crate::{
    blocking::BlockingTracer,
    builder::{TcpTracerBuilder, UdpTracerBuilder},
    config::{
        Buffer, DEFAULT_INTERVAL, DEFAULT_LATENCY, DEFAULT_MAX_FLOWS, DEFAULT_MAX_SOCKETS,
        DEFAULT_QUEUE, DEFAULT_RING_BYTES, DEFAULT_SAMPLE_INTERVAL, OverflowPolicy,
    },
    error::{Error, ErrorKind},
    event::{
        Direction, Event, EventKind, LossStage, Protocol, ResetDirection, Retransmission, Socket,
        Traffic,
        comm::{Comm, ParseCommError},
        kind::{EventCounts, EventCountsByKind, Kind, UnknownKind},
        process::{Origin, Parent, Process, ProcessDetails, User},
        reset_reason::ResetReason,
        sample_info::SampleInfo,
        summary::{EndedBy, Summary},
        tcp_info::TcpInfo,
        tcp_state::TcpState,
        udp_info::UdpInfo,
    },
    filter::{Family, Filter},
    hook::Hook,
    stats::Stats,
    tracer::{TcpTracer, TracerHandle, UdpTracer},
};
