//! Builds BTF for the tests.

use super::kind;

/// Builds BTF. Each call of `add` appends one type, and returns its id.
pub(super) struct Builder {
    pub(super) types: Vec<u8>,
    pub(super) strings: Vec<u8>,
    pub(super) last_id: u32,
}

impl Builder {
    pub(super) fn new() -> Self {
        Self {
            types: vec![],
            strings: vec![0],
            last_id: 0,
        }
    }

    pub(super) fn name(&mut self, name: &str) -> u32 {
        if name.is_empty() {
            return 0;
        }
        let offset = self.strings.len();
        self.strings.extend_from_slice(name.as_bytes());
        self.strings.push(0);
        offset.try_into().expect("strings are short")
    }

    /// Appends a type. `info` has the kind, the count and the flag in their bits of BTF.
    pub(super) fn add(&mut self, name: &str, info: u32, size_or_type: u32, extra: &[u32]) -> u32 {
        let name = self.name(name);
        for word in [name, info, size_or_type].iter().chain(extra) {
            self.types.extend_from_slice(&word.to_le_bytes());
        }
        self.last_id += 1;
        self.last_id
    }

    pub(super) fn int(&mut self, bytes: u32) -> u32 {
        self.add("", kind::INT << 24, bytes, &[bytes * 8])
    }

    /// Appends a struct or union. Each member is its name, its type, and its offset in bits.
    pub(super) fn aggregate(
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

    pub(super) fn structure(&mut self, name: &str, size: u32, members: &[(&str, u32, u32)]) -> u32 {
        self.aggregate(kind::STRUCT, name, size, members)
    }

    pub(super) fn build(&self) -> Vec<u8> {
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
