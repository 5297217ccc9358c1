//! The architectures whose kernels the tests run on.
//!
//! The tests are compiled on this machine for each of them. QEMU emulates all of them, also this
//! machine's own.

use std::{env::consts, fmt};

use anyhow::{Context as _, Result};

use crate::deps::{self, Group};

pub(crate) struct Arch {
    /// Rust's name.
    name: &'static str,
    /// Debian's name.
    pub(crate) debian: &'static str,
    /// The emulator.
    pub(crate) qemu: &'static str,
    pub(crate) qemu_package: &'static Group,
    /// The linker for machines of another architecture.
    pub(crate) linker: &'static Group,
    /// The guest's hardware.
    pub(crate) machine: &'static [&'static str],
    /// The device of the guest's console.
    pub(crate) console: &'static str,
}

const ARCHES: &[Arch] = &[
    Arch {
        name: "x86_64",
        debian: "amd64",
        qemu: "qemu-system-x86_64",
        qemu_package: &deps::QEMU_X86_64,
        linker: &deps::LINKER_X86_64,
        // An early CPU has fewer features to emulate. The tests take a sixth less time than with
        // `max`.
        // QEMU's emulation of `cmpxchg16b` crashes two-CPU guests of 6.12.
        machine: &["-cpu", "Nehalem,cx16=off"],
        console: "ttyS0",
    },
    Arch {
        name: "aarch64",
        debian: "arm64",
        qemu: "qemu-system-aarch64",
        qemu_package: &deps::QEMU_AARCH64,
        linker: &deps::LINKER_AARCH64,
        // `max` has pointer authentication, and its emulation takes most of the time.
        machine: &["-machine", "virt", "-cpu", "neoverse-n1"],
        console: "ttyAMA0",
    },
];

impl Arch {
    /// Returns the architecture of this machine.
    pub(crate) fn host() -> Result<&'static Self> {
        Self::named(consts::ARCH)
    }

    pub(crate) fn named(name: &str) -> Result<&'static Self> {
        ARCHES
            .iter()
            .find(|arch| arch.name == name)
            .with_context(|| {
                let known: Vec<_> = ARCHES.iter().map(|arch| arch.name).collect();
                format!(
                    "the tests do not run on {name}, only on {}",
                    known.join(", ")
                )
            })
    }

    pub(crate) fn is_host(&self) -> bool {
        self.name == consts::ARCH
    }

    /// Returns Rust's target.
    pub(crate) fn target(&self) -> String {
        format!("{self}-unknown-linux-gnu")
    }

    /// Returns the name in GNU's tools and in Debian's folders of libraries.
    pub(crate) fn gnu(&self) -> String {
        format!("{self}-linux-gnu")
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}
