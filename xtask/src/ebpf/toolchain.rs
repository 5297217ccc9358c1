//! Finds a compiler that makes BPF code, its linker, and a tool to strip the result.
//!
//! Stable Rust ships no `core` for BPF. Debian's compiler for web browsers does, at a version that
//! anyone can install, so it is the pinned one. Elsewhere a nightly from rustup compiles `core`
//! from `rust-src`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    deps::{self, DEBIAN_RUSTC},
    process, workspace,
};

pub(super) const TARGET: &str = "bpfel-unknown-none";

/// The folder of the programs of the pinned LLVM. On the search path, their names have suffixes.
const DEBIAN_LLVM_BIN: &str = "/usr/lib/llvm-22/bin";

pub(super) struct Toolchain {
    compiler: Compiler,
    sysroot: PathBuf,
    pub(super) bpf_linker: PathBuf,
    pub(super) objcopy: PathBuf,
    /// One `name: version` line for each tool.
    description: String,
}

enum Compiler {
    /// Debian's `rustc-web`, which has a compiled `core` for BPF.
    Debian,
    /// A nightly from rustup with `rust-src`, from which cargo compiles `core`.
    Nightly,
}

impl Toolchain {
    /// Finds the pinned compiler, or else a nightly.
    pub(super) fn find() -> Result<Self> {
        let (compiler, sysroot) = find_compiler()?;
        let bpf_linker = workspace::find_program("bpf-linker").with_context(|| {
            format!(
                "bpf-linker is missing: run `cargo xtask setup`, or `{}`",
                deps::BPF_LINKER_INSTALL
            )
        })?;
        let objcopy = find_objcopy(&sysroot)?;

        let mut toolchain = Self {
            compiler,
            sysroot,
            bpf_linker,
            objcopy,
            description: String::new(),
        };
        toolchain.description = toolchain.versions()?;
        Ok(toolchain)
    }

    pub(super) fn describe(&self) -> &str {
        &self.description
    }

    /// Returns a cargo command that compiles with this toolchain.
    pub(super) fn cargo(&self) -> Command {
        let mut command = match self.compiler {
            Compiler::Debian => {
                let mut command = Command::new(workspace::cargo());
                // The sources use unstable features, and this compiler is a stable one.
                command
                    .env("RUSTC", DEBIAN_RUSTC)
                    .env("RUSTC_BOOTSTRAP", "1");
                command
            }
            Compiler::Nightly => process::nightly("cargo"),
        };
        // A wrapper or the user's flags would change the bytes.
        for variable in ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS"] {
            command.env_remove(variable);
        }
        command
    }

    pub(super) fn cargo_flags(&self) -> &'static [&'static str] {
        match self.compiler {
            Compiler::Debian => &[],
            Compiler::Nightly => &["-Zbuild-std=core"],
        }
    }

    /// Returns the folder of `core`'s sources, whose paths must not enter the object when cargo
    /// compiles them.
    pub(super) fn core_sources(&self) -> PathBuf {
        self.sysroot.join("lib/rustlib/src/rust")
    }

    fn versions(&self) -> Result<String> {
        let rustc = match self.compiler {
            Compiler::Debian => process::stdout(Command::new(DEBIAN_RUSTC).arg("-vV"))?,
            Compiler::Nightly => process::stdout(process::nightly("rustc").arg("-vV"))?,
        };
        let cargo = process::stdout(self.cargo().arg("-V"))?;
        let bpf_linker = process::stdout(Command::new(&self.bpf_linker).arg("--version"))?;
        let objcopy = process::stdout(Command::new(&self.objcopy).arg("--version"))?;

        let rustc_version = rustc.lines().next().unwrap_or_default();
        let rustc_llvm = line_with(&rustc, "LLVM version")?;
        let objcopy_llvm = line_with(&objcopy, "LLVM version")?;
        Ok(format!(
            "rustc: {rustc_version}\nrustc's LLVM: {}\ncargo: {}\nbpf-linker: {}\nllvm-objcopy: {}\n",
            last_word(rustc_llvm),
            cargo.trim(),
            bpf_linker.trim(),
            last_word(objcopy_llvm),
        ))
    }
}

fn find_compiler() -> Result<(Compiler, PathBuf)> {
    if Path::new(DEBIAN_RUSTC).is_file() {
        let sysroot = sysroot(&mut Command::new(DEBIAN_RUSTC))?;
        if sysroot.join("lib/rustlib").join(TARGET).is_dir() {
            return Ok((Compiler::Debian, sysroot));
        }
    }
    // This fails without rustup or without a nightly.
    if let Ok(sysroot) = sysroot(&mut process::nightly("rustc")) {
        if sysroot.join("lib/rustlib/src/rust/library/core").is_dir() {
            return Ok((Compiler::Nightly, sysroot));
        }
    }
    bail!(
        "no compiler for {TARGET}. Install one of:\n\
         - on Debian: `cargo xtask setup` as root, which is `{}`\n\
         - elsewhere: `rustup toolchain install nightly --component rust-src`",
        deps::EBPF.apt_command(),
    )
}

fn find_objcopy(sysroot: &Path) -> Result<PathBuf> {
    let pinned = Path::new(DEBIAN_LLVM_BIN).join("llvm-objcopy");
    // The path in rustup's component `llvm-tools`.
    let rustup = sysroot
        .join("lib/rustlib")
        .join(format!("{}-unknown-linux-gnu", std::env::consts::ARCH))
        .join("bin/llvm-objcopy");
    [pinned, rustup]
        .into_iter()
        .find(|candidate| candidate.is_file())
        .or_else(|| workspace::find_program("llvm-objcopy"))
        .context("llvm-objcopy is missing: install LLVM's tools, or `rustup +nightly component add llvm-tools`")
}

fn sysroot(rustc: &mut Command) -> Result<PathBuf> {
    let output = process::stdout(rustc.args(["--print", "sysroot"]))?;
    Ok(PathBuf::from(output.trim()))
}

fn line_with<'a>(text: &'a str, needle: &str) -> Result<&'a str> {
    text.lines()
        .find(|line| line.contains(needle))
        .with_context(|| format!("no line with {needle:?} in a version output:\n{text}"))
}

fn last_word(line: &str) -> &str {
    line.split_whitespace().next_back().unwrap_or_default()
}
