//! Decides which events are reported. The decision comes before the record, so an event that does
//! not pass takes no room in the ring.

pub(crate) mod cgroup;
pub(crate) mod sets;
pub(crate) mod tree;

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{Global, macros::map, maps::PerCpuArray};
use tcp_udp_trace_common::{
    AF_INET, Field, Owner, Peer, Tracked, UdpTracked, filter, kind, origin,
};

use self::{
    sets::{argument, current, has, passes_networks},
    tree::{is_member, member},
};
use crate::{
    datagrams::Datagrams,
    owner,
    sock::{
        Sock, Socket as _,
        tcp_state::{CLOSE, SYN_SENT},
    },
};

/// The parts of a filter that depend on the ends of a connection.
const ENDS: u64 =
    filter::NO_IPV4 | filter::NO_IPV6 | filter::PORTS | filter::LOCAL | filter::REMOTE;

/// How many events of each kind did not pass.
#[map]
static REJECTED: PerCpuArray<u64> = PerCpuArray::with_max_entries(kind::COUNT as u32, 0);

/// Not 0 if the ends of TCP connections are the only events. User space sets it.
#[unsafe(no_mangle)]
static ONLY_ENDS: Global<u8> = Global::new(0);

/// Returns whether the ends of TCP connections are the only events.
#[inline(always)]
pub(crate) fn only_ends() -> bool {
    ONLY_ENDS.load() != 0
}

/// Returns whether an event of TCP passes the filter. `states` has the bits of the event's states.
#[inline(always)]
pub(crate) fn passes_tcp(kind: u32, states: u64, sk: Sock, tracked: &mut Tracked) -> bool {
    decide(kind, |word| {
        states & !word != 0
            && tracked.rejected_by != filter::generation(word)
            && (matches_cgroup(word, sk, tracked.cgroup) || reject(word, tracked))
            && matches_tcp(word, sk.0, tracked)
    })
}

/// Returns whether a failed `connect` between these ends (local, remote) passes the filter. Its
/// socket is in the state `CLOSE`.
#[inline(always)]
pub(crate) fn passes_connect(sk: Sock, tracked: &mut Tracked, ends: &(Peer, Peer)) -> bool {
    decide(kind::CONNECT_FAILED_TCP, |word| {
        filter::no_state(CLOSE) & !word != 0
            && matches_cgroup(word, sk, tracked.cgroup)
            && matches_connect(word, sk.0, tracked, ends)
    })
}

/// Returns whether an event of UDP passes the filter.
#[inline(always)]
pub(crate) fn passes_udp(kind: u32, tracked: &mut UdpTracked, at: &Datagrams) -> bool {
    if kind == kind::CLOSE && tracked.has_flows() {
        find_cgroup(tracked);
        return true;
    }
    decide(kind, |word| {
        matches_cgroup(word, Sock::new(tracked.sk), tracked.cgroup)
            && matches_udp(word, tracked, at)
    })
}

/// Finds out whether the cgroup of a socket is below one of the filter's trees, so that user space
/// can query it for an event that it produces itself.
#[inline(always)]
pub(crate) fn find_cgroup(tracked: &UdpTracked) {
    let word = current();
    if word != 0 {
        matches_cgroup(word, Sock::new(tracked.sk), tracked.cgroup);
    }
}

/// Returns whether an event passes the filter, and counts the event if not.
///
/// User space may replace the filter meanwhile, and remove the values of the old one from the sets.
/// A negative result therefore counts only if the word is still the same. Otherwise the event
/// passes: to evaluate the new filter would double the verifier's work at each start.
#[inline(always)]
fn decide(kind: u32, matches: impl FnOnce(u64) -> bool) -> bool {
    let word = current();
    if word == 0 || word & filter::no_kind(kind) == 0 && matches(word) {
        return true;
    }
    current() != word || count(kind)
}

#[inline(always)]
fn count(kind: u32) -> bool {
    if let Some(count) = REJECTED.get_ptr_mut(kind) {
        // SAFETY: a valid pointer to this CPU's value. The addition is atomic, because another
        // program may interrupt this one.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(count, 1) };
    }
    false
}

#[inline(always)]
fn matches_cgroup(word: u64, sk: Sock, id: u64) -> bool {
    word & filter::CGROUPS == 0 || cgroup::matches(word, sk.0, id)
}

// Not inlined: the function is in the program once, and without a filter it costs only the
// verifier's work.
#[inline(never)]
fn matches_tcp(word: u64, sk: u64, tracked: &mut Tracked) -> bool {
    let sk = Sock::new(sk);
    if word & ENDS != 0 {
        let (local, remote) = sk.ends();
        if !matches_ends(word, &local, &remote) {
            // The kernel chooses the port of a socket that connects after the change of its state.
            let have_ports = local.port != 0 && tracked.state != SYN_SENT;
            return have_ports && reject(word, tracked);
        }
    }
    (matches_life(word, tracked) || reject(word, tracked)) && matches_users(word, sk, tracked)
}

/// Remembers that no event of the socket passes this filter, and returns false.
#[inline(always)]
fn reject(word: u64, tracked: &mut Tracked) -> bool {
    tracked.rejected_by = filter::generation(word);
    false
}

#[inline(never)]
fn matches_connect(word: u64, sk: u64, tracked: &mut Tracked, ends: &(Peer, Peer)) -> bool {
    matches_life(word, tracked)
        && matches_users(word, Sock::new(sk), tracked)
        && matches_ends(word, &ends.0, &ends.1)
}

/// Returns whether a TCP socket matches the filter by properties that it keeps for life.
#[inline(always)]
fn matches_life(word: u64, tracked: &Tracked) -> bool {
    let directions = word & filter::DIRECTIONS;
    (directions == 0 || directions & filter::direction(tracked.direction()) != 0)
        && matches_netns(word, [tracked.netns.into(), tracked.netns_cookie])
        && is_chosen(word, tracked.id)
}

/// Returns whether a TCP socket matches the filter by its owner and its user id.
#[inline(always)]
fn matches_users(word: u64, sk: Sock, tracked: &mut Tracked) -> bool {
    let owner: *const Owner = owner::of_socket(tracked);
    // SAFETY: a pointer into `tracked`. The owner does not overlap the field that is written here.
    let owner = unsafe { &*owner };
    matches_owner(word, owner, &mut tracked.tree_generation) && matches_uid(word, sk)
}

#[inline(never)]
fn matches_udp(word: u64, tracked: &mut UdpTracked, at: &Datagrams) -> bool {
    let UdpTracked {
        sk,
        id,
        netns_cookie,
        netns,
        owner,
        tree_generation,
        ..
    } = tracked;
    // The arguments are assembled late, because values kept from before would take too much stack.
    matches_owner(word, owner, tree_generation)
        && matches_netns(word, [(*netns).into(), *netns_cookie])
        && matches_uid(word, Sock::new(*sk))
        && matches_ends(word, &at.local, &at.flow.peer)
        && is_chosen(word, *id)
}

#[inline(always)]
fn is_chosen(of: u64, id: u64) -> bool {
    of & filter::ONE_IN == 0 || filter::is_chosen(id, argument(of) as u32)
}

#[inline(always)]
fn matches_owner(word: u64, owner: &Owner, tree_generation: &mut u16) -> bool {
    let pid = [u64::from(owner.pid), 0];
    if word & filter::NOT_OWN != 0 && has(word, filter::OWN, pid) {
        return false;
    }
    if word & filter::PROCESS != 0 && !has(word, filter::PID, pid) {
        let generation = filter::generation(word);
        if *tree_generation != generation {
            if owner.origin == origin::NONE
                || !is_member(generation, &member(owner.pid, owner.started))
            {
                return false;
            }
            *tree_generation = generation;
        }
    }
    word & filter::COMMS == 0 || has(word, filter::COMM, name(owner.comm))
}

/// Returns a name without the bytes after its NUL, where the kernel leaves the rest of a longer
/// name.
#[inline(always)]
fn name([first, second]: [u64; 2]) -> [u64; 2] {
    const EACH: u64 = 0x0101_0101_0101_0101;
    // Sets the highest bit of the first byte that is 0, and perhaps of some bytes after it.
    let zeros = |word: u64| word.wrapping_sub(EACH) & !word & (EACH << 7);
    // Keeps the bytes before that byte, or all bytes if there is none.
    let before_zero = |word: u64| {
        let zeros = zeros(word);
        word & ((zeros & zeros.wrapping_neg()) >> 7).wrapping_sub(1)
    };
    let [first, second] = [first, second].map(u64::from_le);
    let rest = if zeros(first) == 0 {
        before_zero(second)
    } else {
        0
    };
    [before_zero(first), rest].map(u64::to_le)
}

#[inline(always)]
fn matches_netns(word: u64, netns: [u64; 2]) -> bool {
    word & filter::NAMESPACES == 0 || has(word, filter::NETNS, netns)
}

#[inline(always)]
fn matches_uid(word: u64, sk: Sock) -> bool {
    word & filter::UIDS == 0 || has(word, filter::UID, [sk.get::<u32>(Field::SkUid).into(), 0])
}

#[inline(always)]
fn matches_ends(word: u64, local: &Peer, remote: &Peer) -> bool {
    let unwanted = if local.family == AF_INET {
        filter::NO_IPV4
    } else {
        filter::NO_IPV6
    };
    if word & unwanted != 0 {
        return false;
    }
    let port = |end: &Peer| has(word, filter::PORT, [u64::from(end.port), 0]);
    if word & filter::PORTS != 0 && !port(local) && !port(remote) {
        return false;
    }
    (word & filter::LOCAL == 0 || passes_networks(word, 0, local))
        && (word & filter::REMOTE == 0 || passes_networks(word, 1, remote))
}
