//! The filter as user space has set it: a word, and the sets of values that the word refers to.

use core::ptr;

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{Array, HashMap, LpmTrie, lpm_trie::Key},
};
use tcp_udp_trace_common::{
    ON_DEMAND, Peer,
    filter::{self, Network, Value, verdict},
};

/// The word of the current filter, and the word of the next one, of which only the generation is
/// set. Then the [`argument`] of the current filter, and the one of the next or the previous
/// filter.
#[map]
static FILTER: Array<u64> = Array::with_max_entries(4, 0);

pub(crate) const CURRENT: u32 = 0;

pub(crate) const NEXT: u32 = 1;

/// Returns the index of the [`argument`] of a filter. Of two filters in a row, one has an odd
/// generation.
#[inline(always)]
pub(crate) fn index_of_argument(word: u64) -> u32 {
    2 + u32::from(filter::generation(word) & 1)
}

/// The values of the sets.
#[map]
pub(crate) static VALUES: HashMap<Value, u8> =
    HashMap::with_max_entries(2 * filter::MAX_VALUES, ON_DEMAND);

/// The networks of the filter.
#[map]
pub(crate) static NETWORKS: LpmTrie<[u32; 5], u8> = LpmTrie::with_max_entries(
    2 * (filter::MAX_VALUES + filter::MORE_NETWORKS),
    BPF_F_NO_PREALLOC,
);

#[inline(always)]
pub(crate) fn word(of: u32) -> u64 {
    FILTER.get(of).copied().unwrap_or(0)
}

/// Returns the numbers of a filter that have no room in its word, see [`filter::argument`].
#[inline(always)]
pub(super) fn argument(of: u64) -> u64 {
    word(index_of_argument(of))
}

#[inline(always)]
pub(super) fn current() -> u64 {
    word(CURRENT)
}

#[inline(always)]
pub(crate) fn set(which: u32, word: u64) -> i32 {
    let Some(slot) = FILTER.get_ptr_mut(which) else {
        return -1;
    };
    // SAFETY: a valid pointer to the map's value. An aligned word is written as a whole.
    unsafe { slot.write_volatile(word) };
    0
}

#[inline(always)]
pub(crate) fn has(word: u64, set: u16, value: [u64; 2]) -> bool {
    let value = Value::new(filter::generation(word), set, value);
    VALUES.get_ptr(value).is_some()
}

/// Returns whether the filter lets this address pass.
#[inline(always)]
pub(super) fn passes_networks(word: u64, side: u8, end: &Peer) -> bool {
    let [a, b, c, d] = end.address.map(u64::from);
    let generation = filter::generation(word);
    let address = Network::new(
        generation,
        side,
        end.family,
        128,
        [a | b << 32, c | d << 32],
    );
    NETWORKS.get(key(&address)) == Some(&verdict::PASSES)
}

#[inline(always)]
pub(crate) fn key(network: &Network) -> &Key<[u32; 5]> {
    const { assert!(size_of::<Network>() == size_of::<Key<[u32; 5]>>()) };
    // SAFETY: both types are plain integers of the same size, and the key needs no alignment. The
    // first 32 bits of a network are the key's prefix length.
    unsafe { &*ptr::from_ref(network).cast() }
}
