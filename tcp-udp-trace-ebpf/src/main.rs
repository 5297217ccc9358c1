//! The eBPF programs of tcp-udp-trace.
//!
//! Each event takes the same path. A hook in this file finds the socket. [`tcp`] or [`udp`]
//! determines the event from the state that it remembers of the socket. [`filter`] decides whether
//! the event is reported, and [`emit`] writes the record.
//!
//! A program has 512 bytes of stack and no unbounded loops. Records are built in the ring's memory.
#![no_std]
#![no_main]
#![allow(
    internal_features,
    reason = "atomic additions without a result are the only atomics that Linux 5.10 has"
)]
#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "a value in place of a reference would be copied to the stack"
)]
#![feature(asm_experimental_arch, core_intrinsics)]

// Layers, each uses only those after it: iter, query -> tcp, udp -> connect, filter, id, netns,
// room -> owner, stopping -> image, syscall -> emit, iter_context, datagrams, sock, task ->
// counters -> read -> arch.
mod arch;
mod connect;
mod counters;
mod datagrams;
mod emit;
mod filter;
mod id;
mod image;
mod iter;
mod iter_context;
mod netns;
mod owner;
mod query;
mod read;
mod room;
mod sock;
mod stopping;
mod syscall;
mod task;
mod tcp;
mod udp;

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::bpf_get_socket_cookie,
    macros::{
        btf_tracepoint, cgroup_skb, cgroup_sock, cgroup_sock_addr, classifier, fentry, fexit,
        kprobe, raw_tracepoint, tracepoint,
    },
    programs::{
        BtfTracePointContext, FEntryContext, FExitContext, ProbeContext, RawTracePointContext,
        SkBuffContext, SockAddrContext, SockContext, TcContext, TracePointContext,
    },
};
use tcp_udp_trace_common::{AF_INET, Field, Peer, kind, origin};

use crate::{
    filter::tree,
    iter_context::Step,
    sock::{Sock, Socket as _, TcpSock, peer6},
    tcp::{Program, accept},
};

// ---- Signal `state`: inet_sock_set_state(sk, old, new) ------------------------------------------
//
// Two programs run at each transition, because the kernel skips a program that is already active on
// the CPU (a softirq interrupted it or, on preemptible kernels, another task did). The first one to
// run reports.
//
// <https://github.com/torvalds/linux/blob/v6.12/kernel/trace/bpf_trace.c>

#[btf_tracepoint(function = "inet_sock_set_state")]
fn tcp_state_btf(ctx: BtfTracePointContext) -> i32 {
    let sk: *mut c_void = ctx.arg(0);
    if let Some(socket) = TcpSock::new(sk) {
        tcp::state_changed(
            ctx.as_ptr(),
            Program::First,
            Sock::new(sk as u64),
            socket,
            ctx.arg(1),
            ctx.arg(2),
        );
    }
    0
}

#[tracepoint]
fn tcp_state_tp(ctx: TracePointContext) -> u32 {
    // The layout is in events/sock/inet_sock_set_state/format, and the same on every kernel since
    // 4.16.
    let sk = Sock::new(field(&ctx, 8));
    let (old, new) = (field(&ctx, 16), field(&ctx, 20));
    tcp::state_changed(ctx.as_ptr(), Program::Second, sk, sk, old, new);
    0
}

#[raw_tracepoint(tracepoint = "inet_sock_set_state")]
fn tcp_state_raw(ctx: RawTracePointContext) -> i32 {
    let sk = Sock::new(ctx.arg(0));
    tcp::state_changed(
        ctx.as_ptr(),
        Program::Second,
        sk,
        sk,
        ctx.arg(1),
        ctx.arg(2),
    );
    0
}

// ---- Signal `end`: tcp_destroy_sock(sk) ---------------------------------------------------------

#[raw_tracepoint(tracepoint = "tcp_destroy_sock")]
fn tcp_end_raw(ctx: RawTracePointContext) -> i32 {
    tcp::destroyed(ctx.as_ptr(), Sock::new(ctx.arg(0)));
    0
}

#[btf_tracepoint(function = "tcp_destroy_sock")]
fn tcp_end_btf(ctx: BtfTracePointContext) -> i32 {
    tcp::destroyed(ctx.as_ptr(), Sock::new(ctx.arg(0)));
    0
}

#[tracepoint]
fn tcp_end_tp(ctx: TracePointContext) -> u32 {
    tcp::destroyed(ctx.as_ptr(), Sock::new(field(&ctx, 8)));
    0
}

// ---- Signals `retransmit` and `reset`, only on request ------------------------------------------

/// `tcp_retransmit_skb(sk, skb, err)`, since about 6.17. It runs even if the retransmission failed.
#[raw_tracepoint(tracepoint = "tcp_retransmit_skb")]
fn tcp_retransmit_err(ctx: RawTracePointContext) -> i32 {
    if ctx.arg::<i32>(2) == 0 {
        tcp::retransmitted(ctx.as_ptr(), Sock::new(ctx.arg(0)), ctx.arg(1));
    }
    0
}

/// `tcp_retransmit_skb(sk, skb)`
#[raw_tracepoint(tracepoint = "tcp_retransmit_skb")]
fn tcp_retransmit(ctx: RawTracePointContext) -> i32 {
    tcp::retransmitted(ctx.as_ptr(), Sock::new(ctx.arg(0)), ctx.arg(1));
    0
}

/// `tcp_retransmit_synack(sk, req)`: the socket is the listener.
#[raw_tracepoint(tracepoint = "tcp_retransmit_synack")]
fn tcp_retransmit_synack(ctx: RawTracePointContext) -> i32 {
    tcp::syn_ack_retransmitted(ctx.as_ptr(), Sock::new(ctx.arg(0)), ctx.arg(1));
    0
}

/// `tcp_send_reset(sk, skb, reason)`, since 6.10. The reset may belong to no socket. It answers the
/// segment in `skb`. Without one, the kernel ends the connection (`tcp_send_active_reset`).
///
/// <https://github.com/torvalds/linux/blob/v6.12/net/ipv4/tcp_output.c>
#[raw_tracepoint(tracepoint = "tcp_send_reset")]
fn tcp_reset_sent_reason(ctx: RawTracePointContext) -> i32 {
    let (reason, ends) = (ctx.arg::<u32>(2) + 1, ctx.arg::<u64>(1) == 0);
    tcp::reset(
        ctx.as_ptr(),
        kind::RESET_SENT,
        Sock::new(ctx.arg(0)),
        reason,
        ends,
    );
    0
}

/// `tcp_send_reset(sk, skb)`
#[raw_tracepoint(tracepoint = "tcp_send_reset")]
fn tcp_reset_sent(ctx: RawTracePointContext) -> i32 {
    let sk = Sock::new(ctx.arg(0));
    tcp::reset(ctx.as_ptr(), kind::RESET_SENT, sk, 0, false);
    0
}

/// `tcp_receive_reset(sk)`
#[raw_tracepoint(tracepoint = "tcp_receive_reset")]
fn tcp_reset_received(ctx: RawTracePointContext) -> i32 {
    let sk = Sock::new(ctx.arg(0));
    tcp::reset(ctx.as_ptr(), kind::RESET_RECEIVED, sk, 0, false);
    0
}

// ---- Signal `listen_overflow`, only on request --------------------------------------------------
//
// <https://github.com/torvalds/linux/blob/v6.12/net/ipv4/tcp_input.c>

/// `tcp_conn_request(ops, af_ops, sk, skb)`: a SYN has come for a listener.
#[kprobe]
fn tcp_syn(ctx: ProbeContext) -> u32 {
    let ctx = ctx.as_ptr();
    let sk = Sock::new(arch::third_argument(ctx));
    tcp::connection_requested(ctx, sk, arch::fourth_argument(ctx));
    0
}

/// `tcp_v4_syn_recv_sock(sk, skb, …)`: the last segment of a handshake has come for a listener.
#[kprobe]
fn tcp_child4(ctx: ProbeContext) -> u32 {
    let ctx = ctx.as_ptr();
    let sk = Sock::new(arch::first_argument(ctx));
    tcp::connection_requested(ctx, sk, arch::second_argument(ctx));
    0
}

/// `tcp_v6_syn_recv_sock(sk, skb, …)`. It calls the function above for an IPv4 segment.
#[kprobe]
fn tcp_child6(ctx: ProbeContext) -> u32 {
    let ctx = ctx.as_ptr();
    let (sk, skb) = (arch::first_argument(ctx), arch::second_argument(ctx));
    if !tcp::is_v4(skb) {
        tcp::connection_requested(ctx, Sock::new(sk), skb);
    }
    0
}

// ---- Signal `accept` ----------------------------------------------------------------------------

/// `security_sock_graft(sk, parent)`: the last step of every accept, in the accepting task.
#[kprobe]
fn accept_kprobe(ctx: ProbeContext) -> u32 {
    accept::accepted(ctx.as_ptr(), Sock::new(arch::first_argument(ctx.as_ptr())));
    0
}

#[fentry(function = "security_sock_graft")]
fn accept_fentry(ctx: FEntryContext) -> i32 {
    accept::accepted(ctx.as_ptr(), Sock::new(ctx.arg(0)));
    0
}

/// `syscalls:sys_exit_accept` and `sys_exit_accept4`: the result is the new socket's descriptor.
#[tracepoint]
fn accept_exit(ctx: TracePointContext) -> u32 {
    accept::accepted_descriptor(ctx.as_ptr(), field(&ctx, 16));
    0
}

/// `sys_exit(regs, ret)`: the exit of every system call.
#[raw_tracepoint(tracepoint = "sys_exit")]
fn accept_sys_exit(ctx: RawTracePointContext) -> i32 {
    accept::syscall_returned(ctx.as_ptr(), ctx.arg(0), ctx.arg(1));
    0
}

/// `io_uring:io_uring_complete(ctx, req, user_data, res, cflags, …)`: an accept by io_uring makes
/// no system call.
#[tracepoint]
fn accept_uring(ctx: TracePointContext) -> u32 {
    let (ring, request) = (field(&ctx, 8), field(&ctx, 16));
    accept::request_completed(
        ctx.as_ptr(),
        ring,
        request,
        field(&ctx, 32),
        field(&ctx, 36),
    );
    0
}

/// `io_uring:io_uring_cqe_overflow(ctx, user_data, res, cflags, …)`: the same, if the process is
/// slow to take its completions.
#[tracepoint]
fn accept_uring_overflow(ctx: TracePointContext) -> u32 {
    accept::request_completed(
        ctx.as_ptr(),
        field(&ctx, 8),
        0,
        field(&ctx, 24),
        field(&ctx, 28),
    );
    0
}

// ---- Signal `connect_failed` --------------------------------------------------------------------

/// `sys_connect(regs)` returns 0 or an error. The verifier of 5.10 refuses to load the argument.
#[fexit(function = "sys_connect")]
fn tcp_connect_fexit(ctx: FExitContext) -> i32 {
    tcp::connect_returned(ctx.as_ptr(), ctx.arg(1));
    0
}

/// `syscalls:sys_exit_connect`: the result is 0 or an error.
#[tracepoint]
fn tcp_connect_exit(ctx: TracePointContext) -> u32 {
    tcp::connect_returned(ctx.as_ptr(), field(&ctx, 16));
    0
}

// ---- Signal `listen`: the port that the kernel has chosen for a listener ------------------------

/// `inet_hash(sk)` and `inet6_hash(sk)`: the listener has its port, and SYNs will find it from now
/// on.
#[kprobe]
fn tcp_hash(ctx: ProbeContext) -> u32 {
    tcp::listener_has_port(ctx.as_ptr(), Sock::new(arch::first_argument(ctx.as_ptr())));
    0
}

/// `syscalls:sys_exit_listen`
#[tracepoint]
fn tcp_listen_exit(ctx: TracePointContext) -> u32 {
    tcp::listen_returned(ctx.as_ptr());
    0
}

// ---- UDP: the life of a socket ------------------------------------------------------------------
//
// A program at a cgroup returns 1, which lets the kernel continue.

#[cgroup_sock(sock_create)]
fn udp_create(ctx: SockContext) -> i32 {
    // SAFETY: the context is the socket that is being created.
    let (protocol, key) = unsafe { ((*ctx.sock).protocol, bpf_get_socket_cookie(ctx.as_ptr())) };
    if protocol == IPPROTO_UDP {
        udp::track_new(
            key,
            ctx.as_ptr(),
            owner::current(ctx.as_ptr(), origin::CREATOR),
        );
    }
    1
}

#[cgroup_sock(sock_release)]
fn udp_release(ctx: SockContext) -> i32 {
    // SAFETY: the context is the socket whose last descriptor is being closed.
    let (protocol, key) = unsafe { ((*ctx.sock).protocol, bpf_get_socket_cookie(ctx.as_ptr())) };
    if protocol == IPPROTO_UDP {
        udp::closed(ctx.as_ptr(), key, ctx.as_ptr());
    }
    1
}

// ---- UDP: connect, which begins at the cgroup and ends with the system call ---------------------

#[cgroup_sock_addr(connect4)]
fn udp_connect4(ctx: SockAddrContext) -> i32 {
    connect(&ctx)
}

#[cgroup_sock_addr(connect6)]
fn udp_connect6(ctx: SockAddrContext) -> i32 {
    connect(&ctx)
}

#[inline(always)]
fn connect(ctx: &SockAddrContext) -> i32 {
    // SAFETY: the context of a connect has a socket.
    let (protocol, sk, key) = unsafe {
        let addr = &*ctx.sock_addr;
        (
            addr.protocol,
            addr.__bindgen_anon_1.sk,
            bpf_get_socket_cookie(ctx.as_ptr()),
        )
    };
    if protocol == IPPROTO_UDP {
        let tracked = udp::track_for_current_task(ctx.as_ptr(), key, sk.cast(), || true);
        if let Some(tracked) = tracked {
            udp::connect::connect_started(key, tracked);
        }
    }
    1
}

/// As for TCP.
#[fexit(function = "sys_connect")]
fn udp_connect_fexit(ctx: FExitContext) -> i32 {
    udp::connect::connect_exited(ctx.as_ptr(), ctx.arg(1));
    0
}

#[tracepoint]
fn udp_connect_exit(ctx: TracePointContext) -> u32 {
    udp::connect::connect_exited(ctx.as_ptr(), field(&ctx, 16));
    0
}

#[raw_tracepoint(tracepoint = "sys_exit")]
fn udp_connect_sys_exit(ctx: RawTracePointContext) -> i32 {
    udp::connect::syscall_returned(ctx.as_ptr(), ctx.arg(0), ctx.arg(1));
    0
}

#[tracepoint]
fn udp_connect_uring(ctx: TracePointContext) -> u32 {
    udp::connect::request_completed(ctx.as_ptr(), field(&ctx, 16), field::<i32>(&ctx, 32));
    0
}

// ---- UDP: send ----------------------------------------------------------------------------------

#[cgroup_skb(egress)]
fn udp_egress(ctx: SkBuffContext) -> i32 {
    udp::send::sent(&ctx);
    1
}

/// `kfree_skb(skb, location, reason)`, since 5.17.
#[raw_tracepoint(tracepoint = "kfree_skb")]
fn udp_drop(ctx: RawTracePointContext) -> i32 {
    udp::drop::dropped(ctx.as_ptr(), ctx.arg(0), ctx.arg(2));
    0
}

/// `kfree_skb(skb, location)`
#[raw_tracepoint(tracepoint = "kfree_skb")]
fn udp_drop_no_reason(ctx: RawTracePointContext) -> i32 {
    udp::drop::dropped_for_no_reason(ctx.arg(0));
    0
}

/// `sock_send_length(sk, ret, flags)`: a send of the current thread has ended.
#[raw_tracepoint(tracepoint = "sock_send_length")]
fn udp_send_length(ctx: RawTracePointContext) -> i32 {
    udp::drop::send_returned(ctx.arg(0), ctx.arg(1));
    0
}

// ---- UDP: receive -------------------------------------------------------------------------------

#[kprobe]
fn udp_consume_kprobe(ctx: ProbeContext) -> u32 {
    let ctx = ctx.as_ptr();
    let (sk, skb) = (arch::first_argument(ctx), arch::second_argument(ctx));
    let len = arch::third_argument(ctx) as i32;
    udp::receive::consumed(ctx, Sock::new(sk), skb, len);
    0
}

#[fentry(function = "skb_consume_udp")]
fn udp_consume_fentry(ctx: FEntryContext) -> i32 {
    udp::receive::consumed(ctx.as_ptr(), Sock::new(ctx.arg(0)), ctx.arg(1), ctx.arg(2));
    0
}

#[cgroup_sock_addr(recvmsg4)]
fn udp_recvmsg4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the context of a receive.
    let (address, port) = unsafe { ((*ctx.sock_addr).user_ip4, (*ctx.sock_addr).user_port) };
    let peer = Peer {
        address: [address, 0, 0, 0],
        port: u16::from_be(port as u16),
        family: AF_INET,
    };
    udp::receive::receiving(ctx.as_ptr(), peer);
    1
}

#[cgroup_sock_addr(recvmsg6)]
fn udp_recvmsg6(ctx: SockAddrContext) -> i32 {
    // SAFETY: the context of a receive.
    let (address, port) = unsafe { ((*ctx.sock_addr).user_ip6, (*ctx.sock_addr).user_port) };
    let peer = peer6(address, u16::from_be(port as u16));
    udp::receive::receiving(ctx.as_ptr(), peer);
    1
}

/// `sock:sock_recv_length(sk, family, protocol, ret, flags)`.
#[tracepoint]
fn udp_recv_length_tp(ctx: TracePointContext) -> u32 {
    udp::receive::received(
        ctx.as_ptr(),
        Sock::new(field(&ctx, 8)),
        field(&ctx, 18),
        field(&ctx, 20),
        field(&ctx, 24),
    );
    0
}

#[raw_tracepoint(tracepoint = "sock_recv_length")]
fn udp_recv_length_raw(ctx: RawTracePointContext) -> i32 {
    let sk = Sock::new(ctx.arg(0));
    let protocol = sk.get(Field::Protocol);
    udp::receive::received(ctx.as_ptr(), sk, protocol, ctx.arg(1), ctx.arg(2));
    0
}

// ---- Iterators, which user space starts ---------------------------------------------------------
//
// aya-ebpf has no macro for them.

#[unsafe(link_section = "iter/task_file")]
#[unsafe(no_mangle)]
fn iter_files_tcp(ctx: *mut c_void) -> i32 {
    iter::file_of_tcp(Step::new(ctx))
}

#[unsafe(link_section = "iter/task_file")]
#[unsafe(no_mangle)]
fn iter_files_udp(ctx: *mut c_void) -> i32 {
    iter::file_of_udp(Step::new(ctx))
}

#[unsafe(link_section = "iter/tcp")]
#[unsafe(no_mangle)]
fn iter_tcp(ctx: *mut c_void) -> i32 {
    iter::tcp_socket(Step::new(ctx))
}

#[unsafe(link_section = "iter/udp")]
#[unsafe(no_mangle)]
fn iter_udp(ctx: *mut c_void) -> i32 {
    iter::udp_socket(Step::new(ctx))
}

// ---- Process trees, only if the filter has one --------------------------------------------------

#[raw_tracepoint(tracepoint = "sched_process_fork")]
fn tree_fork(ctx: RawTracePointContext) -> i32 {
    tree::process_forked(ctx.arg(0), ctx.arg(1));
    0
}

#[raw_tracepoint(tracepoint = "sched_process_free")]
fn tree_free(ctx: RawTracePointContext) -> i32 {
    tree::process_freed(ctx.arg(0));
    0
}

#[unsafe(link_section = "iter/task")]
#[unsafe(no_mangle)]
fn iter_tasks(ctx: *mut c_void) -> i32 {
    tree::add_existing(Step::new(ctx));
    iter::CONTINUE
}

// ---- Pids of another namespace, only if the filter names one ------------------------------------

#[unsafe(link_section = "iter/task")]
#[unsafe(no_mangle)]
fn iter_pids(ctx: *mut c_void) -> i32 {
    iter::pids(Step::new(ctx))
}

// ---- Programs that user space runs --------------------------------------------------------------
//
// These programs are attached to no hook. User space runs them by `BPF_PROG_TEST_RUN`, instead of
// reading and writing maps by system calls. During such a system call, the kernel skips every
// kprobe and classic tracepoint program on that CPU. On a preemptible kernel this lasts as long as
// the caller is preempted in it.
//
// <https://github.com/torvalds/linux/blob/v6.12/include/linux/bpf.h>

// aya-ebpf's macro for raw tracepoints always returns 0, so these programs do not use it.

/// Arms the wake-up before the reader sleeps. Returns how many records the buffer has refused so
/// far.
#[unsafe(link_section = "raw_tp")]
#[unsafe(no_mangle)]
fn arm_wakeup(_ctx: *mut c_void) -> i32 {
    query::arm_wakeup()
}

/// Returns how many eighths of the ring are full.
#[cfg(not(feature = "perf"))]
#[unsafe(link_section = "raw_tp")]
#[unsafe(no_mangle)]
fn ring_fill(_ctx: *mut c_void) -> i32 {
    emit::fill().cast_signed()
}

/// Changes or queries the filter.
#[unsafe(link_section = "raw_tp")]
#[unsafe(no_mangle)]
fn control_filter(ctx: *mut c_void) -> i32 {
    query::control_filter(&RawTracePointContext::new(ctx))
}

/// Reports the TCP socket at an address if it is gone, or without an address one whose address has
/// another socket.
#[unsafe(link_section = "raw_tp")]
#[unsafe(no_mangle)]
fn check_gone(ctx: *mut c_void) -> i32 {
    let args = RawTracePointContext::new(ctx);
    match args.arg(0) {
        0 => tcp::gone::report_replaced(ctx),
        sk => {
            tcp::gone::check(ctx, Sock::new(sk), args.arg(1));
            0
        }
    }
}

/// Returns the totals of a flow.
#[classifier]
fn query_flow(ctx: TcContext) -> i32 {
    query::query_flow(&ctx).unwrap_or(0)
}

const IPPROTO_UDP: u32 = 17;

/// Reads a field of a tracepoint's record, which the program may read directly.
#[inline(always)]
fn field<T: Copy>(ctx: &TracePointContext, offset: usize) -> T {
    // SAFETY: the verifier refuses the program unless `offset` is in the context of a tracepoint,
    // and attaching fails if the tracepoint's record is shorter. Volatile, because the verifier
    // refuses a single load of two fields.
    unsafe { ctx.as_ptr().byte_add(offset).cast::<T>().read_volatile() }
}

// The kernel lets only a program that states "GPL" call GPL-only helpers. The object is under MIT,
// Apache-2.0 or GPL-2.0, at the user's choice. This is the GPL.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
