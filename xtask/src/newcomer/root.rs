//! The root file system, and the commands that run in it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::page::{Folder, Step, User};
use crate::{apt, process, workspace};

/// The user, and the name of the home folder. The id is 1000, the first one of an ordinary user.
pub(super) const NAME: &str = "newcomer";

/// The packages that Rust needs to link, and those that the pages presume.
const PACKAGES: &str = "sudo,gcc,libc6-dev,ca-certificates";

/// The toolchain for folders without `rust-toolchain.toml`.
const DEFAULT_TOOLCHAIN: &str = "stable";

pub(super) struct Root {
    cache: PathBuf,
    folder: PathBuf,
    /// The folder of each toolchain, and its name.
    toolchains: Vec<(PathBuf, String)>,
}

impl Root {
    /// Makes a clean root file system, with a copy of all files that git does not ignore in the
    /// home folder.
    pub(super) fn new() -> Result<Self> {
        let cache = workspace::cache_dir().join("newcomer");
        let folder = cache.join("root");
        fs::create_dir_all(&cache).context("cannot create the cache")?;
        let base = cache.join("root.tar");
        apt::root_file_system(PACKAGES, &base)?;
        let root = Self {
            toolchains: toolchains()?,
            cache,
            folder,
        };
        root.shell(UNPACK, &[&base])?;
        root.copy_cargo()?;
        root.shell(CLONE, &[workspace::root()])?;
        Ok(root)
    }

    fn home(&self) -> PathBuf {
        self.folder.join("home").join(NAME)
    }

    /// Copies the files that a newcomer's rustup and cargo would download.
    fn copy_cargo(&self) -> Result<()> {
        for (_, name) in &self.toolchains {
            fs::create_dir_all(self.home().join(".rustup/toolchains").join(name))
                .context("cannot create the toolchains' folders")?;
        }
        let settings = format!("version = \"12\"\ndefault_toolchain = \"{DEFAULT_TOOLCHAIN}\"\n");
        fs::write(self.home().join(".rustup/settings.toml"), settings)
            .context("cannot write rustup's settings")?;
        self.shell(CARGO, &[&workspace::cargo_home()?])
    }

    /// Runs one of the scripts below as root; `$0` is the root file system, `$1` the first of
    /// `args`.
    fn shell(&self, script: &str, args: &[&Path]) -> Result<()> {
        let mut command = Command::new("sh");
        command.args(["-euc", script]).arg(&self.folder).args(args);
        process::stdout(&mut command).map(drop)
    }

    /// Writes the program that the reader writes before the command.
    pub(super) fn prepare(&self, step: &Step) -> Result<()> {
        if let Some(program) = &step.program {
            let at = fs::read_to_string(self.home().join(CWD)).context("no project yet")?;
            let folder = self.folder.join(at.trim().trim_start_matches('/'));
            fs::write(folder.join("src/main.rs"), program).context("cannot write the program")?;
        }
        Ok(())
    }

    /// Returns the command, with a terminal of its own, and mounts and processes that end with it.
    pub(super) fn command(&self, step: &Step) -> Command {
        let clone = format!("~{NAME}/tcp-udp-trace");
        let (folder, remember) = match step.folder {
            Folder::Project => (
                format!("\"$(cat ~{NAME}/{CWD} 2>/dev/null || echo ~{NAME})\""),
                format!(" && pwd >~{NAME}/{CWD}"),
            ),
            Folder::Clone => (clone, String::new()),
        };
        let line = format!(
            ". ~{NAME}/.cargo/env; cd {folder}; {}{remember}",
            step.command
        );
        let script = format!(
            "script --quiet --return --command {} /dev/null",
            process::quote(&line)
        );
        let mut command = process::isolated(RUN);
        command
            .arg(&self.folder)
            .arg(name(step.user))
            .arg(script)
            .arg(&self.cache);
        for (toolchain, name) in &self.toolchains {
            command
                .arg(toolchain)
                .arg(format!("/home/{NAME}/.rustup/toolchains/{name}"));
        }
        command
    }
}

fn name(user: User) -> &'static str {
    match user {
        User::Newcomer => NAME,
        User::Root => "root",
    }
}

/// Returns the toolchains of this machine's rustup that the commands of the pages need.
fn toolchains() -> Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    for name in [None, Some(DEFAULT_TOOLCHAIN)] {
        let mut rustc = Command::new("rustc");
        rustc
            .current_dir(workspace::root())
            .args(["--print", "sysroot"])
            // The cargo that runs this program sets it to the pinned toolchain.
            .env_remove("RUSTUP_TOOLCHAIN")
            .envs(name.map(|name| ("RUSTUP_TOOLCHAIN", name)));
        let folder = process::stdout(&mut rustc)?;
        let folder = PathBuf::from(folder.trim());
        let name = folder.file_name().context("the compiler is in no folder")?;
        let name = name.to_string_lossy().into_owned();
        let folder = fs::canonicalize(&folder).context("cannot find the toolchain")?;
        if !found.iter().any(|(_, known)| *known == name) {
            found.push((folder, name));
        }
    }
    Ok(found)
}

/// The file in the home folder that has the folder where a command of the project ended.
const CWD: &str = ".cwd";

const UNPACK: &str = r#"
rm -rf --one-file-system "$0"
mkdir "$0"
tar -xf "$1" -C "$0"
chroot "$0" useradd --create-home --shell /bin/bash newcomer
echo 'newcomer ALL=(ALL:ALL) NOPASSWD: ALL' >"$0/etc/sudoers.d/newcomer"
cp -L /etc/resolv.conf "$0/etc/resolv.conf"
cp -L /etc/hosts "$0/etc/hosts"
cp -L /etc/ssl/certs/ca-certificates.crt "$0/etc/ssl/certs/ca-certificates.crt"
"#;

const CARGO: &str = r#"
home="$0/home/newcomer"
mkdir -p "$home/.cargo/bin" "$home/.cargo/registry"
cp -L "$1/bin/rustup" "$home/.cargo/bin/"
for name in cargo rustc rustdoc; do ln -s rustup "$home/.cargo/bin/$name"; done
cp -a "$1/registry/index" "$1/registry/cache" "$home/.cargo/registry/"
echo 'export PATH="/home/newcomer/.cargo/bin:$PATH" RUSTUP_HOME=/home/newcomer/.rustup CARGO_HOME=/home/newcomer/.cargo' \
    >"$home/.cargo/env"
"#;

const CLONE: &str = r#"
clone="$0/home/newcomer/tcp-udp-trace"
mkdir -p "$clone/target"
cd "$1"
git ls-files --cached --others --exclude-standard -z | tar --create --null --files-from - | tar --extract --directory "$clone"
chown -R 1000:1000 "$0/home/newcomer"
"#;

/// `$0` root file system, `$1` user, `$2` command, `$3` cache, then pairs of folder and mount
/// point.
const RUN: &str = r#"
root=$0 user=$1 line=$2 cache=$3
shift 3
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
while [ $# -ge 2 ]; do
    mount --bind -o ro "$1" "$root$2"
    shift 2
done
# The artifacts of an earlier run.
mkdir -p "$cache/target"
chown 1000:1000 "$cache/target"
mount --bind "$cache/target" "$root/home/newcomer/tcp-udp-trace/target"
chroot "$root" su --login "$user" --command "$line" && code=0 || code=$?
chown -R 1000:1000 "$root/home/newcomer/tcp-udp-trace/target"
exit $code
"#;
