//! `cargo xtask ebpf`: builds the eBPF objects that the library embeds, the same bytes on every
//! machine.
//!
//! The objects are committed, so that users of the library need neither a BPF toolchain nor a build
//! script. Anyone can check them, because their bytes do not depend on the machine: paths are
//! remapped, and the sections that would still differ (debug information) are stripped.
//! `toolchain.txt` beside them records the compiler, because another compiler makes other bytes.

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
/// The program that `cargo xtask bench` compares with.
const FLOOR: &str = "floor";
const PROFILE: &str = "bpf";

/// The objects: a suffix of the file name, and the features. User space sets the offsets of kernel
/// structures and the architecture when it loads them, so they serve every machine.
const VARIANTS: &[(&str, &[&str])] = &[("", &[]), ("-perf", &["--features", "perf"])];

/// Build the eBPF objects that the library embeds.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Write no files; build the objects, and fail if the committed ones differ from them.
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let toolchain = toolchain()?;
    let record = record(&toolchain);
    let objects = VARIANTS
        .iter()
        .map(|(variant, features)| {
            let object = build(&toolchain, BINARY, features, args.check)?;
            Ok((committed_object(variant), object))
        })
        .collect::<Result<Vec<_>>>()?;

    if args.check {
        check(&record, &objects)
    } else {
        write(&record, &objects)
    }
}

/// Builds the floor of the benchmarks for this machine, and returns its path.
///
/// It is not committed, because only the benchmarks need it.
pub(crate) fn floor() -> Result<PathBuf> {
    let toolchain = toolchain()?;
    let object = build(&toolchain, FLOOR, &[], false)?;
    let path = workspace::target_dir().join("floor.o");
    fs::write(&path, object).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Returns the tools. Installs them if they are missing and this process may install packages.
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

fn committed_object(variant: &str) -> PathBuf {
    object_dir().join(format!("{BINARY}{variant}.o"))
}

/// Returns the text of `toolchain.txt`: everything besides the source that determines the bytes.
fn record(toolchain: &Toolchain) -> String {
    let flags = rustflags(&toolchain.bpf_linker, &[]).join(" ");
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
            "cannot read {}: run `cargo xtask ebpf` and commit its files",
            path.display()
        )
    })?;
    if committed_record != record {
        eprintln!(
            "The programs build. They are not compared with the committed objects, because other \
             tools made those.\ncommitted:\n{committed_record}\nhere:\n{record}"
        );
        return Ok(());
    }
    for (path, bytes) in objects {
        let committed = fs::read(path).with_context(|| {
            format!(
                "cannot read {}: run `cargo xtask ebpf` and commit its files",
                path.display()
            )
        })?;
        ensure!(
            committed == *bytes,
            "{} differs from the object built here: run `cargo xtask ebpf` and commit the result",
            relative(path).display()
        );
        eprintln!("{} matches the source", relative(path).display());
    }
    Ok(())
}

/// Builds the programs of `binary` and returns the stripped object.
fn build(toolchain: &Toolchain, binary: &str, features: &[&str], locked: bool) -> Result<Vec<u8>> {
    let remaps = remaps(toolchain)?;
    let flags = rustflags(&toolchain.bpf_linker, &remaps);

    // A target directory of its own, because this compiler would evict the artifacts of the host's.
    let target_dir = workspace::target_dir().join("ebpf");
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

/// The options of llvm-objcopy.
///
/// `.BTF` and the map sections must stay, because loaders find the maps by them. `.BTF.ext` only
/// adds source lines to the verifier's log, and is half of the object.
const STRIP: &[&str] = &[
    "--strip-debug",
    "--remove-section=.BTF.ext",
    "--remove-section=.rel.BTF.ext",
];

fn rustflags(linker: &Path, remaps: &[(PathBuf, &str)]) -> Vec<String> {
    let mut flags = vec![
        // The programs do not depend on the architecture (`arch.rs`). But aya-ebpf has code for
        // one, and takes the host's if none is set.
        "--cfg=bpf_target_arch=\"x86_64\"".to_owned(),
        format!("-Clinker={}", linker.display()),
        // bpf-linker makes BTF from the debug information.
        "-Clink-arg=--btf".to_owned(),
        // By default, bpf-linker asks LLVM to expand copies in a way that leaves the clearing of
        // memory, and copies between places that may overlap, to functions that loop over bytes.
        // Those take five instructions a byte.
        "-Clink-arg=--disable-expand-memcpy-in-order".to_owned(),
        "-Cdebuginfo=2".to_owned(),
    ];
    flags.extend(
        remaps
            .iter()
            .map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display())),
    );
    flags
}

/// Returns the folders of this machine whose names could enter the object, each with its
/// replacement.
fn remaps(toolchain: &Toolchain) -> Result<Vec<(PathBuf, &'static str)>> {
    let mut remaps = vec![(workspace::root().to_owned(), ".")];
    // The folder of a registry is named after the URL of its index, so a mirror has another name.
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
        // With a slash at its end, because "/root" could be a part of another path.
        let name = folder.join("");
        let name = name.as_os_str().as_encoded_bytes();
        // A root folder ("/") would match every path.
        if name.len() > 1 && object.windows(name.len()).any(|window| window == name) {
            bail!(
                "the object contains the path {} of this machine: strip its section, or remap the path \
                 (`remaps` in xtask/src/ebpf.rs)",
                folder.display()
            );
        }
    }
    Ok(())
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix(workspace::root()).unwrap_or(path)
}
