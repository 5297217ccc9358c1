//! Tools for programs that consume events. None of them does I/O or needs a privilege.
//!
//! - [`Growth`] turns the totals of events into increments, for counters and rates.
//! - [`Connections`] is the set of connections that are open now, and knows both ends of a
//!   connection on this machine.
//! - [`merge`] makes one stream of two, in the order of time.
//! - `replay` (feature `replay`) reads recorded events, so that a program can be tested without
//!   root.
//!
//! `Growth` and `Connections` take events one by one, from a tracer, a merged stream, or a
//! recording. Their memory is bounded.

mod bounded;
mod connections;
mod growth;
mod merge;
#[cfg(feature = "replay")]
mod replay;
#[cfg(test)]
mod script;

#[cfg(feature = "replay")]
pub use self::replay::{Replay, ReplayError, ReplayIter, replay};
pub use self::{
    connections::{Connection, Connections, Peer},
    growth::{Growth, Increment},
    merge::{DEFAULT_HOLD, Merge, merge},
};
