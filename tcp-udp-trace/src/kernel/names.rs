//! Resolves the names of a filter: processes by the caller's numbers, cgroups by their paths.

use std::{
    collections::HashMap,
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use aya::Ebpf;
use tcp_udp_trace_common::filter::{MAX_TREE_LEVEL, netns, op};

use super::{btf::ids::Ids, cgroup, control::control_filter, iter};
use crate::{
    error::{Error, ErrorKind},
    filter::resolve::Names,
};

/// The names of the calling process.
pub(super) struct Caller<'a> {
    ebpf: &'a mut Ebpf,
    ids: &'a Ids,
    /// The processes of the caller's pid namespace, when they are needed.
    processes: Option<Processes>,
}

enum Processes {
    /// The pid namespace is the initial one, so the numbers are the same.
    Initial,
    /// Maps numbers of the caller's pid namespace to those of the initial one.
    Child(HashMap<u32, u32>),
}

impl<'a> Caller<'a> {
    pub(super) fn new(ebpf: &'a mut Ebpf, ids: &'a Ids) -> Self {
        let processes = None;
        Self {
            ebpf,
            ids,
            processes,
        }
    }

    fn processes(&mut self) -> Result<&Processes, Error> {
        let processes = match self.processes.take() {
            Some(processes) => processes,
            None if control_filter(self.ebpf, &[op::LEVEL]).map_err(unknown)? == 0 => {
                Processes::Initial
            }
            None => Processes::Child(iter::pids(self.ebpf, self.ids).map_err(no_iterator)?),
        };
        Ok(self.processes.insert(processes))
    }
}

impl Names for Caller<'_> {
    fn own_pid(&mut self) -> Result<u32, Error> {
        let pid = control_filter(self.ebpf, &[op::CALLER]).map_err(unknown)?;
        Ok(pid.cast_unsigned())
    }

    fn pid(&mut self, number: u32) -> Result<Option<u32>, Error> {
        Ok(match self.processes()? {
            Processes::Initial => Some(number),
            Processes::Child(processes) => processes.get(&number).copied(),
        })
    }

    fn cgroup(&mut self, path: &Path) -> Result<u64, String> {
        cgroup::id_of(path)
    }

    fn cgroup_tree(&mut self, path: &Path) -> Result<(u64, u8), String> {
        let (folder, id) = cgroup::open(path)?;
        let fd = u64::from(folder.as_raw_fd().cast_unsigned());
        let level = control_filter(self.ebpf, &[op::CGROUP_LEVEL, fd, id]);
        let level = level.map_err(|error| format!("its level cannot be read: {error}"))?;
        match u8::try_from(level) {
            Ok(level) if level <= MAX_TREE_LEVEL => Ok((id, level)),
            _ => Err(format!("it is at level {level}, at most {MAX_TREE_LEVEL}")),
        }
    }

    fn cgroup_path(&mut self, id: u64) -> Result<PathBuf, String> {
        cgroup::path_of(id)
    }

    fn netns_cookie(&mut self, inode: u32) -> Result<Option<u64>, Error> {
        let cookie = find_netns(self.ebpf, inode).map_err(no_namespaces)?;
        if cookie.is_none() {
            log::warn!("netns is {inode}: there is no such network namespace, so none passes");
        }
        Ok(cookie)
    }
}

/// The maximum number of runs of one search for a namespace: enough for 100,000 namespaces.
const MAX_RUNS: usize = 4096;

/// Returns the cookie of the network namespace that has this inode now.
fn find_netns(ebpf: &Ebpf, inode: u32) -> io::Result<Option<u64>> {
    let inode = u64::from(inode);
    let mut answer = control_filter(ebpf, &[op::FIND_NETNS, inode])?;
    for _ in 0..MAX_RUNS {
        if answer != netns::PAUSED {
            break;
        }
        answer = control_filter(ebpf, &[op::GO_ON, inode])?;
    }
    match answer {
        netns::NONE => Ok(None),
        netns::FOUND => {
            let bits = |from: u32| {
                let bits = control_filter(ebpf, &[op::NETNS_COOKIE, from.into()])?;
                io::Result::Ok(u64::from(bits.cast_unsigned()) << from)
            };
            let each = netns::COOKIE_BITS;
            Ok(Some(bits(0)? | bits(each)? | bits(2 * each)?))
        }
        _ => Err(io::ErrorKind::TimedOut.into()),
    }
}

fn unknown(source: io::Error) -> Error {
    let message = "the pid namespace of this process cannot be read";
    Error::new(ErrorKind::Load, message).with_source(source)
}

fn no_namespaces(source: io::Error) -> Error {
    let message = "netns needs the kernel's list of network namespaces, which cannot be read";
    Error::new(ErrorKind::Unsupported, message).with_source(source)
}

fn no_iterator(source: String) -> Error {
    let message = "a pid in a child pid namespace needs the iterator over all tasks, which the \
                kernel refuses";
    Error::new(ErrorKind::Attach, message).with_source(source)
}
