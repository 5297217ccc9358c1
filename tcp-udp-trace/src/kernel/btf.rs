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

use thiserror::Error;

/// `BTF_KIND_*`.
pub(super) mod kind {
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

    /// Finds a member in a struct or union, or in the anonymous ones inside it.
    fn member(&self, parent: Place<'a>, name: &str, budget: &mut usize) -> Option<Place<'a>> {
        if name.is_empty() {
            return None;
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

pub(super) const MAGIC: u32 = 0xeb9f;
const MAGIC_BIG_ENDIAN: u32 = 0x9feb;
pub(super) const VERSION: u32 = 1;

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
mod tests {
    use std::time::{Duration, Instant};

    use tcp_udp_trace_common::FIELDS;

    use super::*;

    const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
    const FLAG: u32 = 1 << 31;

    /// Writes BTF. Every `add` is one more type and returns its id.
    struct Builder {
        types: Vec<u8>,
        strings: Vec<u8>,
        last_id: u32,
    }

    impl Builder {
        fn new() -> Self {
            Self {
                types: vec![],
                strings: vec![0],
                last_id: 0,
            }
        }

        fn name(&mut self, name: &str) -> u32 {
            if name.is_empty() {
                return 0;
            }
            let offset = self.strings.len();
            self.strings.extend_from_slice(name.as_bytes());
            self.strings.push(0);
            offset.try_into().expect("strings are short")
        }

        /// `info` is the kind in its own bits, with the count and [`FLAG`] as they are in BTF.
        fn add(&mut self, name: &str, info: u32, size_or_type: u32, extra: &[u32]) -> u32 {
            let name = self.name(name);
            for word in [name, info, size_or_type].iter().chain(extra) {
                self.types.extend_from_slice(&word.to_le_bytes());
            }
            self.last_id += 1;
            self.last_id
        }

        fn int(&mut self, bytes: u32) -> u32 {
            self.add("", kind::INT << 24, bytes, &[bytes * 8])
        }

        /// Members are name, type and offset in bits.
        fn aggregate(
            &mut self,
            kind: u32,
            name: &str,
            size: u32,
            members: &[(&str, u32, u32)],
        ) -> u32 {
            let mut info = kind << 24;
            let mut extra = vec![];
            for &(member, ty, bits) in members {
                info += 1;
                extra.extend([self.name(member), ty, bits]);
            }
            self.add(name, info, size, &extra)
        }

        fn structure(&mut self, name: &str, size: u32, members: &[(&str, u32, u32)]) -> u32 {
            self.aggregate(kind::STRUCT, name, size, members)
        }

        fn build(&self) -> Vec<u8> {
            let types = u32::try_from(self.types.len()).expect("few types");
            let strings = u32::try_from(self.strings.len()).expect("short strings");
            let mut data = vec![];
            for word in [0x0001_eb9f, 24, 0, types, types, strings] {
                data.extend_from_slice(&u32::to_le_bytes(word));
            }
            data.extend_from_slice(&self.types);
            data.extend_from_slice(&self.strings);
            data
        }
    }

    fn at(offset: u32, size: u32) -> Option<Field> {
        Some(Field { offset, size })
    }

    fn check(btf: &Builder, path: &str, expected: Option<Field>) {
        let data = btf.build();
        let btf = Btf::parse(&data).expect("valid BTF");
        assert_eq!(btf.field(path), expected, "{path}");
    }

    /// Some of everything that can be asked for.
    fn sample() -> Builder {
        let mut b = Builder::new();
        let short = b.int(2);
        let int = b.int(4);
        let pointer = b.add("", kind::PTR << 24, int, &[]);
        let constant = b.add("", kind::CONST << 24, short, &[]);
        let family = b.add("family_t", kind::TYPEDEF << 24, constant, &[]);
        let array = b.add("", kind::ARRAY << 24, 0, &[int, int, 4]);
        let ports = b.structure("", 4, &[("num", short, 0), ("dport", short, 16)]);
        let union = b.aggregate(kind::UNION, "", 4, &[("pair", int, 0), ("", ports, 0)]);
        let common = b.structure(
            "common",
            32,
            &[
                ("family", family, 0),
                ("", union, 32),
                ("next", pointer, 64),
                ("addr", array, 128),
            ],
        );
        b.structure("sock", 40, &[("err", int, 0), ("__common", common, 64)]);
        let names = [b.name("NEG"), b.name("POS")];
        b.add(
            "state",
            FLAG | kind::ENUM << 24 | 2,
            4,
            &[names[0], u32::MAX, names[1], 7],
        );
        let name = b.name("BIG");
        b.add("wide", kind::ENUM64 << 24 | 1, 8, &[name, 1, 2]);
        let names = [b.name("sk"), b.name("flags")];
        let prototype = b.add(
            "",
            kind::FUNC_PROTO << 24 | 3,
            int,
            &[names[0], pointer, names[1], int, 0, 0],
        );
        b.add("accept", kind::FUNC << 24, prototype, &[]);
        b
    }

    /// A kernel that has what we ask for and nothing else, each field in another guise.
    fn small_kernel() -> Builder {
        let mut b = Builder::new();
        let byte = b.int(1);
        for (index, wanted) in FIELDS.iter().enumerate() {
            let path = wanted.path.split(" | ").next().expect("a path");
            let int = b.int(wanted.size);
            let mut members = path.rsplit('.');
            let last = members.next().expect("a member");
            let (mut name, mut ty) = match index % 4 {
                0 => (last, int),
                1 => {
                    let constant = b.add("", kind::CONST << 24, int, &[]);
                    (last, b.add("", kind::TYPEDEF << 24, constant, &[]))
                }
                2 => {
                    let half = b.int(wanted.size.div_ceil(2));
                    let row = b.add("", kind::ARRAY << 24, 0, &[half, byte, wanted.size.min(2)]);
                    (last, b.add("", kind::ARRAY << 24, 0, &[row, byte, 1]))
                }
                _ => (
                    "",
                    b.aggregate(kind::UNION, "", 16, &[("", byte, 0), (last, int, 0)]),
                ),
            };
            // The last of these is the struct's own name.
            for parent in members {
                let is_outer = path.starts_with(&format!("{parent}."));
                ty = b.structure(if is_outer { parent } else { "" }, 64, &[(name, ty, 64)]);
                name = parent;
            }
        }
        let prototype = b.add("", kind::FUNC_PROTO << 24, 0, &[]);
        for name in ["bpf_iter_tcp", "bpf_iter_task_file"] {
            b.add(name, kind::FUNC << 24, prototype, &[]);
        }
        b
    }

    #[test]
    fn everything_of_a_small_kernel() {
        crate::kernel::ask_btf(&small_kernel().build()).expect("all that is needed is there");
    }

    #[test]
    #[ignore = "writes the fuzzers' seeds"]
    fn write_seeds() {
        crate::fuzzing::tests::write_seed("btf", "small_kernel", &small_kernel().build());
        crate::fuzzing::tests::write_seed("btf", "other_kinds", &sample().build());
    }

    #[test]
    fn fields_of_nested_and_anonymous_aggregates() {
        let btf = sample();
        check(&btf, "sock.err", at(0, 4));
        check(&btf, "sock.__common", at(8, 32));
        check(&btf, "sock.__common.family", at(8, 2));
        check(&btf, "sock.__common.pair", at(12, 4));
        check(&btf, "sock.__common.num", at(12, 2));
        check(&btf, "sock.__common.dport", at(14, 2));
        check(&btf, "sock.__common.next", at(16, 8));
        check(&btf, "sock.__common.addr", at(24, 16));
        check(&btf, "common.dport", at(6, 2));
    }

    #[test]
    fn fields_that_are_not_there() {
        let btf = sample();
        for path in [
            "",
            ".",
            "sock",
            "sock.",
            ".err",
            "sock.er",
            "sock.error",
            "soc.err",
            "sock.family",
            "sock.err.x",
            "sock.__common.",
            "sock.__common..dport",
            "sock.__common.next.x",
            "sock.__common.addr.x",
        ] {
            check(&btf, path, None);
        }
    }

    #[test]
    fn of_structs_with_one_name_the_first_with_the_field() {
        let mut b = Builder::new();
        let int = b.int(4);
        b.add("twice", kind::FWD << 24, 0, &[]);
        b.structure("twice", 8, &[("a", int, 32)]);
        b.structure("twice", 16, &[("a", int, 64), ("b", int, 96)]);
        check(&b, "twice.a", at(4, 4));
        check(&b, "twice.b", at(12, 4));
    }

    #[test]
    fn a_function_has_the_id_of_its_type() {
        let mut b = Builder::new();
        let int = b.int(4);
        // Not everything of that name is one.
        b.structure("bpf_iter_tcp", 4, &[("a", int, 0)]);
        let prototype = b.add("", kind::FUNC_PROTO << 24, 0, &[]);
        let longer = b.add("bpf_iter_tcp_seq", kind::FUNC << 24, prototype, &[]);
        let wanted = b.add("bpf_iter_tcp", kind::FUNC << 24, prototype, &[]);
        let data = b.build();
        let btf = Btf::parse(&data).expect("well-formed BTF");
        assert_eq!(btf.id(kind::FUNC, "bpf_iter_tcp"), Some(wanted));
        assert_eq!(btf.id(kind::FUNC, "bpf_iter_tcp_seq"), Some(longer));
        assert_eq!(btf.id(kind::FUNC, "bpf_iter"), None);
    }

    #[test]
    fn arrays_of_arrays() {
        let mut b = Builder::new();
        let int = b.int(4);
        let row = b.add("", kind::ARRAY << 24, 0, &[int, int, 3]);
        let row = b.add("", kind::TYPEDEF << 24, row, &[]);
        let matrix = b.add("", kind::ARRAY << 24, 0, &[row, int, 5]);
        let flexible = b.add("", kind::ARRAY << 24, 0, &[matrix, int, 0]);
        let huge = b.add("", kind::ARRAY << 24, 0, &[matrix, int, u32::MAX]);
        let members = [("m", matrix, 0), ("f", flexible, 480), ("h", huge, 480)];
        b.structure("s", 60, &members);
        check(&b, "s.m", at(0, 60));
        check(&b, "s.f", at(60, 0));
        check(&b, "s.h", None);
    }

    #[test]
    fn bitfields_only_in_whole_bytes() {
        let mut b = Builder::new();
        let int = b.int(4);
        let extra: Vec<u32> = [
            ("bit", 1, 0),
            ("byte", 8, 8),
            ("odd", 8, 17),
            ("word", 0, 32),
        ]
        .into_iter()
        .flat_map(|(name, width, bit)| [b.name(name), int, width << 24 | bit])
        .collect();
        b.add("flagged", FLAG | kind::STRUCT << 24 | 4, 8, &extra);
        check(&b, "flagged.bit", None);
        check(&b, "flagged.byte", at(1, 1));
        check(&b, "flagged.odd", None);
        check(&b, "flagged.word", at(4, 4));

        // Without the flag: the integer has the width, and may have an offset of its own.
        let three = b.add("", kind::INT << 24, 4, &[3]);
        let byte = b.add("", kind::INT << 24, 4, &[8 << 16 | 8]);
        b.structure("plain", 8, &[("three", three, 0), ("byte", byte, 32)]);
        check(&b, "plain.three", None);
        check(&b, "plain.byte", at(5, 1));
    }

    #[test]
    fn every_kind_has_its_length() {
        // By kind from 1: words after the header, and words for each of `count`.
        const LENGTHS: [(usize, usize); 19] = [
            (1, 0),
            (0, 0),
            (3, 0),
            (0, 3),
            (0, 3),
            (0, 2),
            (0, 0),
            (0, 0),
            (0, 0),
            (0, 0),
            (0, 0),
            (0, 0),
            (0, 2),
            (1, 0),
            (0, 3),
            (0, 0),
            (1, 0),
            (0, 0),
            (0, 3),
        ];
        let mut all = Builder::new();
        for (kind, (fixed, each)) in (1..).zip(LENGTHS) {
            for count in [0_u32, 1, 3, 300] {
                let extra = vec![0; fixed + each * count as usize];
                let mut one = Builder::new();
                for b in [&mut one, &mut all] {
                    b.add("", kind << 24 | count, 0, &extra);
                }
                let int = one.int(4);
                one.structure("marker", 4, &[("x", int, 0)]);
                check(&one, "marker.x", at(0, 4));
            }
        }
        let int = all.int(4);
        all.structure("marker", 4, &[("x", int, 0)]);
        check(&all, "marker.x", at(0, 4));
    }

    #[test]
    fn a_longer_header_is_skipped() {
        let mut data = sample().build();
        data.splice(24..24, [0xff; 8]);
        data[4] = 32;
        let btf = Btf::parse(&data).expect("valid BTF");
        assert_eq!(btf.field("sock.__common.dport"), at(14, 2));
    }

    #[test]
    fn errors_say_what_is_wrong() {
        fn error(change: impl FnOnce(&mut Vec<u8>)) -> String {
            let mut data = sample().build();
            change(&mut data);
            let result = Btf::parse(&data).map(drop);
            result.expect_err("invalid BTF").to_string()
        }
        let cases = [
            (
                error(|data| data.truncate(7)),
                "BTF of 7 bytes is shorter than its header of 24 bytes",
            ),
            (
                error(|data| data.swap(0, 1)),
                "BTF is big-endian; only that of little-endian kernels can be read",
            ),
            (
                error(|data| data[..4].copy_from_slice(b"\x7fELF")),
                "not BTF: magic number 0x457f instead of 0xeb9f",
            ),
            (
                error(|data| data[2] = 2),
                "BTF has version 2, only version 1 can be read",
            ),
            (
                error(|data| data.splice(4..8, [0, 0, 1, 0]).for_each(drop)),
                "BTF header claims a length of 65536 bytes in 490 bytes of data",
            ),
            (
                error(|data| data[4] = 23),
                "BTF header claims a length of 23 bytes in 490 bytes of data",
            ),
            (
                error(|data| data[11] = 1),
                "type section (offset 16777216, length 360) reaches past the end of the BTF",
            ),
            (
                error(|data| data.truncate(489)),
                "string section (offset 360, length 106) reaches past the end of the BTF",
            ),
            (
                error(|data| *data.last_mut().expect("strings") = b'x'),
                "string section does not begin and end with a NUL byte",
            ),
            (
                error(|data| data[12] -= 4),
                "type section ends inside type 14",
            ),
            (
                error(|data| data[31] = 31),
                "type 1 is of unknown kind 31; the kernel may be newer than this reader",
            ),
            (
                error(|data| data[31] = 0),
                "type 1 is of unknown kind 0; the kernel may be newer than this reader",
            ),
        ];
        for (error, expected) in cases {
            assert_eq!(error, expected);
        }
    }

    #[test]
    fn truncated_anywhere() {
        let data = sample().build();
        for len in 0..data.len() {
            assert!(Btf::parse(&data[..len]).is_err(), "cut at {len}");
        }
        // The same for the type section alone: each boundary between types is valid, no other.
        let types = sample().types.len();
        let mut valid = 0;
        for len in 0..=types {
            let mut cut = data.clone();
            cut[12..16].copy_from_slice(&u32::try_from(len).expect("short").to_le_bytes());
            valid += usize::from(Btf::parse(&cut).is_ok());
        }
        assert_eq!(valid, 1 + 14);
    }

    #[test]
    fn cycles_of_typedefs() {
        let mut b = Builder::new();
        b.add("a", kind::TYPEDEF << 24, 2, &[]);
        b.add("b", kind::TYPEDEF << 24, 1, &[]);
        b.add("", kind::ARRAY << 24, 0, &[3, 3, 1]);
        let void = 0;
        let members = [
            ("t", 1, 0),
            ("a", 3, 0),
            ("v", void, 0),
            ("o", 99, 0),
            ("", 1, 0),
        ];
        b.structure("s", 8, &members);
        for path in ["s.t", "s.t.x", "s.a", "s.v", "s.o", "s.none"] {
            check(&b, path, None);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes too long")]
    fn structs_inside_themselves() {
        let start = Instant::now();
        // 40 levels of anonymous structs, two of the next in each: 2^40 ways down, and round again.
        let mut b = Builder::new();
        for id in 1..40 {
            b.structure(
                if id == 1 { "fan" } else { "" },
                8,
                &[("", id + 1, 0), ("", id + 1, 0)],
            );
        }
        let last = b.structure("", 8, &[("", 1, 0), ("", 40, 0)]);
        assert_eq!(last, 40);
        check(&b, "fan.x", None);

        let mut b = Builder::new();
        b.structure("s", 8, &[("", 1, 8), ("me", 1, 8)]);
        check(&b, "s.none", None);
        check(&b, "s.me.me.me", at(3, 8));
        check(&b, &format!("s{}", ".me".repeat(100_000)), None);
        assert!(start.elapsed() < Duration::from_secs(5), "bounded time");
    }

    #[test]
    fn counts_and_offsets_out_of_range() {
        let mut b = Builder::new();
        b.add("s", kind::STRUCT << 24 | 0x00ff_ffff, 8, &[0; 30]);
        let error = Btf::parse(&b.build()).err();
        assert_eq!(error, Some(BtfError::Truncated { id: 1 }));

        let mut b = Builder::new();
        let int = b.int(4);
        let inner = b.structure("", 8, &[("far", int, u32::MAX - 7)]);
        b.structure("s", 8, &[("", inner, 8), ("near", int, 0)]);
        b.add("n", kind::STRUCT << 24 | 1, 8, &[u32::MAX, int, 0]);
        check(&b, "s.far", None);
        check(&b, "s.near", at(0, 4));
        check(&b, "n.x", None);
    }

    /// What user space and the eBPF programs rely on, on the kernel that runs the test.
    #[test]
    #[cfg_attr(miri, ignore = "asks the kernel")]
    #[allow(clippy::print_stderr, reason = "a skipped test says so")]
    fn the_running_kernel() {
        let data = match std::fs::read(VMLINUX) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("skipped: no {VMLINUX}");
                return;
            }
            data => data.expect("BTF is readable"),
        };
        let btf = Btf::parse(&data).expect("the kernel's BTF is valid");
        for (path, expected) in [
            ("sock.__sk_common.skc_daddr", at(0, 4)),
            ("sock.__sk_common.skc_rcv_saddr", at(4, 4)),
            ("sock.__sk_common.skc_dport", at(12, 2)),
            ("sock.__sk_common.skc_num", at(14, 2)),
            ("sock.__sk_common.skc_family", at(16, 2)),
            ("sock.__sk_common.skc_state", at(18, 1)),
            (
                "tcp_sock.inet_conn.icsk_inet.sk.__sk_common.skc_family",
                at(16, 2),
            ),
            ("sock.skc_family", None),
            ("sock.sk_socket.file", None),
        ] {
            assert_eq!(btf.field(path), expected, "{path}");
        }
        for (path, size) in [
            ("sock.__sk_common.skc_net.net", 8),
            ("sock.__sk_common.skc_cookie", 8),
            ("sock.sk_socket", 8),
            ("sock.sk_protocol", 2),
            ("inet_sock.inet_sport", 2),
            ("tcp_sock.bytes_acked", 8),
            ("tcp_sock.bytes_received", 8),
            ("tcp_sock.srtt_us", 4),
            ("net.ns.inum", 4),
            ("socket.file", 8),
            ("cred.uid", 4),
            ("socket_alloc.vfs_inode.i_ino", 8),
            ("sk_buff.len", 4),
        ] {
            assert_eq!(
                btf.field(path).map(|field| field.size),
                Some(size),
                "{path}"
            );
        }
    }
}
