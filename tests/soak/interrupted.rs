//! The closes that no BPF program can see on a hardened kernel, as ftrace sees them.
//!
//! Such a kernel runs no BPF program in a softirq that has interrupted a thread of pid 1
//! (docs/kernels.md). ftrace runs there all the same.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use integration_tests::mounts;
use nix::{
    libc::O_NONBLOCK,
    mount::{MsFlags, mount},
};
use tcp_udp_trace::Event;

const TRACEFS: &str = "/sys/kernel/tracing";
/// The fixed name lets the next soak remove the instance of one that was killed.
const INSTANCE: &str = "tcp_udp_trace_soak";
const EVENT: &str = "events/sock/inet_sock_set_state";
/// How often the records are read, and the threads of pid 1 listed.
const INTERVAL: Duration = Duration::from_millis(100);

/// The time of a record of ftrace is in microseconds.
const ROUNDING: Duration = Duration::from_micros(1);
/// The time after which the two ports of a connection may be those of another one.
const CLOSES_WITHIN: Duration = Duration::from_secs(5);

/// A close in a softirq that had interrupted a thread of pid 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Interrupted {
    /// `CLOCK_BOOTTIME`, as [`tcp_udp_trace::Event::uptime`].
    pub(crate) uptime: Duration,
    /// The local and the remote port.
    pub(crate) ports: (u16, u16),
}

/// Collects the closes of TCP sockets, of all network namespaces, in softirqs that interrupt pid 1.
#[derive(Debug)]
pub(crate) struct Interruptions {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<anyhow::Result<Vec<Interrupted>>>>,
}

impl Interruptions {
    /// Starts to collect, in an instance of ftrace of its own.
    pub(crate) fn start() -> anyhow::Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let (ready, started) = mpsc::channel();
        let thread = thread::spawn({
            let over = Arc::clone(&over);
            move || {
                let instance = Instance::new()?;
                // Closed before the instance is dropped, which could otherwise not be removed.
                let mut pipe = instance.pipe()?;
                let mut found = Vec::new();
                let mut tids = instance.watch_init(Vec::new())?;
                ready.send(())?;
                while !over.load(Ordering::Relaxed) {
                    thread::sleep(INTERVAL);
                    tids = instance.watch_init(tids)?;
                    found.extend(read(&mut pipe)?.lines().filter_map(parse));
                }
                Ok(found)
            }
        });
        let mut interruptions = Self {
            over,
            thread: Some(thread),
        };
        if started.recv().is_err() {
            interruptions.end()?;
        }
        Ok(interruptions)
    }

    /// Stops collecting, and returns the closes in the order in which they were read.
    pub(crate) fn end(&mut self) -> anyhow::Result<Vec<Interrupted>> {
        self.over.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("it has ended")?;
        thread.join().map_err(|_| anyhow!("its thread panicked"))?
    }
}

impl Drop for Interruptions {
    fn drop(&mut self) {
        if self.thread.is_some() {
            let _ = self.end();
        }
    }
}

/// An instance of ftrace, removed when dropped.
struct Instance {
    path: PathBuf,
}

impl Instance {
    /// Mounts tracefs for the calling thread alone, and makes the instance.
    fn new() -> anyhow::Result<Self> {
        mounts::make_private()?;
        if !fs::exists(format!("{TRACEFS}/events"))? {
            mount(
                Some("nodev"),
                TRACEFS,
                Some("tracefs"),
                MsFlags::empty(),
                None::<&str>,
            )?;
        }
        let path = Path::new(TRACEFS).join("instances").join(INSTANCE);
        let _ = fs::remove_dir(&path);
        fs::create_dir(&path).context("no instance of ftrace")?;
        let instance = Self { path };
        instance.write("trace_clock", "boot")?;
        instance.write("buffer_size_kb", "256")?;
        Ok(instance)
    }

    fn write(&self, file: &str, value: &str) -> anyhow::Result<()> {
        fs::write(self.path.join(file), value).with_context(|| format!("{file}: {value}"))
    }

    /// Restricts the records to the current threads of pid 1, unless they are `known` already.
    fn watch_init(&self, known: Vec<u32>) -> anyhow::Result<Vec<u32>> {
        let mut tids = Vec::new();
        for entry in fs::read_dir("/proc/1/task")? {
            let name = entry?.file_name();
            tids.push(name.to_str().context("no number")?.parse()?);
        }
        if tids == known {
            return Ok(known);
        }
        let is_one: Vec<_> = tids
            .iter()
            .map(|tid| format!("common_pid == {tid}"))
            .collect();
        // TCP_CLOSE, and TRACE_FLAG_SOFTIRQ.
        let filter = format!(
            "newstate == 7 && common_flags & 16 && ({})",
            is_one.join(" || ")
        );
        self.write(&format!("{EVENT}/filter"), &filter)?;
        self.write(&format!("{EVENT}/enable"), "1")?;
        Ok(tids)
    }

    /// Opens the records. Reading a record removes it from the buffer.
    fn pipe(&self) -> anyhow::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(O_NONBLOCK);
        Ok(options.open(self.path.join("trace_pipe"))?)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
    }
}

/// Reads all current records.
fn read(pipe: &mut File) -> anyhow::Result<String> {
    let mut records = Vec::new();
    match pipe.read_to_end(&mut records) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error.into()),
        _ => Ok(String::from_utf8_lossy(&records).into_owned()),
    }
}

/// Parses a line of `trace_pipe`. Returns `None` for a line that is no record, such as one about
/// lost records.
fn parse(line: &str) -> Option<Interrupted> {
    let (head, fields) = line.split_once(": inet_sock_set_state: ")?;
    let (seconds, micros) = head.rsplit_once(' ')?.1.split_once('.')?;
    let uptime =
        Duration::from_secs(seconds.parse().ok()?) + Duration::from_micros(micros.parse().ok()?);
    let port = |name: &str| {
        let mut values = fields
            .split(' ')
            .filter_map(|field| field.strip_prefix(name));
        values.next()?.parse().ok()
    };
    Some(Interrupted {
        uptime,
        ports: (port("sport=")?, port("dport=")?),
    })
}

/// The TCP sockets of which events came, and no close yet.
#[derive(Debug, Default)]
pub(crate) struct Unclosed(HashMap<u64, Unfinished>);

/// The last event of a socket so far.
#[derive(Debug)]
struct Unfinished {
    uptime: Duration,
    ports: (u16, u16),
}

impl Unclosed {
    /// Records a state change of a socket that does not listen.
    pub(crate) fn see(&mut self, event: &Event) {
        let socket = &event.socket;
        if event.is_end() {
            self.0.remove(&socket.id);
            return;
        }
        let last = Unfinished {
            uptime: event.uptime,
            ports: (socket.local.port(), socket.remote.port()),
        };
        self.0.insert(socket.id, last);
    }

    /// Returns how many of the missing closes were in a softirq that had interrupted pid 1.
    pub(crate) fn explained_by(&self, interrupted: &[Interrupted]) -> u64 {
        let is_explained = |last: &&Unfinished| {
            interrupted.iter().any(|close| {
                let after = (close.uptime + ROUNDING).checked_sub(last.uptime);
                close.ports == last.ports && after.is_some_and(|after| after < CLOSES_WITHIN)
            })
        };
        self.0.values().filter(is_explained).count() as u64
    }
}
