//! Network namespaces, and what `ip` and `tc` do in them.

use std::{
    fs::File,
    io::ErrorKind,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    process::{self, Command},
    thread,
};

use anyhow::{Context as _, bail};
use nix::sched::{CloneFlags, setns, unshare};

use crate::suite::skip;

/// A network namespace; it lives as long as this value or a process in it.
#[derive(Debug)]
pub struct Netns {
    file: File,
}

impl Netns {
    /// Moves the calling thread, and the processes it starts from now on, to a new namespace whose loopback is up.
    pub fn enter_new() -> anyhow::Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET).context("a new network namespace needs root")?;
        ip("link set lo up")?;
        Self::current()
    }

    /// Makes a namespace without going there.
    pub fn new() -> anyhow::Result<Self> {
        thread::scope(|scope| scope.spawn(Self::enter_new).join().unwrap())
    }

    /// The namespace of the calling thread.
    pub fn current() -> anyhow::Result<Self> {
        Ok(Self {
            file: File::open("/proc/thread-self/ns/net")?,
        })
    }

    /// The namespace that `ip netns` has given this name.
    pub fn named(name: &str) -> anyhow::Result<Self> {
        Ok(Self {
            file: File::open(format!("/run/netns/{name}"))?,
        })
    }

    /// The inode number, by which events name it.
    pub fn inode(&self) -> anyhow::Result<u32> {
        Ok(u32::try_from(self.file.metadata()?.ino())?)
    }

    /// Runs `f` in this namespace, on a thread that ends with it.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        let enter_and_run = || {
            setns(&self.file, CloneFlags::CLONE_NEWNET)?;
            f()
        };
        thread::scope(|scope| scope.spawn(enter_and_run).join().unwrap())
    }

    /// A path that names it, for `ip link set … netns PATH`.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", process::id(), self.file.as_raw_fd())
    }
}

/// The addresses of the two ends of [`veth`].
pub const NEAR: &str = "10.77.0.1";
/// The far end.
pub const FAR: &str = "10.77.0.2";

/// Joins the calling thread's namespace ([`NEAR`], `near0`) and a new one ([`FAR`], `far0`) by a pair of virtual
/// Ethernet devices.
pub fn veth() -> anyhow::Result<Netns> {
    let far = Netns::new()?;
    if ip("link add near0 type veth peer name far0").is_err() {
        return skip("no veth devices (module not loaded?) or no iproute2");
    }
    ip(&format!("link set far0 netns {}", far.path()))?;
    ip(&format!("addr add {NEAR}/24 dev near0"))?;
    ip("link set near0 up")?;
    far.run(|| {
        ip(&format!("addr add {FAR}/24 dev far0"))?;
        ip("link set far0 up")
    })?;
    Ok(far)
}

/// `ip ARGS` in the calling thread's namespace.
pub fn ip(args: &str) -> anyhow::Result<()> {
    run("ip", args)
}

/// `tc ARGS` in the calling thread's namespace; a kernel without that discipline, or no `tc`, skips the test.
pub fn tc(args: &str) -> anyhow::Result<()> {
    run("tc", args).or_else(|error| skip(format_args!("{error:#}")))
}

/// Adds these rules of nftables to the calling thread's namespace; a kernel without them skips the test.
pub fn nft(rules: &str) -> anyhow::Result<()> {
    let output = match Command::new("nft").arg(rules).output() {
        Err(error) if error.kind() == ErrorKind::NotFound => bail!("needs `nft` (nftables)"),
        output => output.context("nft")?,
    };
    if !output.status.success() {
        return skip(format_args!(
            "nft: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ));
    }
    Ok(())
}

fn run(program: &str, args: &str) -> anyhow::Result<()> {
    let output = match Command::new(program).args(args.split_whitespace()).output() {
        Err(error) if error.kind() == ErrorKind::NotFound => bail!("needs `{program}` (iproute2)"),
        output => output.with_context(|| program.to_owned())?,
    };
    if !output.status.success() {
        bail!(
            "{program} {args}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
