//! A process connects a UDP socket.

use core::ptr;

use aya_ebpf::{
    bindings::BPF_ANY, helpers::bpf_get_current_pid_tgid, macros::map, maps::LruHashMap,
};
use tcp_udp_trace_common::{AF_INET6, Field, Peer, UdpTracked, connects, kind};

use super::{
    records::{record, report, totals_of},
    sockets::{get, key_of, queued, track},
};
use crate::{
    connect::{self, Connect},
    datagrams::{Datagrams, Direction, flow_with},
    emit::Context,
    filter,
    read::{current_task, read},
    sock::{Sock, Socket as _, tcp_state::ESTABLISHED},
    syscall,
};

/// The threads that are in a `connect`, with the key of the socket.
#[map]
static CONNECTING: LruHashMap<u64, u64> = LruHashMap::with_max_entries(4096, 0);

/// `IORING_OP_CONNECT` of `io_uring.h`.
const IORING_OP_CONNECT: u8 = 16;

/// `PF_IO_WORKER`: a thread of an io_uring, whose requests complete elsewhere.
const IO_WORKER: u32 = 0x10;

/// The current thread begins to connect the socket.
#[inline(always)]
pub(crate) fn connect_started(key: u64, tracked: &mut UdpTracked) {
    let sk = Sock::new(tracked.sk);
    if !sk.has_address() {
        tracked.connects |= connects::VARYING_ADDRESS;
    }
    tracked.connects &= !(connects::BEGUN | connects::REPORTED);
    if sk.get::<u8>(Field::State) != ESTABLISHED {
        tracked.connects |= connects::BEGUN;
        tracked.strangers = queued(sk);
    }
    if read::<u32>(current_task(), Field::TaskFlags) & IO_WORKER != 0 {
        return;
    }
    let thread = bpf_get_current_pid_tgid();
    // If the map is full (4096 threads are in `connect` at once), the event will be missing.
    let _ = CONNECTING.insert(thread, key, u64::from(BPF_ANY));
}

/// The current thread's `connect`, if it was in one, has returned this result.
#[inline(always)]
pub(crate) fn connect_returned(ctx: Context, result: i64) {
    let thread = bpf_get_current_pid_tgid();
    // SAFETY: only this thread writes the entry.
    let Some(&key) = (unsafe { CONNECTING.get(thread) }) else {
        return;
    };
    let _ = CONNECTING.remove(thread);
    report_connect(ctx, key, result);
}

/// Reports a `connect` of the socket that has ended with this result.
#[inline(always)]
fn report_connect(ctx: Context, key: u64, result: i64) {
    let Some(tracked) = get(key) else { return };
    let sk = Sock::new(tracked.sk);
    let is_reported = tracked.connects & connects::REPORTED != 0;
    tracked.connects &= !(connects::BEGUN | connects::REPORTED);
    if is_reported {
        return;
    }
    if result == 0 && sk.get::<u8>(Field::State) == ESTABLISHED {
        tracked.strangers = queued(sk);
        report(ctx, kind::CONNECT, key, tracked, sk, 0);
    }
}

/// Reports a `connect` that has ended unseen, as in a 32-bit program, or is about to end.
#[inline(always)]
pub(super) fn report_unseen(ctx: Context, key: u64, tracked: &mut UdpTracked, sk: Sock) {
    if tracked.connects & connects::BEGUN != 0 && sk.get::<u8>(Field::State) == ESTABLISHED {
        tracked.connects ^= connects::BEGUN | connects::REPORTED;
        report(ctx, kind::CONNECT, key, tracked, sk, 0);
    }
}

/// The current process returns from `connect`.
#[inline(always)]
pub(crate) fn connect_exited(ctx: Context, result: i64) {
    connect_returned(ctx, result);
    if let Some(errno) = connect::errno(result) {
        if let Some(regs) = syscall::registers(syscall::CONNECT) {
            failed(ctx, regs, errno);
        }
    }
}

/// The current process returns from a system call.
#[inline(always)]
pub(crate) fn syscall_returned(ctx: Context, regs: u64, result: i64) {
    if syscall::is_any_of(&[syscall::CONNECT], regs) {
        connect_returned(ctx, result);
        if let Some(errno) = connect::errno(result) {
            failed(ctx, regs, errno);
        }
    }
}

/// The current task's `connect`, which has these registers, has failed.
#[inline(always)]
fn failed(ctx: Context, regs: u64, errno: u32) {
    let Some(connect) = Connect::new(regs).filter(|connect| connect.sk.is_udp()) else {
        return;
    };
    let key = key_of(connect.sk);
    let sk = ptr::without_provenance(connect.sk.0 as usize);
    let Some(tracked) = track(key, sk) else {
        return;
    };
    let (mut local, mut peer) = connect.ends();
    if local.family != peer.family {
        // A record has only one family.
        [local, peer] = [local, peer].map(|end| Peer {
            address: connect::mapped(&end),
            port: end.port,
            family: AF_INET6,
        });
    }
    let device = connect.sk.get(Field::Device);
    let ends = Datagrams {
        direction: Direction::Sent,
        bytes: 0,
        packets: 0,
        flow: flow_with(peer, device, local.address),
        local,
        other_port: 0,
        device: Some(device),
    };
    if filter::passes_udp(kind::CONNECT_FAILED_UDP, tracked, &ends) {
        let totals = totals_of(tracked);
        let (kind, errno) = (kind::CONNECT_FAILED_UDP, errno.into());
        record(ctx, kind, key, tracked, &ends, totals, errno);
    }
}

/// An io_uring has completed a request, which another thread may have executed.
#[inline(always)]
pub(crate) fn request_completed(ctx: Context, request: u64, result: i32) {
    if read::<u8>(request, Field::IoOpcode) != IORING_OP_CONNECT {
        return;
    }
    // If this thread executed the request, it has left an entry that is not used.
    let _ = CONNECTING.remove(bpf_get_current_pid_tgid());
    if let Some(sk) = Sock::of_file(read(request, Field::IoFile)) {
        if sk.is_udp() {
            report_connect(ctx, key_of(sk), result.into());
        }
    }
}
