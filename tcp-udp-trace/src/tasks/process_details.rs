//! Looks up the program that a process runs in `/proc`, if the eBPF programs have not reported it.

use std::{
    collections::HashSet,
    ffi::OsString,
    fs::{self, File},
    io::Read as _,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use lru::LruCache;
use tokio::{sync::oneshot, time::timeout};

use crate::{
    event::{
        Event,
        comm::Comm,
        process::{Process, ProcessDetails},
    },
    pipeline::images::words,
};

/// How many processes are kept.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(4096).unwrap();
/// How long events wait for a look-up.
const PATIENCE: Duration = Duration::from_millis(50);
/// How many look-ups may still run after their time limit. `/proc` blocks as long as a process
/// holds the lock of its memory.
const MOST_PENDING: usize = 4;
/// The limit of bytes of a command line.
const CMDLINE: u64 = 4096;
/// `/proc/PID/stat` counts time in hundredths of a second (`USER_HZ`).
const TICK: Duration = Duration::from_millis(10);

/// A process with its name. A process that executes a new program usually gets a new name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    pid: u32,
    started: Duration,
    comm: Comm,
}

type Found = Vec<(Key, Option<Arc<ProcessDetails>>)>;

/// The known details of processes.
#[derive(Debug)]
pub(crate) struct Details {
    known: LruCache<Key, Option<Arc<ProcessDetails>>>,
    pending: Vec<oneshot::Receiver<Found>>,
}

impl Default for Details {
    fn default() -> Self {
        Self {
            known: LruCache::new(REMEMBERED),
            pending: Vec::new(),
        }
    }
}

impl Details {
    /// Adds details to the processes of these events, as far as possible in a short time.
    pub(crate) async fn fill(&mut self, events: &mut [Event]) {
        let pending = std::mem::take(&mut self.pending);
        for mut lookup in pending {
            match lookup.try_recv() {
                Ok(found) => self.learn(found),
                Err(oneshot::error::TryRecvError::Empty) => self.pending.push(lookup),
                // The thread has panicked, and has reported that itself.
                Err(oneshot::error::TryRecvError::Closed) => {}
            }
        }
        let unknown = self.apply(events);
        if unknown.is_empty() || self.pending.len() >= MOST_PENDING {
            return;
        }
        let (send, mut found) = oneshot::channel();
        let look_up = move || {
            let found = unknown.into_iter().map(|key| {
                let details = read(Path::new("/proc"), &key).map(Arc::new);
                (key, details)
            });
            // There is no receiver if the tracer is gone.
            let _ = send.send(found.collect());
        };
        // Not a thread of the runtime, because the shutdown of the runtime would wait for it.
        if let Err(error) = thread::Builder::new().name("details".into()).spawn(look_up) {
            log::warn!("no thread to look up processes: {error}");
            return;
        }
        match timeout(PATIENCE, &mut found).await {
            Ok(Ok(found)) => {
                self.learn(found);
                self.apply(events);
            }
            Ok(Err(_)) => {}
            Err(_) => self.pending.push(found),
        }
    }

    fn learn(&mut self, found: Found) {
        for (key, details) in found {
            self.known.put(key, details);
        }
    }

    /// Adds the known details to each process, and returns the processes without known details.
    fn apply(&mut self, events: &mut [Event]) -> HashSet<Key> {
        let mut unknown = HashSet::new();
        for process in events.iter_mut().filter_map(|event| event.process.as_mut()) {
            if process.details.is_some() {
                continue;
            }
            let &mut Process {
                pid, started, comm, ..
            } = process;
            let key = Key { pid, started, comm };
            match self.known.get(&key) {
                Some(details) => process.details.clone_from(details),
                None => {
                    unknown.insert(key);
                }
            }
        }
        unknown
    }
}

/// Returns the details of a process; `None` if it has ended, even if another process has its number
/// now.
fn read(proc: &Path, key: &Key) -> Option<ProcessDetails> {
    let folder = proc.join(key.pid.to_string());
    let is_it = || {
        started(&folder).is_some_and(|ticks| ticks == key.started.as_nanos() / TICK.as_nanos())
            && comm(&folder) == Some(key.comm)
    };
    if !is_it() {
        return None;
    }
    let details = ProcessDetails {
        exe: exe(&folder)?,
        cmdline: cmdline(folder.join("cmdline")).unwrap_or_default(),
    };
    // The process still exists, so it existed during all reads.
    is_it().then_some(details)
}

/// Returns the name of the main thread.
fn comm(folder: &Path) -> Option<Comm> {
    let name = fs::read(folder.join("comm")).ok()?;
    Some(Comm::from_bytes(name.strip_suffix(b"\n")?))
}

/// Returns the executable; `Some(None)` for a kernel thread, `None` if it cannot be read.
fn exe(folder: &Path) -> Option<Option<PathBuf>> {
    if let Ok(exe) = fs::read_link(folder.join("exe")) {
        return Some(Some(exe));
    }
    if is_kernel_thread(folder) {
        return Some(None);
    }
    // The main thread has exited. Each other thread has the same executable.
    let threads = fs::read_dir(folder.join("task")).ok()?.flatten();
    let mut links = threads.filter_map(|thread| fs::read_link(thread.path().join("exe")).ok());
    links.next().map(Some)
}

fn is_kernel_thread(folder: &Path) -> bool {
    const PF_KTHREAD: u64 = 0x0020_0000;
    stat(folder, 6).is_some_and(|flags| flags & u128::from(PF_KTHREAD) != 0)
}

fn cmdline(path: PathBuf) -> std::io::Result<Vec<OsString>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(CMDLINE).read_to_end(&mut bytes)?;
    Ok(words(&bytes))
}

/// Returns the start time of the process, in ticks since boot.
fn started(folder: &Path) -> Option<u128> {
    stat(folder, 19)
}

/// Returns a number in `/proc/PID/stat`. The parent's pid is number 1.
fn stat(folder: &Path, field: usize) -> Option<u128> {
    let stat = fs::read(folder.join("stat")).ok()?;
    // The second field is the process's name in parentheses, which may contain any characters
    // (proc(5)).
    let end = stat.iter().rposition(|&byte| byte == b')')?;
    let rest = std::str::from_utf8(&stat[end..]).ok()?;
    rest.split(' ').nth(field + 1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the key of this process.
    fn own() -> Key {
        let ticks = started(Path::new("/proc/self")).expect("/proc");
        Key {
            pid: std::process::id(),
            started: TICK * u32::try_from(ticks).expect("less than a year"),
            comm: comm(Path::new("/proc/self")).expect("/proc"),
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "reads files of the kernel")]
    fn finds_the_program_of_a_process() {
        let details = read(Path::new("/proc"), &own()).expect("it is there");
        assert_eq!(details.exe, std::env::current_exe().ok());
        assert_eq!(details.cmdline, std::env::args_os().collect::<Vec<_>>());
    }

    #[test]
    #[cfg_attr(miri, ignore = "reads files of the kernel")]
    fn a_reused_pid_is_another_process() {
        let mut key = own();
        key.started += TICK;
        assert_eq!(read(Path::new("/proc"), &key), None);
        key.pid = u32::MAX;
        assert_eq!(read(Path::new("/proc"), &key), None);
    }
}
