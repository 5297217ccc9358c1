//! `cargo xtask ebpf`: builds the eBPF object that the library embeds, the same bytes on every machine.
//!
//! The object is committed, so that users of the library need neither a BPF toolchain nor a build script. For anyone to
//! be able to check it, it must not depend on where it was built: paths are remapped, and what would
//! still differ (debug sections) is stripped. `toolchain.txt` beside it records which compiler made it, because another
//! compiler makes other bytes.

mod toolchain;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use self::toolchain::{TARGET, Toolchain};
use crate::{deps, process, workspace};

const PACKAGE: &str = "tcp-udp-trace-ebpf";
const BINARY: &str = "tcp-udp-trace";
/// What `cargo xtask bench` compares with.
const FLOOR: &str = "floor";
const PROFILE: &str = "bpf";

/// The architectures that the library carries an object for, as `std::env::consts::ARCH` names them.
///
/// The programs read kernel structures by offsets that they get at load time, but which register holds which argument
/// of a probed function is fixed at compile time, and so are the numbers of system calls.
const ARCHITECTURES: &[&str] = &["x86_64", "aarch64"];

/// What is built of the programs for each architecture: what the object's name says of it, and the features.
const VARIANTS: &[(&str, &[&str])] = &[("", &[]), ("-perf", &["--features", "perf"])];

/// Build the eBPF objects that the library embeds.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Write nothing; build, and fail if the committed objects are not what this source makes.
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let toolchain = toolchain()?;
    let record = record(&toolchain);
    let objects = ARCHITECTURES
        .iter()
        .flat_map(|&arch| VARIANTS.iter().map(move |&variant| (arch, variant)))
        .map(|(arch, (variant, features))| {
            let object = build(&toolchain, BINARY, arch, features, args.check)?;
            Ok((committed_object(arch, variant), object))
        })
        .collect::<Result<Vec<_>>>()?;

    if args.check {
        check(&record, &objects)
    } else {
        write(&record, &objects)
    }
}

/// Builds the floor of the benchmarks for this machine, and says where it is.
///
/// It is not committed: only who measures needs it.
pub(crate) fn floor() -> Result<PathBuf> {
    let toolchain = toolchain()?;
    let object = build(&toolchain, FLOOR, env::consts::ARCH, &[], false)?;
    let path = workspace::target_dir().join("floor.o");
    fs::write(&path, object).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// The tools; installed if they are missing and may be.
fn toolchain() -> Result<Toolchain> {
    let toolchain = match Toolchain::find() {
        Err(_) if deps::can_install() => {
            deps::ensure(&deps::EBPF)?;
            Toolchain::find()?
        }
        found => found?,
    };
    eprintln!("{}", toolchain.describe());
    // The sources must be unpacked before `remaps` can list their folders.
    process::run(
        Command::new(workspace::cargo())
            .arg("fetch")
            .current_dir(workspace::root()),
    )?;
    Ok(toolchain)
}

/// The folder of the committed objects.
fn object_dir() -> PathBuf {
    workspace::root().join("tcp-udp-trace").join("bpf")
}

fn committed_object(arch: &str, variant: &str) -> PathBuf {
    object_dir().join(format!("{BINARY}{variant}.{arch}.o"))
}

/// What is written to `toolchain.txt`: everything outside the source that decides the bytes.
fn record(toolchain: &Toolchain) -> String {
    let flags = rustflags("ARCH", &toolchain.bpf_linker, &[]).join(" ");
    let flags = flags.replace(&*toolchain.bpf_linker.to_string_lossy(), "bpf-linker");
    format!(
        "# What made the objects in this folder. `cargo xtask ebpf` writes this file, `cargo xtask ebpf --check`\n\
         # rebuilds the objects and compares them when it runs with the same tools.\n\
         {}command: cargo build --profile {PROFILE} --package {PACKAGE} --target {TARGET} [--features perf]\n\
         rustflags: {flags} --remap-path-prefix=<workspace>=. --remap-path-prefix=<registry sources>=registry\n\
         strip: llvm-objcopy {}\n",
        toolchain.describe(),
        STRIP.join(" "),
    )
}

fn write(record: &str, objects: &[(PathBuf, Vec<u8>)]) -> Result<()> {
    fs::create_dir_all(object_dir()).context("cannot create the folder of the objects")?;
    let record = (
        object_dir().join("toolchain.txt"),
        record.as_bytes().to_vec(),
    );
    for (path, bytes) in objects.iter().chain([&record]) {
        fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("wrote {} ({} bytes)", relative(path).display(), bytes.len());
    }
    Ok(())
}

fn check(record: &str, objects: &[(PathBuf, Vec<u8>)]) -> Result<()> {
    let path = object_dir().join("toolchain.txt");
    let committed_record = fs::read_to_string(&path).with_context(|| {
        format!(
            "cannot read {}: run `cargo xtask ebpf` and commit what it writes",
            path.display()
        )
    })?;
    if committed_record != record {
        eprintln!(
            "The programs build, but the committed objects were made by other tools, so there is nothing to compare.\n\
             committed:\n{committed_record}\nhere:\n{record}"
        );
        return Ok(());
    }
    for (path, bytes) in objects {
        let committed = fs::read(path).with_context(|| {
            format!(
                "cannot read {}: run `cargo xtask ebpf` and commit what it writes",
                path.display()
            )
        })?;
        ensure!(
            committed == *bytes,
            "{} is not what the source makes: run `cargo xtask ebpf` and commit the result",
            relative(path).display()
        );
        eprintln!("{} is what the source makes", relative(path).display());
    }
    Ok(())
}

/// Builds the programs of `binary` for `arch` and returns the stripped object.
fn build(
    toolchain: &Toolchain,
    binary: &str,
    arch: &str,
    features: &[&str],
    locked: bool,
) -> Result<Vec<u8>> {
    let remaps = remaps(toolchain)?;
    let flags = rustflags(arch, &toolchain.bpf_linker, &remaps);

    // A target directory of its own, because this compiler would evict the artifacts of the host's.
    let mut target_dir = workspace::target_dir().join("ebpf");
    // On a clean clone, the architectures of a check share the derive macros. A developer compiles
    // often, and in one directory the dependencies of one architecture would evict the other's.
    if !locked {
        target_dir.push(arch);
    }
    let mut cargo = toolchain.cargo();
    cargo
        .current_dir(workspace::root())
        .args(["build", "--package", PACKAGE, "--bin", binary])
        .args(["--profile", PROFILE, "--target", TARGET])
        .args(features)
        .args(toolchain.cargo_flags())
        .arg("--target-dir")
        .arg(&target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    if locked {
        cargo.arg("--locked");
    }
    process::run(&mut cargo)?;

    let linked = target_dir.join(TARGET).join(PROFILE).join(binary);
    let stripped = linked.with_extension("stripped.o");
    process::run(
        Command::new(&toolchain.objcopy)
            .args(STRIP)
            .arg(&linked)
            .arg(&stripped),
    )?;
    let bytes = fs::read(&stripped)
        .with_context(|| format!("cannot read the stripped object {}", stripped.display()))?;
    ensure_no_host_path(&bytes, &remaps)?;
    Ok(bytes)
}

/// `.BTF` and the map sections must stay: loaders find the maps by them. `.BTF.ext` only serves the verifier's log with
/// source lines; it is half of the object.
const STRIP: &[&str] = &[
    "--strip-debug",
    "--remove-section=.BTF.ext",
    "--remove-section=.rel.BTF.ext",
];

fn rustflags(arch: &str, linker: &Path, remaps: &[(PathBuf, &str)]) -> Vec<String> {
    let mut flags = vec![
        // Which registers hold the arguments of a probed function: aya-ebpf falls back to the host's architecture.
        format!("--cfg=bpf_target_arch=\"{arch}\""),
        format!("-Clinker={}", linker.display()),
        // BTF is made of the debug info.
        "-Clink-arg=--btf".to_owned(),
        "-Cdebuginfo=2".to_owned(),
    ];
    flags.extend(
        remaps
            .iter()
            .map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display())),
    );
    flags
}

/// The folders of this machine whose names could enter the object, and what stands for each.
fn remaps(toolchain: &Toolchain) -> Result<Vec<(PathBuf, &'static str)>> {
    let mut remaps = vec![(workspace::root().to_owned(), ".")];
    // Each registry has a folder, named after where its index is: a mirror's has another name.
    let sources = workspace::cargo_home()?.join("registry").join("src");
    for entry in fs::read_dir(&sources)
        .with_context(|| format!("cannot list the registry sources in {}", sources.display()))?
    {
        remaps.push((entry?.path(), "registry"));
    }
    remaps.push((toolchain.core_sources(), "rust"));
    Ok(remaps)
}

fn ensure_no_host_path(object: &[u8], remaps: &[(PathBuf, &str)]) -> Result<()> {
    let home = env::var_os("HOME").map(PathBuf::from);
    let folders = remaps.iter().map(|(folder, _)| folder).chain(&home);
    for folder in folders {
        // With a slash at its end: "/root" could well be part of something else.
        let name = folder.join("");
        let name = name.as_os_str().as_encoded_bytes();
        // A root folder ("/") would match every path.
        if name.len() > 1 && object.windows(name.len()).any(|window| window == name) {
            bail!(
                "the object contains the path {} of this machine: its section needs stripping or the path remapping \
                 (see `remaps` in xtask/src/ebpf.rs)",
                folder.display()
            );
        }
    }
    Ok(())
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix(workspace::root()).unwrap_or(path)
}
