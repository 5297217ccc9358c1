//! Reads the kernel's BTF and says where a field of a struct is.
//!
//! BTF is the kernel's description of its own types, in `/sys/kernel/btf/vmlinux` (4 to 6 MB). We
//! resolve field offsets here, in user space, and hand them to the eBPF programs as read-only
//! globals: CO-RE without C.
//!
//! Why our own: aya-obj reads BTF too but exposes neither members nor their offsets, and btf-rs is
//! LGPL. The format is documented in the kernel's
//! [`Documentation/bpf/btf.rst`](https://docs.kernel.org/bpf/btf.html) and declared in
//! `include/uapi/linux/btf.h`.
//!
//! [`Btf::parse`] walks the types once and notes where each begins and which can be asked for by
//! name; a lookup compares names along one such list. No name is hashed or copied, because only a
//! few dozen of the hundred thousand are ever asked for.
//!
//! Whatever the bytes, the answer is an error or `None`: no panic and no unbounded work. Left out:
//! the BTF of modules, which continues the ids of `vmlinux`, and big-endian kernels.

pub(in crate::kernel) mod ids;
pub(in crate::kernel) mod offsets;

use thiserror::Error;

/// `BTF_KIND_*`.
pub(in crate::kernel) mod kind {
    pub(in crate::kernel) const INT: u32 = 1;
    pub(in crate::kernel) const PTR: u32 = 2;
    pub(in crate::kernel) const ARRAY: u32 = 3;
    pub(in crate::kernel) const STRUCT: u32 = 4;
    pub(in crate::kernel) const UNION: u32 = 5;
    pub(in crate::kernel) const ENUM: u32 = 6;
    pub(in crate::kernel) const FWD: u32 = 7;
    pub(in crate::kernel) const TYPEDEF: u32 = 8;
    pub(in crate::kernel) const VOLATILE: u32 = 9;
    pub(in crate::kernel) const CONST: u32 = 10;
    pub(in crate::kernel) const RESTRICT: u32 = 11;
    pub(in crate::kernel) const FUNC: u32 = 12;
    pub(in crate::kernel) const FUNC_PROTO: u32 = 13;
    pub(in crate::kernel) const VAR: u32 = 14;
    pub(in crate::kernel) const DATASEC: u32 = 15;
    pub(in crate::kernel) const FLOAT: u32 = 16;
    pub(in crate::kernel) const DECL_TAG: u32 = 17;
    pub(in crate::kernel) const TYPE_TAG: u32 = 18;
    pub(in crate::kernel) const ENUM64: u32 = 19;
}

/// Why the bytes are not BTF that we can read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum BtfError {
    #[error("BTF of {len} bytes is shorter than its header of {HEADER_LEN} bytes")]
    TooShort { len: usize },
    #[error("BTF is big-endian; only that of little-endian kernels can be read")]
    BigEndian,
    #[error("not BTF: magic number {magic:#06x} instead of {MAGIC:#06x}")]
    Magic { magic: u32 },
    #[error("BTF has version {version}, only version {VERSION} can be read")]
    Version { version: u32 },
    #[error("BTF header claims a length of {header} bytes in {len} bytes of data")]
    HeaderLength { header: u32, len: usize },
    #[error("{name} section (offset {offset}, length {len}) reaches past the end of the BTF")]
    Section {
        name: &'static str,
        offset: u32,
        len: u32,
    },
    #[error("string section does not begin and end with a NUL byte")]
    Strings,
    #[error("type section ends inside type {id}")]
    Truncated { id: usize },
    #[error("type {id} is of unknown kind {kind}; the kernel may be newer than this reader")]
    UnknownKind { id: usize, kind: u32 },
}

/// Where a field is in its struct.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Field {
    /// Bytes from the beginning of the path's first struct.
    pub(crate) offset: u32,
    /// Size in bytes.
    pub(crate) size: u32,
}

/// BTF, indexed.
pub(crate) struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Where each type begins in `types`. Id 1 is the first; 0 is `void`, which is not there.
    offsets: Vec<u32>,
    /// Structs and unions, but for the anonymous ones.
    aggregates: Vec<Named>,
}

impl<'a> Btf<'a> {
    /// Checks the header and indexes the types.
    ///
    /// # Errors
    ///
    /// The bytes are not the whole BTF of a little-endian kernel, or a type is of a kind newer than
    /// this reader: its length is unknown, so what follows cannot be found.
    pub(crate) fn parse(data: &'a [u8]) -> Result<Self, BtfError> {
        let len = data.len();
        let [preamble, header, type_off, type_len, str_off, str_len] =
            words(data).ok_or(BtfError::TooShort { len })?;
        match preamble & 0xffff {
            MAGIC => {}
            MAGIC_BIG_ENDIAN => return Err(BtfError::BigEndian),
            magic => return Err(BtfError::Magic { magic }),
        }
        let version = (preamble >> 16) & 0xff;
        if version != VERSION {
            return Err(BtfError::Version { version });
        }
        let body = data
            .get(header as usize..)
            .filter(|_| header >= HEADER_LEN)
            .ok_or(BtfError::HeaderLength { header, len })?;
        let types = section(body, "type", type_off, type_len)?;
        let strings = section(body, "string", str_off, str_len)?;
        if strings.first() != Some(&0) || strings.last() != Some(&0) {
            return Err(BtfError::Strings);
        }
        let mut btf = Self {
            types,
            strings,
            // A type takes at least 12 bytes, 25 on average.
            offsets: Vec::with_capacity(types.len() / 24),
            aggregates: Vec::new(),
        };
        btf.index()?;
        Ok(btf)
    }

    /// The place of a field, by the name of a struct (or union) and those of the members down to
    /// the field: `sock.__sk_common.skc_family`.
    ///
    /// As in C, members of anonymous structs and unions are named as if they were their parent's.
    /// Typedefs and qualifiers are looked through; pointers are not followed. Of several structs of
    /// that name the first that has the field counts. A bitfield has a place only if it begins and
    /// ends at the boundary of a byte.
    pub(crate) fn field(&self, path: &str) -> Option<Field> {
        let (name, members) = path.split_once('.')?;
        let mut budget = MAX_MEMBERS;
        self.named(&self.aggregates, name)
            .find_map(|aggregate| self.walk(aggregate, members, &mut budget))
    }

    /// The size in bytes of a struct or union. Of several of that name, the first counts.
    pub(crate) fn size_of(&self, name: &str) -> Option<u32> {
        let ty = self.named(&self.aggregates, name).next()?;
        self.size(ty)
    }

    /// The id of the type of that kind and name.
    pub(crate) fn id(&self, kind: u32, name: &str) -> Option<u32> {
        let is_it = |offset: &u32| {
            let header = self.types.get(*offset as usize..).and_then(words);
            header.is_some_and(|[string, info]| {
                (info >> 24) & 0x7f == kind && self.is_name(string, name)
            })
        };
        let index = self.offsets.iter().position(is_it)?;
        // Id 0 is `void`.
        u32::try_from(index + 1).ok()
    }

    /// The number of an enumerator of an enum.
    pub(crate) fn enumerator(&self, name: &str, enumerator: &str) -> Option<u32> {
        let ty = self.by_id(self.id(kind::ENUM, name)?)?;
        let mut all = records(ty.extra);
        all.find_map(|[string, value]| self.is_name(string, enumerator).then_some(value))
    }

    fn index(&mut self) -> Result<(), BtfError> {
        let mut offset = 0;
        while (offset as usize) < self.types.len() {
            let ty = Type::read(self.types, offset, self.offsets.len() + 1)?;
            let name = ty.name;
            if matches!(ty.kind, kind::STRUCT | kind::UNION) && name != 0 {
                self.aggregates.push(Named { name, offset });
            }
            self.offsets.push(offset);
            // No overflow: the type is inside the section, and the section's length is a `u32`.
            offset += ty.len;
        }
        Ok(())
    }

    /// The types of a list that have that name.
    fn named(&self, list: &[Named], name: &str) -> impl Iterator<Item = Type<'a>> {
        list.iter()
            .filter(|named| self.is_name(named.name, name))
            .filter_map(|named| Type::read(self.types, named.offset, 0).ok())
    }

    fn by_id(&self, id: u32) -> Option<Type<'a>> {
        let index = (id as usize).checked_sub(1)?;
        Type::read(self.types, *self.offsets.get(index)?, 0).ok()
    }

    /// The type behind typedefs and qualifiers.
    fn resolve(&self, mut id: u32) -> Option<Type<'a>> {
        for _ in 0..MAX_CHAIN {
            let ty = self.by_id(id)?;
            match ty.kind {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = ty.size_or_type;
                }
                _ => return Some(ty),
            }
        }
        None
    }

    fn is_name(&self, offset: u32, name: &str) -> bool {
        self.strings
            .get(offset as usize..)
            .and_then(|string| string.strip_prefix(name.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    }

    /// Follows the names of members from a struct down to a field.
    fn walk(&self, ty: Type<'a>, members: &str, budget: &mut usize) -> Option<Field> {
        let (bit, width) = (0, 0);
        let mut place = Place { ty, bit, width };
        for name in members.split('.') {
            place = self.member(place, name, budget)?;
        }
        self.bytes(place)
    }

    /// Finds a member in a struct or union, or in the anonymous ones inside it. Of an array, it is one of the first element.
    fn member(&self, mut parent: Place<'a>, name: &str, budget: &mut usize) -> Option<Place<'a>> {
        if name.is_empty() {
            return None;
        }
        if parent.ty.kind == kind::ARRAY {
            let [element, _, _] = words(parent.ty.extra)?;
            parent.ty = self.resolve(element)?;
        }
        let mut open = vec![parent];
        while let Some(parent) = open.pop() {
            if !matches!(parent.ty.kind, kind::STRUCT | kind::UNION) {
                continue;
            }
            for [member, ty, offset] in records(parent.ty.extra) {
                *budget = budget.checked_sub(1)?;
                let named = self.is_name(member, name);
                if !named && member != 0 {
                    continue;
                }
                // With the flag, the upper 8 bits are the width of a bitfield, or 0.
                let (offset, width) = if parent.ty.flag {
                    (offset & 0x00ff_ffff, offset >> 24)
                } else {
                    (offset, 0)
                };
                let bit = parent.bit.checked_add(offset)?;
                let ty = self.resolve(ty)?;
                let place = Place { ty, bit, width };
                if named {
                    return Some(place);
                }
                open.push(place);
            }
        }
        None
    }

    /// Offset and size, if they are whole bytes.
    fn bytes(&self, Place { ty, bit, width }: Place<'a>) -> Option<Field> {
        let (bit, size) = if width != 0 {
            (bit, whole_bytes(width)?)
        } else if ty.kind == kind::INT {
            // BTF without the flag describes a bitfield by an integer narrower than its size.
            let [encoding] = words(ty.extra)?;
            let bit = bit.checked_add((encoding >> 16) & 0xff)?;
            (bit, whole_bytes(encoding & 0xff)?)
        } else {
            (bit, self.size(ty)?)
        };
        let offset = whole_bytes(bit)?;
        Some(Field { offset, size })
    }

    fn size(&self, mut ty: Type<'a>) -> Option<u32> {
        let mut count = 1_u32;
        for _ in 0..MAX_CHAIN {
            let size = match ty.kind {
                kind::ARRAY => {
                    let [element, _, len] = words(ty.extra)?;
                    count = count.checked_mul(len)?;
                    ty = self.resolve(element)?;
                    continue;
                }
                kind::PTR => POINTER_SIZE,
                kind::INT | kind::FLOAT | kind::STRUCT..=kind::ENUM | kind::ENUM64 => {
                    ty.size_or_type
                }
                _ => return None,
            };
            return count.checked_mul(size);
        }
        None
    }
}

/// A type that can be asked for by name.
#[derive(Debug, Clone, Copy)]
struct Named {
    /// Offset of the name in the string section.
    name: u32,
    /// Offset in the type section.
    offset: u32,
}

/// Where a lookup is: a member and its type, typedefs and qualifiers looked through.
#[derive(Debug, Clone, Copy)]
struct Place<'a> {
    ty: Type<'a>,
    /// Bits from the beginning of the path's first struct.
    bit: u32,
    /// Width in bits of a bitfield, else 0.
    width: u32,
}

/// `struct btf_type` and what belongs to it.
#[derive(Debug, Clone, Copy)]
struct Type<'a> {
    name: u32,
    kind: u32,
    /// An aggregate's members have bitfield widths; an enum is signed.
    flag: bool,
    size_or_type: u32,
    /// Bytes in all, the header of 12 too.
    len: u32,
    /// What follows the header: members, parameters, constants ...
    extra: &'a [u8],
}

impl<'a> Type<'a> {
    /// The type at an offset. The id is for errors only.
    fn read(types: &'a [u8], offset: u32, id: usize) -> Result<Self, BtfError> {
        let truncated = || BtfError::Truncated { id };
        let bytes = types.get(offset as usize..).ok_or_else(truncated)?;
        let [name, info, size_or_type] = words(bytes).ok_or_else(truncated)?;
        // Newer headers have 24 bits of count instead of 16 and 7 bits of kind instead of 5; the
        // additional ones were reserved and are 0 in older BTF.
        let (kind, count) = ((info >> 24) & 0x7f, info & 0x00ff_ffff);
        let extra = match kind {
            kind::PTR | kind::FWD..=kind::FUNC | kind::FLOAT | kind::TYPE_TAG => 0,
            kind::INT | kind::VAR | kind::DECL_TAG => 4,
            kind::ARRAY => 12,
            kind::ENUM | kind::FUNC_PROTO => 8 * count,
            kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * count,
            _ => return Err(BtfError::UnknownKind { id, kind }),
        };
        let len = 12 + extra;
        let flag = info >> 31 == 1;
        let extra = bytes.get(12..len as usize).ok_or_else(truncated)?;
        Ok(Self {
            name,
            kind,
            flag,
            size_or_type,
            len,
            extra,
        })
    }
}

fn section<'a>(
    body: &'a [u8],
    name: &'static str,
    offset: u32,
    len: u32,
) -> Result<&'a [u8], BtfError> {
    body.get(offset as usize..)
        .and_then(|bytes| bytes.get(..len as usize))
        .ok_or(BtfError::Section { name, offset, len })
}

/// The first `N` little-endian words.
fn words<const N: usize>(bytes: &[u8]) -> Option<[u32; N]> {
    let mut words = [0; N];
    let bytes = bytes.get(..N * 4)?;
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes(bytes.try_into().ok()?);
    }
    Some(words)
}

/// Records of `N` little-endian words each.
fn records<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u32; N]> {
    bytes.chunks_exact(N * 4).filter_map(words)
}

fn whole_bytes(bits: u32) -> Option<u32> {
    bits.is_multiple_of(8).then_some(bits / 8)
}

pub(in crate::kernel) const MAGIC: u32 = 0xeb9f;
const MAGIC_BIG_ENDIAN: u32 = 0x9feb;
pub(in crate::kernel) const VERSION: u32 = 1;

/// Length of the header, in bytes, up to the last field that we read. A newer one may be longer.
const HEADER_LEN: u32 = 24;

/// Size of a pointer in bytes: the kernels we support are 64-bit. BTF does not say.
const POINTER_SIZE: u32 = 8;

/// Most typedefs and qualifiers, or dimensions of an array, in a row. More are a cycle: the kernel
/// has the same limit, `MAX_RESOLVE_DEPTH`.
const MAX_CHAIN: usize = 32;

/// Most members that one lookup looks at. The largest struct of a kernel has, with the anonymous
/// ones inside it, some thousands; a malformed one can contain itself.
const MAX_MEMBERS: usize = 1 << 16;

#[cfg(test)]
mod test_builder;
#[cfg(test)]
mod tests;
