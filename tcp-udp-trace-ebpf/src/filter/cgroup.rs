//! The cgroups that a filter names, and those below them.

use aya_ebpf::{Global, bindings::BPF_ANY, macros::map, maps::LruHashMap};
use tcp_udp_trace_common::{
    Field,
    filter::{self, TREE_LEVEL_BITS, TREE_LEVELS, Value},
};

use super::sets::{VALUES, argument, has};
use crate::{
    read::{has as has_field, offset, read, read_at},
    sock::{Sock, Socket as _, cgroup_id, file_of_descriptor},
};

/// Cgroups that were found below one of the filter's trees. A socket of such a cgroup needs no
/// further search, and user space can query a cgroup by its id alone.
#[map]
static BELOW: LruHashMap<Value, u8> = LruHashMap::with_max_entries(1024, 0);

/// Not 0 if [`Field::Ancestors`] are ids rather than pointers, as before Linux 6.1. User space sets
/// it.
///
/// <https://github.com/torvalds/linux/blob/v5.10/include/linux/cgroup-defs.h>
#[unsafe(no_mangle)]
static ANCESTOR_IDS: Global<u8> = Global::new(0);

/// Returns whether a socket's cgroup is one of the filter's, or below one of its trees.
// Not inlined: the function is in the program once, and its stack does not add to that of the
// other comparisons.
#[inline(never)]
pub(super) fn matches(word: u64, sk: u64, id: u64) -> bool {
    if id == 0 {
        return false;
    }
    let key = Value::new(filter::generation(word), filter::CGROUP, [id, 0]);
    if VALUES.get_ptr(&key).is_some() {
        return true;
    }
    let levels = argument(word) >> u32::BITS;
    if levels == 0 {
        return false;
    }
    if BELOW.get_ptr(&key).is_some() {
        return true;
    }
    let cgroup = Sock::new(sk).get::<u64>(Field::Cgroup);
    // The memory may be that of another socket by now.
    let is_below = cgroup_id(cgroup) == id && is_below(word, levels, cgroup);
    if is_below {
        let _ = BELOW.insert(&key, 0, u64::from(BPF_ANY));
    }
    is_below
}

/// Returns whether the cgroup at this address, or one of its ancestors, is the root of one of the
/// filter's trees.
///
/// The kernel stores the ancestors of a cgroup by their levels. A tree's root has one level, so
/// there is one ancestor to compare.
#[inline(always)]
fn is_below(word: u64, levels: u64, cgroup: u64) -> bool {
    let own_level = read::<u32>(cgroup, Field::CgroupLevel);
    let ancestors = cgroup + u64::from(offset(Field::Ancestors));
    let mut levels = levels;
    for _ in 0..TREE_LEVELS {
        // Plus 1. 0 ends the list.
        let level = levels & ((1 << TREE_LEVEL_BITS) - 1);
        if level == 0 {
            break;
        }
        if level <= u64::from(own_level) + 1 {
            let ancestor = read_at::<u64>(ancestors + (level - 1) * 8);
            let id = if ANCESTOR_IDS.load() != 0 {
                ancestor
            } else {
                cgroup_id(ancestor)
            };
            if has(word, filter::CGROUP_ROOT, [id, 0]) {
                return true;
            }
        }
        levels >>= TREE_LEVEL_BITS;
    }
    false
}

/// Returns whether a cgroup was found below one of the trees of the filter with this word.
#[inline(always)]
pub(crate) fn is_known_below(word: u64, id: u64) -> bool {
    let key = Value::new(filter::generation(word), filter::CGROUP, [id, 0]);
    BELOW.get_ptr(&key).is_some()
}

/// Returns the level of the cgroup with this id whose folder the current process has open as this
/// descriptor, or a negative number if it is not known. The root has level 0.
#[inline(always)]
pub(crate) fn level(fd: u64, id: u64) -> i32 {
    if !has_field(Field::Ancestors) || !has_field(Field::CgroupLevel) {
        return -EOPNOTSUPP;
    }
    let Some(file) = file_of_descriptor(fd as i64) else {
        return -EBADF;
    };
    let inode = read::<u64>(read(file, Field::FileDentry), Field::DentryInode);
    let node = read::<u64>(inode, Field::InodePrivate);
    let cgroup = read::<u64>(node, Field::KernfsPrivate);
    if cgroup == 0 || cgroup_id(cgroup) != id {
        return -EOPNOTSUPP;
    }
    read::<u32>(cgroup, Field::CgroupLevel).cast_signed()
}

const EBADF: i32 = 9;
const EOPNOTSUPP: i32 = 95;
