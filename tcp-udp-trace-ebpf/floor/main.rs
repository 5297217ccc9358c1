//! The baseline of the benchmarks: programs on the same hooks that do hardly anything.
//! `cargo xtask bench` runs them beside the library's programs, to separate the cost of a hook, of
//! the ring and of a map from the cost of our code. The library does not contain them.
#![no_std]
#![no_main]
#![allow(
    internal_features,
    reason = "atomic additions without a result are the only atomics that Linux 5.10 has"
)]
#![feature(core_intrinsics)]

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{
    EbpfContext as _, Global,
    bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::{
        bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_ktime_get_boot_ns,
        bpf_probe_read_kernel, generated::bpf_get_socket_cookie,
    },
    macros::{cgroup_skb, map, raw_tracepoint},
    maps::{Array, HashMap, RingBuf},
    programs::{RawTracePointContext, SkBuffContext},
};

/// A record of 128 bytes, the agreed size of the baseline.
#[repr(C)]
struct Record {
    time: u64,
    pid_tgid: u64,
    sk: u64,
    old: i32,
    new: i32,
    comm: [u8; 16],
    /// The beginning of `struct sock`: addresses, ports, family, state.
    common: [u64; 3],
    rest: [u64; 7],
}
const _: () = assert!(size_of::<Record>() == 128);

#[map]
static RECORDS: RingBuf = RingBuf::with_byte_size(2 << 20, 0);

/// The records that the ring refused.
#[map]
static LOST: Array<u64> = Array::with_max_entries(1, 0);

#[map]
static TOTALS: HashMap<u64, [u64; 2]> = HashMap::with_max_entries(65_536, 0);

/// The binary logarithm of an eighth of the ring's size in bytes, as in the library's programs.
#[unsafe(no_mangle)]
static WAKE_SHIFT: Global<u32> = Global::new(18);

#[raw_tracepoint(tracepoint = "inet_sock_set_state")]
fn tcp_empty(_ctx: RawTracePointContext) -> i32 {
    0
}

/// Writes a record for each event. The record wakes the reader each time that another eighth of the
/// ring is full.
#[raw_tracepoint(tracepoint = "inet_sock_set_state")]
fn tcp_record(ctx: RawTracePointContext) -> i32 {
    let before = RECORDS.query(u64::from(BPF_RB_AVAIL_DATA));
    let Some(mut entry) = RECORDS.reserve::<Record>(0) else {
        if let Some(lost) = LOST.get_ptr_mut(0) {
            add(lost, 1);
        }
        return 0;
    };
    let sk: u64 = ctx.arg(0);
    entry.write(Record {
        // SAFETY: the helper takes no argument and cannot fail.
        time: unsafe { bpf_ktime_get_boot_ns() },
        pid_tgid: bpf_get_current_pid_tgid(),
        sk,
        old: ctx.arg(1),
        new: ctx.arg(2),
        comm: bpf_get_current_comm().unwrap_or_default(),
        // SAFETY: the helper reads kernel memory or fails.
        common: unsafe { bpf_probe_read_kernel(sk as *const [u64; 3]) }.unwrap_or_default(),
        rest: [0; 7],
    });
    let after = before + size_of::<Record>() as u64;
    let shift = WAKE_SHIFT.load();
    let wake = if after >> shift == before >> shift {
        BPF_RB_NO_WAKEUP
    } else {
        BPF_RB_FORCE_WAKEUP
    };
    entry.submit(u64::from(wake));
    0
}

#[cgroup_skb(egress)]
fn udp_empty(_ctx: SkBuffContext) -> i32 {
    1
}

/// Looks a socket up in a hash map, and adds to two numbers.
#[cgroup_skb(egress)]
fn udp_count(ctx: SkBuffContext) -> i32 {
    count(&ctx)
}

/// Does the same for the socket that receives.
#[cgroup_skb(ingress)]
fn udp_count_in(ctx: SkBuffContext) -> i32 {
    count(&ctx)
}

#[inline(always)]
fn count(ctx: &SkBuffContext) -> i32 {
    // SAFETY: the context is an skb with a socket.
    let key = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    match TOTALS.get_ptr_mut(key) {
        Some(totals) => {
            let count = totals.cast::<u64>();
            add(count, 1);
            add(count.wrapping_add(1), ctx.len().into());
        }
        None => {
            let _ = TOTALS.insert(key, [1, ctx.len().into()], 0);
        }
    }
    1
}

fn add(to: *mut u64, count: u64) {
    // SAFETY: a pointer into a map's value.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(to, count) };
}

// For the helpers that the kernel offers only to GPL programs. Under MIT, Apache-2.0 or GPL-2.0,
// like the other object.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
