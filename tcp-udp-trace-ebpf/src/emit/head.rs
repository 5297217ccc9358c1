//! The head and the priority of a record.

use core::ffi::c_void;

use tcp_udp_trace_common::Head;

use crate::{counters, read::now};

/// The context of a program. The helper that writes into a perf buffer requires it.
pub(crate) type Context = *mut c_void;

/// A record, which begins with a [`Head`].
pub(crate) trait Record: 'static {
    fn head(&mut self) -> &mut Head;
}

impl Record for tcp_udp_trace_common::StateChange {
    fn head(&mut self) -> &mut Head {
        &mut self.head
    }
}

impl Record for tcp_udp_trace_common::Anomaly {
    fn head(&mut self) -> &mut Head {
        &mut self.head
    }
}

impl Record for tcp_udp_trace_common::Udp {
    fn head(&mut self) -> &mut Head {
        &mut self.head
    }
}

impl Record for tcp_udp_trace_common::Tcp {
    fn head(&mut self) -> &mut Head {
        &mut self.head
    }
}

impl Record for tcp_udp_trace_common::Image {
    fn head(&mut self) -> &mut Head {
        &mut self.head
    }
}

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
