//! A BPF program at a cgroup that refuses all packets, as the programs of `IPAddressDeny=` do.

use std::fs::File;

use anyhow::Context as _;
use aya::{
    Ebpf,
    programs::{CgroupAttachMode, CgroupSkb, CgroupSkbAttachType},
};
use object::{
    Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope,
    write::{Object, Symbol, SymbolSection},
};

use crate::cgroup::Cgroup;

const NAME: &str = "refuse";

/// `r0 = 0; exit`
const CODE: [u8; 16] = [0xb7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0];

/// The program, attached until this value is dropped.
#[derive(Debug)]
pub struct Refusal {
    _program: Ebpf,
}

impl Refusal {
    /// Lets no socket of this cgroup send any more.
    pub fn at(cgroup: &Cgroup) -> anyhow::Result<Self> {
        let mut ebpf = Ebpf::load(&object()?)?;
        let program = ebpf.program_mut(NAME).context("the program")?;
        let program: &mut CgroupSkb = program.try_into()?;
        program.load()?;
        // A link allows other programs at the same cgroup.
        let mode = CgroupAttachMode::Single;
        program.attach(
            File::open(cgroup.path())?,
            CgroupSkbAttachType::Egress,
            mode,
        )?;
        Ok(Self { _program: ebpf })
    }
}

fn object() -> anyhow::Result<Vec<u8>> {
    let endianness = if cfg!(target_endian = "big") {
        Endianness::Big
    } else {
        Endianness::Little
    };
    let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, endianness);
    let section = object.add_section(vec![], b"cgroup_skb/egress".to_vec(), SectionKind::Text);
    object.append_section_data(section, &CODE, 8);
    object.add_symbol(Symbol {
        name: NAME.into(),
        value: 0,
        size: CODE.len() as u64,
        kind: SymbolKind::Text,
        scope: SymbolScope::Dynamic,
        weak: false,
        section: SymbolSection::Section(section),
        flags: SymbolFlags::None,
    });
    let license = object.add_section(vec![], b"license".to_vec(), SectionKind::Data);
    object.append_section_data(license, b"GPL\0", 1);
    Ok(object.write()?)
}
