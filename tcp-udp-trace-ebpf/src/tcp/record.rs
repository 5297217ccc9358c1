//! The contents of a TCP record.

use aya_ebpf::Global;
use tcp_udp_trace_common::{AF_INET, Field, Summary, TcpSocket, Tracked, sk_flag, syn};

use super::sockets;
use crate::{
    owner,
    read::{now, read, read_at},
    sock::{
        Socket,
        tcp_state::{CLOSING, FIN_WAIT1, FIN_WAIT2, LAST_ACK, LISTEN, SYN_SENT},
    },
};

const EADDRINUSE: u32 = 98;
pub(super) const EADDRNOTAVAIL: u32 = 99;

/// The bit of `sk_flags` that the kernel sets when a socket has begun to listen, 0 if it is not
/// known. User space sets it.
#[unsafe(no_mangle)]
static HAS_LISTENED: Global<u64> = Global::new(0);

/// The bit of [`Field::Repair`] in its byte, 0 if it is not known. User space sets it.
#[unsafe(no_mangle)]
static REPAIR: Global<u8> = Global::new(0);

/// Returns whether a socket that connects takes over a connection (`TCP_REPAIR`). The kernel then
/// sends no SYN, so no SYN is acknowledged.
///
/// <https://elixir.bootlin.com/linux/v6.12/source/net/ipv4/tcp_output.c>
#[inline(always)]
pub(super) fn is_repaired(socket: impl Socket) -> bool {
    repair(socket) != 0
}

/// Returns the kernel's bit of `TCP_REPAIR`.
#[inline(always)]
fn repair(socket: impl Socket) -> u8 {
    socket.get::<u8>(Field::Repair) & REPAIR.load()
}

/// Writes a socket into a record.
pub(super) trait Describe: Socket {
    /// Returns the payload bytes put on the wire, each counted once, for a socket that leaves
    /// `state`.
    #[inline(always)]
    fn tx_bytes(self, tracked: &Tracked, state: u8) -> u64 {
        if tracked.syn() == syn::UNKNOWN {
            let sent = self.get::<u64>(Field::BytesSent);
            return sent.wrapping_sub(self.get::<u64>(Field::BytesRetrans));
        }
        // The sum of the acknowledged bytes and those in flight, minus SYN and FIN. `bytes_sent`
        // would count a segment again each time that this machine's own queue refuses it.
        let next = self.get::<u32>(Field::SndNxt);
        let in_flight = next.wrapping_sub(self.get::<u32>(Field::SndUna));
        let sequence = self
            .get::<u64>(Field::BytesAcked)
            .wrapping_add(u64::from(in_flight));
        let fin_sent = queues_fin(state) && next == self.get::<u32>(Field::WriteSeq);
        sequence.saturating_sub(u64::from(tracked.syn() == syn::COUNTED) + u64::from(fin_sent))
    }

    /// Returns the payload bytes received in order, given the kernel's count of a moment ago.
    ///
    /// The kernel counts the FIN first and marks its arrival afterwards. A hook that does not hold
    /// the socket's lock may run in between. So the mark is read late, and if it is set, the count,
    /// which is now final, is read again.
    #[inline(always)]
    fn rx_bytes(self, counted: u64) -> u64 {
        if self.get::<u64>(Field::Flags) & u64::from(sk_flag::PEER_CLOSED) == 0 {
            counted
        } else {
            self.get::<u64>(Field::BytesReceived).saturating_sub(1)
        }
    }

    /// Writes the addresses of a socket of this family.
    #[inline(always)]
    fn describe_addresses(self, family: u16, to: &mut TcpSocket) {
        if family == AF_INET {
            to.local = [self.get(Field::LocalAddr4), 0, 0, 0];
            to.remote = [self.get(Field::RemoteAddr4), 0, 0, 0];
        } else {
            self.get_into(&mut to.local, Field::LocalAddr6);
            self.get_into(&mut to.remote, Field::RemoteAddr6);
        }
    }

    /// Writes the addresses of a `struct request_sock`, which begins as a `struct sock` does.
    #[inline(always)]
    fn describe_peer(self, to: &mut TcpSocket) {
        to.family = self.family();
        self.describe_addresses(to.family, to);
        to.local_port = self.bound_port();
        to.remote_port = u16::from_be(self.get(Field::RemotePort));
    }

    /// Writes the socket, which leaves or is in `state`, into a record.
    #[inline(always)]
    fn describe(
        self,
        tracked: &Tracked,
        family: u16,
        state: u8,
        local_port: u16,
        to: &mut TcpSocket,
    ) {
        let received = self.get(Field::BytesReceived);
        to.id = tracked.id;
        to.born = tracked.born;
        self.get_into(&mut to.cookie, Field::Cookie);
        to.cgroup = tracked.cgroup;
        to.netns_cookie = tracked.netns_cookie;
        to.tx_bytes = self.tx_bytes(tracked, state);
        self.get_into(&mut to.tx_packets, Field::SegsOut);
        self.get_into(&mut to.rx_packets, Field::SegsIn);
        self.get_into(&mut to.uid, Field::SkUid);
        to.netns = tracked.netns;
        to.owner = *owner::of_socket(tracked);
        self.describe_addresses(family, to);
        to.local_port = local_port;
        to.remote_port = u16::from_be(self.get(Field::RemotePort));
        to.family = family;
        to.older = tracked.older();
        to.direction = tracked.direction();
        self.get_into(&mut to.device, Field::Device);
        to.error = 0;
        to.rx_bytes = self.rx_bytes(received);
        sockets::copy_user(tracked, &mut to.user);
    }
}

/// Summarizes a connection.
pub(super) trait Summarize: Socket {
    /// Remembers that the handshake of the socket is over.
    #[inline(always)]
    fn establish(self, tracked: &mut Tracked) {
        tracked.established = now();
        if tracked.syn() != syn::NOT_COUNTED {
            return;
        }
        // A child begins when its handshake is nearly over, but the kernel has measured the time
        // from the SYN-ACK to its acknowledgment. There is no measurement if the SYN-ACK was
        // retransmitted. With TCP Fast Open, data may have been measured instead.
        let others =
            self.get::<u64>(Field::BytesSent) | u64::from(self.get::<u32>(Field::TotalRetrans));
        let eighths = self.get::<u32>(Field::SmoothedRtt);
        tracked.handshake = if others == 0 { eighths >> 3 } else { 0 };
    }

    /// Writes the summary of a connection that ends.
    // Not inlined: its values would take stack of the caller.
    #[inline(never)]
    fn summarize(self, socket_state: u32, tracked: &Tracked, to: &mut Summary) {
        to.established = tracked.established;
        to.handshake = tracked.handshake;
        self.get_into(&mut to.bytes_retrans, Field::BytesRetrans);
        self.get_into(&mut to.smoothed_rtt, Field::SmoothedRtt);
        self.get_into(&mut to.rtt_deviation, Field::RttDeviation);
        self.get_into(&mut to.min_rtt, Field::MinRtt);
        self.get_into(&mut to.total_retrans, Field::TotalRetrans);
        self.get_into(&mut to.lost, Field::Lost);
        self.get_into(&mut to.out_of_order, Field::OutOfOrder);
        // Without branches, which would multiply the work of older kernels' verifiers.
        to.socket_state = socket_state;
        to.unsent = self.get::<u32>(Field::SndNxt) ^ self.get::<u32>(Field::WriteSeq);
        to.flags = self.get::<u64>(Field::Flags) as u8;
        to.repair = repair(self);
        to.reset_reason = tracked.reset_reason;
    }
}

impl<S: Socket> Describe for S {}
impl<S: Socket> Summarize for S {}

/// Returns whether this `struct sk_buff` has an IPv4 packet.
#[inline(always)]
pub(crate) fn is_v4(skb: u64) -> bool {
    /// `ETH_P_IP`.
    const IPV4: u16 = 0x0800_u16.to_be();
    read::<u16>(skb, Field::SkbProtocol) == IPV4
}

/// Writes the addresses of a received segment into a record.
#[inline(always)]
pub(super) fn describe_ends(skb: u64, to: &mut TcpSocket) {
    let head = read::<u64>(skb, Field::SkbHead);
    let network = head + u64::from(read::<u16>(skb, Field::SkbNetworkHeader));
    let transport = head + u64::from(read::<u16>(skb, Field::SkbTransportHeader));
    if is_v4(skb) {
        to.family = AF_INET;
        to.remote = [read_at(network + 12), 0, 0, 0];
        to.local = [read_at(network + 16), 0, 0, 0];
    } else {
        to.remote = read_at(network + 8);
        to.local = read_at(network + 24);
    }
    to.remote_port = u16::from_be(read_at(transport));
}

/// Lets the bytes of a socket, whose close no hook saw, be those that the kernel counts without SYN
/// and FIN. Other changes of the state may have been missed, so a FIN may have been sent.
#[inline(always)]
pub(super) fn forget_syn(tracked: &mut Tracked) {
    if !queues_fin(tracked.state) {
        tracked.set_syn(syn::UNKNOWN);
    }
}

/// Returns whether a socket in this state has a FIN in its queue, or has sent it.
#[inline(always)]
const fn queues_fin(state: u8) -> bool {
    matches!(state, FIN_WAIT1 | FIN_WAIT2 | LAST_ACK | CLOSING)
}

/// Returns the errno with which a socket closes, or 0 if there is none.
///
/// Some calls return their errno and do not leave it in the socket. They are recognized by the
/// fields that they have not set.
#[inline(always)]
pub(super) fn error(socket: impl Socket, from: u8) -> u32 {
    if from == LISTEN {
        // The errno in the socket belongs to an earlier connection. A listener that ends was either
        // shut down or has listened.
        let has_listened = socket.get::<u64>(Field::Flags) & HAS_LISTENED.load() != 0;
        let is_refused =
            HAS_LISTENED.load() != 0 && !has_listened && socket.get::<u8>(Field::Shutdown) == 0;
        return if is_refused { EADDRINUSE } else { 0 };
    }
    let error = socket.get(Field::Error);
    // The kernel chooses the port before the first sequence number.
    if from == SYN_SENT
        && error == 0
        && (socket.get::<u16>(Field::LocalPort) == 0 || socket.get::<u32>(Field::WriteSeq) == 0)
    {
        return EADDRNOTAVAIL;
    }
    error
}
