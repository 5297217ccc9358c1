//! The search for the network namespace that has an inode now.
//!
//! The kernel links all network namespaces of the machine. User space alone does not find those of
//! other pid and mount namespaces, nor those that only a descriptor or a socket keeps alive.
//!
//! <https://github.com/torvalds/linux/blob/v6.12/include/net/net_namespace.h>

use aya_ebpf::{macros::map, maps::Array};
use tcp_udp_trace_common::{Field, filter::netns};

use crate::read::{current_task, has, offset, read};

/// How many namespaces one run checks. The verifier processes each iteration of the loop.
const STEPS: u32 = 32;

/// The state of the search. User space runs one search at a time.
#[map]
static SEARCH: Array<Search> = Array::with_max_entries(1, 0);

#[derive(Clone, Copy)]
#[repr(C)]
struct Search {
    /// The address of the `struct net` at which the next run begins.
    next: u64,
    /// The cookie of the namespace that was found, 0 if the kernel has none.
    cookie: u64,
}

#[inline(always)]
fn search() -> Option<&'static mut Search> {
    // SAFETY: a valid pointer to the map's value, which no other program uses.
    SEARCH
        .get_ptr_mut(0)
        .and_then(|search| unsafe { search.as_mut() })
}

/// Begins or continues the search for an inode. Returns one of [`netns`].
///
/// The program runs in an RCU read-side critical section, which keeps the namespaces in memory. The
/// namespace at which the next run begins may be freed between two runs. Its memory then holds
/// another namespace, or is not mistaken for one.
#[inline(always)]
pub(crate) fn find(begins: bool, inode: u64) -> i32 {
    let namespaces = read::<u64>(current_task(), Field::Namespaces);
    let own = read::<u64>(namespaces, Field::NamespacesNet);
    let Some(search) = search() else {
        return netns::UNKNOWN;
    };
    if own == 0 || !has(Field::NetNext) || !has(Field::NetInode) {
        return netns::UNKNOWN;
    }
    let operations = read::<u64>(own, Field::NetOps);
    let mut net = if begins { own } else { search.next };
    for _ in 0..STEPS {
        // The head of the list is not a namespace. It lacks the operations that all namespaces
        // have.
        let is_other = read::<u64>(net, Field::NetOps) ^ operations;
        if (is_other | (u64::from(read::<u32>(net, Field::NetInode)) ^ inode)) == 0 {
            search.cookie = read(net, Field::NetCookie);
            return netns::FOUND;
        }
        net = read::<u64>(net, Field::NetNext).wrapping_sub(u64::from(offset(Field::NetNext)));
        if net == own {
            return netns::NONE;
        }
    }
    search.next = net;
    netns::PAUSED
}

/// Returns some bits of the cookie of the namespace that was found.
#[inline(always)]
pub(crate) fn cookie(from: u64) -> i32 {
    let cookie = search().map_or(0, |search| search.cookie);
    ((cookie >> (from & 63)) & ((1 << netns::COOKIE_BITS) - 1)) as i32
}
