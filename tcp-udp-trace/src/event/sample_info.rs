//! What the kernel tells of a live socket when it is asked: from the bytes of sock_diag. No I/O, and any bytes are survived.

use std::fmt;

use super::{tcp_info::TcpInfo, tcp_state::TcpState, udp_info::UdpInfo};

/// The kernel's view of a live socket, in an [`EventKind::Sample`](crate::EventKind::Sample).
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(untagged))]
#[non_exhaustive]
pub enum SampleInfo {
    /// Of a TCP socket.
    Tcp(Box<TcpInfo>),
    /// Of a UDP socket.
    Udp(Box<UdpInfo>),
}

/// The few numbers that are looked at first.
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
