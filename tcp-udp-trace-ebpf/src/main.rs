//! The eBPF programs of tcp-udp-trace.
//!
//! One way through: a hook (this file) finds the socket; [`tcp`] decides what happened to it, with what
//! [`track`] remembers; [`emit`] writes the record into the ring. [`sock`] reads the kernel's structures,
//! [`owner`] the current task's.
//!
//! The kernel's own functions need no loops and no more than 512 bytes of stack here; records are built in
//! the ring's memory.
#![no_std]
#![no_main]
#![allow(
    internal_features,
    reason = "atomic additions without a result are the only atomics that Linux 5.10 has"
)]
#![feature(core_intrinsics)]

mod accept;
mod anomaly;
mod emit;
mod owner;
mod sock;
mod tcp;
mod track;

use aya_ebpf::{
    EbpfContext as _,
    macros::{btf_tracepoint, fentry, kprobe, raw_tracepoint, tracepoint},
    programs::{
        BtfTracePointContext, FEntryContext, ProbeContext, RawTracePointContext, TracePointContext,
    },
};

use crate::{sock::Sock, tcp::Program};

// ---- signal `state`: inet_sock_set_state(sk, old, new) ------------------------------------------------------
//
// Two programs hear each transition, because the kernel skips a program that is already active on the CPU
// (a softirq, or on preemptible kernels another task, interrupted it). Whichever comes first reports it.

#[raw_tracepoint(tracepoint = "inet_sock_set_state")]
fn tcp_state_raw(ctx: RawTracePointContext) -> i32 {
    tcp::changed(
        Program::First,
        Sock::new(ctx.arg(0)),
        ctx.arg(1),
        ctx.arg(2),
    );
    0
}

#[tracepoint]
fn tcp_state_tp(ctx: TracePointContext) -> u32 {
    // Layout: events/sock/inet_sock_set_state/format, the same on every kernel since 4.16.
    let sk = field::<u64>(&ctx, 8);
    let (old, new) = (field::<i32>(&ctx, 16), field::<i32>(&ctx, 20));
    tcp::changed(Program::Second, Sock::new(sk), old, new);
    0
}

#[btf_tracepoint(function = "inet_sock_set_state")]
fn tcp_state_btf(ctx: BtfTracePointContext) -> i32 {
    tcp::changed(
        Program::Second,
        Sock::new(ctx.arg(0)),
        ctx.arg(1),
        ctx.arg(2),
    );
    0
}

// ---- signal `end`: tcp_destroy_sock(sk) ---------------------------------------------------------------------

#[raw_tracepoint(tracepoint = "tcp_destroy_sock")]
fn tcp_end_raw(ctx: RawTracePointContext) -> i32 {
    tcp::ended(Sock::new(ctx.arg(0)));
    anomaly::tell();
    0
}

#[tracepoint]
fn tcp_end_tp(ctx: TracePointContext) -> u32 {
    tcp::ended(Sock::new(field(&ctx, 8)));
    0
}

// ---- signal `accept` ----------------------------------------------------------------------------------------

/// `security_sock_graft(sk, parent)`: the last step of every accept, in the accepting task.
#[kprobe]
fn accept_kprobe(ctx: ProbeContext) -> u32 {
    accept::accepted(Sock::new(ctx.arg(0).unwrap_or(0)));
    0
}

#[fentry(function = "security_sock_graft")]
fn accept_fentry(ctx: FEntryContext) -> i32 {
    accept::accepted(Sock::new(ctx.arg(0)));
    0
}

/// `syscalls:sys_exit_accept` and `sys_exit_accept4`: the result is the new socket's descriptor.
#[tracepoint]
fn accept_exit(ctx: TracePointContext) -> u32 {
    accept::accepted_as(field(&ctx, 16));
    0
}

/// `sys_exit(regs, ret)`, of every system call.
#[raw_tracepoint(tracepoint = "sys_exit")]
fn accept_sys_exit(ctx: RawTracePointContext) -> i32 {
    accept::returned(ctx.arg(0), ctx.arg(1));
    0
}

/// `io_uring:io_uring_complete(ctx, req, user_data, res, …)`: an accept by io_uring makes no system call.
#[tracepoint]
fn accept_uring(ctx: TracePointContext) -> u32 {
    accept::completed(field(&ctx, 16), field::<i32>(&ctx, 32));
    0
}

/// Reads a field of a tracepoint's record, which the program may read directly.
#[inline(always)]
fn field<T: Copy>(ctx: &TracePointContext, offset: usize) -> T {
    // SAFETY: the verifier refuses the program unless `offset` lies in the context of a tracepoint, and
    // attaching fails if the tracepoint's record is shorter.
    unsafe { ctx.as_ptr().byte_add(offset).cast::<T>().read() }
}

// The kernel calls licence-protected helpers only for a program that says "GPL". The object is under
// MIT, Apache-2.0 or GPL-2.0, at the user's choice: this is the GPL.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
