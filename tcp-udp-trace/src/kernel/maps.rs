//! The maps that user space takes out of the eBPF object.

use aya::{Ebpf, maps::MapError};

use crate::error::{Error, ErrorKind};

/// The ring is treated as this many equal parts. Filling one wakes the reader even if it is not
/// armed. The last part is reserved for lifecycle records.
pub(super) const SHARE: u32 = 8;

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
