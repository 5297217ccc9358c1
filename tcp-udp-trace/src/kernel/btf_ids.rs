//! The little of the kernel's BTF that aya needs to load a program which refers to a function of the kernel: that function's id.
//!
//! aya would parse all of it, for tens of milliseconds and megabytes, and then look for one name. So it is given BTF in which the same
//! functions have the same ids, and everything else has no name.

use aya::{BtfError, Endianness};

use super::btf::{Btf, MAGIC, VERSION, kind};

/// BTF with these functions, as far as the kernel has them.
///
/// # Errors
///
/// aya does not take it, which would be our mistake.
pub(super) fn of_functions(btf: &Btf<'_>, names: &[&str]) -> Result<aya::Btf, BtfError> {
    let mut strings = vec![0];
    let mut wanted = Vec::new();
    for name in names {
        if let Some(id) = btf.function(name) {
            wanted.push((id, strings.len() as u32));
            strings.extend(name.as_bytes());
            strings.push(0);
        }
    }
    let last = wanted.iter().map(|(id, _)| *id).max().unwrap_or(0);
    // The name, the kind, and what neither of the two kinds uses.
    let record = |name, kind: u32| [name, kind << 24, 0].map(u32::to_le_bytes).concat();
    let filler = record(0, kind::FWD);
    let mut types = filler.repeat(last as usize);
    for (id, name) in wanted {
        // The first type has id 1.
        let at = (id as usize - 1) * filler.len();
        types[at..at + filler.len()].copy_from_slice(&record(name, kind::FUNC));
    }
    let header = [
        MAGIC | VERSION << 16,
        24,
        0,
        types.len() as u32,
        types.len() as u32,
        strings.len() as u32,
    ];
    let mut bytes: Vec<u8> = header.into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.extend(types);
    bytes.extend(strings);
    aya::Btf::parse(&bytes, Endianness::Little)
}
