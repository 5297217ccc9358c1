//! Finds and enters the network namespaces of the machine.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::sched::{CloneFlags, setns};

/// A network namespace that existed when it was found. It may have ended since.
#[derive(Debug)]
pub(crate) struct Namespace {
    inode: u64,
    path: PathBuf,
}

/// Returns whether the calling thread may enter other namespaces. The attempt to enter its own
/// namespace needs `CAP_SYS_ADMIN`, too.
pub(crate) fn may_enter() -> bool {
    File::open(OWN).is_ok_and(|own| setns(own, CloneFlags::CLONE_NEWNET).is_ok())
}

const OWN: &str = "/proc/thread-self/ns/net";

/// Returns the namespaces that have a thread or a mount, other than the calling thread's. A
/// namespace that only an open descriptor keeps alive cannot be found.
///
/// # Errors
///
/// `/proc` cannot be read.
pub(crate) fn others() -> io::Result<Vec<Namespace>> {
    let mut seen = HashSet::from([fs::metadata(OWN)?.ino()]);
    let mut found = Vec::new();
    let mut look_at = |path: PathBuf| {
        // Skips a namespace that has ended, or that this process may not see.
        let Ok(inode) = fs::metadata(&path).map(|metadata| metadata.ino()) else {
            return;
        };
        if seen.insert(inode) {
            found.push(Namespace { inode, path });
        }
    };
    for process in numbers(Path::new("/proc"))? {
        look_at(process.join("ns/net"));
        let tasks = process.join("task");
        // The folder has one link for each thread, and two of its own. Most processes have one
        // thread.
        if fs::metadata(&tasks).is_ok_and(|tasks| tasks.nlink() > 3) {
            for thread in numbers(&tasks).unwrap_or_default() {
                look_at(thread.join("ns/net"));
            }
        }
    }
    mounted(&fs::read_to_string("/proc/thread-self/mountinfo")?).for_each(look_at);
    Ok(found)
}

/// Returns the folders in `folder` whose names are numbers.
fn numbers(folder: &Path) -> io::Result<Vec<PathBuf>> {
    Ok(fs::read_dir(folder)?
        .flatten()
        .filter(|entry| {
            entry
                .file_name()
                .as_encoded_bytes()
                .iter()
                .all(u8::is_ascii_digit)
        })
        .map(|entry| entry.path())
        .collect())
}

/// Returns the paths at which network namespaces are mounted, as by `ip netns add` and container
/// engines.
fn mounted(mountinfo: &str) -> impl Iterator<Item = PathBuf> {
    // Fields: id, parent, device, root, mount point, ... (proc(5)). The root of a namespace's mount
    // is the namespace's name.
    mountinfo.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        root.starts_with("net:[").then(|| unescape(point).into())
    })
}

/// Replaces the escapes of mountinfo, which writes space, tab, newline and backslash as `\` and
/// three octal digits.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.get(..3).map(|code| u8::from_str_radix(code, 8)) {
            Some(Ok(code)) => {
                plain.push(code.into());
                plain.push_str(&part[3..]);
            }
            _ => {
                plain.push('\\');
                plain.push_str(part);
            }
        }
    }
    plain
}

impl Namespace {
    /// Moves the calling thread to this namespace. Returns false if the namespace has ended.
    ///
    /// # Errors
    ///
    /// The thread may not enter it.
    pub(crate) fn enter(&self) -> io::Result<bool> {
        let Ok(file) = File::open(&self.path) else {
            return Ok(false);
        };
        // Another process may have got the pid of a process that has ended.
        if file.metadata()?.ino() != self.inode {
            return Ok(false);
        }
        setns(file, CloneFlags::CLONE_NEWNET)?;
        Ok(true)
    }

    pub(crate) fn inode(&self) -> u64 {
        self.inode
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounted_namespaces_are_found() {
        let mountinfo = "\
            25 1 0:21 / /proc rw,nosuid - proc proc rw\n\
            90 60 0:4 net:[4026532282] /run/netns/a\\040b rw shared:20 - nsfs nsfs rw\n\
            91 60 0:4 mnt:[4026532283] /run/mnt rw shared:20 - nsfs nsfs rw\n\
            92 60 0:4 net:[4026532284] /run/net\\134x\\ rw\n\
            93 60\n";
        let found: Vec<_> = mounted(mountinfo).collect();
        assert_eq!(
            found,
            [Path::new("/run/netns/a b"), Path::new("/run/net\\x\\")]
        );
    }
}
