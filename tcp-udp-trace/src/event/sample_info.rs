//! The kernel's view of a live socket, decoded from the bytes of sock_diag. No I/O. Any bytes are
//! safe.

use std::fmt;

use super::{tcp_info::TcpInfo, tcp_state::TcpState, udp_info::UdpInfo};

/// The kernel's view of a live socket, in an [`EventKind::Sample`](crate::EventKind::Sample).
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(untagged))]
#[non_exhaustive]
pub enum SampleInfo {
    /// A TCP socket.
    Tcp(Box<TcpInfo>),
    /// A UDP socket.
    Udp(Box<UdpInfo>),
}

/// Shows the most important numbers.
impl fmt::Display for SampleInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(info) => {
                match TcpState::from_number(info.state) {
                    Some(state) => write!(f, "{state}")?,
                    None => write!(f, "state {}", info.state)?,
                }
                let TcpInfo {
                    rtt,
                    snd_cwnd,
                    total_retrans,
                    ..
                } = **info;
                write!(f, " rtt {rtt} us cwnd {snd_cwnd} retrans {total_retrans}")
            }
            Self::Udp(info) => {
                let UdpInfo {
                    rx_queue,
                    tx_queue,
                    drops,
                    ..
                } = **info;
                write!(f, "queues rx {rx_queue} B tx {tx_queue} B, {drops} dropped")
            }
        }
    }
}
