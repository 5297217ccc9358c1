//! The summary of a TCP connection.

use std::{fmt, time::Duration};

use super::reset_reason::ResetReason;

/// The summary of a TCP connection, or of an attempt at one, in the change to
/// [`TcpState::Close`](crate::TcpState::Close).
///
/// The numbers of the round-trip time and of the segments are those that the kernel has for this
/// side's end of the connection (`TCP_INFO`). [`Event::traffic`](crate::Event::traffic) has the
/// totals.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Summary {
    /// The duration of the handshake. For an outbound connection: from `connect` to the state of a
    /// connection. For an inbound connection: from the SYN-ACK to its acknowledgment, as the kernel
    /// measured it.
    ///
    /// `None` if the handshake did not succeed or the tracer did not see all of it. For an inbound
    /// connection also if the SYN-ACK was retransmitted, or the kernel kept no state of the
    /// handshake (SYN cookies), or data was sent before its end (TCP Fast Open).
    #[cfg_attr(
        feature = "serde",
        serde(
            rename = "handshake_ns",
            with = "crate::event::serde_impls::some_nanos"
        )
    )]
    pub handshake: Option<Duration>,
    /// The time from the end of the handshake to this event. `None` if the tracer did not see the
    /// end of the handshake.
    #[cfg_attr(
        feature = "serde",
        serde(
            rename = "established_ns",
            with = "crate::event::serde_impls::some_nanos"
        )
    )]
    pub established: Option<Duration>,
    /// The smoothed round-trip time (`tcpi_rtt`). `None` if the kernel has not measured it.
    #[cfg_attr(
        feature = "serde",
        serde(rename = "srtt_us", with = "crate::event::serde_impls::some_micros")
    )]
    pub srtt: Option<Duration>,
    /// The shortest round-trip time in the kernel's window of minutes (`tcpi_min_rtt`).
    #[cfg_attr(
        feature = "serde",
        serde(rename = "min_rtt_us", with = "crate::event::serde_impls::some_micros")
    )]
    pub min_rtt: Option<Duration>,
    /// The mean deviation of the round-trip time (`tcpi_rttvar`).
    #[cfg_attr(
        feature = "serde",
        serde(rename = "rttvar_us", with = "crate::event::serde_impls::some_micros")
    )]
    pub rttvar: Option<Duration>,
    /// Segments retransmitted, with SYNs and SYN-ACKs (`tcpi_total_retrans`).
    pub retransmitted_packets: u32,
    /// Payload bytes retransmitted (`tcpi_bytes_retrans`).
    pub retransmitted_bytes: u64,
    /// Segments that the kernel took for lost, in all.
    pub lost_packets: u32,
    /// Segments received out of order (`tcpi_rcv_ooopack`).
    pub out_of_order: u32,
    /// How the connection ended. `None` if that is unknown.
    pub ended_by: Option<EndedBy>,
    /// The kernel's reason of the reset with which this side ended the connection, if the kernel
    /// sent the reset before it closed the socket: after unanswered keepalive probes, for lack of
    /// memory, or because another program ended the connection.
    ///
    /// `None` without [`resets`](crate::TcpTracerBuilder::resets), before Linux 6.10, and for all
    /// other resets. The kernel has no reason for a reset that comes from the peer. It sends the
    /// reset of a `close` after the change to `CLOSE`, so that
    /// [`EventKind::Reset`](crate::EventKind::Reset) has its reason.
    pub reset_reason: Option<ResetReason>,
}

/// How a TCP connection ended, or an attempt at one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum EndedBy {
    /// This side closed first, or gave up a `connect`.
    Local,
    /// The peer closed first.
    Peer,
    /// This side reset the connection: it closed with unread data, or with a linger time of zero.
    LocalReset,
    /// The peer reset the connection.
    PeerReset,
    /// The peer did not answer in time: neither the SYN, nor data, nor a probe.
    Timeout,
    /// The peer refused the connection.
    Refused,
    /// A router, or this machine, reported that the peer cannot be reached.
    Unreachable,
    /// Another program ended the connection (`SOCK_DESTROY`, as `ss --kill` does).
    Killed,
    /// The listener ended before a process accepted the connection.
    NotAccepted,
}

impl EndedBy {
    /// Returns the name, as in JSON: `local`, `peer`, `local_reset` ...
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Peer => "peer",
            Self::LocalReset => "local_reset",
            Self::PeerReset => "peer_reset",
            Self::Timeout => "timeout",
            Self::Refused => "refused",
            Self::Unreachable => "unreachable",
            Self::Killed => "killed",
            Self::NotAccepted => "not_accepted",
        }
    }
}

impl fmt::Display for EndedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
