//! The head and the priority of a record.

use core::ffi::c_void;

use tcp_udp_trace_common::Head;

use crate::{counters, read::now};

/// The context of a program. The helper that writes into a perf buffer requires it.
pub(crate) type Context = *mut c_void;

/// A record.
///
/// # Safety
///
/// It begins with a [`Head`].
pub(crate) unsafe trait Record: 'static {}

// SAFETY: all of them begin with a `Head`.
unsafe impl Record for tcp_udp_trace_common::StateChange {}
// SAFETY: see above.
unsafe impl Record for tcp_udp_trace_common::Anomaly {}
// SAFETY: see above.
unsafe impl Record for tcp_udp_trace_common::Udp {}
// SAFETY: see above.
unsafe impl Record for tcp_udp_trace_common::Tcp {}
// SAFETY: see above.
unsafe impl Record for tcp_udp_trace_common::Image {}

/// How bad it would be to lose a record.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Priority {
    /// The end of a socket with its final numbers. No later record could replace it.
    Final,
    /// Another lifecycle event. An eighth of the ring is reserved for this priority and the one
    /// above.
    Lifecycle,
    /// A record whose loss later records make up for.
    Normal,
}

/// Returns the head of a record that is written now.
#[inline(always)]
pub(super) fn head(kind: u32) -> Head {
    Head {
        kind,
        lost: counters::lost_so_far(),
        time: now(),
    }
}
