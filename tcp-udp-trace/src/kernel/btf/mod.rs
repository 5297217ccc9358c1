//! Parses the kernel's BTF, and returns the offset and size of a field of a struct.
//!
//! BTF is the kernel's description of its own types, in `/sys/kernel/btf/vmlinux` (4 to 6 MB). This
//! crate resolves field offsets in user space, and passes them to the eBPF programs as read-only
//! globals. This is CO-RE without C.
//!
//! No existing crate fits: aya-obj parses BTF, but exposes neither members nor their offsets, and
//! btf-rs is LGPL. The format is documented in the kernel's
//! [`Documentation/bpf/btf.rst`](https://docs.kernel.org/bpf/btf.html) and declared in
//! `include/uapi/linux/btf.h`.
//!
//! [`Btf::parse`] reads the types once, and records the offset of each type and a list of the types
//! that can be looked up by name. A lookup compares the names of that list. No name is hashed or
//! copied, because only a few dozen of the hundred thousand names are ever looked up.
//!
//! Any bytes are safe: they lead to an error or `None`, without panics or unbounded work. The BTF
//! of modules, which continues the ids of `vmlinux`, and big-endian kernels are not supported.

pub(in crate::kernel) mod ids;
pub(in crate::kernel) mod offsets;
pub(in crate::kernel) mod source;

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

/// The error of bytes that are not readable BTF.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum BtfError {
    #[error("BTF of {len} bytes is shorter than its header of {HEADER_LEN} bytes")]
    TooShort { len: usize },
    #[error("BTF is big-endian; only little-endian BTF can be read")]
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

/// The position of a field in its struct.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Field {
    /// Bytes from the beginning of the path's first struct.
    pub(crate) offset: u32,
    /// Size in bytes.
    pub(crate) size: u32,
}

/// Indexed BTF.
pub(crate) struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// The offset of each type in `types`. The first has id 1. Id 0 is `void`, which has no entry.
    offsets: Vec<u32>,
    /// The structs and unions that have a name.
    aggregates: Vec<Named>,
}

impl<'a> Btf<'a> {
    /// Checks the header and indexes the types.
    ///
    /// # Errors
    ///
    /// The bytes are not the complete BTF of a little-endian kernel, or a type is of a kind that is
    /// newer than this parser. The length of such a type is unknown, so the types after it cannot
    /// be found.
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

    /// Returns the position of a field. The path has the name of a struct or union, and the names
    /// of the members down to the field: `sock.__sk_common.skc_family`.
    ///
    /// As in C, members of anonymous structs and unions are named like members of their parent.
    /// Typedefs and qualifiers are resolved. Pointers are not followed. If several structs have the
    /// name, the first one that has the field counts. A bitfield has a position only if it begins
    /// and ends at the boundary of a byte.
    pub(crate) fn field(&self, path: &str) -> Option<Field> {
        let (name, members) = path.split_once('.')?;
        let mut budget = MAX_MEMBERS;
        self.named(&self.aggregates, name)
            .find_map(|aggregate| self.descend(aggregate, members, &mut budget))
    }

    /// Returns the position of a bitfield that lies in one byte: the offset of the byte, and the
    /// field's bits in it.
    pub(crate) fn bitfield(&self, path: &str) -> Option<(u32, u8)> {
        let (name, members) = path.split_once('.')?;
        let mut budget = MAX_MEMBERS;
        let Member { bit, width, .. } = self
            .named(&self.aggregates, name)
            .find_map(|aggregate| self.reach(aggregate, members, &mut budget))?;
        let last = (bit % 8).checked_add(width).filter(|last| *last <= 8)?;
        let bits = (1_u32 << last) - (1 << (bit % 8));
        (width != 0).then_some((bit / 8, bits as u8))
    }

    /// Returns the size of a struct or union in bytes. If several have the name, the first counts.
    pub(crate) fn size_of(&self, name: &str) -> Option<u32> {
        let ty = self.named(&self.aggregates, name).next()?;
        self.size(ty)
    }

    /// Returns the id of the type with this kind and name.
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

    /// Returns the value of an enumerator of an enum.
    pub(crate) fn enumerator(&self, name: &str, enumerator: &str) -> Option<u32> {
        let ty = self.by_id(self.id(kind::ENUM, name)?)?;
        let mut all = records(ty.extra);
        all.find_map(|[string, value]| self.is_name(string, enumerator).then_some(value))
    }

    /// Returns the values and the names of an enum's enumerators.
    pub(crate) fn enumerators(&self, name: &str) -> impl Iterator<Item = (u32, &'a [u8])> {
        let ty = self.id(kind::ENUM, name).and_then(|id| self.by_id(id));
        let all = ty.into_iter().flat_map(|ty| records(ty.extra));
        all.filter_map(|[string, value]| Some((value, self.string(string)?)))
    }

    /// Returns a string without its NUL.
    fn string(&self, offset: u32) -> Option<&'a [u8]> {
        let rest = self.strings.get(offset as usize..)?;
        rest.split(|byte| *byte == 0).next()
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

    /// Returns the types of a list that have this name.
    fn named(&self, list: &[Named], name: &str) -> impl Iterator<Item = Type<'a>> {
        list.iter()
            .filter(|named| self.is_name(named.name, name))
            .filter_map(|named| Type::read(self.types, named.offset, 0).ok())
    }

    fn by_id(&self, id: u32) -> Option<Type<'a>> {
        let index = (id as usize).checked_sub(1)?;
        Type::read(self.types, *self.offsets.get(index)?, 0).ok()
    }

    /// Resolves typedefs and qualifiers.
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
    fn descend(&self, ty: Type<'a>, members: &str, budget: &mut usize) -> Option<Field> {
        self.bytes(self.reach(ty, members, budget)?)
    }

    /// Follows the names of members from a struct down to a member.
    fn reach(&self, ty: Type<'a>, members: &str, budget: &mut usize) -> Option<Member<'a>> {
        let (bit, width) = (0, 0);
        let mut member = Member { ty, bit, width };
        for name in members.split('.') {
            member = self.member(member, name, budget)?;
        }
        Some(member)
    }

    /// Finds a member in a struct or union, or in the anonymous ones inside it. If the parent is an
    /// array, it is a member of the first element.
    fn member(&self, mut parent: Member<'a>, name: &str, budget: &mut usize) -> Option<Member<'a>> {
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
            for [string, ty, offset] in records(parent.ty.extra) {
                *budget = budget.checked_sub(1)?;
                let named = self.is_name(string, name);
                if !named && string != 0 {
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
                let member = Member { ty, bit, width };
                if named {
                    return Some(member);
                }
                open.push(member);
            }
        }
        None
    }

    /// Returns the offset and size, if they are whole bytes.
    fn bytes(&self, Member { ty, bit, width }: Member<'a>) -> Option<Field> {
        let (bit, size) = if width != 0 {
            (bit, whole_bytes(width)?)
        } else if ty.kind == kind::INT {
            // Without the flag, the type of a bitfield is an integer narrower than its size.
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

/// A type that can be looked up by name.
#[derive(Debug, Clone, Copy)]
struct Named {
    /// Offset of the name in the string section.
    name: u32,
    /// Offset in the type section.
    offset: u32,
}

/// A member that a lookup has reached.
#[derive(Debug, Clone, Copy)]
struct Member<'a> {
    /// Its type, with typedefs and qualifiers resolved.
    ty: Type<'a>,
    /// Bits from the beginning of the path's first struct.
    bit: u32,
    /// Width in bits of a bitfield, else 0.
    width: u32,
}

/// `struct btf_type`, and the data that follows it.
#[derive(Debug, Clone, Copy)]
struct Type<'a> {
    name: u32,
    kind: u32,
    /// In an aggregate, the members have bitfield widths. An enum is signed.
    flag: bool,
    size_or_type: u32,
    /// The length in bytes, including the header of 12 bytes.
    len: u32,
    /// The data after the header: members, parameters, constants and so on.
    extra: &'a [u8],
}

impl<'a> Type<'a> {
    /// Reads the type at an offset. The id is for errors only.
    fn read(types: &'a [u8], offset: u32, id: usize) -> Result<Self, BtfError> {
        let truncated = || BtfError::Truncated { id };
        let bytes = types.get(offset as usize..).ok_or_else(truncated)?;
        let [name, info, size_or_type] = words(bytes).ok_or_else(truncated)?;
        // Newer headers have 24 bits of count instead of 16, and 7 bits of kind instead of 5. The
        // additional bits were reserved, and are 0 in older BTF.
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

/// Reads the first `N` little-endian words.
fn words<const N: usize>(bytes: &[u8]) -> Option<[u32; N]> {
    let mut words = [0; N];
    let bytes = bytes.get(..N * 4)?;
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes(bytes.try_into().ok()?);
    }
    Some(words)
}

/// Reads records of `N` little-endian words each.
fn records<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u32; N]> {
    bytes.chunks_exact(N * 4).filter_map(words)
}

fn whole_bytes(bits: u32) -> Option<u32> {
    bits.is_multiple_of(8).then_some(bits / 8)
}

pub(in crate::kernel) const MAGIC: u32 = 0xeb9f;
const MAGIC_BIG_ENDIAN: u32 = 0x9feb;
pub(in crate::kernel) const VERSION: u32 = 1;

/// The length in bytes of the header up to the last field in use. A newer header may be longer.
const HEADER_LEN: u32 = 24;

/// The size of a pointer in bytes. BTF does not contain it. All supported kernels are 64-bit.
const POINTER_SIZE: u32 = 8;

/// The maximum number of typedefs and qualifiers, or of dimensions of an array, in a row. More are
/// a cycle. The kernel has the same limit ([`MAX_RESOLVE_DEPTH`][depth]).
///
/// [depth]: https://github.com/torvalds/linux/blob/v6.12/kernel/bpf/btf.c
const MAX_CHAIN: usize = 32;

/// The maximum number of members that one lookup compares. The largest struct of a kernel has some
/// thousands, with those of the anonymous structs inside it. A malformed struct can contain itself.
const MAX_MEMBERS: usize = 1 << 16;

#[cfg(test)]
mod test_builder;
#[cfg(test)]
mod tests;
