//! The kernels that the tests run on: Debian's packages, unpacked into the cache.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{apt::Archive, arch::Arch, workspace};

/// One kernel of the table.
pub(crate) struct Kernel {
    /// The name for `--vm`.
    pub(crate) name: &'static str,
    /// Whether `--vm extra` names it, and not `--vm all`. `.ci/run` has no time for it.
    pub(crate) is_extra: bool,
    suite: &'static str,
    /// The names of its packages are `PREFIX`, a part that changes with each update, the flavour,
    /// Debian's architecture, and `SUFFIX`.
    prefixes: &'static [&'static str],
    moving_part_starts_with: &'static str,
    flavour: &'static str,
    suffix: &'static str,
    /// About how many seconds the default tests take, on two cores with two guests at a time. The
    /// guest that takes longest starts first, so that no core is idle while the last one runs.
    pub(super) seconds: u32,
}

/// The flavour of small kernels for virtual machines.
const CLOUD: &str = "cloud";
/// The flavour of real-time kernels (`CONFIG_PREEMPT_RT`).
const REAL_TIME: &str = "rt";

/// The packages of a kernel: one, and since 7.2 one more for the modules.
const ONE_PACKAGE: &[&str] = &["linux-image-"];
const TWO_PACKAGES: &[&str] = &["linux-binary-", "linux-modules-"];

/// The oldest supported kernel, two long-term ones and a new one, then those that run only on
/// request: the newest of any suite, and real-time kernels.
///
/// They are Debian's, because one mirror has them all.
pub(crate) const KERNELS: &[Kernel] = &[
    Kernel {
        name: "5.10",
        is_extra: false,
        suite: "bullseye",
        prefixes: ONE_PACKAGE,
        moving_part_starts_with: "5.10.",
        flavour: CLOUD,
        suffix: "-unsigned",
        seconds: 340,
    },
    Kernel {
        name: "6.1",
        is_extra: false,
        suite: "bookworm",
        prefixes: ONE_PACKAGE,
        moving_part_starts_with: "6.1.",
        flavour: CLOUD,
        suffix: "-unsigned",
        seconds: 330,
    },
    Kernel {
        name: "6.12",
        is_extra: false,
        suite: "trixie",
        prefixes: ONE_PACKAGE,
        moving_part_starts_with: "6.12.",
        flavour: CLOUD,
        suffix: "-unsigned",
        seconds: 500,
    },
    Kernel {
        name: "7.2",
        is_extra: false,
        suite: "sid",
        prefixes: TWO_PACKAGES,
        moving_part_starts_with: "7.2.",
        flavour: CLOUD,
        suffix: "",
        seconds: 490,
    },
    Kernel {
        name: "7.3",
        is_extra: true,
        suite: "trixie-backports",
        prefixes: TWO_PACKAGES,
        moving_part_starts_with: "7.3.",
        flavour: CLOUD,
        suffix: "",
        seconds: 500,
    },
    Kernel {
        name: "5.10-rt",
        is_extra: true,
        suite: "bullseye",
        prefixes: ONE_PACKAGE,
        moving_part_starts_with: "5.10.",
        flavour: REAL_TIME,
        suffix: "-unsigned",
        seconds: 500,
    },
    Kernel {
        name: "6.1-rt",
        is_extra: true,
        suite: "bookworm",
        prefixes: ONE_PACKAGE,
        moving_part_starts_with: "6.1.",
        flavour: REAL_TIME,
        suffix: "-unsigned",
        seconds: 500,
    },
    Kernel {
        name: "6.12-rt",
        is_extra: true,
        suite: "trixie",
        prefixes: ONE_PACKAGE,
        moving_part_starts_with: "6.12.",
        flavour: REAL_TIME,
        suffix: "-unsigned",
        seconds: 700,
    },
    Kernel {
        name: "7.3-rt",
        is_extra: true,
        suite: "trixie-backports",
        prefixes: TWO_PACKAGES,
        moving_part_starts_with: "7.3.",
        flavour: REAL_TIME,
        suffix: "",
        seconds: 700,
    },
];

/// An unpacked kernel.
pub(crate) struct Installed {
    /// The release that `uname -r` shows there, without the flavour.
    pub(crate) release: String,
    pub(crate) vmlinuz: PathBuf,
    pub(crate) modules: PathBuf,
}

impl Kernel {
    /// Returns the name of its results, logs and files.
    pub(crate) fn name_on(&self, arch: &Arch) -> String {
        if arch.is_host() {
            self.name.to_owned()
        } else {
            format!("{}-{arch}", self.name)
        }
    }

    /// Returns the kernel from the cache, or else from the mirror.
    pub(crate) fn cached_or_fetch(&self, arch: &'static Arch) -> Result<Installed> {
        match self.newest_cached(arch) {
            Some(installed) => Ok(installed),
            None => self.fetch(arch),
        }
    }

    /// Returns the newest one of the mirror, or else the cached one.
    pub(crate) fn fetch(&self, arch: &'static Arch) -> Result<Installed> {
        match (self.fetch_newest(arch), self.newest_cached(arch)) {
            (Ok(installed), _) => Ok(installed),
            (Err(error), Some(cached)) => {
                eprintln!(
                    "{}: keeping {} from the cache: {error:#}",
                    self.name, cached.release
                );
                Ok(cached)
            }
            (Err(error), None) => Err(error.context(format!(
                "cannot fetch kernel {} and none is cached",
                self.name
            ))),
        }
    }

    fn folder(&self, arch: &Arch) -> PathBuf {
        workspace::cache_dir()
            .join("kernels")
            .join(self.name_on(arch))
    }

    fn newest_cached(&self, arch: &Arch) -> Option<Installed> {
        let releases = fs::read_dir(self.folder(arch))
            .ok()?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with(self.moving_part_starts_with));
        let newest = releases.max_by_key(|release| version_key(release))?;
        Installed::open(&self.folder(arch), &newest).ok()
    }

    fn fetch_newest(&self, arch: &'static Arch) -> Result<Installed> {
        let archive = Archive::of_suite(self.suite, arch)?;
        let [kernel_prefix, ..] = self.prefixes else {
            bail!("no packages in the table")
        };
        let suffix = format!("-{}-{}{}", self.flavour, arch.debian, self.suffix);
        let release = archive
            .package_names(kernel_prefix)?
            .iter()
            .filter_map(|name| name.strip_prefix(kernel_prefix)?.strip_suffix(&*suffix))
            .filter(|moving| moving.starts_with(self.moving_part_starts_with))
            .max_by_key(|moving| version_key(moving))
            .map(str::to_owned)
            .with_context(|| {
                format!(
                    "the mirror has no {kernel_prefix}{}*{} in {}: update the table in \
                     xtask/src/vm/kernel.rs",
                    self.moving_part_starts_with, suffix, self.suite
                )
            })?;

        let folder = self.folder(arch);
        if !folder.join(&release).is_dir() {
            eprintln!("{}: fetching {release}", self.name_on(arch));
            let packages: Vec<_> = self
                .prefixes
                .iter()
                .map(|prefix| format!("{prefix}{release}{suffix}"))
                .collect();
            archive.unpack(&packages, &folder.join(&release))?;
        }
        Installed::open(&folder, &release)
    }
}

impl Installed {
    fn open(folder: &Path, release: &str) -> Result<Self> {
        let root = folder.join(release);
        // Older packages have the modules in /lib and the kernel in /boot.
        let modules = ["usr/lib/modules", "lib/modules"]
            .iter()
            .find_map(|parent| only_child(&root.join(parent)))
            .with_context(|| {
                format!(
                    "no modules in {}: remove that folder and try again",
                    root.display()
                )
            })?;
        let vmlinuz = Some(modules.join("vmlinuz"))
            .filter(|path| path.is_file())
            .or_else(|| {
                fs::read_dir(root.join("boot"))
                    .ok()?
                    .filter_map(|entry| Some(entry.ok()?.path()))
                    .find(|path| {
                        path.file_name()
                            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"vmlinuz"))
                    })
            })
            .with_context(|| {
                format!(
                    "no vmlinuz in {}: remove that folder and try again",
                    root.display()
                )
            })?;
        Ok(Self {
            release: release.to_owned(),
            vmlinuz,
            modules,
        })
    }
}

fn only_child(folder: &Path) -> Option<PathBuf> {
    fs::read_dir(folder)
        .ok()?
        .find_map(|entry| Some(entry.ok()?.path()))
}

/// Orders releases as their numbers do, not as text: 6.1.0-9 before 6.1.0-48.
fn version_key(release: &str) -> Vec<u64> {
    release
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::version_key;

    #[test]
    fn releases_are_ordered_by_number() {
        let check = |older: &str, newer: &str| assert!(version_key(older) < version_key(newer));
        check("6.1.0-9", "6.1.0-48");
        check("6.12.9+deb13", "6.12.107+deb13");
        check("7.2.9", "7.2.13");
    }
}
