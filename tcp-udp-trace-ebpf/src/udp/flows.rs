//! Flows: the traffic of a UDP socket with one of its peers by one of its addresses. Decides when a
//! flow is reported.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{
    Global,
    bindings::BPF_NOEXIST,
    macros::map,
    maps::{HashMap, LruHashMap},
};
use tcp_udp_trace_common::{
    Flow, FlowKey, ON_DEMAND, Traffic, UdpTracked, approximate, kind, report, translated,
};

use super::{
    balancer,
    packet::{Packet, is_set},
    records::{Totals, record},
};
use crate::{
    counters,
    datagrams::{Datagrams, Direction},
    emit::Context,
    filter,
    read::now,
};

/// The flows that have been reported. User space removes them when their socket ends, and the least
/// recently used ones if there are too many. The map has additional room for flows that user space
/// does not know yet, because their records are on their way.
#[map]
pub(crate) static FLOWS: HashMap<FlowKey, Flow> = HashMap::with_max_entries(65_536, ON_DEMAND);

/// Flows that do not pass the filter. User space does not learn about them, so the map evicts.
#[map]
static UNWANTED: LruHashMap<FlowKey, Flow> = LruHashMap::with_max_entries(16_384, 0);

/// The time in nanoseconds after which a flow that did not pass the filter is checked again. User
/// space sets it.
#[unsafe(no_mangle)]
static INTERVAL: Global<u64> = Global::new(1_000_000_000);

/// Counts datagrams for their flow, and reports the flow if that is due.
#[inline(always)]
pub(super) fn count(
    ctx: Context,
    key: u64,
    tracked: &mut UdpTracked,
    datagrams: &mut Datagrams,
    packet: impl Packet,
) {
    let found = find(tracked, datagrams, packet);
    let found = match found {
        Some(flow) => Some((flow, false)),
        None => create(tracked, datagrams, packet),
    };
    let Some((flow, is_first)) = found else {
        return;
    };
    if is_set(&datagrams.flow.local) {
        datagrams.local.address = datagrams.flow.local;
    } else {
        reveal(flow, &datagrams.local.address);
    }
    if datagrams.direction == Direction::Received && tracked.approximate & approximate::READS != 0 {
        // Set before the datagrams are counted, so that a reader of the totals sees the mark, too.
        flow.approximate = 1;
    }
    add(&mut flow.traffic, datagrams);
    // SAFETY: a valid pointer into the map. Volatile, so that it is read after the datagrams are
    // counted.
    let next = unsafe { (&raw const flow.report).read_volatile() };
    // Most datagrams end here. To read the clock would take as long as to find the flow.
    if next == report::BY_USER_SPACE && !is_first {
        return;
    }
    if next != report::BY_USER_SPACE && next != report::NEXT_DATAGRAM {
        // The flow is being removed. Its last totals were read either before or after this datagram
        // was counted.
        unassigned(tracked);
        return;
    }
    if !is_first && packet.is_refused() {
        // The datagram will be subtracted. The next one is reported.
        return;
    }
    flow.report = report::BY_USER_SPACE;
    tracked.flows |= 1;
    datagrams.local.address = flow.local;
    let totals = Totals {
        traffic: &flow.traffic,
        approximate: flow.approximate != 0,
        first: is_first,
    };
    if !record(ctx, kind::FLOW, key, tracked, datagrams, totals, flow.born) {
        flow.report = report::NEXT_DATAGRAM;
        if is_first {
            // User space removes only flows that it knows.
            let key = &datagrams.flow;
            let _ = FLOWS.remove(key);
            unassigned(tracked);
        }
    }
}

/// Returns the flow that datagrams were counted for, and gives the datagrams the addresses that the
/// socket knows.
#[inline(always)]
pub(super) fn find_counted(
    tracked: &mut UdpTracked,
    datagrams: &mut Datagrams,
    packet: impl Packet,
) -> Option<&'static mut Flow> {
    find(tracked, datagrams, packet).or_else(|| get_unwanted(&datagrams.flow))
}

/// Returns the flow with this key.
#[inline(always)]
pub(super) fn get_counted(key: &FlowKey) -> Option<&'static mut Flow> {
    get_flow(key).or_else(|| get_unwanted(key))
}

/// Subtracts datagrams that were counted and not sent.
#[inline(always)]
pub(super) fn take_back(traffic: &mut Traffic, bytes: u64, packets: u64) {
    let (to_bytes, to_packets) = (&raw mut traffic.tx_bytes, &raw mut traffic.tx_packets);
    // SAFETY: as in `add`.
    unsafe {
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(to_bytes, bytes.wrapping_neg());
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(to_packets, packets.wrapping_neg());
    }
}

/// Returns the flow that datagrams belong to, and gives the datagrams the addresses that the socket
/// knows.
///
/// One lookup is enough unless netfilter translates the socket's packets. Then the translated
/// address of one peer may be the own address of another peer.
#[inline(always)]
fn find<P: Packet>(
    tracked: &mut UdpTracked,
    datagrams: &mut Datagrams,
    packet: P,
) -> Option<&'static mut Flow> {
    datagrams.flow.socket = FlowKey::socket(tracked.id, datagrams.local.port);
    if !P::MAY_BE_TRANSLATED {
        if tracked.translated & translated::BY_PROGRAM != 0 {
            balancer::undo(datagrams);
        }
        return get_flow(&datagrams.flow);
    }
    if datagrams.other_port == 0 && tracked.translated == 0 {
        let found = get_flow(&datagrams.flow);
        if found.is_some() {
            return found;
        }
    }
    if packet.undo_nat(datagrams) {
        tracked.translated |= translated::BY_NETFILTER;
        datagrams.flow.socket = FlowKey::socket(tracked.id, datagrams.local.port);
    } else if tracked.translated & translated::BY_PROGRAM != 0 {
        packet.undo_program(tracked.sk, datagrams);
    }
    get_flow(&datagrams.flow)
}

/// Notes the local address of a datagram, for a flow whose key has none.
#[inline(always)]
fn reveal(flow: &mut Flow, local: &[u32; 4]) {
    if !is_set(local) || flow.is_mixed != 0 || flow.local == *local {
        return;
    }
    if is_set(&flow.local) {
        flow.local = [0; 4];
        flow.is_mixed = 1;
    } else {
        flow.local = *local;
    }
}

/// Returns a new flow, and whether this call has created it. Returns `None` if the flow does not
/// pass the filter, or if there is no room for it.
#[inline(always)]
fn create<P: Packet>(
    tracked: &mut UdpTracked,
    datagrams: &mut Datagrams,
    packet: P,
) -> Option<(&'static mut Flow, bool)> {
    let mut unwanted = get_unwanted(&datagrams.flow);
    if unwanted.is_none() {
        if packet.is_refused() {
            return None;
        }
        // Only now, because to find the address that the application gave takes long.
        if P::MAY_BE_TRANSLATED
            && tracked.translated == 0
            && packet.undo_program(tracked.sk, datagrams)
        {
            tracked.translated |= translated::BY_PROGRAM;
            if let Some(flow) = get_flow(&datagrams.flow) {
                return Some((flow, false));
            }
            unwanted = get_unwanted(&datagrams.flow);
        }
    }
    let key = &datagrams.flow;
    let is_due = unwanted.as_ref().is_none_or(|flow| is_due(flow.report));
    let fresh = Flow {
        traffic: Traffic {
            tx_bytes: 0,
            rx_bytes: 0,
            tx_packets: 0,
            rx_packets: 0,
        },
        report: report::BY_USER_SPACE,
        born: now(),
        approximate: tracked.unassigned.into(),
        is_mixed: 0,
        local: datagrams.local.address,
    };
    if !is_due || !filter::passes_udp(kind::FLOW, tracked, datagrams) {
        let unwanted = match unwanted {
            Some(flow) => flow,
            None => {
                let _ = UNWANTED.insert(key, fresh, u64::from(BPF_NOEXIST));
                get_unwanted(key)?
            }
        };
        if is_due {
            unwanted.report = now();
        }
        add(&mut unwanted.traffic, datagrams);
        return None;
    }
    let start = match unwanted {
        Some(flow) => {
            flow.report = report::BY_USER_SPACE;
            &*flow
        }
        None => &fresh,
    };
    // If another CPU was first, that one reports.
    let is_first = FLOWS.insert(key, start, u64::from(BPF_NOEXIST)).is_ok();
    if is_first {
        let _ = UNWANTED.remove(key);
    }
    let flow = get_flow(key);
    if flow.is_none() {
        unassigned(tracked);
    }
    flow.map(|flow| (flow, is_first))
}

#[inline(always)]
pub(crate) fn get_flow(key: &FlowKey) -> Option<&'static mut Flow> {
    // SAFETY: the kernel keeps the memory of a removed entry until no program uses it. The totals
    // are added to atomically.
    FLOWS
        .get_ptr_mut(key)
        .and_then(|flow| unsafe { flow.as_mut() })
}

#[inline(always)]
fn get_unwanted(key: &FlowKey) -> Option<&'static mut Flow> {
    // SAFETY: the map is preallocated, so its memory stays. The totals are added to atomically.
    UNWANTED
        .get_ptr_mut(key)
        .and_then(|flow| unsafe { flow.as_mut() })
}

/// Counts a datagram that could not be added to a flow.
#[inline(always)]
fn unassigned(tracked: &mut UdpTracked) {
    tracked.unassigned = 1;
    counters::unassigned();
}

/// Returns whether a flow that did not pass the filter at this time is due to be checked again.
#[inline(always)]
fn is_due(report: u64) -> bool {
    now().wrapping_sub(report) >= INTERVAL.load()
}

#[inline(always)]
pub(super) fn add(traffic: &mut Traffic, datagrams: &Datagrams) {
    let (bytes, packets) = match datagrams.direction {
        Direction::Sent => (&raw mut traffic.tx_bytes, &raw mut traffic.tx_packets),
        Direction::Received => (&raw mut traffic.rx_bytes, &raw mut traffic.rx_packets),
    };
    // SAFETY: pointers into a map's value. The additions are atomic, because other CPUs also add to
    // them.
    unsafe {
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(bytes, datagrams.bytes);
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(packets, datagrams.packets);
    }
}
