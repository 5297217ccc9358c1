//! The kernel's view of a live TCP socket.

use super::tcp_state::TcpState;

/// Returns the bytes of a field; `None` if bytes are missing.
pub(super) fn field<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

macro_rules! tcp_info {
    ($($(#[$doc:meta])* $name:ident: $type:ident @ $offset:literal,)+
     | $($(#[$later_doc:meta])* $later:ident: $later_type:ident @ $later_offset:literal,)+) => {
        /// The kernel's `struct tcp_info`, as `getsockopt(TCP_INFO)` returns it, without the prefix
        /// `tcpi_`.
        ///
        /// Times are in microseconds, except where a field says otherwise. Fields that 5.10 does
        /// not have are an `Option`.
        ///
        /// Source: `include/uapi/linux/tcp.h`.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        #[non_exhaustive]
        pub struct TcpInfo {
            /// The scale of this side's window, as a power of two: 0 to 14.
            pub snd_wscale: u8,
            /// The scale of the peer's window, as a power of two: 0 to 14.
            pub rcv_wscale: u8,
            /// Whether `delivery_rate` was measured while the application had too little to send.
            pub delivery_rate_app_limited: bool,
            /// The reason why a TCP Fast Open by this side failed: `TFO_*` of `linux/tcp.h`. 0 if
            /// it did not fail.
            pub fastopen_client_fail: u8,
            /// For a listener: the connections, and attempts at one, that the kernel dropped, most
            /// often because the queue of those that wait was full (`sk_drops`, the sum of which is
            /// `ListenDrops`). It is not a field of `struct tcp_info`. `None` for other sockets.
            #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
            pub drops: Option<u32>,
            $($(#[$doc])* pub $name: $type,)+
            $($(#[$later_doc])*
              #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
              pub $later: Option<$later_type>,)+
        }

        impl TcpInfo {
            /// Decodes the kernel's bytes. `None` if they are fewer than those of 5.10.
            pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
                let [scales, flags] = field(bytes, 6)?;
                Some(Self {
                    snd_wscale: scales & 0xf,
                    rcv_wscale: scales >> 4,
                    delivery_rate_app_limited: flags & 1 != 0,
                    fastopen_client_fail: flags >> 1 & 3,
                    drops: None,
                    $($name: field(bytes, $offset).map($type::from_ne_bytes)?,)+
                    $($later: field(bytes, $later_offset).map($later_type::from_ne_bytes),)+
                })
            }

            /// Lists each field of `struct tcp_info` that is whole bytes, with its offset and size.
            #[cfg(test)]
            pub(crate) const FIELDS: &[(&str, u32, usize)] = &[
                $((stringify!($name), $offset, size_of::<$type>()),)+
                $((stringify!($later), $later_offset, size_of::<$later_type>()),)+
            ];
        }
    };
}

tcp_info! {
    /// The state: a number of `tcp_states.h` (1 is ESTABLISHED, 10 is LISTEN), see
    /// [`tcp_state`](Self::tcp_state).
    state: u8 @ 0,
    /// The state of congestion control: `enum tcp_ca_state` (0 is open, 4 is loss).
    ca_state: u8 @ 1,
    /// Retransmission timeouts in a row without an acknowledgment.
    retransmits: u8 @ 2,
    /// Probes of a zero window or of an idle connection, unanswered.
    probes: u8 @ 3,
    /// How often the retransmission timeout was doubled.
    backoff: u8 @ 4,
    /// The negotiated options: bits `TCPI_OPT_*` (1 timestamps, 2 SACK, 4 window scaling, 8 ECN
    /// ...).
    options: u8 @ 5,
    /// The retransmission timeout.
    rto: u32 @ 8,
    /// The delay of an acknowledgment.
    ato: u32 @ 12,
    /// The size of segments sent, in bytes.
    snd_mss: u32 @ 16,
    /// The estimated size of segments received, in bytes.
    rcv_mss: u32 @ 20,
    /// Segments sent and not acknowledged. For a listener: connections that wait for their accept.
    unacked: u32 @ 24,
    /// Segments selectively acknowledged. For a listener: the limit of waiting connections.
    sacked: u32 @ 28,
    /// Segments believed lost.
    lost: u32 @ 32,
    /// Segments that were retransmitted and are not acknowledged.
    retrans: u32 @ 36,
    /// Unused.
    fackets: u32 @ 40,
    /// Milliseconds since data was last sent.
    last_data_sent: u32 @ 44,
    /// Always 0: the kernel does not store it.
    last_ack_sent: u32 @ 48,
    /// Milliseconds since data was last received.
    last_data_recv: u32 @ 52,
    /// Milliseconds since an acknowledgment was last received.
    last_ack_recv: u32 @ 56,
    /// The path's MTU, in bytes.
    pmtu: u32 @ 60,
    /// The receive window's slow start threshold, in bytes.
    rcv_ssthresh: u32 @ 64,
    /// The smoothed round-trip time.
    rtt: u32 @ 68,
    /// The round-trip time's mean deviation.
    rttvar: u32 @ 72,
    /// The slow start threshold, in segments.
    snd_ssthresh: u32 @ 76,
    /// The congestion window, in segments.
    snd_cwnd: u32 @ 80,
    /// The largest segment that this side announced, in bytes.
    advmss: u32 @ 84,
    /// The number of segments by which packets may be out of order before one counts as lost.
    reordering: u32 @ 88,
    /// The receiver's estimate of the round-trip time.
    rcv_rtt: u32 @ 92,
    /// Bytes that the application reads in a round-trip time.
    rcv_space: u32 @ 96,
    /// The total of retransmitted segments.
    total_retrans: u32 @ 100,
    /// Bytes per second at which segments are paced. The highest number means no pacing.
    pacing_rate: u64 @ 104,
    /// The limit of `pacing_rate`.
    max_pacing_rate: u64 @ 112,
    /// Bytes acknowledged. If this side connected, its SYN counts as one.
    bytes_acked: u64 @ 120,
    /// Bytes received in order. The peer's FIN counts as one.
    bytes_received: u64 @ 128,
    /// Segments sent.
    segs_out: u32 @ 136,
    /// Segments received.
    segs_in: u32 @ 140,
    /// Bytes written by the application and not sent yet.
    notsent_bytes: u32 @ 144,
    /// The shortest round-trip time. The highest number means none.
    min_rtt: u32 @ 148,
    /// Segments received that carried data.
    data_segs_in: u32 @ 152,
    /// Segments sent that carried data.
    data_segs_out: u32 @ 156,
    /// The recent rate of bytes that reached the peer, per second.
    delivery_rate: u64 @ 160,
    /// The time in which there was data to send.
    busy_time: u64 @ 168,
    /// The time in which the peer's window kept this side from sending.
    rwnd_limited: u64 @ 176,
    /// The time in which the send buffer kept the application from writing.
    sndbuf_limited: u64 @ 184,
    /// Segments that reached the peer, including retransmitted ones.
    delivered: u32 @ 192,
    /// The part of `delivered` that was marked for congestion (ECN).
    delivered_ce: u32 @ 196,
    /// Bytes sent, including retransmitted ones.
    bytes_sent: u64 @ 200,
    /// Bytes retransmitted.
    bytes_retrans: u64 @ 208,
    /// Segments that the peer reported as received twice.
    dsack_dups: u32 @ 216,
    /// Times that the kernel saw segments out of order.
    reord_seen: u32 @ 220,
    /// Segments received out of order.
    rcv_ooopack: u32 @ 224,
    /// The peer's receive window, in bytes.
    snd_wnd: u32 @ 228,
    |
    /// This side's receive window, in bytes. Since 6.2.
    rcv_wnd: u32 @ 232,
    /// Times that the kernel tried another path. Since 6.2.
    rehash: u32 @ 236,
    /// Retransmission timeouts, also of the handshake. Since 6.7.
    total_rto: u16 @ 240,
    /// Recoveries from retransmission timeouts. Since 6.7.
    total_rto_recoveries: u16 @ 242,
    /// Milliseconds spent in such recoveries. Since 6.7.
    total_rto_time: u32 @ 244,
    /// Segments received that were marked for congestion. Since 6.18, as all that follow: Accurate
    /// ECN.
    received_ce: u32 @ 248,
    /// Bytes that the peer received marked ECT(1).
    delivered_e1_bytes: u32 @ 252,
    /// Bytes that the peer received marked ECT(0).
    delivered_e0_bytes: u32 @ 256,
    /// Bytes that the peer received marked CE.
    delivered_ce_bytes: u32 @ 260,
    /// Bytes received marked ECT(1).
    received_e1_bytes: u32 @ 264,
    /// Bytes received marked ECT(0).
    received_e0_bytes: u32 @ 268,
    /// Bytes received marked CE.
    received_ce_bytes: u32 @ 272,
    /// The reason why Accurate ECN was disabled: bits `TCP_ACCECN_*`.
    accecn_fail_mode: u16 @ 276,
    /// Whether the kernel saw the option of Accurate ECN.
    accecn_opt_seen: u16 @ 278,
}

impl TcpInfo {
    /// Returns the state; `None` for a number that this library does not know.
    #[must_use]
    pub const fn tcp_state(&self) -> Option<TcpState> {
        TcpState::from_number(self.state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of bytes that 5.10 sends, and that 6.18 sends.
    const SHORTEST: usize = 232;
    const LONGEST: usize = 280;

    /// Returns bytes whose values are their positions.
    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|at| at as u8).collect()
    }

    #[test]
    fn shorter_and_longer_answers_are_decoded() {
        let old = TcpInfo::decode(&bytes(SHORTEST)).expect("all that 5.10 knows");
        assert_eq!(old.snd_wnd, u32::from_ne_bytes([228, 229, 230, 231]));
        assert_eq!((old.snd_wscale, old.rcv_wscale), (6, 0));
        assert_eq!(
            (old.delivery_rate_app_limited, old.fastopen_client_fail),
            (true, 3)
        );
        assert_eq!((old.rcv_wnd, old.accecn_opt_seen), (None, None));
        // 6.6 ends in the middle.
        let middle = TcpInfo::decode(&bytes(240)).expect("more than 5.10 knows");
        let rehash = u32::from_ne_bytes([236, 237, 238, 239]);
        assert_eq!((middle.rehash, middle.total_rto), (Some(rehash), None));
        let new = TcpInfo::decode(&bytes(LONGEST)).expect("all that 6.18 knows");
        let last = u16::from_ne_bytes([(278 % 256) as u8, (279 % 256) as u8]);
        assert_eq!(new.accecn_opt_seen, Some(last));
        assert_eq!(TcpInfo::decode(&bytes(LONGEST + 64)), Some(new));
    }

    #[test]
    fn an_answer_shorter_than_the_oldest_kernels_is_malformed() {
        for len in 0..SHORTEST {
            assert_eq!(TcpInfo::decode(&bytes(len)), None, "{len} bytes");
        }
    }
}
