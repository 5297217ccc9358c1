//! The states of a TCP socket.

use std::fmt;

macro_rules! tcp_states {
    ($($(#[$doc:meta])* $state:ident = $number:literal $name:literal,)+) => {
        /// A TCP state, named and numbered as in the kernel (`include/net/tcp_states.h`).
        ///
        /// A socket never reports `TimeWait`. The kernel moves a waiting connection to a smaller
        /// structure and closes the socket. So the last change of the active closer is `FIN_WAIT2`
        /// to `CLOSE`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        #[non_exhaustive]
        #[repr(u8)]
        pub enum TcpState {
            $($(#[$doc])* #[cfg_attr(feature = "serde", serde(rename = $name))] $state = $number,)+
        }

        impl TcpState {
            /// Returns the kernel's name: `ESTABLISHED`, `SYN_SENT`, …
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$state => $name,)+ }
            }

            /// Returns the state that has this number in the kernel.
            #[must_use]
            pub const fn from_number(number: u8) -> Option<Self> {
                match number { $($number => Some(Self::$state),)+ _ => None }
            }
        }
    };
}

tcp_states! {
    /// The connection is open, and data flows.
    Established = 1 "ESTABLISHED",
    /// `connect` sent a SYN.
    SynSent = 2 "SYN_SENT",
    /// A child of a listener near the end of its handshake, or a simultaneous open.
    SynRecv = 3 "SYN_RECV",
    /// This side closed. Its FIN is not acknowledged yet.
    FinWait1 = 4 "FIN_WAIT1",
    /// This side closed, and the peer acknowledged it. The peer may still send.
    FinWait2 = 5 "FIN_WAIT2",
    /// Waiting out old segments (never reported by a socket).
    TimeWait = 6 "TIME_WAIT",
    /// Not connected.
    Close = 7 "CLOSE",
    /// The peer closed. This side may still send.
    CloseWait = 8 "CLOSE_WAIT",
    /// Both sides closed, the peer first. This side's FIN is not acknowledged yet.
    LastAck = 9 "LAST_ACK",
    /// Waiting for connections.
    Listen = 10 "LISTEN",
    /// Both sides closed at the same time.
    Closing = 11 "CLOSING",
    /// A connection request that is not a full socket yet.
    NewSynRecv = 12 "NEW_SYN_RECV",
}

impl TcpState {
    /// Returns whether the handshake of a socket in this state is over, and the connection is not.
    pub(crate) const fn is_connected(self) -> bool {
        !matches!(
            self,
            Self::Close | Self::Listen | Self::SynSent | Self::SynRecv | Self::NewSynRecv
        )
    }
}

impl fmt::Display for TcpState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        for number in 0..=255 {
            match TcpState::from_number(number) {
                Some(state) => assert_eq!(state as u8, number),
                None => assert!(number == 0 || number > 12, "{number} has no name"),
            }
        }
        assert_eq!(TcpState::Listen.to_string(), "LISTEN");
    }
}
