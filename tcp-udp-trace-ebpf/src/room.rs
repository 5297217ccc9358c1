//! Which sockets find room in the map of sockets, so that no user can take all of it.
//!
//! The last eighth of the map is for users with less than a 64th of the sockets. Users are
//! identified by a hash of the user id, so two users may be counted as one.

use aya_ebpf::{Global, macros::map, maps::Array};
use core::intrinsics::{AtomicOrdering, atomic_xadd};

use crate::counters;

/// How many sockets the map can hold. User space sets it.
#[unsafe(no_mangle)]
static MAX_SOCKETS: Global<u32> = Global::new(65_536);

const USER_BITS: u32 = 12;

/// The number of all sockets in the map, and the number for each slot of users.
#[map]
static SOCKET_COUNTS: Array<u32> = Array::with_max_entries(1 + (1 << USER_BITS), 0);
const ALL: u32 = 0;

/// Returns whether there is room for another socket of the user. Counts the socket if not.
#[inline(always)]
pub(crate) fn is_left(user: u32) -> bool {
    let max = MAX_SOCKETS.load();
    let is_left = count(ALL) < max - max / 8 || count(slot(user)) < max / 64;
    if !is_left {
        counters::untracked();
    }
    is_left
}

/// Counts a socket of the user that was put into the map.
#[inline(always)]
pub(crate) fn take(user: u32) {
    add(ALL, 1);
    add(slot(user), 1);
}

/// Counts a socket of the user that was removed from the map.
#[inline(always)]
pub(crate) fn give_back(user: u32) {
    add(ALL, u32::MAX);
    add(slot(user), u32::MAX);
}

/// Returns the slot of a user in [`SOCKET_COUNTS`].
#[inline(always)]
const fn slot(user: u32) -> u32 {
    // Spreads ids that are multiples of a power of two, such as those of containers.
    1 + (user.wrapping_mul(0x9e37_79b1) >> (32 - USER_BITS))
}

#[inline(always)]
fn count(slot: u32) -> u32 {
    SOCKET_COUNTS.get(slot).copied().unwrap_or(0)
}

#[inline(always)]
fn add(slot: u32, sockets: u32) {
    if let Some(count) = SOCKET_COUNTS.get_ptr_mut(slot) {
        // SAFETY: a valid pointer to the map's value. The addition is atomic, because other CPUs
        // also count.
        unsafe { atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(count, sockets) };
    }
}
