//! The UDP side of an actor: each call that sends or receives, with the count of its datagrams.

use std::{
    fs::{self, File},
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, SocketAddr, UdpSocket},
    os::{
        fd::{AsFd, AsRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    process,
};

use nix::{
    libc,
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg,
        recvmsg, sendmmsg, sendmsg, setsockopt, sockopt,
    },
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{RecvFlags, SendFlags, SocketAddrAny},
};
use socket2::{Domain, InterfaceIndexOrAddress, Protocol, SockRef, Socket, Type};

use super::{
    datagram::{
        Direction::{Received, Sent},
        Hold, Operation, ReceiveCall, Segmentation, SendCall, SocketOption, Transfer,
    },
    flood,
    interpreter::TIMEOUT,
    protocol::Outcome,
};

/// The argument that makes this program send one datagram through its standard input. The size
/// follows.
pub(super) const CHILD_FLAG: &str = "--send-through-stdin";

/// Room for the largest datagram.
const LARGEST: usize = 1 << 16;

nix::setsockopt_impl!(
    UdpCork,
    libc::SOL_UDP,
    libc::UDP_CORK,
    bool,
    sockopt::SetBool
);

/// Gathers the pieces of a datagram.
#[derive(Debug, Clone, Copy)]
struct UdpCork;

pub(super) fn udp_socket(v6: bool) -> io::Result<Socket> {
    let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_write_timeout(Some(TIMEOUT))?;
    Ok(socket)
}

pub(super) fn perform(socket: &Socket, operation: Operation) -> io::Result<Outcome> {
    let transfers = match operation {
        Operation::Send { by, to, sizes } => send(socket, by, to, &sizes)?,
        Operation::SendPieces { held_by, to, sizes } => {
            vec![send_pieces(socket, held_by, to, &sizes)?]
        }
        Operation::SendUnfinished { to, size } => {
            send_flagged(socket, to, size, SendFlags::MORE)?;
            Vec::new()
        }
        Operation::SendSegments {
            by,
            to,
            bytes,
            segment,
        } => {
            vec![send_segments(socket, by, to, bytes, segment)?]
        }
        Operation::Receive { by, count, room } => receive(socket, by, count, room)?,
        Operation::Peek { with_address, room } => {
            peek(socket, with_address, room)?;
            Vec::new()
        }
        Operation::ReceiveTruncated { room } => {
            vec![receive_flagged(socket, room, RecvFlags::TRUNC)?]
        }
        Operation::ReceiveMerged { bytes } => receive_merged(socket, bytes)?,
        Operation::Drain => drain(socket)?,
        Operation::TakeError => {
            take_error(socket)?;
            Vec::new()
        }
        Operation::Set(option) => {
            set(socket, option)?;
            Vec::new()
        }
        Operation::Disconnect => {
            rustix::net::connect_unspec(socket)?;
            Vec::new()
        }
        Operation::Drops => return Ok(Outcome::Count(drops(socket)?)),
        Operation::SendByChild { size } => vec![send_by_child(socket, size)?],
        Operation::Flood { count, size } => flood::flood(socket, count, size)?,
        Operation::Absorb => flood::absorb(socket)?,
        Operation::Spray { port, addresses } => flood::spray(socket, port, addresses)?,
        Operation::Pace {
            to,
            count,
            every,
            size,
        } => flood::pace(socket, to, count, every, size)?,
    };
    Ok(Outcome::Transfers(transfers))
}

/// Returns the destination of datagrams without an address.
pub(super) fn peer(socket: &Socket) -> Option<SocketAddr> {
    socket
        .peer_addr()
        .ok()
        .and_then(|address| address.as_socket())
}

fn sent(socket: &Socket, to: Option<SocketAddr>, bytes: usize) -> Transfer {
    Transfer::one(Sent, to.or_else(|| peer(socket)), bytes)
}

fn received(socket: &Socket, from: Option<SocketAddr>, bytes: usize) -> Transfer {
    Transfer::one(Received, from.or_else(|| peer(socket)), bytes)
}

fn send(
    socket: &Socket,
    by: SendCall,
    to: Option<SocketAddr>,
    sizes: &[usize],
) -> io::Result<Vec<Transfer>> {
    match by {
        SendCall::SendMmsg => return send_many(socket, to, sizes),
        SendCall::Uring | SendCall::UringWrite => {
            return with_uring(socket, async |uring| {
                let mut transfers = Vec::new();
                for &size in sizes {
                    let payload = vec![0; size];
                    let bytes = match (by, to) {
                        (SendCall::UringWrite, _) => uring.write(payload).submit().await.0?,
                        (_, Some(to)) => uring.send_to(payload, to).await.0?,
                        (_, None) => uring.send(payload).await.0?,
                    };
                    transfers.push(sent(socket, to, bytes));
                }
                Ok(transfers)
            });
        }
        SendCall::SendTo | SendCall::SendMsg | SendCall::Write | SendCall::Writev => {}
    }
    let one = |&size: &usize| {
        let payload = vec![0; size];
        // The datagram has two parts, of which the first may be empty.
        let (head, tail) = payload.split_at(size / 2);
        let parts = [IoSlice::new(head), IoSlice::new(tail)];
        let bytes = match by {
            SendCall::SendTo => send_flagged(socket, to, size, SendFlags::empty())?,
            SendCall::Write => rustix::io::write(socket, &payload)?,
            SendCall::Writev => rustix::io::writev(socket, &parts)?,
            _ => {
                let to = to.map(SockaddrStorage::from);
                sendmsg(
                    socket.as_raw_fd(),
                    &parts,
                    &[],
                    MsgFlags::empty(),
                    to.as_ref(),
                )?
            }
        };
        Ok(sent(socket, to, bytes))
    };
    sizes.iter().map(one).collect()
}

pub(super) fn send_flagged(
    socket: &Socket,
    to: Option<SocketAddr>,
    size: usize,
    flags: SendFlags,
) -> io::Result<usize> {
    let payload = vec![0; size];
    Ok(match to {
        Some(to) => rustix::net::sendto(socket, &payload, flags, &to)?,
        None => rustix::net::send(socket, &payload, flags)?,
    })
}

fn send_many(
    socket: &Socket,
    to: Option<SocketAddr>,
    sizes: &[usize],
) -> io::Result<Vec<Transfer>> {
    let payload = vec![0; sizes.iter().copied().max().unwrap_or(0)];
    let slices: Vec<_> = sizes
        .iter()
        .map(|&size| [IoSlice::new(&payload[..size])])
        .collect();
    let addresses = vec![to.map(SockaddrStorage::from); sizes.len()];
    let mut headers = MultiHeaders::preallocate(sizes.len(), None);
    let messages = sendmmsg(
        socket.as_raw_fd(),
        &mut headers,
        &slices,
        addresses,
        [],
        MsgFlags::empty(),
    )?;
    Ok(messages
        .map(|message| sent(socket, to, message.bytes))
        .collect())
}

fn send_pieces(
    socket: &Socket,
    held_by: Hold,
    to: Option<SocketAddr>,
    sizes: &[usize],
) -> io::Result<Transfer> {
    if held_by == Hold::Cork {
        setsockopt(socket, UdpCork, &true)?;
    }
    for (at, &size) in sizes.iter().enumerate() {
        let is_held = held_by == Hold::More && at + 1 < sizes.len();
        let flags = if is_held {
            SendFlags::MORE
        } else {
            SendFlags::empty()
        };
        send_flagged(socket, to, size, flags)?;
    }
    if held_by == Hold::Cork {
        setsockopt(socket, UdpCork, &false)?;
    }
    Ok(sent(socket, to, sizes.iter().sum()))
}

fn send_segments(
    socket: &Socket,
    by: Segmentation,
    to: Option<SocketAddr>,
    bytes: usize,
    segment: u16,
) -> io::Result<Transfer> {
    let payload = vec![0; bytes];
    let mut messages = Vec::new();
    match by {
        Segmentation::Option => setsockopt(socket, sockopt::UdpGsoSegment, &segment.into())?,
        Segmentation::ControlMessage => messages.push(ControlMessage::UdpGsoSegments(&segment)),
    }
    let to_storage = to.map(SockaddrStorage::from);
    let bytes = sendmsg(
        socket.as_raw_fd(),
        &[IoSlice::new(&payload)],
        &messages,
        MsgFlags::empty(),
        to_storage.as_ref(),
    )?;
    Ok(sent(socket, to, bytes).cut(segment.into()))
}

fn receive(
    socket: &Socket,
    by: ReceiveCall,
    count: usize,
    room: usize,
) -> io::Result<Vec<Transfer>> {
    match by {
        ReceiveCall::RecvMmsg => return receive_many(socket, count, room),
        ReceiveCall::Uring | ReceiveCall::UringRead => {
            return with_uring(socket, async |uring| {
                let mut transfers = Vec::new();
                for _ in 0..count {
                    let buffer = Vec::with_capacity(room);
                    transfers.push(match by {
                        ReceiveCall::Uring => {
                            let (bytes, from) =
                                tokio::time::timeout(TIMEOUT, uring.recv_from(buffer))
                                    .await?
                                    .0?;
                            received(socket, Some(from), bytes)
                        }
                        _ => {
                            let bytes =
                                tokio::time::timeout(TIMEOUT, uring.read(buffer)).await?.0?;
                            received(socket, None, bytes)
                        }
                    });
                }
                Ok(transfers)
            });
        }
        _ => {}
    }
    let one = |_| {
        let mut buffer = vec![0; room];
        Ok(match by {
            ReceiveCall::Recv => {
                let (_, bytes) = rustix::net::recv(socket, &mut buffer[..], RecvFlags::empty())?;
                received(socket, None, bytes)
            }
            ReceiveCall::Read => received(socket, None, rustix::io::read(socket, &mut buffer[..])?),
            ReceiveCall::Readv => {
                let (head, tail) = buffer.split_at_mut(room / 2);
                let mut parts = [IoSliceMut::new(head), IoSliceMut::new(tail)];
                received(socket, None, rustix::io::readv(socket, &mut parts)?)
            }
            ReceiveCall::RecvMsg => receive_message(socket, room, MsgFlags::empty())?,
            _ => receive_flagged(socket, room, RecvFlags::empty())?,
        })
    };
    (0..count).map(one).collect()
}

/// Receives by `recvfrom`. With `TRUNC`, the bytes are those of the datagram, even if the buffer is
/// smaller.
fn receive_flagged(socket: &Socket, room: usize, flags: RecvFlags) -> io::Result<Transfer> {
    let mut buffer = vec![0; room];
    let (_, bytes, from) = rustix::net::recvfrom(socket, &mut buffer[..], flags)?;
    let from = from.map(inet).transpose()?;
    Ok(received(socket, from, bytes))
}

fn inet(address: SocketAddrAny) -> io::Result<SocketAddr> {
    Ok(SocketAddr::try_from(address)?)
}

/// Receives by `recvmsg`, counting the datagrams that the kernel has merged.
fn receive_message(socket: &Socket, room: usize, flags: MsgFlags) -> io::Result<Transfer> {
    let mut buffer = vec![0; room];
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let mut control = nix::cmsg_space!(i32, [u64; 16]);
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let transfer = received(socket, message.address.and_then(storage), message.bytes);
    let segment = message.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::UdpGroSegments(size) => usize::try_from(size).ok(),
        _ => None,
    });
    Ok(segment.map_or(transfer, |segment| transfer.cut(segment)))
}

fn storage(address: SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address
        .as_sockaddr_in()
        .map(|&address| SocketAddr::V4(address.into()));
    v4.or_else(|| {
        address
            .as_sockaddr_in6()
            .map(|&address| SocketAddr::V6(address.into()))
    })
}

fn receive_many(socket: &Socket, count: usize, room: usize) -> io::Result<Vec<Transfer>> {
    let mut transfers = Vec::new();
    while transfers.len() < count {
        let left = count - transfers.len();
        let mut buffers = vec![vec![0; room]; left];
        let mut slices: Vec<_> = buffers
            .iter_mut()
            .map(|buffer| [IoSliceMut::new(buffer)])
            .collect();
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(left, None);
        let flags = MsgFlags::MSG_WAITFORONE;
        let messages = recvmmsg(socket.as_raw_fd(), &mut headers, &mut slices, flags, None)?;
        transfers.extend(
            messages
                .map(|message| received(socket, message.address.and_then(storage), message.bytes)),
        );
    }
    Ok(transfers)
}

fn receive_merged(socket: &Socket, bytes: u64) -> io::Result<Vec<Transfer>> {
    let mut transfers = Vec::<Transfer>::new();
    while transfers.iter().map(|transfer| transfer.bytes).sum::<u64>() < bytes {
        transfers.push(receive_message(socket, LARGEST, MsgFlags::empty())?);
    }
    Ok(transfers)
}

fn peek(socket: &Socket, with_address: bool, room: usize) -> io::Result<()> {
    let mut buffer = vec![0; room];
    if with_address {
        rustix::net::recvfrom(socket, &mut buffer[..], RecvFlags::PEEK)?;
    } else {
        rustix::net::recv(socket, &mut buffer[..], RecvFlags::PEEK)?;
    }
    Ok(())
}

fn drain(socket: &Socket) -> io::Result<Vec<Transfer>> {
    let mut transfers = Vec::new();
    loop {
        match receive_flagged(socket, LARGEST, RecvFlags::DONTWAIT) {
            Ok(transfer) => transfers.push(transfer),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(transfers),
            Err(error) => return Err(error),
        }
    }
}

fn take_error(socket: &Socket) -> io::Result<()> {
    // `poll` always reports errors, so it waits for no other event.
    let mut sockets = [PollFd::new(socket, PollFlags::empty())];
    let timeout = Timespec::try_from(TIMEOUT).map_err(io::Error::other)?;
    if poll(&mut sockets, Some(&timeout))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    receive_message(socket, LARGEST, MsgFlags::MSG_ERRQUEUE).map(drop)
}

fn set(socket: &Socket, option: SocketOption) -> io::Result<()> {
    match option {
        SocketOption::ReceiveBuffer(bytes) => socket.set_recv_buffer_size(bytes)?,
        SocketOption::LargeReceiveBuffer(bytes) => {
            setsockopt(socket, sockopt::RcvBufForce, &bytes)?;
        }
        SocketOption::Broadcast => socket.set_broadcast(true)?,
        SocketOption::ReuseAddress => socket.set_reuse_address(true)?,
        SocketOption::ErrorQueue if is_v6(socket)? => {
            // For IPv4-mapped peers, the IPv4 option counts.
            setsockopt(socket, sockopt::Ipv6RecvErr, &true)?;
            setsockopt(socket, sockopt::Ipv4RecvErr, &true)?;
        }
        SocketOption::ErrorQueue => setsockopt(socket, sockopt::Ipv4RecvErr, &true)?,
        SocketOption::Merge => setsockopt(socket, sockopt::UdpGroSegment, &true)?,
        SocketOption::Join(IpAddr::V4(group), interface) => {
            socket.join_multicast_v4_n(&group, &InterfaceIndexOrAddress::Index(interface))?;
        }
        SocketOption::Join(IpAddr::V6(group), interface) => {
            socket.join_multicast_v6(&group, interface)?;
        }
        SocketOption::MulticastTo(interface) => socket.set_multicast_if_v6(interface)?,
        SocketOption::MulticastHops(hops) if is_v6(socket)? => {
            socket.set_multicast_hops_v6(hops)?;
        }
        SocketOption::MulticastHops(hops) => socket.set_multicast_ttl_v4(hops)?,
    }
    Ok(())
}

fn is_v6(socket: &Socket) -> io::Result<bool> {
    Ok(socket.domain()? == Domain::IPV6)
}

/// Returns how many datagrams found the socket's receive buffer full.
fn drops(socket: &Socket) -> io::Result<u64> {
    let columns = columns(socket)?;
    let drops = columns.last().and_then(|drops| drops.parse().ok());
    drops.ok_or_else(|| io::Error::other(format!("no drops in {columns:?}")))
}

/// Returns how many bytes of the receive buffer the waiting datagrams use.
///
/// # Errors
///
/// The socket is not in the tables of the calling thread's network namespace.
pub fn receive_queue(socket: impl AsFd) -> io::Result<u64> {
    let columns = columns(socket)?;
    let queues = columns.get(4).and_then(|queues| queues.split_once(':'));
    let receive = queues.and_then(|(_, receive)| u64::from_str_radix(receive, 16).ok());
    receive.ok_or_else(|| io::Error::other(format!("no queues in {columns:?}")))
}

/// Returns the columns of the socket's line in `/proc/net/udp`.
fn columns(socket: impl AsFd) -> io::Result<Vec<String>> {
    let inode = File::from(socket.as_fd().try_clone_to_owned()?)
        .metadata()?
        .ino()
        .to_string();
    let is_v6 = SockRef::from(&socket).domain()? == Domain::IPV6;
    let table = if is_v6 { "udp6" } else { "udp" };
    let sockets = fs::read_to_string(format!("/proc/thread-self/net/{table}"))?;
    let line = sockets
        .lines()
        .find(|line| line.split_whitespace().nth(9) == Some(&inode));
    let columns = line.map(|line| line.split_whitespace().map(str::to_owned).collect());
    columns.ok_or_else(|| io::Error::other(format!("socket {inode} is not in\n{sockets}")))
}

fn send_by_child(socket: &Socket, size: usize) -> io::Result<Transfer> {
    let inherited = socket.as_fd().try_clone_to_owned()?;
    let status = process::Command::new("/proc/self/exe")
        .arg(CHILD_FLAG)
        .arg(size.to_string())
        .stdin(inherited)
        .status()?;
    if !status.success() {
        return Err(io::Error::other(format!("the child: {status}")));
    }
    Ok(sent(socket, None, size))
}

/// Runs the child process of [`Operation::SendByChild`].
pub(super) fn send_through_stdin(size: &str) -> io::Result<()> {
    let size = size.parse().map_err(io::Error::other)?;
    SockRef::from(&io::stdin()).send(&vec![0; size]).map(drop)
}

/// Runs a request with a duplicate of the socket, in an `io_uring` of its own.
fn with_uring<T>(
    socket: &Socket,
    act: impl AsyncFnOnce(&tokio_uring::net::UdpSocket) -> io::Result<T>,
) -> io::Result<T> {
    let duplicate = UdpSocket::from(OwnedFd::from(socket.try_clone()?));
    tokio_uring::Runtime::new(&tokio_uring::builder())?.block_on(async {
        let uring = tokio_uring::net::UdpSocket::from_std(duplicate);
        act(&uring).await
    })
}
