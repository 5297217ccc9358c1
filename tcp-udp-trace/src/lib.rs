//! TCP and UDP socket events of the whole machine as async streams, by eBPF.
//!
//! ```no_run
//! use futures_util::StreamExt as _;
//! use tcp_udp_trace::TcpTracer;
//!
//! # async fn run() -> Result<(), tcp_udp_trace::Error> {
//! let mut tcp = TcpTracer::builder().start().await?;
//! while let Some(event) = tcp.next().await {
//!     println!("{event}");
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # What you get
//!
//! - [`TcpTracer`]: every state change and every accept of every TCP socket of the machine; retransmissions and resets on request.
//! - [`UdpTracer`]: every UDP socket's connects, its end and its totals, and the totals of each of its flows; each datagram
//!   on request.
//!
//! - Both: what was there before the tracer, and a sample of every live socket at the start and every 6.2 seconds
//!   ([`EventKind::Sample`]): `tcp_info`, queues, buffers.
//!
//! In every network namespace, with the process that owns the socket, its addresses, and the payload it has carried
//! ([`Event`]). Both are streams of the same event, so they merge with `futures::stream::select`.
//!
//! # What you can rely on
//!
//! - A pid is right or absent: never the process that an interrupt happened to hit.
//! - Bytes are payload to the byte: no SYN, FIN or retransmission; no peek, no failed send. Datagrams are counted one by one.
//! - Nothing is lost without being counted ([`Stats`]) and standing in the stream ([`EventKind::Lost`]).
//! - A sample never delays or sheds another event, and never comes after the close of its socket.
//! - After `close` or a drop, the kernel holds nothing of ours.
//! - Memory is bounded by what the builder was told.
//!
//! Where a kernel cannot give a number exactly, the event says so ([`EventKind::Flow`]), and [`TracerHandle::hooks`] says why.
//!
//! # What it needs
//!
//! Linux 5.10 or newer with BTF, on x86_64 or aarch64; root, or `CAP_BPF` and `CAP_PERFMON`, and for UDP `CAP_NET_ADMIN` too; a Tokio
//! runtime with I/O and time. It finds out by itself which hooks the kernel allows, and says so: [`TracerHandle::hooks`]. To
//! build: stable Rust and nothing else; the eBPF object is part of the crate.
//!
//! As root it can use classic tracepoints too, and samples other network namespaces than its own; which capabilities that takes is in
//! SECURITY.md, and what is lost without, the hooks' notes say. Before Linux 5.11 the limit on locked memory must be raised
//! (`ulimit -l unlimited`). Once started, it does without any privilege (before 5.19: with `CAP_BPF`).
//!
//! # Features
//!
//! - `serde`: `Serialize` and `Deserialize` for [`Event`], [`Stats`] and what is in them.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(target_os = "linux"),
    allow(dead_code, reason = "there, nothing can be started")
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
    process::{Origin, Process, ProcessDetails},
    stats::Stats,
    tcp_state::TcpState,
    tracer::{TcpTracer, TracerHandle, UdpTracer},
};
