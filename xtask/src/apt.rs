//! Packages of other Debian suites and architectures than this machine's own, without touching its apt's state.
//!
//! The mirror is the one that the machine is configured with, so this works behind whatever proxy or cache it uses.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{arch::Arch, process, workspace};

/// Names a Debian mirror for machines whose own apt has none (Ubuntu, for one).
const MIRROR_VARIABLE: &str = "XTASK_DEBIAN_MIRROR";

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Archives whose packages are for one architecture, with apt's state in a folder of ours that goes away with this value: the lists of
/// one suite take a hundred megabytes.
pub(crate) struct Archive {
    state: PathBuf,
    arch: &'static Arch,
    /// The sources are ours, not this machine's.
    has_sources: bool,
}

impl Archive {
    /// Reads the package lists of a Debian suite.
    pub(crate) fn of_suite(suite: &str, arch: &'static Arch) -> Result<Self> {
        ensure!(
            Path::new(KEYRING).exists(),
            "{KEYRING} is missing: the kernels are Debian's, install `debian-archive-keyring`"
        );
        let mirror = mirror()?;
        let line = format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n");
        Self::open(suite, arch, Some(&line))
    }

    /// Reads the package lists of the archives that this machine is configured with, for any architecture.
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

    /// The names of all packages that start with `prefix`.
    pub(crate) fn package_names(&self, prefix: &str) -> Result<Vec<String>> {
        let names = process::stdout(self.apt("apt-cache").args(["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// The packages, and those that they need where nothing is installed.
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

    /// Downloads `packages`, which apt verifies, and unpacks them into `folder`. It is there only when all of them are in it.
    pub(crate) fn unpack(&self, packages: &[String], folder: &Path) -> Result<()> {
        // Under a name that nobody looks for, then renamed: an interrupted run leaves nothing that looks whole.
        let partial = folder.with_file_name("partial");
        if partial.exists() {
            fs::remove_dir_all(&partial).context("cannot remove what an interrupted run left")?;
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
        fs::rename(&root, folder).context("cannot move what was unpacked into place")?;
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
            // What is installed here must not count as a candidate.
            "Dir::State::status=/dev/null".to_owned(),
            format!("APT::Architecture={arch}"),
            format!("APT::Architectures={arch}"),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false".to_owned(),
            // Suites past their support are still signed, but no longer dated anew.
            "Acquire::Check-Valid-Until=false".to_owned(),
            // The unprivileged download user may not reach into the workspace.
            "APT::Sandbox::User=root".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }
}

impl Drop for Archive {
    fn drop(&mut self) {
        // What is left over is overwritten by the next run.
        let _ = fs::remove_dir_all(&self.state);
    }
}

/// The mirror of the Debian archive that this machine is configured with.
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
            "the kernels are Debian's: run this on Debian, or with apt and {MIRROR_VARIABLE} set"
        )
    })?;
    targets
        .lines()
        // The security archive calls itself Debian-Security.
        .find_map(|line| line.strip_suffix(" Debian Debian"))
        .map(str::to_owned)
        .with_context(|| {
            format!("apt has no Debian mirror configured: name one in {MIRROR_VARIABLE} to fetch kernels")
        })
}
