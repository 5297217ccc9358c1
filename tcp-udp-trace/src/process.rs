//! Whose a socket is.

use std::{ffi::OsString, path::PathBuf, sync::Arc, time::Duration};

use crate::comm::Comm;

/// The process that owns a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Process {
    /// Process id (the kernel's `tgid`), as the initial pid namespace numbers it, wherever the tracer runs.
    ///
    /// A tracer in a child pid namespace, such as that of a container, knows its processes by other
    /// numbers. [`Filter::pid`](crate::Filter::pid) takes those.
    pub pid: u32,
    /// The thread that made the socket this process's own.
    pub tid: u32,
    /// The real user id of the process then.
    pub uid: u32,
    /// The process's name then.
    pub comm: Comm,
    /// How the owner is known.
    pub origin: Origin,
    /// The cgroup that the process was in then: the id of its directory in cgroup v2 (its inode
    /// number). `None` where the kernel does not tell it.
    ///
    /// [`Socket::cgroup`](crate::Socket::cgroup) is that of the socket. With socket activation, that
    /// is the cgroup of the service manager.
    #[cfg_attr(feature = "serde", serde(default))]
    pub cgroup: Option<u64>,
    /// When the process was made, on the clock of [`Event::uptime`](crate::Event::uptime). Its pid may be another's one day; pid and this together never are.
    #[cfg_attr(
        feature = "serde",
        serde(rename = "started_ns", with = "crate::json::nanos", default)
    )]
    pub started: Duration,
    /// What else is known of it, if [asked for](crate::TcpTracerBuilder::process_details). Absent too if the process had ended before it
    /// could be looked at.
    #[cfg_attr(
        feature = "serde",
        serde(default, skip_serializing_if = "Option::is_none")
    )]
    pub details: Option<Arc<ProcessDetails>>,
}

/// The last process that was seen using a socket which another process owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct User {
    /// Process id, as in [`Process::pid`].
    pub pid: u32,
    /// The thread that was seen first since another process used the socket.
    pub tid: u32,
    /// The real user id of the process then.
    pub uid: u32,
    /// The process's name then.
    pub comm: Comm,
    /// The cgroup that the process was in then, as in [`Process::cgroup`].
    #[cfg_attr(feature = "serde", serde(default))]
    pub cgroup: Option<u64>,
    /// When the process was made, as in [`Process::started`].
    #[cfg_attr(
        feature = "serde",
        serde(rename = "started_ns", with = "crate::json::nanos", default)
    )]
    pub started: Duration,
}

/// The program that a process ran when it became the owner of a socket, or when it was looked up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct ProcessDetails {
    /// The path of its executable (`/proc/PID/exe`), from the root of the mount namespace that the
    /// executable's mount is in, also for a process in a chroot. ` (deleted)` is at its end if the file
    /// was deleted before it was read. None only for a kernel thread.
    #[cfg_attr(feature = "serde", serde(with = "crate::json::path"))]
    pub exe: Option<PathBuf>,
    /// Its command line (`/proc/PID/cmdline`), which it can change at will: at most the first 4096 bytes.
    #[cfg_attr(feature = "serde", serde(with = "crate::json::words"))]
    pub cmdline: Vec<OsString>,
}

/// How the owner of a socket is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Origin {
    /// TCP: it called `connect` or `listen`; for a connection that waits to be accepted, it called `listen` on the listener.
    /// UDP: it made the socket.
    Creator,
    /// It accepted the connection.
    Acceptor,
    /// It was the first seen sending or receiving.
    User,
    /// It had the socket open when the tracer started; of several that had, it is the one with the lowest pid. For a connection that waits
    /// to be accepted: it had the listener open.
    Snapshot,
}
