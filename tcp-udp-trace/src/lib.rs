//! TCP socket events of the whole machine as an async stream, by eBPF.
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
//! Every state change and every accept of every TCP socket of the machine, in every network namespace, with the
//! process that owns the socket, its addresses, and the payload it has carried ([`Event`]).
//!
//! # What you can rely on
//!
//! - A pid is right or absent: never the process that an interrupt happened to hit.
//! - Bytes are payload to the byte: no SYN, FIN or retransmission.
//! - Nothing is lost without being counted ([`Stats`]) and standing in the stream ([`EventKind::Lost`]).
//! - After [`TcpTracer::close`] or a drop, the kernel holds nothing of ours.
//! - Memory is bounded by what the builder was told.
//!
//! # What it needs
//!
//! Linux 5.10 or newer with BTF, on x86_64; `CAP_BPF` and `CAP_PERFMON` (or root); a Tokio runtime with I/O and time.
//! It finds out by itself which hooks the kernel allows, and says so: [`TracerHandle::hooks`]. To build: stable Rust
//! and nothing else; the eBPF object is part of the crate.
//!
//! With `CAP_SYS_ADMIN` (or with tracefs mounted) it can use classic tracepoints too; what is lost without them,
//! the hooks' notes say. Before Linux 5.11 the limit on locked memory must be raised (`ulimit -l unlimited`).
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
mod error;
mod event;
#[cfg(target_os = "linux")]
mod flows;
mod hook;
#[cfg(feature = "serde")]
mod json;
#[cfg(target_os = "linux")]
mod kernel;
mod queue;
#[cfg_attr(not(target_os = "linux"), path = "unsupported.rs")]
mod reader;
mod stats;
mod tcp_state;
mod time;
mod tracer;

pub use crate::{
    builder::{
        DEFAULT_INTERVAL, DEFAULT_LATENCY, DEFAULT_MAX_FLOWS, DEFAULT_MAX_SOCKETS, DEFAULT_QUEUE,
        DEFAULT_RING_BYTES, TcpTracerBuilder, UdpTracerBuilder,
    },
    comm::{Comm, ParseCommError},
    error::{Error, ErrorKind},
    event::{Event, EventKind, LossStage, Origin, Process, Protocol, Socket, Traffic},
    hook::Hook,
    stats::Stats,
    tcp_state::TcpState,
    tracer::{TcpTracer, TracerHandle, UdpTracer},
};
