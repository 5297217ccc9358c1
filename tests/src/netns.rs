//! Network namespaces, and the commands of `ip` and `tc` in them.

use std::{
    fs::{self, File},
    io::ErrorKind,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    process::{self, Command},
    thread,
};

use anyhow::{Context as _, bail};
use nix::{
    errno::Errno,
    libc::{self, SOL_SOCKET},
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::socket::{getsockopt, sockopt::GetStruct},
};
use socket2::{Domain, Socket, Type};

use crate::{mounts, suite::skip};

/// A network namespace. It exists as long as this value or a process in it.
#[derive(Debug)]
pub struct Netns {
    file: File,
}

impl Netns {
    /// Moves the calling thread, and the processes that it starts later, to a new namespace whose
    /// loopback is up.
    pub fn enter_new() -> anyhow::Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET).context("a new network namespace needs root")?;
        ip("link set lo up")?;
        Self::current()
    }

    /// Makes a namespace without moving there.
    pub fn new() -> anyhow::Result<Self> {
        thread::scope(|scope| scope.spawn(Self::enter_new).join().unwrap())
    }

    /// Returns the namespace of the calling thread.
    pub fn current() -> anyhow::Result<Self> {
        Ok(Self {
            file: File::open("/proc/thread-self/ns/net")?,
        })
    }

    /// Returns the inode number, by which events name the namespace.
    pub fn inode(&self) -> anyhow::Result<u32> {
        Ok(u32::try_from(self.file.metadata()?.ino())?)
    }

    /// Returns the cookie of the namespace; `None` before Linux 5.14, which does not report it.
    pub fn cookie(&self) -> anyhow::Result<Option<u64>> {
        self.run(Self::current_cookie)
    }

    /// Returns the cookie of the calling thread's namespace.
    pub fn current_cookie() -> anyhow::Result<Option<u64>> {
        let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
        match getsockopt(&socket, NetnsCookie) {
            Ok(cookie) => Ok(Some(cookie)),
            Err(Errno::ENOPROTOOPT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Runs `f` in this namespace, on a thread that ends with `f`.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        let enter_and_run = || {
            setns(&self.file, CloneFlags::CLONE_NEWNET)?;
            f()
        };
        thread::scope(|scope| scope.spawn(enter_and_run).join().unwrap())
    }

    /// Returns a path of the namespace, for `ip link set … netns PATH`.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", process::id(), self.file.as_raw_fd())
    }
}

/// Lets the packets on the loopback of the calling thread's namespace be received in softirqs on
/// every CPU (receive packet steering). They interrupt the tasks there at any moment.
pub fn steer_packets() -> anyhow::Result<()> {
    let cpus = thread::available_parallelism()?.get().min(32);
    let mask = (1_u64 << cpus) - 1;
    let steer = || -> anyhow::Result<()> {
        // A mount of sysfs shows the namespace of the thread that makes it.
        mounts::make_private()?;
        let (sysfs, none) = (Some("sysfs"), None::<&str>);
        mount(sysfs, "/sys", sysfs, MsFlags::empty(), none)?;
        let file = "/sys/class/net/lo/queues/rx-0/rps_cpus";
        fs::write(file, format!("{mask:x}")).context(file)
    };
    thread::scope(|scope| scope.spawn(steer).join().unwrap())
}

/// A namespace as `ip netns add` makes it: mounted, with no process in it.
#[derive(Debug)]
pub struct MountedNetns(String);

impl MountedNetns {
    /// Makes a namespace; `name` is the test's.
    pub fn new(name: &str) -> anyhow::Result<Self> {
        let name = format!("tut-{name}-{}", process::id());
        ip(&format!("netns add {name}"))?;
        Ok(Self(name))
    }

    /// Opens the namespace.
    pub fn open(&self) -> anyhow::Result<Netns> {
        let file = File::open(format!("/run/netns/{}", self.0))?;
        Ok(Netns { file })
    }
}

impl Drop for MountedNetns {
    fn drop(&mut self) {
        // A mount that stays behind is no reason to fail.
        let _ = ip(&format!("netns del {}", self.0));
    }
}

/// `SO_NETNS_COOKIE`, the same number on every supported architecture.
const SO_NETNS_COOKIE: i32 = 71;

nix::getsockopt_impl!(
    NetnsCookie,
    SOL_SOCKET,
    SO_NETNS_COOKIE,
    u64,
    GetStruct<u64>
);

#[derive(Debug, Clone, Copy)]
struct NetnsCookie;

/// The near end of [`veth`].
pub const NEAR: &str = "10.77.0.1";
/// The far end of [`veth`].
pub const FAR: &str = "10.77.0.2";

/// Joins the calling thread's namespace ([`NEAR`], `near0`) and a new one ([`FAR`], `far0`) by a
/// pair of virtual Ethernet devices.
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

/// Runs `ip ARGS` in the calling thread's namespace.
pub fn ip(args: &str) -> anyhow::Result<()> {
    run("ip", args)
}

/// Runs `tc ARGS` in the calling thread's namespace. Skips the test on a kernel without that
/// discipline, and without `tc`.
pub fn tc(args: &str) -> anyhow::Result<()> {
    run("tc", args).or_else(|error| skip(format_args!("{error:#}")))
}

/// Adds these rules of nftables to the calling thread's namespace. Skips the test on a kernel
/// without them.
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
