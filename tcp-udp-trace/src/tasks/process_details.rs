//! Completes the details of processes: looks up the program that a process runs in `/proc`, if the
//! eBPF programs have not reported it, and the path of its cgroup.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    fs::{self, File},
    hash::{Hash, Hasher},
    io::Read as _,
    num::NonZeroUsize,
    os::unix::ffi::OsStrExt as _,
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
        process::{Parent, ProcessDetails},
    },
    kernel::cgroup::Paths,
    pipeline::{
        cgroup_path::{container, slice, unit},
        images::words,
    },
};

/// How many processes, and how many cgroups, are kept.
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
    cgroup: Option<u64>,
    image: Option<Image>,
}

/// The details that the programs have reported. Two images of the same process are different
/// programs.
#[derive(Debug, Clone)]
struct Image(Arc<ProcessDetails>);

impl PartialEq for Image {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Image {}

impl Hash for Image {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).hash(state);
    }
}

/// The results of a look-up.
#[derive(Debug)]
struct Found {
    details: Vec<(Key, Option<Arc<ProcessDetails>>)>,
    /// The paths of cgroups by their ids. A cgroup without a path has been removed, and its id is
    /// never used again.
    paths: HashMap<u64, Option<PathBuf>>,
}

/// The known details of processes.
#[derive(Debug)]
pub(crate) struct Details {
    known: LruCache<Key, Option<Arc<ProcessDetails>>>,
    paths: LruCache<u64, Option<PathBuf>>,
    pending: Vec<oneshot::Receiver<Found>>,
}

impl Default for Details {
    fn default() -> Self {
        Self {
            known: LruCache::new(REMEMBERED),
            paths: LruCache::new(REMEMBERED),
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
        let keys: HashSet<_> = unknown.iter().map(|(_, key)| key.clone()).collect();
        let ids = keys.iter().filter_map(|key| key.cgroup);
        let paths: HashMap<_, _> = ids
            .filter_map(|id| Some((id, self.paths.get(&id)?.clone())))
            .collect();
        let look_up = move || {
            // There is no receiver if the tracer is gone.
            let _ = send.send(look_up(Path::new("/proc"), keys, &paths));
        };
        // Not a thread of the runtime, because the shutdown of the runtime would wait for it.
        if let Err(error) = thread::Builder::new().name("details".into()).spawn(look_up) {
            log::warn!("no thread to look up processes: {error}");
            return;
        }
        match timeout(PATIENCE, &mut found).await {
            Ok(Ok(found)) => {
                self.learn(found);
                for (at, key) in unknown {
                    if let (Some(Some(details)), Some(process)) =
                        (self.known.get(&key), &mut events[at].process)
                    {
                        process.details = Some(Arc::clone(details));
                    }
                }
            }
            Ok(Err(_)) => {}
            Err(_) => self.pending.push(found),
        }
    }

    fn learn(&mut self, found: Found) {
        for (key, details) in found.details {
            self.known.put(key, details);
        }
        for (id, path) in found.paths {
            self.paths.put(id, path);
        }
    }

    /// Adds the known details to each process. Returns the positions of the events whose processes
    /// have no known details, and these processes.
    fn apply(&mut self, events: &mut [Event]) -> Vec<(usize, Key)> {
        let mut unknown = Vec::new();
        for (at, event) in events.iter_mut().enumerate() {
            let Some(process) = &mut event.process else {
                continue;
            };
            let key = Key {
                pid: process.pid,
                started: process.started,
                comm: process.comm,
                cgroup: process.cgroup,
                image: process.details.clone().map(Image),
            };
            if let Some(details) = self.known.get(&key) {
                process.details.clone_from(details);
                continue;
            }
            let path = key.cgroup.and_then(|id| self.paths.get(&id));
            let (Some(Image(image)), Some(path)) = (&key.image, path) else {
                unknown.push((at, key));
                continue;
            };
            let details = in_cgroup(ProcessDetails::clone(image), path.clone());
            let details = Arc::new(details);
            process.details = Some(Arc::clone(&details));
            self.known.put(key, Some(details));
        }
        unknown
    }
}

/// Looks up these processes, and the paths of their cgroups. `known` has the paths that are known.
fn look_up(proc: &Path, keys: HashSet<Key>, known: &HashMap<u64, Option<PathBuf>>) -> Found {
    let cgroups = Paths::find();
    let shown = |folder: &Path| fs::read(folder.join("cgroup")).ok();
    let mut paths = HashMap::new();
    if cgroups != Paths::ByProcess {
        // Another process may have the number now. The paths are checked.
        let unknown = keys.iter().filter_map(|key| {
            let id = key.cgroup.filter(|id| !known.contains_key(id))?;
            Some((id, shown(&folder(proc, key)).unwrap_or_default()))
        });
        paths = cgroups.of_ids(unknown.collect());
    }
    let complete = |key: Key| {
        let path = match (&cgroups, key.cgroup) {
            (Paths::ByProcess, _) => {
                while_alive(proc, &key, shown).and_then(|shown| Paths::of_process(&shown))
            }
            (Paths::ById(_), Some(id)) => {
                known.get(&id).or_else(|| paths.get(&id)).cloned().flatten()
            }
            (Paths::ById(_), None) => None,
        };
        let program = match &key.image {
            Some(Image(image)) => Some(ProcessDetails::clone(image)),
            None => while_alive(proc, &key, |folder| read(proc, folder)),
        };
        let details = program.map(|program| Arc::new(in_cgroup(program, path)));
        (key, details)
    };
    let details = keys.into_iter().map(complete).collect();
    Found { details, paths }
}

/// Adds the path of a cgroup, and the names in it.
fn in_cgroup(details: ProcessDetails, cgroup: Option<PathBuf>) -> ProcessDetails {
    let path = cgroup
        .as_deref()
        .map_or(&b""[..], |path| path.as_os_str().as_bytes());
    ProcessDetails {
        container: container(path).map(Into::into),
        unit: unit(path).map(Into::into),
        slice: slice(path).map(Into::into),
        cgroup,
        ..details
    }
}

fn folder(proc: &Path, key: &Key) -> PathBuf {
    proc.join(key.pid.to_string())
}

/// Returns the result of a read in the folder of a process; `None` if the process has ended or has
/// another name, even if another process has its number now.
fn while_alive<T>(proc: &Path, key: &Key, read: impl FnOnce(&Path) -> Option<T>) -> Option<T> {
    let folder = folder(proc, key);
    let is_it = || {
        started(&folder).is_some_and(|ticks| ticks == key.started.as_nanos() / TICK.as_nanos())
            && comm(&folder) == Some(key.comm)
    };
    if !is_it() {
        return None;
    }
    let found = read(&folder)?;
    // The process still exists, so it existed during all reads.
    is_it().then_some(found)
}

fn read(proc: &Path, folder: &Path) -> Option<ProcessDetails> {
    Some(ProcessDetails {
        exe: exe(folder)?,
        cmdline: cmdline(folder.join("cmdline")).unwrap_or_default(),
        parent: parent(proc, folder),
        ns_pid: ns_pid(folder),
        ..ProcessDetails::default()
    })
}

fn parent(proc: &Path, folder: &Path) -> Option<Parent> {
    let number = || stat(folder, 1);
    let pid = number().filter(|&pid| pid != 0)?;
    let comm = comm(&proc.join(pid.to_string()))?;
    // When a process ends, its children get another parent before its number is free. So the name
    // is that of the parent.
    (number() == Some(pid)).then_some(Parent {
        pid: pid.try_into().ok()?,
        comm,
    })
}

/// Returns the process id in the innermost pid namespace.
fn ns_pid(folder: &Path) -> Option<u32> {
    let status = fs::read(folder.join("status")).ok()?;
    let mut lines = status.split(|&byte| byte == b'\n');
    let numbers = lines.find_map(|line| line.strip_prefix(b"NSpid:"))?;
    let numbers = std::str::from_utf8(numbers).ok()?;
    numbers.split_whitespace().next_back()?.parse().ok()
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
            cgroup: None,
            image: None,
        }
    }

    fn details_of(key: &Key) -> Option<ProcessDetails> {
        let proc = Path::new("/proc");
        while_alive(proc, key, |folder| read(proc, folder))
    }

    #[test]
    #[cfg_attr(miri, ignore = "reads files of the kernel")]
    fn finds_the_program_of_a_process() {
        let details = details_of(&own()).expect("it is there");
        assert_eq!(details.exe, std::env::current_exe().ok());
        assert_eq!(details.cmdline, std::env::args_os().collect::<Vec<_>>());
        let parent = details.parent.expect("it has a parent");
        assert_eq!(parent.pid, std::os::unix::process::parent_id());
        assert_eq!(details.ns_pid, Some(std::process::id()));
    }

    #[test]
    #[cfg_attr(miri, ignore = "reads files of the kernel")]
    fn a_reused_pid_is_another_process() {
        let mut key = own();
        key.started += TICK;
        assert_eq!(details_of(&key), None);
        key.pid = u32::MAX;
        assert_eq!(details_of(&key), None);
    }

    #[test]
    fn two_images_of_a_process_are_two_programs() {
        let image = || Some(Image(Arc::default()));
        let (one, other) = (image(), image());
        let with = |image: &Option<Image>| Key {
            pid: 1,
            started: TICK,
            comm: Comm::from_bytes(b"sh"),
            cgroup: None,
            image: image.clone(),
        };
        assert_eq!(with(&one), with(&one));
        assert_ne!(with(&one), with(&other));
        assert_ne!(with(&one), with(&None));
    }
}
