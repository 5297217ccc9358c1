//! A `connect` that failed, and the address that it was called with.

use tcp_udp_trace_common::{AF_INET, AF_INET6, Peer};

use crate::{
    read::read_user,
    sock::{Sock, Socket as _, peer6},
    syscall,
};

const EINTR: i64 = 4;
const EISCONN: i64 = 106;
const EALREADY: i64 = 114;
const EINPROGRESS: i64 = 115;
/// The first of the errnos that no process sees. The kernel restarts the call, or returns `EINTR`.
///
/// <https://github.com/torvalds/linux/blob/v6.12/include/linux/errno.h>
const ERESTARTSYS: i64 = 512;

/// The size of a `sockaddr_in`, and of the shortest `sockaddr_in6` that the kernel accepts
/// (`SIN6_LEN_RFC2133`).
const LEN4: u64 = 16;
const LEN6: u64 = 24;

/// Returns the errno with which a `connect` of this result failed, or `None` if it succeeded,
/// continues in the background, or was interrupted.
#[inline(always)]
pub(crate) fn errno(result: i64) -> Option<u32> {
    let errno = -result;
    let is_none = errno <= 0
        || errno >= ERESTARTSYS
        || matches!(errno, EINPROGRESS | EALREADY | EISCONN | EINTR);
    (!is_none).then_some(errno as u32)
}

/// A `connect` that has returned.
pub(crate) struct Connect {
    pub(crate) sk: Sock,
    /// The address that the caller gave, and its length.
    address: u64,
    len: u64,
}

impl Connect {
    /// Returns the `connect` that the current task, which has these registers, returns from.
    #[inline(always)]
    pub(crate) fn new(regs: u64) -> Option<Self> {
        let [fd, address, len] = syscall::arguments(regs);
        let sk = Sock::of_descriptor(i64::from(fd as i32))?;
        let len = u64::from(len as u32);
        Some(Self { sk, address, len })
    }

    /// Returns the ends of the attempted connection. The local end is the one that the socket has.
    /// The remote end is the address that the caller gave, or the unspecified address if that is
    /// not an address of IPv4 or IPv6. An IPv4-mapped address becomes its IPv4 address.
    #[inline(always)]
    pub(crate) fn ends(&self) -> (Peer, Peer) {
        // If the socket was connected before, only this port belongs to the socket itself.
        let local = self.sk.local_end(self.sk.bound_port());
        let remote = Self::remote(self.address, self.len).unwrap_or(Peer {
            address: [0; 4],
            port: 0,
            family: local.family,
        });
        if remote.family == AF_INET && local.address == [0; 4] {
            let family = AF_INET;
            return (Peer { family, ..local }, remote);
        }
        (local, remote)
    }

    /// Returns the address at this address of user memory, which the kernel has accepted.
    #[inline(always)]
    pub(crate) fn address(at: u64) -> Option<Peer> {
        Self::remote(at, LEN6)
    }

    /// Returns the address of this length at an address of user memory, if it is one of IPv4 or
    /// IPv6.
    #[inline(always)]
    fn remote(address: u64, len: u64) -> Option<Peer> {
        // The family, the port, and the address if the family is IPv4.
        let head = read_user::<u64>(address).to_le();
        let port = u16::from_be((head >> 16) as u16);
        match head as u16 {
            AF_INET if len >= LEN4 => Some(Peer {
                address: [(head >> 32) as u32, 0, 0, 0],
                port,
                family: AF_INET,
            }),
            AF_INET6 if len >= LEN6 => Some(peer6(read_user(address + 8), port)),
            _ => None,
        }
    }
}

/// Returns an address as the four words of an IPv6 address.
#[inline(always)]
pub(crate) fn mapped(peer: &Peer) -> [u32; 4] {
    if peer.family == AF_INET {
        [0, 0, 0xffff_u32.to_be(), peer.address[0]]
    } else {
        peer.address
    }
}
