//! `cargo xtask setup`: installs all that the verbs need.

use anyhow::{Result, bail};

use crate::{
    arch::Arch,
    deps::{self, EBPF, FUZZ, NEIGHBORS, TESTS, VM},
};

pub(crate) fn run() -> Result<()> {
    // `--arch` installs the programs for other architectures when it needs them.
    let qemu = Arch::host()?.qemu_package;
    let missing: Vec<_> = [&EBPF, &TESTS, &NEIGHBORS, &VM, &FUZZ, qemu]
        .into_iter()
        .flat_map(deps::Group::missing)
        .collect();
    if !missing.is_empty() {
        if !deps::is_debian_like() {
            bail!(
                "this is not a Debian-like system. Install the programs of these Debian packages: {}. \
                 For the eBPF object, a nightly compiler works too: \
                 `rustup toolchain install nightly --component rust-src`",
                missing.join(" ")
            );
        }
        deps::install(&missing)?;
    }
    deps::ensure_bpf_linker()?;
    eprintln!("everything that the verbs need is installed");
    Ok(())
}
