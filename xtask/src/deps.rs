//! The programs that the verbs need besides cargo; installs them on Debian and its derivatives.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::{process, workspace};

/// Programs that one verb needs, each with the Debian package that has it.
pub(crate) struct Group {
    purpose: &'static str,
    packages: &'static [Package],
}

struct Package {
    name: &'static str,
    /// How to find out whether it is installed, on any distribution and without a package manager.
    probe: Probe,
}

enum Probe {
    /// A program on the search path.
    Program(&'static str),
    File(&'static str),
}

/// The pinned compiler for BPF. The `-dev` packages are for building bpf-linker.
pub(crate) const EBPF: Group = Group {
    purpose: "building the eBPF object",
    packages: &[
        RUSTC,
        Package {
            name: "libstd-rust-web-dev-bpf",
            probe: Probe::File("/usr/lib/rustlib/bpfel-unknown-none"),
        },
        Package {
            name: "llvm-22-dev",
            probe: Probe::File("/usr/lib/llvm-22/include/llvm-c/Core.h"),
        },
        Package {
            name: "libpolly-22-dev",
            probe: Probe::File("/usr/lib/llvm-22/lib/libPolly.a"),
        },
        Package {
            name: "libclang-common-22-dev",
            probe: Probe::File("/usr/lib/llvm-22/lib/clang/22/include"),
        },
    ],
};

/// Debian's compiler. The path is absolute because rustup's proxy comes earlier on the search path.
pub(crate) const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

const RUSTC: Package = Package {
    name: "rustc-web",
    probe: Probe::File(DEBIAN_RUSTC),
};

/// The programs with which the integration tests set up links, impairments and translated
/// addresses.
pub(crate) const TESTS: Group = Group {
    purpose: "running the integration tests",
    packages: &[
        Package {
            name: "iproute2",
            probe: Probe::Program("tc"),
        },
        Package {
            name: "nftables",
            probe: Probe::Program("nft"),
        },
    ],
};

/// Other tracers and a debugger, without which a test is skipped, and the loader of AppArmor
/// profiles, which one odd machine needs. Only `cargo xtask setup` installs them.
pub(crate) const NEIGHBORS: Group = Group {
    purpose: "running the tests beside other programs",
    packages: &[
        Package {
            name: "apparmor",
            probe: Probe::Program("apparmor_parser"),
        },
        Package {
            name: "bpftool",
            probe: Probe::Program("bpftool"),
        },
        Package {
            name: "bpftrace",
            probe: Probe::Program("bpftrace"),
        },
        Package {
            name: "libbpf-tools",
            probe: Probe::Program("tcplife"),
        },
        Package {
            name: "strace",
            probe: Probe::Program("strace"),
        },
    ],
};

/// The programs that make a guest's image.
pub(crate) const VM: Group = Group {
    purpose: "running the tests on other kernels",
    packages: &[
        Package {
            name: "busybox-static",
            probe: Probe::Program("busybox"),
        },
        Package {
            name: "xz-utils",
            probe: Probe::Program("xz"),
        },
        Package {
            name: "zstd",
            probe: Probe::Program("zstd"),
        },
    ],
};

pub(crate) const QEMU_X86_64: Group = Group {
    purpose: "running the tests on x86_64",
    packages: &[Package {
        name: "qemu-system-x86",
        probe: Probe::Program("qemu-system-x86_64"),
    }],
};

pub(crate) const QEMU_AARCH64: Group = Group {
    purpose: "running the tests on aarch64",
    packages: &[Package {
        name: "qemu-system-arm",
        probe: Probe::Program("qemu-system-aarch64"),
    }],
};

pub(crate) const LINKER_X86_64: Group = Group {
    purpose: "linking the tests for x86_64",
    packages: &[
        Package {
            name: "gcc-x86-64-linux-gnu",
            probe: Probe::Program("x86_64-linux-gnu-gcc"),
        },
        Package {
            name: "libc6-dev-amd64-cross",
            probe: Probe::File("/usr/x86_64-linux-gnu/lib/libc.so"),
        },
    ],
};

pub(crate) const LINKER_AARCH64: Group = Group {
    purpose: "linking the tests for aarch64",
    packages: &[
        Package {
            name: "gcc-aarch64-linux-gnu",
            probe: Probe::Program("aarch64-linux-gnu-gcc"),
        },
        Package {
            name: "libc6-dev-arm64-cross",
            probe: Probe::File("/usr/aarch64-linux-gnu/lib/libc.so"),
        },
    ],
};

/// A compiler whose standard library Debian has for every architecture.
pub(crate) const CROSS_RUSTC: Group = Group {
    purpose: "compiling for another architecture",
    packages: &[RUSTC],
};

/// The program that makes a Debian root file system.
pub(crate) const ROOT: Group = Group {
    purpose: "making a clean Debian",
    packages: &[Package {
        name: "mmdebstrap",
        probe: Probe::Program("mmdebstrap"),
    }],
};

/// Programs that receive what the command sends. The Python environment gets the others.
pub(crate) const COLLECTORS: Group = Group {
    purpose: "testing with real collectors",
    packages: &[
        Package {
            name: "prometheus",
            probe: Probe::Program("prometheus"),
        },
        Package {
            name: "python3-venv",
            probe: Probe::Program("python3"),
        },
    ],
};

/// The program that builds and runs an image, with a runtime that needs no systemd.
pub(crate) const IMAGE: Group = Group {
    purpose: "building the image",
    packages: &[
        Package {
            name: "podman",
            probe: Probe::Program("podman"),
        },
        Package {
            name: "runc",
            probe: Probe::Program("runc"),
        },
    ],
};

/// The compiler of libFuzzer, which is C++.
pub(crate) const FUZZ: Group = Group {
    purpose: "building the fuzzers",
    packages: &[Package {
        name: "g++",
        probe: Probe::Program("c++"),
    }],
};

/// The installer of the spell checker: its Python package installs in a second, compiling it takes
/// minutes.
const SPELLING: Group = Group {
    purpose: "installing the spell checker",
    packages: &[Package {
        name: "python3-pip",
        probe: Probe::Program("pip"),
    }],
};

const TYPOS_VERSION: &str = "1.52.0";

/// The version that goes with the pinned compiler: both on LLVM 22.
const BPF_LINKER_VERSION: &str = "0.13.0";

/// The command that installs bpf-linker.
pub(crate) const BPF_LINKER_INSTALL: &str = "LLVM_PREFIX=/usr/lib/llvm-22 cargo install --locked bpf-linker \
     --version 0.13.0 --no-default-features --features llvm-22";

impl Group {
    /// Returns the packages that are not installed.
    pub(crate) fn missing(&self) -> Vec<&'static str> {
        self.packages
            .iter()
            .filter(|package| !package.probe.holds())
            .map(|package| package.name)
            .collect()
    }

    /// Returns the command that installs the whole group on Debian.
    pub(crate) fn apt_command(&self) -> String {
        let names: Vec<_> = self.packages.iter().map(|package| package.name).collect();
        process::shell_line(&apt_install(&names))
    }
}

impl Probe {
    fn holds(&self) -> bool {
        match self {
            Self::Program(name) => workspace::find_program(name).is_some(),
            Self::File(path) => Path::new(path).exists(),
        }
    }
}

/// Makes sure that `group` is installed.
///
/// As root on a Debian-like system, this installs it. Elsewhere the error names the packages.
pub(crate) fn ensure(group: &Group) -> Result<()> {
    let missing = group.missing();
    if missing.is_empty() {
        return Ok(());
    }
    if can_install() {
        return install(&missing);
    }
    bail!(
        "missing for {}: {}. Run `cargo xtask setup`, or on Debian `sudo {}`",
        group.purpose,
        missing.join(" "),
        process::shell_line(&apt_install(&missing)),
    )
}

/// Whether a verb may install packages by itself. It never uses sudo, which can prompt for a
/// password.
pub(crate) fn can_install() -> bool {
    process::is_root() && is_debian_like()
}

/// Installs a subcommand of cargo, such as `cargo-fuzz`, if it is missing.
pub(crate) fn ensure_subcommand(name: &str) -> Result<()> {
    if workspace::find_program(name).is_some() {
        return Ok(());
    }
    let mut command = Command::new(workspace::cargo());
    process::run(command.args(["install", "--locked", name]))
}

/// Whether the pinned compiler has a standard library for `target`.
pub(crate) fn has_std(target: &str) -> Result<bool> {
    let mut rustc = Command::new("rustc");
    rustc
        .current_dir(workspace::root())
        .args(["--print", "target-libdir", "--target", target]);
    let folder = process::stdout(&mut rustc)?;
    Ok(Path::new(folder.trim()).is_dir())
}

/// Installs the standard library of the pinned compiler for `target` if it is missing.
pub(crate) fn ensure_std(target: &str) -> Result<()> {
    if has_std(target)? {
        return Ok(());
    }
    let mut command = Command::new("rustup");
    command.current_dir(workspace::root());
    process::run(command.args(["target", "add", target]))
}

/// Returns the path of the spell checker. Installs it into the cache if it is missing.
pub(crate) fn typos() -> Result<PathBuf> {
    let folder = workspace::cache_dir().join("pip");
    let ours = folder.join("bin/typos");
    if ours.is_file() {
        return Ok(ours);
    }
    if let Some(program) = workspace::find_program("typos") {
        return Ok(program);
    }
    ensure(&SPELLING).context("or install the spell checker with `cargo install typos-cli`")?;
    let mut command = Command::new("pip");
    command
        .args([
            "install",
            "--quiet",
            "--no-deps",
            "--root-user-action=ignore",
            "--target",
        ])
        .arg(folder)
        .arg(format!("typos=={TYPOS_VERSION}"));
    process::run(&mut command)?;
    Ok(ours)
}

pub(crate) fn is_debian_like() -> bool {
    Path::new("/etc/debian_version").exists() && workspace::find_program("apt-get").is_some()
}

/// Installs packages; as root, or through sudo.
pub(crate) fn install(names: &[&str]) -> Result<()> {
    let mut update = process::as_root("apt-get");
    update.args(["update", "-qq"]).stdin(Stdio::null());
    process::run(&mut update)?;

    let (known, unknown): (Vec<&str>, Vec<&str>) =
        names.iter().partition(|name| is_in_archive(name));
    if !known.is_empty() {
        let mut command = process::as_root("env");
        command.arg("DEBIAN_FRONTEND=noninteractive");
        let install = apt_install(&known);
        command
            .arg(install.get_program())
            .args(install.get_args())
            .stdin(Stdio::null());
        process::run(&mut command)?;
    }
    if !unknown.is_empty() {
        bail!(
            "the package archives of this system do not have {}. For the eBPF object, a nightly \
             compiler works too: `rustup toolchain install nightly --component rust-src`",
            unknown.join(" ")
        );
    }
    Ok(())
}

fn is_in_archive(name: &str) -> bool {
    Command::new("apt-cache")
        .args(["show", "--no-all-versions", name])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn apt_install(names: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command
        .args(["install", "-y", "-qq", "--no-install-recommends"])
        .args(names);
    command
}

/// Installs bpf-linker if it is missing.
pub(crate) fn ensure_bpf_linker() -> Result<()> {
    if workspace::find_program("bpf-linker").is_some() {
        return Ok(());
    }
    let mut command = Command::new(workspace::cargo());
    command
        .args([
            "install",
            "--locked",
            "bpf-linker",
            "--version",
            BPF_LINKER_VERSION,
        ])
        .args(["--no-default-features", "--features", "llvm-22"])
        .env("LLVM_PREFIX", PathBuf::from("/usr/lib/llvm-22"));
    process::run(&mut command)
}
