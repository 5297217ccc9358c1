//! The guest's root file system: an init script, busybox, iproute2, kernel modules and the test
//! program.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ffi::OsString,
    fs,
    path::Path,
};

use anyhow::{Context as _, Result};

use super::{cpio::Archive, kernel::Installed, machine::Guest, modules, userland::Userland};
use crate::{arch::Arch, process};

/// The program that runs in a guest.
pub(crate) struct Job<'a> {
    pub(crate) arch: &'static Arch,
    pub(crate) program: &'a Path,
    pub(crate) args: &'a [OsString],
    /// Whether the program runs only the tests that the kernel has by default (docs/tests.md).
    pub(crate) only_default_tests: bool,
    /// Files that the program needs, each with its path in the guest.
    pub(crate) files: &'a [(&'a Path, &'a str)],
    /// Parameters of the kernel that add to the usual ones.
    pub(crate) parameters: &'a str,
    /// Options of QEMU that add to the usual ones or override them.
    pub(crate) qemu: &'a [&'a str],
}

const INIT: &str = include_str!("init.sh");

/// The programs in a guest: common tools, and those with which the tests set up links.
///
/// The shell is not busybox's, which would prefer its own `ip` to the one on the search path.
const PROGRAMS: &[(&str, &str)] = &[
    ("busybox", "/bin/busybox"),
    ("sh", "/bin/sh"),
    ("ip", "/usr/sbin/ip"),
    ("tc", "/usr/sbin/tc"),
    ("ss", "/usr/bin/ss"),
    ("nft", "/usr/sbin/nft"),
];

/// Programs without which a test is skipped: other tracers, and a debugger.
const OPTIONAL_PROGRAMS: &[(&str, &str)] = &[
    ("tcpstates", "/usr/sbin/tcpstates"),
    ("tcplife", "/usr/sbin/tcplife"),
    ("strace", "/usr/bin/strace"),
];

/// Empty folders: mount points, and folders for busybox's links.
const FOLDERS: &[&str] = &[
    "/proc", "/sys", "/dev", "/tmp", "/run", "/root", "/var", "/bin", "/sbin",
];

/// Builds an image that runs the job's program with `args`, and ends.
///
/// It is not compressed, because the guest would be slow to unpack it.
pub(super) fn build(
    guest: Guest,
    kernel: &Installed,
    job: &Job<'_>,
    args: &[OsString],
    userland: &Userland,
) -> Result<Vec<u8>> {
    let mut files = BTreeMap::new();
    files.insert("/init".to_owned(), INIT.as_bytes().to_vec());
    files.insert(
        "/etc/passwd".to_owned(),
        b"root:x:0:0::/root:/bin/sh\n".to_vec(),
    );
    files.insert(
        "/etc/hosts".to_owned(),
        b"127.0.0.1 localhost\n::1 localhost\n".to_vec(),
    );
    let name = guest.kernel.name_on(job.arch);
    let variable = match guest.machine {
        None => job
            .only_default_tests
            .then(|| format!("TUT_DEFAULT_TESTS_OF={name}")),
        Some(machine) => args
            .is_empty()
            .then(|| format!("TUT_TESTS={}", machine.tests.join(","))),
    };
    let commands = guest.machine.map_or("", |machine| machine.commands);
    files.insert(
        "/tests/run".to_owned(),
        run_script(args, commands, variable).into_bytes(),
    );
    add_program(&mut files, userland, job.program, "/tests/integration")?;
    for (path, destination) in job.files {
        files.insert((*destination).to_owned(), read(path)?);
    }
    let programs = guest.machine.map_or(&[][..], |machine| machine.programs);
    for (name, destination) in PROGRAMS.iter().chain(programs) {
        add_program(&mut files, userland, &userland.program(name)?, destination)?;
    }
    for (name, destination) in OPTIONAL_PROGRAMS {
        if let Ok(program) = userland.program(name) {
            add_program(&mut files, userland, &program, destination)?;
        }
    }

    let (modules, missing) = modules::load_order(&kernel.modules)?;
    for (index, module) in modules.into_iter().enumerate() {
        files.insert(
            format!("/modules/{index:02}-{}.ko", module.name),
            module.object,
        );
    }
    // These are built into the kernel, or it lacks them. The guest's log lists them.
    files.insert(
        "/modules/missing".to_owned(),
        missing.join(" ").into_bytes(),
    );

    Ok(archive(&files))
}

/// Returns a script that prepares the machine, and runs the tests with the arguments. The kernel's
/// command line would need another quoting.
fn run_script(args: &[OsString], commands: &str, variable: Option<String>) -> String {
    let variable = variable
        .map(|variable| format!("export {variable}\n"))
        .unwrap_or_default();
    let words: Vec<_> = args
        .iter()
        .map(|arg| process::quote(&arg.to_string_lossy()))
        .collect();
    format!(
        "#!/bin/sh -e\n{commands}\n{variable}exec /tests/integration {}\n",
        words.join(" ")
    )
}

/// Adds the program at `path` as `destination`, and its shared libraries where its loader looks for
/// them.
fn add_program(
    files: &mut BTreeMap<String, Vec<u8>>,
    userland: &Userland,
    path: &Path,
    destination: &str,
) -> Result<()> {
    files.insert(destination.to_owned(), read(path)?);
    for (library, destination) in userland.libraries(path)? {
        if let Entry::Vacant(entry) = files.entry(destination) {
            entry.insert(read(&library)?);
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {} for the guest", path.display()))
}

fn archive(files: &BTreeMap<String, Vec<u8>>) -> Vec<u8> {
    let mut archive = Archive::default();
    let mut folders: Vec<String> = FOLDERS.iter().map(|&folder| folder.to_owned()).collect();
    for path in files.keys() {
        let parents = Path::new(path)
            .ancestors()
            .skip(1)
            .filter(|parent| *parent != Path::new("/"));
        folders.extend(parents.map(|parent| parent.to_string_lossy().into_owned()));
    }
    // Sorted, so that a folder comes before its contents.
    folders.sort();
    folders.dedup();
    for folder in &folders {
        archive.directory(folder);
    }
    // The kernel opens it for init's output before any file system is mounted.
    archive.character_device("/dev/console", 5, 1);
    for (path, contents) in files {
        archive.file(path, contents);
    }
    archive.finish()
}
