//! Notices that another process has detached a program from the cgroup.
//!
//! A privileged process may [detach a cgroup's link][detach] whose descriptor it does not own, and
//! the removal of the cgroup does the same. The link then stays, [without a cgroup][fdinfo]. The
//! kernel refuses this for the links of all other hooks in use.
//!
//! [detach]: https://github.com/torvalds/linux/blob/v6.12/kernel/bpf/syscall.c
//! [fdinfo]: https://github.com/torvalds/linux/blob/v6.12/kernel/bpf/cgroup.c

use std::{
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::{Ebpf, programs::Program};

/// The name of the file of a BPF link.
const LINK: &str = "anon_inode:bpf_link";

/// The links between our programs and the cgroup.
#[derive(Debug, Default)]
pub(super) struct CgroupLinks(Vec<CgroupLink>);

#[derive(Debug)]
struct CgroupLink {
    program: String,
    /// The file that shows the link.
    fdinfo: String,
}

impl CgroupLinks {
    /// Finds the links, of which aya does not show the descriptors.
    pub(super) fn of(ebpf: &Ebpf) -> Self {
        let programs: Vec<_> = ebpf
            .programs()
            .filter(|(_, program)| {
                matches!(
                    program,
                    Program::CgroupSock(_) | Program::CgroupSockAddr(_) | Program::CgroupSkb(_)
                )
            })
            .filter_map(|(name, program)| {
                let fd = program.fd().ok()?.as_fd().as_raw_fd();
                let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
                Some((field(&info, "prog_id")?.to_owned(), name))
            })
            .collect();
        if programs.is_empty() {
            return Self::default();
        }
        let files = fs::read_dir("/proc/self/fd").into_iter().flatten();
        let links = files.filter_map(|file| {
            let file = file.ok()?;
            // The process may have very many files, and this is the cheapest way to skip them.
            if !fs::read_link(file.path()).ok()?.ends_with(LINK) {
                return None;
            }
            let fdinfo = format!("/proc/self/fdinfo/{}", file.file_name().to_str()?);
            let info = fs::read_to_string(&fdinfo).ok()?;
            let id = field(&info, "prog_id").filter(|_| is_of_cgroup(&info))?;
            let (_, name) = programs.iter().find(|(program, _)| program == id)?;
            Some(CgroupLink {
                program: (*name).to_owned(),
                fdinfo,
            })
        });
        Self(links.collect())
    }

    /// Returns the name of a program that is no longer attached.
    pub(super) fn detached(&self) -> Option<&str> {
        let is_detached = |link: &&CgroupLink| {
            let info = fs::read_to_string(&link.fdinfo);
            info.is_ok_and(|info| is_of_cgroup(&info) && field(&info, "cgroup_id") == Some("0"))
        };
        let detached = self.0.iter().find(is_detached)?;
        Some(&detached.program)
    }
}

fn is_of_cgroup(info: &str) -> bool {
    field(info, "link_type") == Some("cgroup")
}

fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = info.lines().filter_map(|line| line.split_once(':'));
    lines
        .find(|(field, _)| *field == name)
        .map(|(_, value)| value.trim())
}
