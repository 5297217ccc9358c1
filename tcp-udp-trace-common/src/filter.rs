//! A filter in the form that the programs use: a word, which is replaced as a whole, and sets of
//! values, which carry the word's generation.
//!
//! The word is 0 if every event passes, so a tracer without a filter checks only the word.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Returns the bit that excludes events of this [kind](crate::kind).
#[must_use]
pub const fn no_kind(kind: u32) -> u64 {
    1 << kind
}

/// Returns the bit that excludes this TCP state.
#[must_use]
pub const fn no_state(state: u8) -> u64 {
    1 << (16 + state)
}

/// Excludes all TCP states.
pub const STATES: u64 = 0xffff << 16;
/// Excludes IPv4.
pub const NO_IPV4: u64 = 1 << 32;
/// Excludes IPv6.
pub const NO_IPV6: u64 = 1 << 33;
/// The owner must be a process in the set [`PID`], or a member of a tree.
pub const PROCESS: u64 = 1 << 34;
/// The owner must not be in the set [`OWN`].
pub const NOT_OWN: u64 = 1 << 35;
/// The owner's name must be in the set [`COMM`].
pub const COMMS: u64 = 1 << 36;
/// The socket's user must be in the set [`UID`].
pub const UIDS: u64 = 1 << 37;
/// The cgroup must be in the set [`CGROUP`], or below one in the set [`CGROUP_ROOT`].
pub const CGROUPS: u64 = 1 << 38;
/// The network namespace must be in the set [`NETNS`].
pub const NAMESPACES: u64 = 1 << 39;
/// At least one of the ports must be in the set [`PORT`].
pub const PORTS: u64 = 1 << 40;
/// The smallest network of the local side ([`Network`]) that has the local address must be one that
/// passes.
pub const LOCAL: u64 = 1 << 41;
/// The same for the remote address and the remote side.
pub const REMOTE: u64 = 1 << 42;
/// The socket must be chosen by its id ([`is_chosen`]).
pub const ONE_IN: u64 = 1 << 43;
/// The directions of TCP that pass. If none of these bits is set, there is no restriction.
pub const DIRECTIONS: u64 = 7 << 45;

/// Returns the one of [`DIRECTIONS`] for this [direction](crate::direction); 0 for an unknown one.
#[must_use]
#[inline(always)]
pub const fn direction(direction: u8) -> u64 {
    DIRECTIONS & 1 << (44 + (direction & 3))
}

/// Returns whether a socket with this id is chosen. The ids are hashed, and the hash must be at
/// most `last`.
#[must_use]
#[inline(always)]
pub const fn is_chosen(id: u64, last: u32) -> bool {
    // The finalizer of MurmurHash3.
    let id = (id ^ (id >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let id = (id ^ (id >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    (id >> 32) as u32 <= last
}

/// Returns the value of `last` that chooses one of so many sockets, at least 1.
#[must_use]
pub const fn last_of(one_in: u32) -> u32 {
    match one_in {
        0 | 1 => u32::MAX,
        one_in => u32::MAX / one_in,
    }
}

/// Returns the numbers of a filter that have no room in its word: `last` of [`is_chosen`] in the
/// lower half, and in the upper half the levels of the cgroups in the set [`CGROUP_ROOT`]. Each
/// level is increased by 1.
#[must_use]
pub fn argument(last: u32, levels: impl IntoIterator<Item = u8>) -> u64 {
    let levels = levels.into_iter().take(TREE_LEVELS as usize);
    let levels = levels.fold(0, |all, level| {
        all << TREE_LEVEL_BITS | (u64::from(level) + 1)
    });
    u64::from(last) | levels << u32::BITS
}

/// The maximum number of levels that the trees of cgroups in a filter may begin at.
pub const TREE_LEVELS: u32 = 4;
/// The number of bits of a level in [`argument`].
pub const TREE_LEVEL_BITS: u32 = u32::BITS / TREE_LEVELS;
/// The maximum level of a cgroup that a tree may begin at.
pub const MAX_TREE_LEVEL: u8 = u8::MAX - 1;

/// Returns the generation, which distinguishes the values of one filter from those of another. It
/// is never 0.
#[must_use]
pub const fn generation(word: u64) -> u16 {
    (word >> 48) as u16
}

/// Returns a word of this generation.
#[must_use]
pub const fn of_generation(generation: u16) -> u64 {
    (generation as u64) << 48
}

/// A set, in [`Value::tag`]: process ids.
pub const PID: u16 = 0;
/// Process ids that are the roots of trees.
pub const ROOT: u16 = 1;
/// The tracing process itself.
pub const OWN: u16 = 2;
/// Names of processes, all 16 bytes.
pub const COMM: u16 = 3;
/// User ids.
pub const UID: u16 = 4;
/// Ids of cgroups.
pub const CGROUP: u16 = 5;
/// Network namespaces: the inode, and the cookie.
pub const NETNS: u16 = 6;
/// Ports.
pub const PORT: u16 = 7;
/// Ids of cgroups that are the roots of trees.
pub const CGROUP_ROOT: u16 = 8;

// The following types are keys of maps. They consist of whole words. If a program writes a word in
// pieces, the verifier assumes that the previous contents still matter, and verifies the same code
// again and again.

/// A value that passes the filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Value {
    /// The value. A value shorter than two words is in the first one.
    pub value: [u64; 2],
    /// The filter's generation, and the set.
    pub tag: u64,
}

impl Value {
    /// Returns a value in a set of a filter.
    #[must_use]
    #[inline(always)]
    pub const fn new(generation: u16, set: u16, value: [u64; 2]) -> Self {
        Self {
            value,
            tag: generation as u64 | (set as u64) << 16,
        }
    }
}

/// A network, as the key of a trie. The value is one of [`verdict`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Network {
    /// In the lower half, how many of the following bits count. In the upper half, the generation,
    /// the side (0 for the local address, 1 for the remote one), and the family.
    pub head: u64,
    /// The address, network byte order. An IPv4 address is in the first half of the first word.
    pub address: [u64; 2],
}

impl Network {
    /// Returns the network whose addresses share this number of bits, or a single address.
    #[must_use]
    #[inline(always)]
    pub const fn new(generation: u16, side: u8, family: u16, bits: u32, address: [u64; 2]) -> Self {
        let (side, family) = (side as u64, family as u64);
        Self {
            head: (NETWORK_HEAD_BITS + bits) as u64
                | (generation as u64) << 32
                | side << 48
                | family << 56,
            address,
        }
    }
}

/// Whether addresses of a [`Network`] pass the filter.
pub mod verdict {
    /// They pass.
    pub const PASSES: u8 = 0;
    /// They do not pass.
    pub const EXCLUDED: u8 = 1;
}

/// The maximum number of values, and of networks, in a filter.
pub const MAX_VALUES: u32 = 512;
/// The maximum number of networks that are added to those of a filter: where a filter only excludes
/// networks, all others pass; and loopback addresses.
pub const MORE_NETWORKS: u32 = 8;
/// The maximum number of processes in the trees of a filter at a time.
pub const MAX_TREE_MEMBERS: u32 = 4096;

/// How many bits of a [`Network`] precede its address.
pub const NETWORK_HEAD_BITS: u32 = 32;

/// A member of a process tree: a process, identified uniquely.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TreeMember {
    /// The time when the process was created: `CLOCK_BOOTTIME`, nanoseconds.
    pub started: u64,
    /// Process id (`tgid`).
    pub pid: u64,
}

/// The operations on a filter: the first argument of `control_filter`.
pub mod op {
    /// Replace the current filter's word by this one.
    pub const SWITCH: u64 = 0;
    /// Prepare a filter of this generation, and with this [`argument`](super::argument).
    pub const PREPARE: u64 = 1;
    /// Add a value, passed as its words.
    pub const ADD: u64 = 2;
    /// Remove a value.
    pub const REMOVE: u64 = 3;
    /// Return the pid of the calling process in the initial pid namespace.
    pub const CALLER: u64 = 4;
    /// Add a network that passes, passed as its words.
    pub const ADD_NETWORK: u64 = 5;
    /// Remove a network.
    pub const REMOVE_NETWORK: u64 = 6;
    /// Return the bits of [`membership`](super::membership) of a process, passed as its pid and its
    /// start time.
    pub const MEMBERSHIP: u64 = 7;
    /// Return the level of the calling process's pid namespace: 0 for the initial one.
    pub const LEVEL: u64 = 8;
    /// Search for the network namespace that has this inode now. Returns one of
    /// [`netns`](super::netns).
    pub const FIND_NETNS: u64 = 9;
    /// Continue the search for this inode, which has paused. Returns the same as [`FIND_NETNS`].
    pub const GO_ON: u64 = 10;
    /// Return [`netns::COOKIE_BITS`](super::netns::COOKIE_BITS) bits of the cookie of the namespace
    /// that was found, from this bit on.
    pub const NETNS_COOKIE: u64 = 11;
    /// Add a network that is excluded, passed as its words.
    pub const EXCLUDE_NETWORK: u64 = 12;
    /// Return the level of a cgroup, passed as a descriptor of its folder and its id.
    pub const CGROUP_LEVEL: u64 = 13;
    /// Return whether a cgroup is known to be below one of the current filter's trees.
    pub const IS_BELOW: u64 = 14;
}

/// Returns the bytes that the iterator of pids writes for a process: its pid in the reader's pid
/// namespace, and its pid in the initial one (`tgid`).
#[must_use]
pub const fn numbers(here: u32, initial: u32) -> [u8; 8] {
    (here as u64 | (initial as u64) << 32).to_ne_bytes()
}

/// Reverses [`numbers`].
#[must_use]
pub const fn from_numbers(bytes: [u8; 8]) -> (u32, u32) {
    let word = u64::from_ne_bytes(bytes);
    (word as u32, (word >> 32) as u32)
}

/// Results of the search for the network namespace that has an inode.
pub mod netns {
    /// No network namespace has the inode.
    pub const NONE: i32 = 0;
    /// A network namespace has it.
    pub const FOUND: i32 = 1;
    /// The program has checked as many namespaces as it may in one run.
    pub const PAUSED: i32 = 2;
    /// The kernel's structures are not the expected ones: `EOPNOTSUPP`.
    pub const UNKNOWN: i32 = -95;
    /// How many bits of a cookie are returned at a time. A negative result would be an error.
    pub const COOKIE_BITS: u32 = 31;
}

/// The relation of a process to a filter.
pub mod membership {
    /// The process is a member of one of the filter's trees.
    pub const TREE: i32 = 1;
    /// The process is the tracing process itself.
    pub const OWN: i32 = 2;
}
