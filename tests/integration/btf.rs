//! Kernels without BTF of their own.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{bail, ensure};
use integration_tests::{
    collector::{self, Collector},
    mounts,
    suite::Test,
    tcp_pair::{TcpPair, loopback},
    udp_pair::{self, Family},
};
use nix::mount::{MsFlags, mount};
use tcp_udp_trace::{ErrorKind, TracerHandle};
use tokio::runtime::Builder;

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Process: [
            from_a_file,
            of_a_kernel_without_its_own,
            errors_name_the_setting,
        ],
    ]
}

const OWN: &str = "/sys/kernel/btf";

/// Returns the kernel's BTF, and hides it from this process.
fn hide() -> anyhow::Result<Vec<u8>> {
    let btf = fs::read(Path::new(OWN).join("vmlinux"))?;
    mounts::make_private()?;
    mount(
        Some("nodev"),
        OWN,
        Some("tmpfs"),
        MsFlags::empty(),
        None::<&str>,
    )?;
    // The file system is empty, and only this process sees it.
    ensure!(fs::read_dir(OWN)?.next().is_none());
    Ok(btf)
}

/// Writes a file that only this process sees.
fn file(contents: &[u8]) -> anyhow::Result<PathBuf> {
    let path = Path::new(OWN).join("file");
    fs::write(&path, contents)?;
    Ok(path)
}

fn hooks(handle: &TracerHandle) -> String {
    let hooks = handle.hooks();
    let hooks: Vec<_> = hooks.iter().map(ToString::to_string).collect();
    hooks.join("\n")
}

/// Traces both protocols with this file, checks the contents of their events, and returns the
/// hooks.
fn trace(path: PathBuf) -> anyhow::Result<[String; 2]> {
    let of_udp = path.clone();
    let tcp = Collector::start_with(|builder| builder.btf(path))?;
    let udp = Collector::start_udp_with(|builder| builder.btf(of_udp))?;
    let hooks = [hooks(tcp.handle()), hooks(udp.handle())];
    eprintln!("{}\n{}", hooks[0], hooks[1]);
    TcpPair::traced_by(tcp, loopback(false))?.check_transfer(1_000, 2_000)?;
    udp_pair::check_transfer(Family::V6, udp)?;
    Ok(hooks)
}

fn from_a_file() -> anyhow::Result<()> {
    let btf = hide()?;
    for hooks in trace(file(&btf)?)? {
        ensure!(
            hooks.contains("snapshot=iter:") && hooks.contains("sample=netlink:"),
            "{hooks}"
        );
    }
    Ok(())
}

/// The file lacks the types that only a kernel with BTF of its own accepts from a program. So the
/// tracer finds the hooks that a kernel without BTF has.
fn of_a_kernel_without_its_own() -> anyhow::Result<()> {
    let mut btf = hide()?;
    for name in [&b"\0btf_trace_"[..], b"\0bpf_iter_"] {
        let mut at = 0;
        while let Some(found) = btf[at..]
            .windows(name.len())
            .position(|bytes| bytes == name)
        {
            at += found + 1;
            btf[at] = b'x';
        }
    }
    let [tcp, udp] = trace(file(&btf)?)?;
    for part in [
        "state=raw_tracepoint:inet_sock_set_state+tracepoint:",
        "no BTF of its own",
    ] {
        ensure!(tcp.contains(part), "{part}: {tcp}");
    }
    for hooks in [tcp, udp] {
        for part in ["snapshot=none", "sample=none", "no samples"] {
            ensure!(hooks.contains(part), "{part}: {hooks}");
        }
    }
    Ok(())
}

fn errors_name_the_setting() -> anyhow::Result<()> {
    drop(hide()?);
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let start = |path: Option<PathBuf>| {
        let builder = match path {
            Some(path) => collector::tcp().btf(path),
            None => collector::tcp(),
        };
        let Err(error) = runtime.block_on(builder.start()) else {
            bail!("started without BTF")
        };
        eprintln!("{error:?}");
        Ok((error.kind(), error.to_string()))
    };
    let (kind, message) = start(None)?;
    ensure!(kind == ErrorKind::Unsupported, "{kind:?}");
    ensure!(message.contains("`btf`"), "{message}");
    for path in [
        file(b"not BTF")?,
        "/nonexistent".into(),
        "/proc/self/exe".into(),
    ] {
        let name = path.display().to_string();
        let (kind, message) = start(Some(path))?;
        ensure!(kind == ErrorKind::InvalidConfig, "{kind:?}");
        ensure!(message.contains(&format!("btf is {name}")), "{message}");
    }
    Ok(())
}
