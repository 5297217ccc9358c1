//! Summarizes the end of a TCP connection. No I/O.

use std::time::Duration;

use tcp_udp_trace_common::{Summary as Record, TcpSocket, direction, older, sk_flag};

use crate::event::{
    reset_reason::ResetReason,
    summary::{EndedBy, Summary},
    tcp_state::TcpState,
};

/// Errors of Linux, as numbers. They are the same on every architecture that the library supports.
mod errno {
    pub(super) const EACCES: i32 = 13;
    pub(super) const EPIPE: i32 = 32;
    pub(super) const ENONET: i32 = 64;
    pub(super) const ENOPROTOOPT: i32 = 92;
    pub(super) const ENETDOWN: i32 = 100;
    pub(super) const ENETUNREACH: i32 = 101;
    pub(super) const ECONNABORTED: i32 = 103;
    pub(super) const ECONNRESET: i32 = 104;
    pub(super) const ETIMEDOUT: i32 = 110;
    pub(super) const ECONNREFUSED: i32 = 111;
    pub(super) const EHOSTDOWN: i32 = 112;
    pub(super) const EHOSTUNREACH: i32 = 113;
}

/// The facts that the programs report of the end of a connection.
pub(super) struct Ending<'a> {
    /// The last state.
    pub(super) from: TcpState,
    pub(super) error: Option<i32>,
    pub(super) summary: &'a Record,
}

impl Ending<'_> {
    /// Returns the summary of the socket that ended at this time.
    pub(super) fn summary(&self, socket: &TcpSocket, now: u64) -> Summary {
        let &Record {
            established,
            bytes_retrans,
            handshake,
            smoothed_rtt,
            rtt_deviation,
            min_rtt,
            total_retrans,
            lost,
            out_of_order,
            reset_reason,
            ..
        } = self.summary;
        let nanos = |from: u64, to: u64| Duration::from_nanos(to.saturating_sub(from));
        let is_established = established != 0;
        let handshake = match socket.direction {
            direction::OUTBOUND if is_established && socket.older == older::NO => {
                Some(nanos(socket.born, established))
            }
            direction::INBOUND if handshake != 0 => Some(Duration::from_micros(handshake.into())),
            _ => None,
        };
        // Until the first measurement, the other two have initial values.
        let rtt = |micros: u32| (smoothed_rtt != 0).then(|| Duration::from_micros(micros.into()));
        Summary {
            handshake,
            established: is_established.then(|| nanos(established, now)),
            srtt: rtt(smoothed_rtt >> 3),
            min_rtt: rtt(min_rtt).filter(|_| min_rtt != u32::MAX),
            rttvar: rtt(rtt_deviation >> 2),
            retransmitted_packets: total_retrans,
            retransmitted_bytes: bytes_retrans,
            lost_packets: lost,
            out_of_order,
            ended_by: self.ended_by(socket.direction),
            reset_reason: ResetReason::from_record(reset_reason.into()),
        }
    }

    /// Returns how the connection ended, or `None` if that is not certain.
    fn ended_by(&self, direction: u8) -> Option<EndedBy> {
        use TcpState::{
            CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, SynRecv, SynSent,
        };
        let &Record {
            socket_state,
            unsent,
            flags,
            repair,
            ..
        } = self.summary;
        if repair != 0 || socket_state == Record::MISSED {
            return None;
        }
        let is_closed = flags & sk_flag::CLOSED != 0;
        match self.error {
            Some(errno::ECONNABORTED) => Some(EndedBy::Killed),
            Some(errno::ETIMEDOUT) => Some(EndedBy::Timeout),
            Some(errno::ECONNREFUSED) => Some(EndedBy::Refused),
            Some(
                errno::EACCES
                | errno::ENONET
                | errno::ENOPROTOOPT
                | errno::ENETDOWN
                | errno::ENETUNREACH
                | errno::EHOSTDOWN
                | errno::EHOSTUNREACH,
            ) => Some(EndedBy::Unreachable),
            // The process had closed the connection before. The kernel treats data that comes after
            // that like a reset.
            Some(errno::ECONNRESET)
                if is_closed && matches!(self.from, FinWait1 | FinWait2 | Closing) =>
            {
                Some(EndedBy::Local)
            }
            Some(errno::ECONNRESET | errno::EPIPE) => Some(EndedBy::PeerReset),
            Some(_) => None,
            None => match self.from {
                SynSent => Some(EndedBy::Local),
                SynRecv if direction == direction::OUTBOUND => Some(EndedBy::Local),
                // The kernel may as well drop a child that it made twice.
                SynRecv => None,
                Established | CloseWait => {
                    let is_accepted = is_closed || socket_state != 0;
                    Some(if direction == direction::OUTBOUND || is_accepted {
                        EndedBy::LocalReset
                    } else {
                        EndedBy::NotAccepted
                    })
                }
                FinWait1 => Some(EndedBy::LocalReset),
                // The kernel moves a closed socket to a smaller structure, which waits for the
                // peer's FIN.
                FinWait2 if is_closed || flags & sk_flag::PEER_CLOSED != 0 => Some(EndedBy::Local),
                FinWait2 => Some(EndedBy::LocalReset),
                LastAck | Closing if unsent != 0 => Some(EndedBy::LocalReset),
                LastAck => Some(EndedBy::Peer),
                Closing => Some(EndedBy::Local),
                _ => None,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros as _;

    use super::*;

    /// A fact in the record.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Fact {
        None,
        Closed,
        PeerClosed,
        HasDescriptor,
        TakenAway,
        Missed,
        Unsent,
    }

    fn ended_by(from: TcpState, direction: u8, fact: Fact, error: Option<i32>) -> Option<EndedBy> {
        let mut summary = Record::new_zeroed();
        match fact {
            Fact::None => {}
            Fact::Closed => summary.flags = sk_flag::CLOSED,
            Fact::PeerClosed => summary.flags = sk_flag::PEER_CLOSED,
            Fact::HasDescriptor => summary.socket_state = 3,
            Fact::TakenAway => summary.repair = 1 << 6,
            Fact::Missed => summary.socket_state = Record::MISSED,
            Fact::Unsent => summary.unsent = 1,
        }
        let summary = &summary;
        Ending {
            from,
            error,
            summary,
        }
        .ended_by(direction)
    }

    #[test]
    fn states_and_flags_show_how_a_connection_ended() {
        use Fact::{Closed, HasDescriptor, Missed, PeerClosed, TakenAway, Unsent};
        use TcpState::{
            CloseWait, Closing, Established, FinWait1, FinWait2, LastAck, SynRecv, SynSent,
        };
        use direction::{INBOUND, OUTBOUND, UNKNOWN};
        for (from, direction, fact, expected) in [
            (SynSent, OUTBOUND, HasDescriptor, Some(EndedBy::Local)),
            (SynRecv, OUTBOUND, HasDescriptor, Some(EndedBy::Local)),
            (SynRecv, INBOUND, Fact::None, None),
            (Established, INBOUND, Fact::None, Some(EndedBy::NotAccepted)),
            (Established, UNKNOWN, Fact::None, Some(EndedBy::NotAccepted)),
            (CloseWait, INBOUND, PeerClosed, Some(EndedBy::NotAccepted)),
            (
                Established,
                INBOUND,
                HasDescriptor,
                Some(EndedBy::LocalReset),
            ),
            (Established, OUTBOUND, Fact::None, Some(EndedBy::LocalReset)),
            (Established, OUTBOUND, TakenAway, None),
            (Established, OUTBOUND, Missed, None),
            (FinWait1, OUTBOUND, Fact::None, Some(EndedBy::LocalReset)),
            (FinWait2, OUTBOUND, Closed, Some(EndedBy::Local)),
            (FinWait2, OUTBOUND, PeerClosed, Some(EndedBy::Local)),
            (FinWait2, OUTBOUND, HasDescriptor, Some(EndedBy::LocalReset)),
            (Closing, OUTBOUND, Closed, Some(EndedBy::Local)),
            (LastAck, OUTBOUND, Closed, Some(EndedBy::Peer)),
            (LastAck, OUTBOUND, Unsent, Some(EndedBy::LocalReset)),
        ] {
            assert_eq!(
                ended_by(from, direction, fact, None),
                expected,
                "{from} {direction} {fact:?}"
            );
        }
    }

    #[test]
    fn errors_show_how_a_connection_ended() {
        use TcpState::{CloseWait, Established, FinWait2, SynSent};
        for (from, fact, error, expected) in [
            (
                SynSent,
                Fact::None,
                errno::ECONNREFUSED,
                Some(EndedBy::Refused),
            ),
            (
                SynSent,
                Fact::None,
                errno::ETIMEDOUT,
                Some(EndedBy::Timeout),
            ),
            (
                SynSent,
                Fact::None,
                errno::EHOSTUNREACH,
                Some(EndedBy::Unreachable),
            ),
            (
                Established,
                Fact::None,
                errno::ECONNABORTED,
                Some(EndedBy::Killed),
            ),
            (
                Established,
                Fact::None,
                errno::ECONNRESET,
                Some(EndedBy::PeerReset),
            ),
            (
                CloseWait,
                Fact::None,
                errno::EPIPE,
                Some(EndedBy::PeerReset),
            ),
            (
                FinWait2,
                Fact::None,
                errno::ECONNRESET,
                Some(EndedBy::PeerReset),
            ),
            (
                FinWait2,
                Fact::Closed,
                errno::ECONNRESET,
                Some(EndedBy::Local),
            ),
            (SynSent, Fact::None, 99, None),
        ] {
            let found = ended_by(from, direction::OUTBOUND, fact, Some(error));
            assert_eq!(found, expected, "{from} {error}");
        }
    }

    #[test]
    fn absent_numbers_are_none() {
        let mut record = Record::new_zeroed();
        record.min_rtt = u32::MAX;
        record.rtt_deviation = 4_000_000;
        let mut socket = TcpSocket::new_zeroed();
        socket.direction = direction::OUTBOUND;
        (socket.born, record.total_retrans) = (1_000, 2);
        let of = |socket: &TcpSocket, summary: &Record| {
            let (from, error) = (TcpState::Established, None);
            let ending = Ending {
                from,
                error,
                summary,
            };
            ending.summary(socket, 9_000)
        };
        let summary = of(&socket, &record);
        assert_eq!((summary.handshake, summary.established), (None, None));
        assert_eq!(
            (summary.srtt, summary.min_rtt, summary.rttvar),
            (None, None, None)
        );
        assert_eq!(summary.retransmitted_packets, 2);
        (record.established, record.smoothed_rtt) = (3_000, 80);
        let summary = of(&socket, &record);
        assert_eq!(summary.handshake, Some(Duration::from_nanos(2_000)));
        assert_eq!(summary.established, Some(Duration::from_nanos(6_000)));
        assert_eq!(summary.srtt, Some(Duration::from_micros(10)));
        assert_eq!(
            (summary.min_rtt, summary.rttvar),
            (None, Some(Duration::from_secs(1)))
        );
        socket.older = older::YES;
        assert_eq!(of(&socket, &record).handshake, None);
        socket.direction = direction::INBOUND;
        assert_eq!(of(&socket, &record).handshake, None);
        record.handshake = 70;
        let handshake = of(&socket, &record).handshake;
        assert_eq!(handshake, Some(Duration::from_micros(70)));
    }
}
