//! The filter as user space has set it.

use core::ptr;

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{Array, HashMap, LpmTrie, lpm_trie::Key},
};
use tcp_udp_trace_common::{
    Peer,
    filter::{self, Network, Value},
};

/// The filter's word, and one that is being prepared: of that, only the generation counts.
#[map]
static FILTER: Array<u64> = Array::with_max_entries(2, 0);

pub(crate) const CURRENT: u32 = 0;

pub(crate) const NEXT: u32 = 1;

/// The sets.
#[map]
pub(crate) static VALUES: HashMap<Value, u8> = HashMap::with_max_entries(2 * filter::MAX_VALUES, 0);

/// The networks.
#[map]
pub(crate) static NETWORKS: LpmTrie<[u32; 5], u8> =
    LpmTrie::with_max_entries(2 * filter::MAX_VALUES, BPF_F_NO_PREALLOC);

#[inline(always)]
pub(crate) fn word(of: u32) -> u64 {
    FILTER.get(of).copied().unwrap_or(0)
}

#[inline(always)]
pub(super) fn current() -> u64 {
    word(CURRENT)
}

#[inline(always)]
pub(crate) fn set(which: u32, word: u64) -> i32 {
    let Some(place) = FILTER.get_ptr_mut(which) else {
        return -1;
    };
    // SAFETY: a valid pointer to the map's value; an aligned word is written as a whole.
    unsafe { place.write_volatile(word) };
    0
}

#[inline(always)]
pub(crate) fn has(word: u64, set: u16, value: [u64; 2]) -> bool {
    let value = Value::new(filter::generation(word), set, value);
    VALUES.get_ptr(value).is_some()
}

#[inline(always)]
pub(super) fn is_in_network(word: u64, side: u8, end: &Peer) -> bool {
    let [a, b, c, d] = end.address.map(u64::from);
    let generation = filter::generation(word);
    let address = Network::new(
        generation,
        side,
        end.family,
        128,
        [a | b << 32, c | d << 32],
    );
    NETWORKS.get(key(&address)).is_some()
}

#[inline(always)]
pub(crate) fn key(network: &Network) -> &Key<[u32; 5]> {
    const { assert!(size_of::<Network>() == size_of::<Key<[u32; 5]>>()) };
    // SAFETY: both are plain integers, of one size, and the latter needs no alignment. A network begins with what it calls the length.
    unsafe { &*ptr::from_ref(network).cast() }
}
