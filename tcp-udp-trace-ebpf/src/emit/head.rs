//! The head and the priority of a record.

use core::ffi::c_void;

use aya_ebpf::helpers::bpf_ktime_get_boot_ns;
use tcp_udp_trace_common::Head;

use crate::counters;

/// What a program was called with. The kernel wants to see it from one that writes into a perf buffer.
pub(crate) type Context = *mut c_void;

/// Something that begins with a [`Head`].
pub(crate) trait Record: 'static {
    fn head(&mut self) -> &mut Head;
}

impl Record for tcp_udp_trace_common::StateChange {
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

/// What it would mean to miss a record.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Priority {
    /// It tells the end of a socket, and the final numbers: nothing could make up for it.
    Final,
    /// It tells another beginning or end. An eighth of the room is kept for these and those above.
    Lifecycle,
    /// The picture would soon be right again.
    Normal,
}

/// The head of a record that is written now.
#[inline(always)]
pub(super) fn head(kind: u32) -> Head {
    Head {
        kind,
        lost: counters::lost_so_far(),
        // SAFETY: the helper takes nothing and cannot fail.
        time: unsafe { bpf_ktime_get_boot_ns() },
    }
}
