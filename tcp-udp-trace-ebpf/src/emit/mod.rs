//! Writes records to the reader and decides when to wake the reader.
//!
//! The programs are built twice: with a ring buffer, and with perf buffers for kernels that have no
//! ring buffer.

mod head;
#[cfg(feature = "perf")]
mod perf;
#[cfg(not(feature = "perf"))]
mod ring;
mod wakeup;

pub(crate) use self::head::{Context, Priority};
#[cfg(feature = "perf")]
pub(crate) use self::perf::{is_crowded, record, state_change};
#[cfg(not(feature = "perf"))]
pub(crate) use self::ring::{fill, is_crowded, record, state_change};
pub(crate) use self::wakeup::arm;
