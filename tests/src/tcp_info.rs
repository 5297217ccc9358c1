//! The `TCP_INFO` that the kernel gives to the socket's own process.
#![allow(
    unsafe_code,
    reason = "the macro of `nix` expands to it: a `getsockopt` that fills a buffer of plain bytes"
)]

use std::os::fd::AsFd;

use nix::{getsockopt_impl, libc, sockopt_impl, sys::socket::getsockopt};

/// The size of `struct tcp_info` on the oldest kernel.
const LEN: usize = 232;

sockopt_impl!(
    /// `TCP_INFO`, as far as every kernel has it.
    RawTcpInfo,
    GetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    [u8; LEN]
);

/// The fields of `struct tcp_info` that are whole bytes: name, offset, size
/// (`include/uapi/linux/tcp.h`).
#[rustfmt::skip]
const FIELDS: &[(&str, usize, usize)] = &[
    ("state", 0, 1), ("ca_state", 1, 1), ("retransmits", 2, 1), ("probes", 3, 1), ("backoff", 4, 1), ("options", 5, 1),
    ("rto", 8, 4), ("ato", 12, 4), ("snd_mss", 16, 4), ("rcv_mss", 20, 4), ("unacked", 24, 4), ("sacked", 28, 4),
    ("lost", 32, 4), ("retrans", 36, 4), ("fackets", 40, 4), ("last_data_sent", 44, 4), ("last_ack_sent", 48, 4),
    ("last_data_recv", 52, 4), ("last_ack_recv", 56, 4), ("pmtu", 60, 4), ("rcv_ssthresh", 64, 4), ("rtt", 68, 4),
    ("rttvar", 72, 4), ("snd_ssthresh", 76, 4), ("snd_cwnd", 80, 4), ("advmss", 84, 4), ("reordering", 88, 4),
    ("rcv_rtt", 92, 4), ("rcv_space", 96, 4), ("total_retrans", 100, 4), ("pacing_rate", 104, 8),
    ("max_pacing_rate", 112, 8), ("bytes_acked", 120, 8), ("bytes_received", 128, 8), ("segs_out", 136, 4),
    ("segs_in", 140, 4), ("notsent_bytes", 144, 4), ("min_rtt", 148, 4), ("data_segs_in", 152, 4),
    ("data_segs_out", 156, 4), ("delivery_rate", 160, 8), ("busy_time", 168, 8), ("rwnd_limited", 176, 8),
    ("sndbuf_limited", 184, 8), ("delivered", 192, 4), ("delivered_ce", 196, 4), ("bytes_sent", 200, 8),
    ("bytes_retrans", 208, 8), ("dsack_dups", 216, 4), ("reord_seen", 220, 4), ("rcv_ooopack", 224, 4),
    ("snd_wnd", 228, 4),
];

/// Returns the fields of `getsockopt(TCP_INFO)`: names and values.
pub fn of(socket: &impl AsFd) -> anyhow::Result<Vec<(&'static str, u64)>> {
    let bytes: [u8; LEN] = getsockopt(socket, RawTcpInfo)?;
    let value = |offset, size| {
        let mut value = [0; 8];
        value[..size].copy_from_slice(&bytes[offset..offset + size]);
        u64::from_le_bytes(value)
    };
    let mut fields: Vec<_> = FIELDS
        .iter()
        .map(|&(name, offset, size)| (name, value(offset, size)))
        .collect();
    fields.push(("snd_wscale", u64::from(bytes[6] & 0xf)));
    fields.push(("rcv_wscale", u64::from(bytes[6] >> 4)));
    fields.push(("fastopen_client_fail", u64::from(bytes[7] >> 1 & 3)));
    Ok(fields)
}
