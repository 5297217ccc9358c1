//! Packages of Debian suites other than the one that this machine runs, without touching its own apt state.
//!
//! The mirror is the one that the machine is configured with, so this works behind whatever proxy or cache it uses.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::process;

/// Names a Debian mirror for machines whose own apt has none (Ubuntu, for one).
const MIRROR_VARIABLE: &str = "XTASK_DEBIAN_MIRROR";

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A suite of the Debian archive, with apt's state in a folder of ours that goes away with this value: the lists of
/// one suite take a hundred megabytes.
pub(super) struct Suite {
    state: PathBuf,
}

impl Suite {
    /// Reads the package lists of `suite` into the folder `state`.
    pub(super) fn open(suite: &str, state: &Path) -> Result<Self> {
        ensure!(
            Path::new(KEYRING).exists(),
            "{KEYRING} is missing: the kernels are Debian's, install `debian-archive-keyring`"
        );
        let mirror = mirror()?;
        fs::create_dir_all(state.join("lists/partial"))
            .with_context(|| format!("cannot create apt's state folder {}", state.display()))?;
        fs::write(
            state.join("sources.list"),
            format!("deb [signed-by={KEYRING} arch=amd64] {mirror} {suite} main\n"),
        )
        .context("cannot write a sources list")?;
        let suite = Self {
            state: state.to_owned(),
        };
        process::stdout(suite.apt("apt-get").args(["update", "-qq"]))
            .context("cannot read Debian's package lists")?;
        Ok(suite)
    }

    /// The names of all packages that start with `prefix`.
    pub(super) fn package_names(&self, prefix: &str) -> Result<Vec<String>> {
        let names = process::stdout(self.apt("apt-cache").args(["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// Downloads `package`, which apt verifies, and returns the path of the file in `folder`.
    pub(super) fn download(&self, package: &str, folder: &Path) -> Result<PathBuf> {
        // A folder of its own tells which file apt has made: names have versions that apt encodes in its own way.
        let folder = folder.join("download");
        if folder.exists() {
            fs::remove_dir_all(&folder).context("cannot remove what an interrupted run left")?;
        }
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        process::stdout(
            self.apt("apt-get")
                .args(["download", "-qq", package])
                .current_dir(&folder),
        )?;
        let mut files = fs::read_dir(&folder).context("cannot list the downloaded packages")?;
        let file = files
            .next()
            .with_context(|| format!("apt-get downloaded no file for {package}"))??;
        Ok(file.path())
    }

    fn apt(&self, program: &str) -> Command {
        let state = self.state.display();
        let mut command = Command::new(program);
        for option in [
            format!("Dir::Etc::sourcelist={state}/sources.list"),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::State::Lists={state}/lists"),
            format!("Dir::Cache::pkgcache={state}/pkgcache.bin"),
            format!("Dir::Cache::srcpkgcache={state}/srcpkgcache.bin"),
            // What is installed here must not count as a candidate.
            "Dir::State::status=/dev/null".to_owned(),
            "APT::Architecture=amd64".to_owned(),
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

impl Drop for Suite {
    fn drop(&mut self) {
        // What is left over is overwritten by the next run.
        let _ = fs::remove_dir_all(&self.state);
    }
}

/// The mirror of the Debian archive that this machine is configured with.
fn mirror() -> Result<String> {
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
