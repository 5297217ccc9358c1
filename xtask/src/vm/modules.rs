//! The kernel modules of a guest: finds them in an unpacked package, and orders them by dependency.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::process;

/// The features that the tests use and that a cloud kernel has as modules. A kernel may have some
/// of them built in, or may lack them.
const MODULES: &[&str] = &[
    "ipv6",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "mptcp_diag",
    "veth",
    "sch_netem",
    "sch_tbf",
    "sch_ingress",
    "ifb",
    "tls",
    "nft_chain_nat",
    "nft_nat",
    "nft_masq",
    "nft_redir",
    "nft_numgen",
];

/// A module, decompressed.
pub(super) struct Module {
    pub(super) name: String,
    pub(super) object: Vec<u8>,
}

/// Returns the [`MODULES`] under `folder` with all their dependencies, dependencies first, and the
/// names of those that are missing.
pub(super) fn load_order(folder: &Path) -> Result<(Vec<Module>, Vec<&'static str>)> {
    let mut files = HashMap::new();
    index(&folder.join("kernel"), &mut files)
        .with_context(|| format!("cannot list the modules in {}", folder.display()))?;
    let mut loaded = Vec::new();
    for &name in MODULES {
        add(name, &files, &mut loaded)?;
    }
    let missing = MODULES
        .iter()
        .copied()
        .filter(|name| !files.contains_key(*name))
        .collect();
    Ok((loaded, missing))
}

/// Adds the dependencies of `name`, then `name`.
fn add(name: &str, files: &HashMap<String, PathBuf>, loaded: &mut Vec<Module>) -> Result<()> {
    if loaded.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let Some(path) = files.get(name) else {
        return Ok(());
    };
    let object = decompress(path)?;
    for dependency in dependencies(&object) {
        add(&dependency, files, loaded)?;
    }
    loaded.push(Module {
        name: name.to_owned(),
        object,
    });
    Ok(())
}

fn index(folder: &Path, files: &mut HashMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            index(&path, files)?;
        } else if let Some((name, _)) = path
            .file_name()
            .and_then(|name| name.to_str()?.split_once(".ko"))
        {
            // Module names have underscores where file names may have hyphens.
            files.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// Decompresses a module on the host, because a guest would take seconds.
fn decompress(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(path).with_context(|| format!("cannot read {}", path.display())),
    };
    process::stdout_bytes(Command::new(program).arg("-dc").arg(path))
        .with_context(|| format!("cannot decompress a kernel module: is `{program}` installed?"))
}

/// Returns the names in the `depends=` entry of the module's `.modinfo` section.
///
/// Packages have no `modules.dep`. `depmod` writes it when they are installed.
fn dependencies(object: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = object.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value: Vec<u8> = object[at + KEY.len()..]
        .iter()
        .copied()
        .take_while(|&byte| byte != 0)
        .collect();
    String::from_utf8_lossy(&value)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::dependencies;

    #[test]
    fn dependencies_come_from_modinfo() {
        let check = |object: &[u8], expected: &[&str]| assert_eq!(dependencies(object), expected);
        check(
            b"license=GPL\0depends=inet_diag\0retpoline=Y\0",
            &["inet_diag"],
        );
        check(b"license=GPL\0depends=a,b-c\0", &["a", "b_c"]);
        check(b"license=GPL\0depends=\0name=veth\0", &[]);
        check(b"no modinfo", &[]);
    }
}
