//! The kernel's view of a live UDP socket.

use super::tcp_info::field;

/// The queues and buffers of a UDP socket. The numbers are bytes of kernel memory with its
/// overhead, not payload.
///
/// Source: `inet_diag_msg` and `INET_DIAG_SKMEMINFO` of the kernel's `inet_diag.h` and
/// `sock_diag.h`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct UdpInfo {
    /// Bytes that the application has not received yet (`idiag_rqueue`).
    pub rx_queue: u32,
    /// Bytes that the application sent and that have not left the machine (`idiag_wqueue`).
    pub tx_queue: u32,
    /// The limit of bytes to receive: `SO_RCVBUF` (`SK_MEMINFO_RCVBUF`).
    pub rx_buffer: u32,
    /// The limit of bytes to send: `SO_SNDBUF` (`SK_MEMINFO_SNDBUF`).
    pub tx_buffer: u32,
    /// Memory in use for received data (`SK_MEMINFO_RMEM_ALLOC`).
    pub rx_memory: u32,
    /// Memory in use for sent data (`SK_MEMINFO_WMEM_ALLOC`).
    pub tx_memory: u32,
    /// Datagrams that found the receive buffer full, since the creation of the socket
    /// (`SK_MEMINFO_DROPS`).
    pub drops: u32,
}

impl UdpInfo {
    /// Decodes the header's queues and the words of `INET_DIAG_SKMEMINFO`; `None` if words are
    /// missing.
    pub(crate) fn decode(rx_queue: u32, tx_queue: u32, memory: &[u8]) -> Option<Self> {
        let word = |index: usize| field::<4>(memory, index * 4).map(u32::from_ne_bytes);
        Some(Self {
            rx_queue,
            tx_queue,
            rx_memory: word(0)?,
            rx_buffer: word(1)?,
            tx_memory: word(2)?,
            tx_buffer: word(3)?,
            drops: word(8)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_udp() {
        let words: Vec<u8> = (10_u32..19).flat_map(u32::to_ne_bytes).collect();
        let info = UdpInfo::decode(1, 2, &words).expect("nine words");
        let expected = UdpInfo {
            rx_queue: 1,
            tx_queue: 2,
            rx_memory: 10,
            rx_buffer: 11,
            tx_memory: 12,
            tx_buffer: 13,
            drops: 18,
        };
        assert_eq!(info, expected);
        assert_eq!(UdpInfo::decode(1, 2, &words[..words.len() - 1]), None);
    }
}
