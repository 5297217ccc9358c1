//! Programs that user space runs.

use core::{
    intrinsics::{AtomicOrdering, atomic_xadd},
    mem::offset_of,
};

use aya_ebpf::{
    bindings::BPF_ANY,
    helpers::bpf_get_current_pid_tgid,
    programs::{RawTracePointContext, TcContext},
};
use tcp_udp_trace_common::{
    Field, FlowKey, FlowQuery, Traffic,
    filter::{self, Network, Value, membership, op, verdict},
    report,
};

use crate::{
    counters, emit,
    filter::{
        cgroup, find_cgroup,
        sets::{CURRENT, NETWORKS, NEXT, VALUES, has, index_of_argument, key, set, word},
        tree::{is_member, member},
    },
    netns,
    read::read,
    task,
    udp::{FLOWS, get, get_flow},
};

/// Arms the wake-up, and returns how many records the buffer has refused so far.
#[inline(always)]
pub(crate) fn arm_wakeup() -> i32 {
    emit::arm();
    counters::log();
    counters::lost_so_far().cast_signed()
}

/// Changes or queries the filter, see [`op`]. A negative result is an error, like the kernel's.
#[inline(always)]
pub(crate) fn control_filter(ctx: &RawTracePointContext) -> i32 {
    let operation = ctx.arg::<u64>(0);
    let (a, b, c) = (ctx.arg::<u64>(1), ctx.arg::<u64>(2), ctx.arg::<u64>(3));
    let value = Value {
        value: [a, b],
        tag: c,
    };
    let network = Network {
        head: a,
        address: [b, c],
    };
    match operation {
        op::SWITCH => set(CURRENT, a),
        op::PREPARE => {
            if a != 0 {
                set(index_of_argument(a), b);
            }
            set(NEXT, a)
        }
        op::ADD => result(VALUES.insert(value, 0, u64::from(BPF_ANY))),
        op::REMOVE => result(VALUES.remove(value)),
        op::CALLER => (bpf_get_current_pid_tgid() >> 32) as i32,
        op::LEVEL => match task::current_pid() {
            0 => -1,
            pid => read::<u32>(pid, Field::PidLevel) as i32,
        },
        op::ADD_NETWORK => add_network(&network, verdict::PASSES),
        op::EXCLUDE_NETWORK => add_network(&network, verdict::EXCLUDED),
        op::REMOVE_NETWORK => result(NETWORKS.remove(key(&network))),
        op::MEMBERSHIP => {
            let word = word(CURRENT);
            let is_in_tree = is_member(filter::generation(word), &member(a as u32, b));
            let is_own = has(word, filter::OWN, [a, 0]);
            i32::from(is_in_tree) * membership::TREE + i32::from(is_own) * membership::OWN
        }
        op::FIND_NETNS | op::GO_ON => netns::find(operation == op::FIND_NETNS, a),
        op::NETNS_COOKIE => netns::cookie(a),
        op::CGROUP_LEVEL => cgroup::level(a, b),
        op::IS_BELOW => i32::from(cgroup::is_known_below(word(CURRENT), a)),
        _ => -1,
    }
}

#[inline(always)]
fn add_network(network: &Network, verdict: u8) -> i32 {
    result(NETWORKS.insert(key(network), verdict, u64::from(BPF_ANY)))
}

#[inline(always)]
fn result(result: Result<(), i32>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(error) => error,
    }
}

/// Returns the totals of a flow in the packet, or 1 if the flow exists.
#[inline(always)]
pub(crate) fn query_flow(ctx: &TcContext) -> Result<i32, i64> {
    let key = ctx.load::<FlowKey>(offset_of!(FlowQuery, key))?;
    let forget = ctx.load::<u64>(offset_of!(FlowQuery, forget))?;
    let known = ctx.load::<Traffic>(offset_of!(FlowQuery, known))?;
    let Some(flow) = get_flow(&key) else {
        return Ok(0);
    };
    let report = &raw mut flow.report;
    let is_unchanged =
        flow.traffic.tx_packets == known.tx_packets && flow.traffic.rx_packets == known.rx_packets;
    // SAFETY: a valid pointer. The addition is atomic, so it precedes the reads below. A datagram
    // is counted before its program reads this field, and this field is written before the counts
    // are read again. So one of the two sees the other.
    unsafe {
        if forget != 0 {
            // The sum is neither of the two values that `flows` compares with.
            atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(report, report::REMOVED);
        } else if is_unchanged && report.read_volatile() == report::BY_USER_SPACE {
            // The sum is `NEXT_DATAGRAM`.
            atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(report, report::ARM);
        }
    }
    ctx.store(offset_of!(FlowQuery, traffic), &flow.traffic, 0)?;
    ctx.store(offset_of!(FlowQuery, local), &flow.local, 0)?;
    ctx.store(offset_of!(FlowQuery, approximate), &flow.approximate, 0)?;
    if let Some(tracked) = get(ctx.load(offset_of!(FlowQuery, socket))?) {
        ctx.store(offset_of!(FlowQuery, user), &tracked.user, 0)?;
        find_cgroup(tracked);
    }
    if forget != 0 {
        let _ = FLOWS.remove(key);
    }
    Ok(1)
}
