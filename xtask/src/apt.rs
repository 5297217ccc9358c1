//! Fetches packages of other Debian suites and architectures, without a change to apt's own state,
//! and makes clean root file systems.
//!
//! The mirror is the one in apt's configuration, so this works behind the machine's proxy or cache.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{arch::Arch, deps, process, workspace};

/// The variable that names a Debian mirror, for machines whose apt has none, such as Ubuntu.
const MIRROR_VARIABLE: &str = "XTASK_DEBIAN_MIRROR";

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A package archive for one architecture.
///
/// Its apt state is in a folder of the cache. The lists of one suite take a hundred megabytes, so
/// the folder is removed when this value is dropped.
pub(crate) struct Archive {
    state: PathBuf,
    arch: &'static Arch,
    /// Whether the state has a sources list of its own, instead of that of this machine.
    has_sources: bool,
}

impl Archive {
    /// Reads the package lists of a Debian suite.
    pub(crate) fn of_suite(suite: &str, arch: &'static Arch) -> Result<Self> {
        ensure!(
            Path::new(KEYRING).exists(),
            "{KEYRING} is missing: install `debian-archive-keyring`, which verifies Debian's kernels"
        );
        let mirror = mirror()?;
        let line = format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n");
        Self::open(suite, arch, Some(&line))
    }

    /// Reads the package lists of the archives in this machine's configuration, for any
    /// architecture.
    pub(crate) fn of_this_machine(arch: &'static Arch) -> Result<Self> {
        Self::open("own", arch, None)
    }

    fn open(name: &str, arch: &'static Arch, sources: Option<&str>) -> Result<Self> {
        let archive = Self {
            state: workspace::cache_dir()
                .join("apt")
                .join(format!("{name}-{arch}")),
            arch,
            has_sources: sources.is_some(),
        };
        let state = &archive.state;
        fs::create_dir_all(state.join("lists/partial"))
            .with_context(|| format!("cannot create apt's state folder {}", state.display()))?;
        if let Some(sources) = sources {
            fs::write(state.join("sources.list"), sources)
                .context("cannot write a sources list")?;
        }
        process::stdout(archive.apt("apt-get").args(["update", "-qq"]))
            .context("cannot read Debian's package lists")?;
        Ok(archive)
    }

    /// Returns the names of all packages that start with `prefix`.
    pub(crate) fn package_names(&self, prefix: &str) -> Result<Vec<String>> {
        let names = process::stdout(self.apt("apt-cache").args(["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// Returns `packages` and all their dependencies, as if no package were installed.
    pub(crate) fn with_dependencies(&self, packages: &[&str]) -> Result<Vec<String>> {
        let mut command = self.apt("apt-get");
        command
            .args(["install", "--simulate", "--no-install-recommends"])
            .args(packages);
        let plan = process::stdout(&mut command)?;
        Ok(plan
            .lines()
            .filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next())
            .map(str::to_owned)
            .collect())
    }

    /// Downloads `packages`, which apt verifies, and unpacks them into `folder`.
    ///
    /// `folder` exists only once it is complete.
    pub(crate) fn unpack(&self, packages: &[String], folder: &Path) -> Result<()> {
        // An interrupted run leaves only this folder, which the next run removes.
        let partial = folder.with_file_name("partial");
        if partial.exists() {
            fs::remove_dir_all(&partial)
                .context("cannot remove the folder of an interrupted run")?;
        }
        let (download, root) = (partial.join("download"), partial.join("root"));
        fs::create_dir_all(&download)
            .with_context(|| format!("cannot create {}", download.display()))?;
        process::stdout(
            self.apt("apt-get")
                .args(["download", "-qq"])
                .args(packages)
                .current_dir(&download),
        )?;
        for file in fs::read_dir(&download).context("cannot list the downloaded packages")? {
            let file = file?.path();
            process::stdout(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&root))
                .context("cannot unpack a package")?;
        }
        fs::rename(&root, folder).context("cannot rename the folder of unpacked packages")?;
        fs::remove_dir_all(&partial).context("cannot remove the downloaded packages")
    }

    fn apt(&self, program: &str) -> Command {
        let state = self.state.display();
        let mut command = Command::new(program);
        if self.has_sources {
            command
                .arg("-o")
                .arg(format!("Dir::Etc::sourcelist={state}/sources.list"))
                .args(["-o", "Dir::Etc::sourceparts=-"]);
        }
        let arch = self.arch.debian;
        for option in [
            format!("Dir::State::Lists={state}/lists"),
            format!("Dir::Cache::pkgcache={state}/pkgcache.bin"),
            format!("Dir::Cache::srcpkgcache={state}/srcpkgcache.bin"),
            // Packages that are installed here must not count as candidates.
            "Dir::State::status=/dev/null".to_owned(),
            format!("APT::Architecture={arch}"),
            format!("APT::Architectures={arch}"),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false".to_owned(),
            // A suite past its end of support has a signature, but its date is no longer renewed.
            "Acquire::Check-Valid-Until=false".to_owned(),
            // apt's unprivileged download user may be unable to read the workspace.
            "APT::Sandbox::User=root".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }
}

impl Drop for Archive {
    fn drop(&mut self) {
        // If this fails, the next run overwrites the files.
        let _ = fs::remove_dir_all(&self.state);
    }
}

/// The suite of clean root file systems.
const ROOT_SUITE: &str = "bookworm";

/// Makes an archive of a clean Debian root file system with these packages, unless it exists.
pub(crate) fn root_file_system(packages: &str, archive: &Path) -> Result<()> {
    if archive.is_file() {
        return Ok(());
    }
    deps::ensure(&deps::ROOT)?;
    eprintln!("making a Debian root file system");
    let partial = archive.with_file_name("partial.tar");
    process::stdout(
        Command::new("mmdebstrap")
            .args(["--quiet", "--variant=minbase"])
            .arg(format!("--include={packages}"))
            .arg(ROOT_SUITE)
            .arg(&partial)
            .arg(mirror()?),
    )?;
    fs::rename(&partial, archive).context("cannot rename the archive")
}

/// Returns the mirror of the Debian archive in this machine's configuration.
pub(crate) fn mirror() -> Result<String> {
    if let Ok(mirror) = env::var(MIRROR_VARIABLE) {
        return Ok(mirror);
    }
    let targets = process::stdout(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(ORIGIN) $(LABEL)",
        "Created-By: Packages",
    ]))
    .with_context(|| {
        format!(
            "cannot list apt's sources: Debian's kernels need Debian, or apt and {MIRROR_VARIABLE}"
        )
    })?;
    targets
        .lines()
        // The label of the security archive is Debian-Security.
        .find_map(|line| line.strip_suffix(" Debian Debian"))
        .map(str::to_owned)
        .with_context(|| format!("apt has no Debian mirror: set {MIRROR_VARIABLE} to one"))
}
