//! A filter as the programs have it: a word, which is swapped as a whole, and sets of values, which carry its generation.
//!
//! The word is 0 if everything is wanted, so that a tracer without a filter asks one thing only.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Events of this [kind](crate::kind) are not wanted.
#[must_use]
pub const fn no_kind(kind: u32) -> u64 {
    1 << kind
}

/// This TCP state is not wanted.
#[must_use]
pub const fn no_state(state: u8) -> u64 {
    1 << (16 + state)
}

/// Any state at all is not wanted.
pub const STATES: u64 = 0xffff << 16;
/// IPv4 is not wanted.
pub const NO_IPV4: u64 = 1 << 32;
/// IPv6 is not wanted.
pub const NO_IPV6: u64 = 1 << 33;
/// The owner must be a process in the set [`PID`], or of a tree.
pub const PROCESS: u64 = 1 << 34;
/// The owner must not be in the set [`OWN`].
pub const NOT_OWN: u64 = 1 << 35;
/// The owner's name must be in the set [`COMM`].
pub const COMMS: u64 = 1 << 36;
/// The socket's user must be in the set [`UID`].
pub const UIDS: u64 = 1 << 37;
/// The cgroup must be in the set [`CGROUP`].
pub const CGROUPS: u64 = 1 << 38;
/// The network namespace must be in the set [`NETNS`].
pub const NAMESPACES: u64 = 1 << 39;
/// One of the ports must be in the set [`PORT`].
pub const PORTS: u64 = 1 << 40;
/// The local address must be in one of the networks of this side ([`Network`]).
pub const LOCAL: u64 = 1 << 41;
/// The remote address must be in one of the networks of this side ([`Network`]).
pub const REMOTE: u64 = 1 << 42;

/// What tells one filter's values from another's; never 0.
#[must_use]
pub const fn generation(word: u64) -> u16 {
    (word >> 48) as u16
}

/// A word of this generation.
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

// What follows are keys of maps. They are whole words: of a word that is written in pieces, the verifier believes that what was there
// before still matters, and so takes the same code for different again and again.

/// A value that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Value {
    /// The value; what is shorter is in the first word.
    pub value: [u64; 2],
    /// The filter's generation, and the set.
    pub tag: u64,
}

impl Value {
    /// A value in a set of a filter.
    #[must_use]
    #[inline(always)]
    pub const fn new(generation: u16, set: u16, value: [u64; 2]) -> Self {
        Self {
            value,
            tag: generation as u64 | (set as u64) << 16,
        }
    }
}

/// A network that is wanted, as the key of a trie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Network {
    /// How many bits count of what follows, in the lower half; in the upper one the generation, the side (0 for the local address, 1 for the
    /// remote one), and the family.
    pub head: u64,
    /// The address, network byte order; IPv4 in the first half of the first word.
    pub address: [u64; 2],
}

impl Network {
    /// The network of which so many bits of an address count, or one address.
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

/// How many values, and how many networks, a filter may have.
pub const MAX_VALUES: u32 = 512;
/// How many processes may be in the trees of a filter at a time.
pub const MAX_TREE_MEMBERS: u32 = 4096;

/// How many bits of a [`Network`] stand before its address.
pub const NETWORK_HEAD_BITS: u32 = 32;

/// A process, named for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TreeMember {
    /// When it was made: `CLOCK_BOOTTIME`, nanoseconds.
    pub started: u64,
    /// Process id (`tgid`).
    pub pid: u64,
}

/// What user space tells the programs about a filter, as the first argument of `control_filter`.
pub mod op {
    /// The filter is this word from now on.
    pub const SWITCH: u64 = 0;
    /// A filter of this generation is being prepared.
    pub const PREPARE: u64 = 1;
    /// Add a value: its words.
    pub const ADD: u64 = 2;
    /// Remove a value.
    pub const REMOVE: u64 = 3;
    /// The answer is the pid of the calling process, as the programs know it.
    pub const CALLER: u64 = 4;
    /// Add a network: its words.
    pub const ADD_NETWORK: u64 = 5;
    /// Remove a network.
    pub const REMOVE_NETWORK: u64 = 6;
    /// What is this process to the filter? pid, start; the answer has the bits of [`membership`](super::membership).
    pub const MEMBERSHIP: u64 = 7;
    /// The answer is the level of the calling process's pid namespace: 0 for the initial one.
    pub const LEVEL: u64 = 8;
    /// Look for the network namespace that has this inode now. The answer is one of
    /// [`netns`](super::netns).
    pub const FIND_NETNS: u64 = 9;
    /// Go on with the search for this inode, which has paused. The answer is as before.
    pub const GO_ON: u64 = 10;
    /// The answer is [`netns::COOKIE_BITS`](super::netns::COOKIE_BITS) bits of the cookie of the
    /// namespace that was found, from this bit on.
    pub const NETNS_COOKIE: u64 = 11;
}

/// The two numbers of a process, as the iterator that translates them writes them: the one in the
/// reader's pid namespace, and the one in the initial pid namespace (`tgid`).
#[must_use]
pub const fn numbers(here: u32, initial: u32) -> [u8; 8] {
    (here as u64 | (initial as u64) << 32).to_ne_bytes()
}

/// The inverse of [`numbers`].
#[must_use]
pub const fn from_numbers(bytes: [u8; 8]) -> (u32, u32) {
    let word = u64::from_ne_bytes(bytes);
    (word as u32, (word >> 32) as u32)
}

/// The answers about the network namespace that has an inode.
pub mod netns {
    /// No network namespace has it.
    pub const NONE: i32 = 0;
    /// One has it.
    pub const FOUND: i32 = 1;
    /// The program has looked at as many namespaces as it may at a time.
    pub const PAUSED: i32 = 2;
    /// The kernel's structures are not the known ones: `EOPNOTSUPP`.
    pub const UNKNOWN: i32 = -95;
    /// How many bits of a cookie are told at a time: a negative answer is an error.
    pub const COOKIE_BITS: u32 = 31;
}

/// What a process is to a filter.
pub mod membership {
    /// It is in one of its trees.
    pub const TREE: i32 = 1;
    /// It is the tracing process itself.
    pub const OWN: i32 = 2;
}
