//! Tracers of other projects, which run beside ours.

use std::{
    fs::File,
    io::{self, BufRead as _, BufReader},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use nix::{
    mount::{MsFlags, mount},
    pty::openpty,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{mounts, netns::Netns, suite::skip};

/// How long a tracer may take to attach, or to print a line.
const PATIENCE: Duration = Duration::from_secs(60);

/// The loopback address of the connections that show that a tracer is attached.
pub const SIGN: &str = "127.91.7.4";

/// Gives this thread, and the tracers that it starts, a private mount of tracefs, which they need.
pub fn mount_tracefs() -> anyhow::Result<()> {
    mounts::make_private()?;
    let (tracefs, none) = (Some("tracefs"), None::<&str>);
    Ok(mount(
        tracefs,
        "/sys/kernel/tracing",
        tracefs,
        MsFlags::empty(),
        none,
    )?)
}

/// A running tracer of another project. Dropping it kills the process.
#[derive(Debug)]
pub struct OtherTracer {
    child: Child,
    output: Arc<Output>,
    /// `None` after the thread was joined.
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Output {
    lines: Mutex<Vec<String>>,
    changed: Condvar,
}

impl OtherTracer {
    /// Starts a tracer, and waits until its output shows a connection to [`SIGN`]. Skips the test
    /// where the program is missing.
    pub fn start(program: &str, args: &[&str]) -> anyhow::Result<Self> {
        // On a terminal, each line comes at once.
        let terminal = openpty(None, None)?;
        let mut command = Command::new(program);
        let child = command
            .args(args)
            .stdin(Stdio::null())
            .stdout(terminal.slave.try_clone()?)
            .stderr(terminal.slave)
            .spawn();
        let child = match child {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return skip(format_args!("no {program}"));
            }
            child => child.with_context(|| program.to_owned())?,
        };
        // It holds the other descriptors of the terminal.
        drop(command);
        let output = Arc::<Output>::default();
        let reader = thread::spawn({
            let output = Arc::clone(&output);
            move || output.read(File::from(terminal.master))
        });
        let mut tracer = Self {
            child,
            output,
            reader: Some(reader),
        };
        tracer.await_sign().with_context(|| program.to_owned())?;
        Ok(tracer)
    }

    /// Connects to [`SIGN`] in another network namespace until the tracer shows it.
    fn await_sign(&mut self) -> anyhow::Result<()> {
        let elsewhere = Netns::new()?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            elsewhere.run(|| {
                let listener = TcpListener::bind((SIGN, 0))?;
                drop(TcpStream::connect(listener.local_addr()?)?);
                Ok(())
            })?;
            let is_shown = |lines: &[String]| lines.iter().any(|line| line.contains(SIGN));
            if self.output.wait(Duration::from_millis(100), is_shown) {
                return Ok(());
            }
            let ended = self.child.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                bail!("not attached ({ended:?}): {:#?}", self.output.copy());
            }
        }
    }

    /// Waits until this many lines contain `mark`.
    pub fn wait_lines(&self, mark: &str, count: usize) -> anyhow::Result<()> {
        let are_there = |lines: &[String]| marked(lines, mark).len() >= count;
        if self.output.wait(PATIENCE, are_there) {
            return Ok(());
        }
        bail!("not {count} lines with {mark}: {:#?}", self.output.copy())
    }

    /// Interrupts the tracer, as a user does, and returns its lines.
    pub fn finish(mut self) -> anyhow::Result<Vec<String>> {
        kill(Pid::from_raw(self.child.id().try_into()?), Signal::SIGINT)?;
        self.child.wait()?;
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        Ok(self.output.copy())
    }
}

impl Drop for OtherTracer {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Output {
    /// Reads lines until the program has ended.
    fn read(&self, terminal: File) {
        // A terminal without a program gives an error.
        for line in BufReader::new(terminal).lines().map_while(Result::ok) {
            self.lines.lock().unwrap().push(line.trim_end().to_owned());
            self.changed.notify_all();
        }
    }

    /// Waits until the lines are as expected. Returns whether they are.
    fn wait(&self, patience: Duration, is_done: impl Fn(&[String]) -> bool) -> bool {
        let lines = self.lines.lock().unwrap();
        let (lines, _) = self
            .changed
            .wait_timeout_while(lines, patience, |lines| !is_done(lines))
            .unwrap();
        is_done(&lines)
    }

    fn copy(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }
}

/// Returns the lines that contain `mark`.
#[must_use]
pub fn marked<'a>(lines: &'a [String], mark: &str) -> Vec<&'a str> {
    let lines = lines.iter().map(String::as_str);
    lines.filter(|line| line.contains(mark)).collect()
}
