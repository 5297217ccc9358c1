//! A BPF program at a cgroup that refuses all packets, as the programs of `IPAddressDeny=` do.

use std::fs::File;

use anyhow::Context as _;
use aya::{
    Ebpf,
    programs::{CgroupAttachMode, CgroupSkb, CgroupSkbAttachType},
};

use crate::{cgroup::Cgroup, cgroup_program::object};

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
        let mut ebpf = Ebpf::load(&object(&[(NAME, "cgroup_skb/egress", CODE.to_vec())])?)?;
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
