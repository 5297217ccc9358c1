//! The little of the kernel's BTF that aya needs to load a program which refers to a function of the kernel: that function's id.
//!
//! aya would parse all of it, for tens of milliseconds and megabytes, and then look for one name. So it is given BTF in which the same
//! functions have the same ids, and everything else has no name.

use aya::{BtfError, Endianness};

use super::btf::{Btf, MAGIC, VERSION, kind};

/// Names of functions, each with its id.
pub(super) type Functions = Vec<(String, u32)>;

/// Those of these functions that the kernel has.
pub(super) fn find(btf: &Btf<'_>, names: impl IntoIterator<Item = String>) -> Functions {
    let names = names.into_iter();
    names
        .filter_map(|name| btf.function(&name).map(|id| (name, id)))
        .collect()
}

/// BTF with these functions.
///
/// # Errors
///
/// aya does not take it, which would be our mistake.
pub(super) fn of_functions(functions: &Functions) -> Result<aya::Btf, BtfError> {
    let mut strings = vec![0];
    let mut wanted = Vec::new();
    for (name, id) in functions {
        wanted.push((*id, strings.len() as u32));
        strings.extend(name.as_bytes());
        strings.push(0);
    }
    let last = wanted.iter().map(|(id, _)| *id).max().unwrap_or(0);
    // The name, the kind, and what neither of the two kinds uses.
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
    for (id, name) in wanted {
        // The first type has id 1.
        let at = HEADER_LEN as usize + (id as usize - 1) * filler.len();
        bytes[at..at + filler.len()].copy_from_slice(&record(name, kind::FUNC));
    }
    bytes.extend(strings);
    aya::Btf::parse(&bytes, Endianness::Little)
}

const HEADER_LEN: u32 = 24;
