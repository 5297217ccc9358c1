//! Builds the image of a container, and runs it with only the capabilities that it needs.
//!
//! The images are in a store of their own, in the cache. Its driver needs nothing of the kernel.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::{
    program::{self, PROGRAM},
    traffic,
};
use crate::{arch::Arch, deps, process, workspace};

/// Writes the image of an architecture into `file`, in the format `oci-archive`.
pub(super) fn build(arch: &Arch, version: &str, file: &Path) -> Result<()> {
    deps::ensure(&deps::IMAGE)?;
    let context = workspace::cache_dir().join("image");
    let staged = context.join(arch.debian);
    workspace::recreate(&staged)?;
    fs::copy(program::path(arch), staged.join(PROGRAM)).context("cannot copy the program")?;
    let name = name(arch, version);
    process::run(
        podman()
            // No instruction of the file runs a program, so this needs no emulation.
            .args(["build", "--isolation=chroot", "--platform"])
            .arg(format!("linux/{}", arch.debian))
            .args([
                "--label",
                &format!("org.opencontainers.image.version={version}"),
            ])
            .args(["--tag", &name, "--file"])
            .arg(workspace::root().join("deploy/Containerfile"))
            .arg(&context),
    )?;
    process::run(
        podman()
            .args(["save", "--quiet", "--format=oci-archive", "--output"])
            .arg(file)
            .arg(&name),
    )?;
    process::stdout(podman().args(["rmi", &name])).map(drop)
}

/// Loads the image of this machine from its file, and traces a connection in a container.
pub(super) fn test(arch: &Arch, version: &str, file: &Path) -> Result<()> {
    process::run(podman().args(["load", "--quiet", "--input"]).arg(file))?;
    let name = name(arch, version);
    let mut command = podman();
    command
        .args(["run", "--rm", "--read-only", "--network=host", "--pid=host"])
        .args(["--cap-drop=all", "--cap-add=BPF,PERFMON,NET_ADMIN"])
        .args([
            "--cgroupns=host",
            "--volume=/sys/fs/cgroup:/sys/fs/cgroup:ro",
        ])
        // By default podman raises the limits, for which root may lack the capability.
        .args(["--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"])
        // The profile of podman 4.3 allows bpf(2) only with SYS_ADMIN.
        .args(["--security-opt=seccomp=unconfined", &name]);
    let traced = traffic::is_traced(command);
    process::stdout(podman().args(["rmi", "--force", &name]))?;
    traced.context("the container does not trace")?;
    eprintln!("the image traces with three capabilities");
    Ok(())
}

fn name(arch: &Arch, version: &str) -> String {
    format!("localhost/{PROGRAM}:{version}-{}", arch.debian)
}

fn podman() -> Command {
    let store = |name: &str| -> PathBuf { workspace::cache_dir().join("podman").join(name) };
    let mut command = Command::new("podman");
    command
        .args([
            "--storage-driver=vfs",
            "--runtime=runc",
            "--cgroup-manager=cgroupfs",
        ])
        .arg("--root")
        .arg(store("root"))
        .arg("--runroot")
        .arg(store("run"));
    command
}
