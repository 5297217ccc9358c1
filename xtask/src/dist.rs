//! `cargo xtask dist`: builds the files of a release, and tests each of them where users run it.
//!
//! The folder `target/release-files` then has a static program for each architecture, packed with
//! its manual pages and completions, a Debian package and an image for each, and the checksums.

mod guest;
mod image;
mod package;
mod program;
mod root;
mod traffic;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use self::program::PROGRAM;
use crate::{arch::Arch, process, workspace};

/// Build the static programs, Debian packages and image of a release, with checksums.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// For these architectures: `aarch64`, `x86_64`, or both.
    #[arg(long, value_delimiter = ',', value_parser = Arch::named, default_value = "x86_64,aarch64")]
    arch: Vec<&'static Arch>,
    /// Then run the program on these kernels in VMs, install the package in a clean Debian, and run
    /// the image, each with traffic. Needs root.
    #[arg(long)]
    test: bool,
    /// The kernels of the test.
    #[arg(
        long,
        value_name = "KERNELS",
        value_delimiter = ',',
        default_value = "5.10,7.2"
    )]
    vm: Vec<String>,
    /// Leave out the image.
    #[arg(long)]
    no_image: bool,
}

const CHECKSUMS: &str = "SHA256SUMS";

pub(crate) fn run(args: &Args) -> Result<()> {
    let host = Arch::host()?;
    ensure!(
        args.arch.iter().any(|arch| arch.is_host()),
        "the program of this machine writes the manual pages: name {host} as well"
    );
    ensure!(!args.test || process::is_root(), "the tests need root");
    let folder = workspace::target_dir().join("release-files");
    workspace::recreate(&folder)?;
    for arch in &args.arch {
        program::build(arch)?;
    }
    let shared = shared_files(&program::path(host))?;
    let version = program::version(&program::path(host))?;
    for arch in &args.arch {
        package::archive(arch, &version, &shared, &folder)?;
        package::debian(arch, &folder)?;
    }
    let image = |arch: &Arch| {
        let name = format!("{PROGRAM}-{version}-image-{}.tar", arch.debian);
        folder.join(name)
    };
    if !args.no_image {
        for arch in &args.arch {
            image::build(arch, &version, &image(arch))?;
        }
    }
    checksums(&folder)?;
    if args.test {
        guest::test(&program::path(host), &args.vm)?;
        root::test(&package::debian_file(host, &folder)?, &version)?;
        if !args.no_image {
            image::test(host, &version, &image(host))?;
        }
    }
    Ok(())
}

/// Writes the manual pages and completion scripts, which are the same for all architectures.
/// Returns their folder.
fn shared_files(program: &Path) -> Result<PathBuf> {
    // `Cargo.toml` of the command names this folder for cargo-deb.
    let shared = workspace::cache_dir().join("dist");
    workspace::recreate(&shared.join("man"))?;
    workspace::recreate(&shared.join("completions"))?;
    let write = |args: &[&str], file: &str| -> Result<String> {
        let text = process::stdout(Command::new(program).args(args))?;
        fs::write(shared.join(file), &text).with_context(|| format!("cannot write {file}"))?;
        Ok(text)
    };
    let page = write(&["man"], &format!("man/{PROGRAM}.1"))?;
    let commands = commands(&page);
    ensure!(!commands.is_empty(), "the manual page names no commands");
    for command in commands {
        write(&["man", &command], &format!("man/{PROGRAM}-{command}.1"))?;
    }
    for (shell, file) in [
        ("bash", "tcp-udp-trace.bash"),
        ("elvish", "tcp-udp-trace.elv"),
        ("fish", "tcp-udp-trace.fish"),
        ("powershell", "tcp-udp-trace.ps1"),
        // zsh finds a completion by the underscore.
        ("zsh", "_tcp-udp-trace"),
    ] {
        write(&["completions", shell], &format!("completions/{file}"))?;
    }
    Ok(shared)
}

/// Returns the commands that a manual page refers to, in lines like `tcp\-udp\-trace\-top(1)`.
fn commands(page: &str) -> Vec<String> {
    page.lines()
        .filter_map(|line| {
            let name = line.replace('\\', "");
            let command = name.strip_suffix("(1)")?.strip_prefix("tcp-udp-trace-")?;
            (command != "help").then(|| command.to_owned())
        })
        .collect()
}

fn checksums(folder: &Path) -> Result<()> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .context("cannot list the files of the release")?
        .map(|file| Ok(file?.file_name()))
        .collect::<Result<_>>()?;
    names.sort();
    let sums = process::stdout(Command::new("sha256sum").args(&names).current_dir(folder))?;
    fs::write(folder.join(CHECKSUMS), &sums).context("cannot write the checksums")?;
    for name in &names {
        let size = fs::metadata(folder.join(name))?.len();
        eprintln!("{:>8} KiB  {}", size / 1024, name.to_string_lossy());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::commands;

    #[test]
    fn a_manual_page_refers_to_the_commands() {
        let page = ".SH SUBCOMMANDS\n.TP\ntcp\\-udp\\-trace\\-trace(1)\nPrint\n.TP\n\
                    tcp\\-udp\\-trace\\-help(1)\n";
        assert_eq!(commands(page), ["trace"]);
    }
}
