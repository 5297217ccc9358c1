//! The harness of the integration tests: everything that makes traffic whose truth is known, and everything
//! that compares it with what a tracer reported.
//!
//! A test runs in its own network namespace ([`suite`], [`netns`]). The traffic is made by real processes
//! ([`actor`]), which count what they do. A [`trace`] collects the events of the test's namespaces until as
//! many sockets are closed as the test closed, ends, and hands them over grouped into [`lives`]. A [`life`] is
//! what one socket must have shown, from its first event to its last. A [`scene`] is the usual
//! beginning: a tracer, a server that listens, a client.
//!
//! A tracer of these tests also samples, and whatever a test is about, its samples must fit in with the rest of their sockets' lives.
//!
//! For UDP, a [`udp_life`] takes the place of the life. A [`talker`] is an actor with one socket, which keeps the book
//! of what passes through it, and a [`udp_scene`] is two of them.
#![deny(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    reason = "a test fails by panicking, and tells what it could not check on stderr"
)]

pub mod actor;
pub mod cgroup;
pub mod collect;
pub mod crowd;
pub mod flow_sums;
pub mod kernel;
pub mod life;
pub mod lives;
pub mod load;
pub mod netns;
pub mod page;
pub mod pid_namespace;
pub mod privileges;
pub mod refusal;
mod sampled;
pub mod scene;
pub mod suite;
pub mod talker;
pub mod tcp_info;
pub mod trace;
pub mod udp_life;
pub mod udp_scene;
