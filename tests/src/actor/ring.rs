//! Accepts and connects by `io_uring`, in each of its ways.
#![allow(
    unsafe_code,
    reason = "a request may point to memory, which must outlive it"
)]

use std::{io, net::SocketAddr, os::fd::RawFd, ptr};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use socket2::SockAddr;

use super::protocol::UringAccept;

/// The number of file slots of a ring: more than the tests accept.
const SLOTS: u32 = 64;

/// Accepts this many connections, which exist as long as the ring or the process.
pub(super) fn accept(listener: RawFd, way: UringAccept, connections: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    match way {
        UringAccept::Polled => builder.setup_sqpoll(2_000),
        UringAccept::Deferred | UringAccept::MultishotDeferred => {
            builder.setup_single_issuer().setup_defer_taskrun()
        }
        _ => &mut builder,
    };
    let mut ring = builder.build(SLOTS)?;
    if way.is_direct() {
        ring.submitter().register_files_sparse(SLOTS)?;
    }
    let mut is_armed = false;
    for number in 0..connections {
        if !is_armed {
            let request = request(listener, way, number)?;
            // SAFETY: the request points to no memory, and the listener stays open.
            unsafe { ring.submission().push(&request) }.map_err(io::Error::other)?;
        }
        ring.submit_and_wait(1)?;
        let Some(completion): Option<cqueue::Entry> = ring.completion().next() else {
            return Err(io::Error::other("nothing was completed"));
        };
        if completion.result() < 0 {
            return Err(io::Error::from_raw_os_error(-completion.result()));
        }
        is_armed = cqueue::more(completion.flags());
    }
    Ok(ring)
}

/// Connects a socket.
pub(super) fn connect(socket: RawFd, to: SocketAddr, worker: bool) -> io::Result<()> {
    let mut ring = IoUring::new(1)?;
    let to = SockAddr::from(to);
    let request = opcode::Connect::new(types::Fd(socket), to.as_ptr().cast(), to.len()).build();
    let request = if worker {
        request.flags(squeue::Flags::ASYNC)
    } else {
        request
    };
    // SAFETY: the address lives until the request is completed, and the socket stays open.
    unsafe { ring.submission().push(&request) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    match ring.completion().next() {
        Some(completion) if completion.result() < 0 => {
            Err(io::Error::from_raw_os_error(-completion.result()))
        }
        Some(_) => Ok(()),
        None => Err(io::Error::other("nothing was completed")),
    }
}

fn request(listener: RawFd, way: UringAccept, number: u32) -> io::Result<squeue::Entry> {
    let listener = types::Fd(listener);
    let once = opcode::Accept::new(listener, ptr::null_mut(), ptr::null_mut());
    let slot = types::DestinationSlot::try_from_slot_target(number)
        .map_err(|_| io::ErrorKind::InvalidInput);
    Ok(match way {
        UringAccept::Once | UringAccept::Polled | UringAccept::Deferred => once.build(),
        UringAccept::Worker => once.build().flags(squeue::Flags::ASYNC),
        UringAccept::Multishot | UringAccept::MultishotDeferred => {
            opcode::AcceptMulti::new(listener).build()
        }
        UringAccept::Direct => once.file_index(Some(slot?)).build(),
        UringAccept::DirectAllocated => {
            let any = types::DestinationSlot::auto_target();
            once.file_index(Some(any)).build()
        }
        UringAccept::MultishotDirect => opcode::AcceptMulti::new(listener)
            .allocate_file_index(true)
            .build(),
    })
}
