//! Queries sock_diag for every socket of the calling thread's network namespace. This is the only
//! module that names netlink.

use std::{
    cell::Cell,
    convert::Infallible,
    io,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::BufMut;
use futures_util::StreamExt as _;
use netlink_packet_core::{
    Emitable as _, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable,
    NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable, NlasIterator,
    Parseable as _,
};
use netlink_packet_sock_diag::{
    AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP, SOCK_DIAG_BY_FAMILY,
    inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags},
};
use netlink_proto::{
    Connection, ConnectionHandle, NetlinkCodec, from_socket_with_codec,
    sys::{AsyncSocket, SocketAddr, TokioSocket, protocols::NETLINK_SOCK_DIAG},
};
use netlink_sys::Socket;
use tokio::time::timeout;

use crate::event::{Protocol, sample_info::SampleInfo, tcp_info::TcpInfo, udp_info::UdpInfo};

/// The number of attempts at a consistent dump.
const ATTEMPTS: usize = 3;
/// The longest time between two parts of a dump.
const PATIENCE: Duration = Duration::from_secs(5);

/// `struct inet_diag_msg`, up to its attributes.
const HEADER_LEN: usize = 72;
/// `enum` of `inet_diag.h`.
const INET_DIAG_INFO: u16 = 2;
const INET_DIAG_SKMEMINFO: u16 = 7;

/// The kernel's answer for one socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SocketInfo {
    pub(crate) cookie: u64,
    pub(crate) info: SampleInfo,
}

/// The error of an answer that is not valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

/// An answer. `None` is an answer that is not for a full socket: the kernel returns TIME_WAIT
/// sockets under their previous state.
pub(crate) type Answer = Result<Option<SocketInfo>, Malformed>;

/// Passes every socket of the calling thread's namespace to `take`, until that returns `false`. The
/// request leaves out TCP sockets that are not full sockets (the first half of a handshake,
/// TIME_WAIT).
///
/// # Errors
///
/// The kernel has no sock_diag for this protocol, or did not answer, or interrupted every attempt.
pub(crate) async fn dump(
    protocol: Protocol,
    mut take: impl FnMut(Answer) -> bool,
) -> io::Result<()> {
    let socket = Paced::new(NETLINK_SOCK_DIAG)?;
    let (mut connection, handle, _unsolicited): (
        Connection<Message, Paced, NetlinkCodec>,
        ConnectionHandle<Message>,
        _,
    ) = from_socket_with_codec(socket);
    connection.set_forward_done(true);
    let connection = tokio::spawn(connection);
    let mut result = Ok(());
    for family in [AF_INET, AF_INET6] {
        result = dump_family(&handle, family, protocol, &mut take).await;
        if result.is_err() {
            break;
        }
    }
    // The connection does not end by itself while the receiver of unsolicited messages exists.
    connection.abort();
    result
}

async fn dump_family(
    handle: &ConnectionHandle<Message>,
    family: u8,
    protocol: Protocol,
    take: &mut impl FnMut(Answer) -> bool,
) -> io::Result<()> {
    for _ in 0..ATTEMPTS {
        let request = NetlinkMessage::new(
            request_header(),
            NetlinkPayload::InnerMessage(Message::Request(request(family, protocol))),
        );
        let mut answers = handle
            .request(request, SocketAddr::new(0, 0))
            .map_err(io::Error::other)?;
        let mut is_consistent = true;
        loop {
            let Some(answer) = timeout(PATIENCE, answers.next()).await? else {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the netlink connection has ended in the middle of a dump",
                ));
            };
            is_consistent &= answer.header.flags & NLM_F_DUMP_INTR == 0;
            match answer.payload {
                NetlinkPayload::InnerMessage(Message::Answer(answer)) => {
                    if !take(answer) {
                        return Ok(());
                    }
                }
                NetlinkPayload::Done(done) if done.code == 0 => break,
                NetlinkPayload::Done(done) => {
                    return Err(io::Error::from_raw_os_error(done.code.wrapping_neg()));
                }
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => is_consistent = false,
            }
        }
        if is_consistent {
            return Ok(());
        }
    }
    Err(io::Error::new(
        io::ErrorKind::Interrupted,
        "each dump was interrupted by changes",
    ))
}

fn request_header() -> NetlinkHeader {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    header
}

fn request(family: u8, protocol: Protocol) -> InetRequest {
    let (protocol, extensions, states) = match protocol {
        Protocol::Tcp => (
            IPPROTO_TCP,
            ExtensionFlags::INFO,
            // SYN_RECV would include connection requests.
            StateFlags::all() - StateFlags::SYN_RECV - StateFlags::TIME_WAIT - StateFlags::CLOSE,
        ),
        Protocol::Udp => (
            IPPROTO_UDP,
            ExtensionFlags::SKMEMINFO,
            // Connected and unconnected sockets.
            StateFlags::ESTABLISHED | StateFlags::CLOSE,
        ),
    };
    let socket_id = if family == AF_INET {
        SocketId::new_v4()
    } else {
        SocketId::new_v6()
    };
    InetRequest {
        family,
        protocol,
        extensions,
        states,
        socket_id,
    }
}

/// The messages of the connection. The crate's own type rejects a socket for one unknown attribute,
/// and its form depends on a feature that any other crate may enable.
#[derive(Debug)]
enum Message {
    Request(InetRequest),
    Answer(Answer),
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        SOCK_DIAG_BY_FAMILY
    }

    fn buffer_len(&self) -> usize {
        match self {
            Self::Request(request) => request.buffer_len(),
            Self::Answer(_) => 0,
        }
    }

    fn serialize(&self, buffer: &mut [u8]) {
        if let Self::Request(request) = self {
            request.emit(buffer);
        }
    }
}

impl NetlinkDeserializable for Message {
    type Error = Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Infallible> {
        Ok(Self::Answer(
            if header.message_type == SOCK_DIAG_BY_FAMILY {
                parse(payload)
            } else {
                Err(Malformed)
            },
        ))
    }
}

/// Parses an answer for one socket.
fn parse(payload: &[u8]) -> Answer {
    let (header, attributes) = payload.split_at_checked(HEADER_LEN).ok_or(Malformed)?;
    let header = InetResponseHeader::parse(header).map_err(|_| Malformed)?;
    let mut info = None;
    for attribute in NlasIterator::new(attributes) {
        let attribute = attribute.map_err(|_| Malformed)?;
        let decoded = match attribute.kind() {
            INET_DIAG_INFO => {
                TcpInfo::decode(attribute.value()).map(|info| SampleInfo::Tcp(info.into()))
            }
            INET_DIAG_SKMEMINFO => {
                let (rx_queue, tx_queue) = (header.recv_queue, header.send_queue);
                UdpInfo::decode(rx_queue, tx_queue, attribute.value())
                    .map(|info| SampleInfo::Udp(info.into()))
            }
            _ => continue,
        };
        info = Some(decoded.ok_or(Malformed)?);
    }
    let cookie = u64::from_ne_bytes(header.socket_id.cookie);
    Ok(info.map(|info| SocketInfo { cookie, info }))
}

/// Parses bytes as one answer, and as a datagram that the netlink crates split into answers. For
/// the fuzzers.
#[cfg(any(test, fuzzing))]
pub(crate) fn parse_answers(bytes: &[u8]) -> Vec<SampleInfo> {
    use netlink_proto::NetlinkMessageCodec as _;

    let mut answers = vec![parse(bytes)];
    let mut datagram = bytes::BytesMut::from(bytes);
    while let Ok(Some(message)) = NetlinkCodec::decode::<Message>(&mut datagram) {
        if let NetlinkPayload::InnerMessage(Message::Answer(answer)) = message.payload {
            answers.push(answer);
        }
    }
    let infos = answers.into_iter().filter_map(|answer| answer.ok()?);
    infos.map(|socket| socket.info).collect()
}

/// A socket that yields to other tasks after each datagram. The connection reads until no data is
/// left, and during a dump, each read makes the kernel write the next part. Without the yield, the
/// connection would read the whole dump into memory before the consumer sees the first socket.
struct Paced {
    socket: TokioSocket,
    has_read: Cell<bool>,
}

impl Paced {
    fn poll_turn(&self, cx: &Context<'_>) -> Poll<()> {
        if self.has_read.take() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(())
    }
}

impl AsyncSocket for Paced {
    fn socket_ref(&self) -> &Socket {
        self.socket.socket_ref()
    }

    fn socket_mut(&mut self) -> &mut Socket {
        self.socket.socket_mut()
    }

    fn new(protocol: isize) -> io::Result<Self> {
        Ok(Self {
            socket: TokioSocket::new(protocol)?,
            has_read: Cell::new(false),
        })
    }

    fn poll_send(&self, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.socket.poll_send(cx, buf)
    }

    fn poll_send_to(
        &self,
        cx: &mut Context<'_>,
        buf: &[u8],
        addr: &SocketAddr,
    ) -> Poll<io::Result<usize>> {
        self.socket.poll_send_to(cx, buf, addr)
    }

    fn poll_recv<B: BufMut>(&self, cx: &mut Context<'_>, buf: &mut B) -> Poll<io::Result<()>> {
        self.socket.poll_recv(cx, buf)
    }

    fn poll_recv_from<B: BufMut>(
        &self,
        cx: &mut Context<'_>,
        buf: &mut B,
    ) -> Poll<io::Result<SocketAddr>> {
        ready!(self.poll_turn(cx));
        let received = ready!(self.socket.poll_recv_from(cx, buf));
        self.has_read.set(true);
        Poll::Ready(received)
    }

    fn poll_recv_from_full(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Vec<u8>, SocketAddr)>> {
        self.socket.poll_recv_from_full(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the `struct inet_diag_msg` of a socket with this cookie.
    fn header(family: u8, cookie: u64) -> Vec<u8> {
        let mut bytes = vec![family, 1, 0, 0]; // family, state, timer, retransmits
        bytes.extend(8080_u16.to_be_bytes()); // source port
        bytes.extend(40_000_u16.to_be_bytes()); // destination port
        bytes.extend([0; 32]); // addresses
        bytes.extend([0; 4]); // interface
        bytes.extend(cookie.to_ne_bytes());
        bytes.extend(0_u32.to_ne_bytes()); // expires
        bytes.extend(3_u32.to_ne_bytes()); // rqueue
        bytes.extend(4_u32.to_ne_bytes()); // wqueue
        bytes.extend([0; 8]); // uid, inode
        assert_eq!(bytes.len(), HEADER_LEN);
        bytes
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let len = u16::try_from(4 + value.len()).expect("a short value");
        let mut bytes = [len.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// Returns an answer of a newer kernel: an unknown attribute, one with an odd length, and the
    /// one that the parser needs.
    fn answer() -> Vec<u8> {
        let unknown = attribute(4_000, &[1, 2, 3]);
        let shutdown = attribute(8, &[0]);
        let info = attribute(INET_DIAG_INFO, &[7; 280]);
        [header(AF_INET6, 77), unknown, shutdown, info].concat()
    }

    #[test]
    fn unknown_attributes_are_skipped() {
        let info = TcpInfo::decode(&[7; 280]).expect("long enough");
        let expected = SocketInfo {
            cookie: 77,
            info: SampleInfo::Tcp(info.into()),
        };
        assert_eq!(parse(&answer()), Ok(Some(expected)));
    }

    #[test]
    fn queues_of_udp_are_in_the_header() {
        let memory = attribute(INET_DIAG_SKMEMINFO, &[1; 36]);
        let info = UdpInfo::decode(3, 4, &[1; 36]).expect("long enough");
        let expected = SocketInfo {
            cookie: 5,
            info: SampleInfo::Udp(info.into()),
        };
        assert_eq!(
            parse(&[header(AF_INET, 5), memory].concat()),
            Ok(Some(expected))
        );
    }

    #[test]
    fn truncated_answers_are_malformed() {
        assert_eq!(parse(&header(1, 1)), Err(Malformed), "another family");
        let short = attribute(INET_DIAG_INFO, &[7; 100]);
        assert_eq!(parse(&[header(AF_INET, 1), short].concat()), Err(Malformed));
        // A cut between two attributes, or in their padding, only makes the answer shorter.
        let whole = [72, 79, 80, 85, 86, 87, 88];
        for len in 0..answer().len() {
            let expected = if whole.contains(&len) {
                Ok(None)
            } else {
                Err(Malformed)
            };
            assert_eq!(parse(&answer()[..len]), expected, "{len} bytes");
        }
    }

    /// Writes the kernel's answers for one socket of each kind, in a network namespace without
    /// others.
    #[test]
    #[ignore = "writes the fuzzers' seeds, as root"]
    fn write_seeds() {
        use nix::sched::{CloneFlags, unshare};

        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace, of this thread only");
        let _tcp4 = std::net::TcpListener::bind("127.0.0.1:8123").expect("a listener");
        let _udp4 = std::net::UdpSocket::bind("127.0.0.1:8123").expect("a socket");
        let _udp6 = std::net::UdpSocket::bind("[::]:8124").expect("a socket");
        for (name, family, protocol) in [
            ("tcp4", AF_INET, Protocol::Tcp),
            ("udp4", AF_INET, Protocol::Udp),
            ("udp6", AF_INET6, Protocol::Udp),
        ] {
            let message = Message::Request(request(family, protocol));
            let mut message =
                NetlinkMessage::new(request_header(), NetlinkPayload::InnerMessage(message));
            message.finalize();
            let mut bytes = vec![0; message.buffer_len()];
            message.serialize(&mut bytes);
            let socket = Socket::new(NETLINK_SOCK_DIAG).expect("a netlink socket");
            let kernel = SocketAddr::new(0, 0);
            socket.send_to(&bytes, &kernel, 0).expect("sent");
            let (datagram, _) = socket.recv_from_full().expect("an answer");
            assert_eq!(parse_answers(&datagram).len(), 1);
            crate::fuzzing::seeds::write_seed("netlink", name, &datagram);
        }
        // An answer that newer kernels could send.
        crate::fuzzing::seeds::write_seed("netlink", "unknown_attribute", &answer());
    }
}
