//! The harness of the integration tests: it makes traffic whose truth is known, and compares that
//! with the events of a tracer.
//!
//! A test runs in its own network namespace ([`suite`], [`netns`]). Real processes make the traffic
//! ([`actor`]) and count what they do. A [`collector`] collects the events of the test's namespaces
//! until as many sockets are closed as the test closed. It returns them grouped by socket
//! ([`observed_tcp`]), and the test compares each socket with its expected events, from the
//! first to the last ([`expected_tcp`]). A [`tcp_pair`] is the usual set-up: a tracer, a
//! server that listens, a client.
//!
//! ```no_run
//! use integration_tests::{expected_tcp::*, tcp_pair::TcpPair};
//!
//! // The suite runs this in a new network namespace.
//! fn upload() -> anyhow::Result<()> {
//!     let mut pair = TcpPair::new()?; // A tracer, a listener and a client.
//!     let connection = pair.connect()?;
//!     pair.upload(&connection, 1_000)?;
//!     pair.close(&connection)?; // The client closes first.
//!     let client = pair.expected_client(&connection, ACTIVE_CLIENT)?;
//!     let server = pair.expected_server(&connection, PASSIVE_SERVER)?;
//!     pair.finish(&[client, server]) // Compares, with the listener, and fails on any other event.
//! }
//! # let _ = upload;
//! ```
//!
//! The tracers of these tests also take samples: in each test, the samples of a socket must fit in
//! with its other events.
//!
//! Each actor records the bytes of its TCP sockets. UDP has an [`expected_udp`] of its own. A
//! [`udp_actor`] is an actor with one socket, which records each transfer, and a [`udp_pair`] is
//! two of them.
#![deny(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    reason = "a test fails by panicking, and writes to stderr if it could not check something; the \
              results are on stdout"
)]

pub mod actor;
pub mod any_tracer;
pub mod balancer;
pub mod cgroup;
mod cgroup_program;
pub mod collector;
pub mod cpu_load;
pub mod crowd;
pub mod default_tests;
pub mod expected_tcp;
pub mod expected_udp;
pub mod flow_sums;
pub mod hooks_page;
pub mod kernel;
pub mod mounts;
pub mod netns;
pub mod observed_tcp;
pub mod other_tracer;
pub mod pid_namespace;
pub mod privileges;
pub mod program_32bit;
pub mod recording;
pub mod refusal;
mod sample_order;
pub mod suite;
pub mod tcp_info;
pub mod tcp_pair;
pub mod udp_actor;
pub mod udp_pair;
