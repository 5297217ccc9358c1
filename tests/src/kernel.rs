//! The objects that the kernel holds on behalf of this process.

use std::{
    collections::{BTreeSet, HashMap},
    fs, process,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use aya::{
    maps::{MapError, MapType, loaded_maps},
    programs::{loaded_links, loaded_programs},
};

/// How long the kernel may take to free released objects: it waits for RCU grace periods.
const FREED_WITHIN: Duration = Duration::from_secs(30);

/// BPF objects of the kernel, by their ids, which the kernel does not soon reuse.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BpfObjects {
    /// Program ids.
    pub programs: BTreeSet<u32>,
    /// Map ids.
    pub maps: BTreeSet<u32>,
    /// Link ids.
    pub links: BTreeSet<u32>,
}

impl BpfObjects {
    /// Returns the objects that this process has file descriptors of, and the maps of those
    /// programs.
    pub fn of_this_process() -> anyhow::Result<Self> {
        Self::of_process(process::id())
    }

    /// Returns the objects that a process has file descriptors of, and the maps of those programs.
    pub fn of_process(pid: u32) -> anyhow::Result<Self> {
        let mut objects = Self::default();
        for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
            // The descriptor of the listing itself is closed by now.
            let Ok(info) = fs::read_to_string(entry?.path()) else {
                continue;
            };
            for line in info.lines() {
                let ids = match line.split_once(':') {
                    Some(("prog_id", id)) => Some((&mut objects.programs, id)),
                    Some(("map_id", id)) => Some((&mut objects.maps, id)),
                    Some(("link_id", id)) => Some((&mut objects.links, id)),
                    _ => None,
                };
                if let Some((ids, id)) = ids {
                    ids.insert(id.trim().parse()?);
                }
            }
        }
        // Objects of other processes may vanish during the listing, so errors are ignored.
        for program in loaded_programs()
            .flatten()
            .filter(|program| objects.programs.contains(&program.id()))
        {
            objects.maps.extend(program.map_ids()?.unwrap_or_default());
        }
        Ok(objects)
    }

    /// Returns all objects of the kernel.
    fn all() -> Self {
        Self {
            programs: loaded_programs()
                .flatten()
                .map(|program| program.id())
                .collect(),
            maps: loaded_maps().flatten().map(|map| map.id()).collect(),
            links: loaded_links().flatten().map(|link| link.id()).collect(),
        }
    }

    /// Returns those that are not among `others`.
    fn without(&self, others: &Self) -> Self {
        Self {
            programs: &self.programs - &others.programs,
            maps: &self.maps - &others.maps,
            links: &self.links - &others.links,
        }
    }

    /// Returns all objects of the kernel that no other process has a file descriptor of.
    #[must_use]
    pub fn loaded() -> Self {
        let others = Self::of_others();
        Self::all().without(&others)
    }

    fn of_others() -> Self {
        let mut others = Self::default();
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        for entry in processes {
            let pid = entry.file_name().to_string_lossy().parse().ok();
            if let Some(pid) = pid.filter(|pid| *pid != process::id()) {
                // The process may have ended.
                others.extend(Self::of_process(pid).unwrap_or_default());
            }
        }
        others
    }

    /// Waits until the kernel has freed all objects that are not among these, except those of other
    /// processes.
    pub fn await_no_more(&self) -> anyhow::Result<()> {
        Self::await_none("new in the kernel", || Self::loaded().without(self))
    }

    /// Returns how many objects there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.programs.len() + self.maps.len() + self.links.len()
    }

    /// Waits until the kernel has freed all of them.
    pub fn await_freed(&self) -> anyhow::Result<()> {
        Self::await_none("still in the kernel", || self.still_loaded())
    }

    /// Waits until no objects are found.
    fn await_none(what: &str, find: impl Fn() -> Self) -> anyhow::Result<()> {
        let deadline = Instant::now() + FREED_WITHIN;
        loop {
            let found = find();
            if found.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{what}: {found:?}");
            }
            sleep(Duration::from_millis(10));
        }
    }

    fn still_loaded(&self) -> Self {
        let all = Self::all();
        Self {
            programs: &self.programs & &all.programs,
            maps: &self.maps & &all.maps,
            links: &self.links & &all.links,
        }
    }

    /// Returns the types of the maps.
    pub fn map_types(&self) -> anyhow::Result<Vec<MapType>> {
        let maps = loaded_maps().flatten();
        let ours = maps.filter(|map| self.maps.contains(&map.id()));
        Ok(ours
            .map(|map| map.map_type())
            .collect::<Result<_, MapError>>()?)
    }

    /// Adds the objects of `other`.
    pub fn extend(&mut self, other: Self) {
        self.programs.extend(other.programs);
        self.maps.extend(other.maps);
        self.links.extend(other.links);
    }

    /// Whether there is no object.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Returns the files that this process has open, as `descriptor -> target`.
pub fn open_files() -> anyhow::Result<BTreeSet<String>> {
    open_files_of(process::id())
}

/// Returns the files that a process has open.
pub fn open_files_of(pid: u32) -> anyhow::Result<BTreeSet<String>> {
    let mut files = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        // The descriptor of the listing itself is closed by now.
        if let Ok(target) = fs::read_link(entry.path()) {
            files.insert(format!(
                "{} -> {}",
                entry.file_name().to_string_lossy(),
                target.display()
            ));
        }
    }
    Ok(files)
}

/// Waits until this process has at most this many threads.
pub fn await_threads(count: usize) -> anyhow::Result<()> {
    let deadline = Instant::now() + FREED_WITHIN;
    loop {
        let threads = fs::read_dir("/proc/self/task")?.count();
        if threads <= count {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("{threads} threads");
        }
        sleep(Duration::from_millis(10));
    }
}

/// The counters of the calling thread's network namespace, by names like `Tcp.ActiveOpens`.
#[derive(Debug)]
pub struct NetCounters(HashMap<String, u64>);

impl NetCounters {
    /// Reads them.
    pub fn now() -> anyhow::Result<Self> {
        let mut counters = HashMap::new();
        for file in ["snmp", "netstat"] {
            let text = fs::read_to_string(format!("/proc/thread-self/net/{file}"))?;
            let lines: Vec<_> = text.lines().collect();
            for pair in lines.chunks_exact(2) {
                let (group, names) = pair[0].split_once(": ").context("no names")?;
                let (_, values) = pair[1].split_once(": ").context("no values")?;
                for (name, value) in names.split(' ').zip(values.split(' ')) {
                    // A few limits are negative.
                    if let Ok(value) = value.parse() {
                        counters.insert(format!("{group}.{name}"), value);
                    }
                }
            }
        }
        Ok(Self(counters))
    }

    /// Returns a counter.
    pub fn get(&self, name: &str) -> anyhow::Result<u64> {
        let counter = self.0.get(name).copied();
        counter.with_context(|| format!("no {name}"))
    }

    /// Returns by how much a counter has grown since these counters were read.
    pub fn growth(&self, now: &Self, name: &str) -> anyhow::Result<u64> {
        Ok(now.get(name)? - self.get(name)?)
    }
}

/// Returns a counter of TCP of the thread's network namespace, by its name in `netstat`.
pub fn tcp_counter(name: &str) -> anyhow::Result<u32> {
    let counter = NetCounters::now()?.get(&format!("TcpExt.{name}"))?;
    Ok(counter.try_into()?)
}

/// Whether the running kernel is of this version or a newer one.
pub fn is_at_least(major: u32, minor: u32) -> anyhow::Result<bool> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(['.', '-']).map(str::parse);
    let (Some(Ok(is_major)), Some(Ok(is_minor))) = (numbers.next(), numbers.next()) else {
        bail!("cannot parse the release {release}");
    };
    Ok((is_major, is_minor) >= (major, minor))
}

/// Whether this is a guest of the test matrix, which is emulated.
pub fn is_emulated() -> anyhow::Result<bool> {
    Ok(fs::read_to_string("/proc/cmdline")?.contains("tut_vm"))
}

/// Whether the kernel side reports the program of a socket's owner, if the setting requests it.
pub fn captures_images() -> anyhow::Result<bool> {
    let btf = fs::read("/sys/kernel/btf/vmlinux")?;
    let has = |name: &[u8]| btf.windows(name.len()).any(|bytes| bytes == name);
    Ok(has(b"\0backtrack_state\0") && !has(b"\0bpf_compute_live_registers\0"))
}
