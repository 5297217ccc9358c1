//! The object files of small BPF programs at a cgroup.

use object::{
    Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope,
    write::{Object, Symbol, SymbolSection},
};

/// Returns the object of programs: name, section and instructions of each.
pub(crate) fn object(programs: &[(&str, &str, Vec<u8>)]) -> anyhow::Result<Vec<u8>> {
    let endianness = if cfg!(target_endian = "big") {
        Endianness::Big
    } else {
        Endianness::Little
    };
    let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, endianness);
    for (name, section, code) in programs {
        let section = object.add_section(vec![], section.as_bytes().into(), SectionKind::Text);
        object.append_section_data(section, code, 8);
        object.add_symbol(Symbol {
            name: name.as_bytes().into(),
            value: 0,
            size: code.len() as u64,
            kind: SymbolKind::Text,
            scope: SymbolScope::Dynamic,
            weak: false,
            section: SymbolSection::Section(section),
            flags: SymbolFlags::None,
        });
    }
    let license = object.add_section(vec![], b"license".to_vec(), SectionKind::Data);
    object.append_section_data(license, b"GPL\0", 1);
    Ok(object.write()?)
}
