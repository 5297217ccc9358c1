//! Makes small BTF for aya. To load a program for a function or a tracepoint of the kernel, aya
//! needs only its id.
//!
//! aya would parse all of the kernel's BTF, which takes tens of milliseconds and megabytes, to find
//! one name. So it gets BTF in which the needed types have the same ids, and all other types have
//! no names.

use aya::{BtfError, Endianness};

use super::{Btf, MAGIC, VERSION, kind};

/// A type that aya looks up by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::kernel) struct Target {
    kind: u32,
    name: String,
}

impl Target {
    /// The type for an iterator's program.
    pub(in crate::kernel) fn iterator(name: &str) -> Self {
        Self {
            kind: kind::FUNC,
            name: format!("bpf_iter_{name}"),
        }
    }

    pub(in crate::kernel) fn tracepoint(name: &str) -> Self {
        Self {
            kind: kind::TYPEDEF,
            name: format!("btf_trace_{name}"),
        }
    }

    pub(in crate::kernel) fn function(name: &str) -> Self {
        Self {
            kind: kind::FUNC,
            name: name.into(),
        }
    }
}

/// Types of a kernel, each with its id.
pub(in crate::kernel) type Ids = Vec<(Target, u32)>;

/// Returns the targets that the kernel has.
pub(in crate::kernel) fn find(btf: &Btf<'_>, targets: impl IntoIterator<Item = Target>) -> Ids {
    let targets = targets.into_iter();
    targets
        .filter_map(|target| Some((btf.id(target.kind, &target.name)?, target)))
        .map(|(id, target)| (target, id))
        .collect()
}

/// Returns BTF with those of these targets that the kernel has. It has twelve bytes for each id up
/// to the highest one, which for a function is near the end of the kernel's BTF.
///
/// # Errors
///
/// aya does not accept the BTF, which would be a bug here.
pub(in crate::kernel) fn for_aya(ids: &Ids, targets: &[Target]) -> Result<aya::Btf, BtfError> {
    let mut strings = vec![0];
    let mut records = Vec::new();
    for (Target { kind, name }, id) in ids.iter().filter(|(target, _)| targets.contains(target)) {
        records.push((*id, *kind, strings.len() as u32));
        strings.extend(name.as_bytes());
        strings.push(0);
    }
    let last = records.iter().map(|(id, ..)| *id).max().unwrap_or(0);
    // The name, the kind, and a word that neither of the two kinds uses.
    let record = |name, kind: u32| [name, kind << 24, 0].map(u32::to_le_bytes).concat();
    let filler = record(0, kind::FWD);
    let types_len = last * filler.len() as u32;
    let header = [
        MAGIC | VERSION << 16,
        HEADER_LEN,
        0,
        types_len,
        types_len,
        strings.len() as u32,
    ];
    let len = HEADER_LEN as usize + types_len as usize + strings.len();
    let mut bytes = Vec::with_capacity(len);
    bytes.extend(header.into_iter().flat_map(u32::to_le_bytes));
    for _ in 0..last {
        bytes.extend(&filler);
    }
    for (id, kind, name) in records {
        // The first type has id 1.
        let at = HEADER_LEN as usize + (id as usize - 1) * filler.len();
        bytes[at..at + filler.len()].copy_from_slice(&record(name, kind));
    }
    bytes.extend(strings);
    aya::Btf::parse(&bytes, Endianness::Little)
}

const HEADER_LEN: u32 = 24;
