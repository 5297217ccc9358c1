//! The sizes and the flags of the maps, and the maps that user space takes out of the eBPF object.

use std::io;

use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData, MapError},
};
use tcp_udp_trace_common::{ON_DEMAND, Tracked, Udp};

use crate::{
    config::{Config, LATE_SHARE},
    error::{Error, ErrorKind, ResultExt as _},
    event::Protocol,
    filter::Filter,
};

/// The ring is treated as this many equal parts. Filling one wakes the reader even if it is not
/// armed. The last part is reserved for lifecycle records.
pub(super) const SHARE: u32 = 8;

/// The smallest ring. The loader rounds it up to whole pages.
const MIN_RING_BYTES: u32 = 4096;

/// How many flows that the filter rejects are remembered, with and without a filter at the start.
/// The map evicts, so the kernel cannot allocate its entries on demand.
const UNWANTED: u32 = 16_384;
const UNWANTED_WITHOUT_FILTER: u32 = 2048;

/// `BPF_F_NO_PREALLOC`: the map allocates an entry when a program inserts it.
///
/// <https://github.com/torvalds/linux/blob/v6.12/include/uapi/linux/bpf.h>
const NO_PREALLOC: u32 = 1;

/// Returns the sizes of maps. The loader makes every map of the object. Those of the other protocol
/// are as small as possible.
pub(super) fn sizes(config: &Config, ring_bytes: u32, cpus: u32) -> Vec<(&'static str, u32)> {
    let unwanted = if config.filter == Filter::default() {
        UNWANTED_WITHOUT_FILTER
    } else {
        UNWANTED
    };
    let (used, unused): (&[_], &[_]) = match config.protocol {
        Protocol::Tcp => (
            &[("SOCKETS", config.max_sockets)],
            &[
                "UDP_SOCKETS",
                "FLOWS",
                "UNWANTED",
                "CONNECTING",
                "RECEIVING",
                "DOUBTS",
                "GIVEN",
            ],
        ),
        Protocol::Udp => (
            &[
                // Each CPU may assemble one more at the same time, and move it to another key.
                ("UDP_SOCKETS", config.max_sockets + 2 * cpus),
                ("FLOWS", config.max_flows + flows_on_their_way(ring_bytes)),
                ("UNWANTED", config.max_flows.min(unwanted)),
            ],
            &["SOCKETS", "ACCEPTING"],
        ),
    };
    let both = [
        ("LATE", (ring_bytes / LATE_SHARE).max(MIN_RING_BYTES)),
        // The programs log a line now and then.
        ("AYA_LOGS", MIN_RING_BYTES),
    ];
    let unused = unused.iter().map(|name| (*name, 1));
    used.iter().copied().chain(unused).chain(both).collect()
}

/// Returns how many flows may have begun that the reader does not know yet. Each of them has a
/// record in the buffer.
fn flows_on_their_way(ring_bytes: u32) -> u32 {
    const MOST: u32 = 16_384;
    (ring_bytes / size_of::<Udp>() as u32).min(MOST)
}

/// Returns an object whose maps that are marked by [`ON_DEMAND`] allocate their entries on demand,
/// or at the start. The loader has no setting for that.
pub(super) fn with_allocation(object: &[u8], on_demand: bool) -> Vec<u8> {
    let flags = if on_demand { NO_PREALLOC } else { 0 };
    let mut object = object.to_vec();
    // A definition is aligned in the object.
    for word in object.chunks_exact_mut(4) {
        if word == ON_DEMAND.to_le_bytes() {
            word.copy_from_slice(&flags.to_le_bytes());
        }
    }
    object
}

/// The TCP sockets that the programs remember.
#[derive(Debug)]
pub(crate) struct TcpSockets {
    map: HashMap<MapData, u64, [u8; size_of::<Tracked>()]>,
    most: usize,
}

impl TcpSockets {
    pub(super) fn open(ebpf: &mut Ebpf, most: u32) -> Result<Self, Error> {
        let map = take_map(ebpf, "SOCKETS", HashMap::try_from)?;
        let most = most as usize;
        Ok(Self { map, most })
    }

    /// Returns their addresses. If sockets end meanwhile, some may come twice and others not at
    /// all.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = io::Result<u64>> {
        let addresses = self.map.keys().take(self.most);
        addresses.map(|address| address.map_err(io::Error::other))
    }
}

/// Takes a map out of the object.
pub(super) fn take_map<M>(
    ebpf: &mut Ebpf,
    name: &str,
    convert: impl FnOnce(aya::maps::Map) -> Result<M, MapError>,
) -> Result<M, Error> {
    let missing = || {
        Error::new(
            ErrorKind::Load,
            format!("the eBPF object has no usable map {name}"),
        )
    };
    let map = ebpf.take_map(name).ok_or_else(missing)?;
    convert(map).map_err(|source| missing().with_source(source))
}

/// Sets a number that the programs read from a map of one entry.
pub(super) fn set_variable(ebpf: &mut Ebpf, name: &str, value: u32) -> Result<(), Error> {
    let mut map = take_map(ebpf, name, Array::<_, u32>::try_from)?;
    map.set(0, value, 0)
        .or_error(ErrorKind::Load, "cannot write to a map")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{WITH_PERF, WITH_RING};

    /// `BPF_MAP_TYPE_HASH`
    const HASH: u32 = 1;

    #[test]
    fn only_definitions_of_hash_maps_are_marked() {
        for object in [WITH_RING, WITH_PERF] {
            let words: Vec<_> = object
                .chunks_exact(4)
                .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
                .collect();
            let marked = words
                .iter()
                .enumerate()
                .filter(|(_, word)| **word == ON_DEMAND);
            // Type, key size, value size, entries and flags.
            let types: Vec<_> = marked.map(|(flags, _)| words[flags - 4]).collect();
            assert_eq!(types, [HASH; 5]);
            assert_eq!(with_allocation(object, true).len(), object.len());
        }
    }
}
