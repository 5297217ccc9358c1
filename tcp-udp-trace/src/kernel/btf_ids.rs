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
    let types: Vec<u8> = (1..=last)
        .flat_map(|id| {
            let name = wanted.iter().find(|(wanted, _)| *wanted == id);
            // The name, the kind, and what neither of the two kinds uses.
            match name {
                Some((_, name)) => [*name, kind::FUNC << 24, 0],
                None => [0, kind::FWD << 24, 0],
            }
        })
        .flat_map(u32::to_le_bytes)
        .collect();
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
