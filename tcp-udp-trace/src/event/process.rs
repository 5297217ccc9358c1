//! The owner of a socket.

use std::{ffi::OsString, path::PathBuf, sync::Arc, time::Duration};

use super::comm::Comm;

/// The process that owns a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Process {
    /// The process id (the kernel's `tgid`) in the initial pid namespace, in whatever namespace the
    /// tracer runs.
    ///
    /// In a child pid namespace, such as that of a container, processes have other numbers.
    /// [`Filter::pid`](crate::Filter::pid) takes those.
    pub pid: u32,
    /// The thread that made the process the owner.
    pub tid: u32,
    /// The real user id of the process when it became the owner.
    pub uid: u32,
    /// The name of the process when it became the owner.
    pub comm: Comm,
    /// How the tracer knows the owner.
    pub origin: Origin,
    /// The cgroup of the process when it became the owner: the id of its directory in cgroup v2
    /// (its inode number). `None` where the kernel does not show it.
    ///
    /// [`Socket::cgroup`](crate::Socket::cgroup) is the cgroup of the socket. With socket
    /// activation, that is the cgroup of the service manager.
    #[cfg_attr(feature = "serde", serde(default))]
    pub cgroup: Option<u64>,
    /// The start time of the process, on the clock of [`Event::uptime`](crate::Event::uptime). The
    /// kernel reuses a pid, but never a pid with the same start time.
    #[cfg_attr(
        feature = "serde",
        serde(
            rename = "started_ns",
            with = "crate::event::serde_impls::nanos",
            default
        )
    )]
    pub started: Duration,
    /// More facts about the process, with
    /// [`process_details`](crate::TcpTracerBuilder::process_details). `None` also if the process
    /// ended before the tracer could read them.
    #[cfg_attr(
        feature = "serde",
        serde(default, skip_serializing_if = "Option::is_none")
    )]
    pub details: Option<Arc<ProcessDetails>>,
}

/// The last process that was seen using a socket that another process owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct User {
    /// The process id, as in [`Process::pid`].
    pub pid: u32,
    /// The thread that was seen first since another process used the socket.
    pub tid: u32,
    /// The real user id of the process at that time.
    pub uid: u32,
    /// The name of the process at that time.
    pub comm: Comm,
    /// The cgroup of the process at that time, as in [`Process::cgroup`].
    #[cfg_attr(feature = "serde", serde(default))]
    pub cgroup: Option<u64>,
    /// The start time of the process, as in [`Process::started`].
    #[cfg_attr(
        feature = "serde",
        serde(
            rename = "started_ns",
            with = "crate::event::serde_impls::nanos",
            default
        )
    )]
    pub started: Duration,
}

/// The program that a process ran when it became the owner of a socket, or when it was looked up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct ProcessDetails {
    /// The path of the executable (`/proc/PID/exe`). It starts at the root of the mount namespace
    /// of the executable's mount, also for a process in a chroot. It ends with ` (deleted)` if the
    /// file was deleted before the tracer read it. `None` only for a kernel thread.
    #[cfg_attr(feature = "serde", serde(with = "crate::event::serde_impls::path"))]
    pub exe: Option<PathBuf>,
    /// The command line (`/proc/PID/cmdline`), at most its first 4096 bytes. The process can change
    /// it at will.
    #[cfg_attr(feature = "serde", serde(with = "crate::event::serde_impls::words"))]
    pub cmdline: Vec<OsString>,
    /// The parent process. `None` for a process without one, and if the kernel does not show it.
    #[cfg_attr(feature = "serde", serde(default))]
    pub parent: Option<Parent>,
    /// The path of the process's cgroup, as `/proc/PID/cgroup` shows it: from the root of the
    /// hierarchy, or of the tracer's cgroup namespace.
    ///
    /// It is the path of [`Process::cgroup`], also after the process has ended, but the tracer must
    /// find it before the cgroup is removed. On a machine that uses cgroup v1, it is the path in
    /// the hierarchy `name=systemd`, or else in cgroup v2, or else in the hierarchy of `memory`. It
    /// is then that of the process when the tracer looked it up.
    #[cfg_attr(
        feature = "serde",
        serde(with = "crate::event::serde_impls::path", default)
    )]
    pub cgroup: Option<PathBuf>,
    /// The id of the container that the process runs in, as [`cgroup`](Self::cgroup) names it: the
    /// 64 hexadecimal digits that Docker, containerd, CRI-O and podman use. In a container that
    /// runs in another one, it is that of the inner one. `None` outside of containers, and for
    /// other runtimes.
    #[cfg_attr(feature = "serde", serde(default))]
    pub container: Option<String>,
    /// The systemd unit, as [`cgroup`](Self::cgroup) names it, such as `nginx.service`,
    /// `docker-….scope` or `session-3.scope`. For a service of a user's own manager, it is that
    /// manager: `user@1000.service`.
    #[cfg_attr(feature = "serde", serde(default))]
    pub unit: Option<String>,
    /// The systemd slice, as [`cgroup`](Self::cgroup) names it, such as `system.slice`. `None` also
    /// for the root slice.
    #[cfg_attr(feature = "serde", serde(default))]
    pub slice: Option<String>,
    /// The process id in the process's own pid namespace. In a container, it is often 1.
    #[cfg_attr(feature = "serde", serde(default))]
    pub ns_pid: Option<u32>,
}

/// The parent of a process, when the tracer looked it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Parent {
    /// The process id, as in [`Process::pid`].
    pub pid: u32,
    /// The name of the process at that time.
    pub comm: Comm,
}

/// The way in which the tracer learned the owner of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Origin {
    /// TCP: the process called `connect` or `listen`. For a connection that waits for its accept,
    /// it called `listen` on the listener. UDP: the process created the socket.
    Creator,
    /// The process accepted the connection.
    Acceptor,
    /// The process was the first one that the tracer saw send or receive.
    User,
    /// The process had the socket open when the tracer started. If several processes had, this is
    /// the one with the lowest pid. For a connection that waits for its accept, the process had the
    /// listener open.
    Snapshot,
}
