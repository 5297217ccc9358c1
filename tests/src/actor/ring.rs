//! Accepts by `io_uring`, in each way that there is.
#![allow(
    unsafe_code,
    reason = "a request may point to memory; those here do not"
)]

use std::{io, os::fd::RawFd, ptr};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::protocol::UringAccept;

/// As many slots for files as a ring has, and more than the tests accept.
const SLOTS: u32 = 64;

/// Accepts so many connections. They live as long as the ring, or the process.
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
