//! Runs the program, and reads the lines that it writes.

use std::{
    env, fs,
    io::{self, BufRead, BufReader},
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tcp_udp_trace::Stats;

/// The most time that a test waits for a line or for the end of the program.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The program under test.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_tcp-udp-trace");

/// A running command. It is killed when dropped.
pub(crate) struct Tool {
    child: Child,
    /// The lines of standard output.
    pub(crate) output: Lines,
    /// The lines of standard error.
    pub(crate) errors: Lines,
    /// The line by which the program reported that it is ready.
    pub(crate) ready: String,
}

impl Tool {
    /// Starts this command in the network namespace of the calling thread, and waits until it is
    /// ready.
    pub(crate) fn start(command: &str, args: &[&str]) -> anyhow::Result<Self> {
        Self::start_with(Command::new(PROGRAM).arg(command).args(args))
    }

    /// Like [`start`](Self::start), with a prepared command.
    pub(crate) fn start_with(command: &mut Command) -> anyhow::Result<Self> {
        Self::start_to(command, Stdio::piped())
    }

    /// Like [`start_with`](Self::start_with), with this standard output.
    pub(crate) fn start_to(command: &mut Command, output: Stdio) -> anyhow::Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("{command:?}"))?;
        // Otherwise `command` would keep the pipe open for writing.
        command.stdout(Stdio::null());
        let errors = Lines::of(child.stderr.take().unwrap());
        let output = match child.stdout.take() {
            Some(output) => Lines::of(output),
            None => Lines::none(),
        };
        let mut tool = Self {
            child,
            output,
            errors,
            ready: String::new(),
        };
        tool.ready = tool.errors.find(|line| line.starts_with("ready"))?;
        Ok(tool)
    }

    /// Returns the statistics that the program printed to standard error.
    pub(crate) fn stats(&self) -> anyhow::Result<Stats> {
        let line = self.errors.find(|line| line.starts_with("stats: "))?;
        let (_, json) = line.split_once(' ').unwrap();
        Ok(serde_json::from_str(json)?)
    }

    /// Sends SIGTERM, and waits until the program ends successfully.
    pub(crate) fn terminate(&mut self) -> anyhow::Result<()> {
        self.signal()?;
        self.end()
    }

    /// Sends SIGTERM.
    pub(crate) fn signal(&self) -> anyhow::Result<()> {
        let pid = Pid::from_raw(self.child.id().try_into()?);
        Ok(kill(pid, Signal::SIGTERM)?)
    }

    /// Returns whether the program still runs.
    pub(crate) fn is_running(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits until the program ends successfully.
    pub(crate) fn end(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(
                    status.success(),
                    "{status}: {}",
                    self.errors.rest().join("\n")
                );
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the program does not end");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        // The program may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The lines of a pipe. A thread reads them as they arrive.
pub(crate) struct Lines(Receiver<String>);

impl Lines {
    fn none() -> Self {
        Self(mpsc::channel().1)
    }

    fn of(pipe: impl io::Read + Send + 'static) -> Self {
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(pipe).lines() {
                // The pipe must not fill up, even if the receiver is gone.
                let _ = sender.send(line.unwrap());
            }
        });
        Self(receiver)
    }

    /// Waits for the next line that matches.
    pub(crate) fn find(&self, is_match: impl Fn(&str) -> bool) -> anyhow::Result<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut others = String::new();
        loop {
            match self.0.recv_timeout(deadline - Instant::now().min(deadline)) {
                Ok(line) if is_match(&line) => return Ok(line),
                Ok(line) => others += &format!("\n{line}"),
                Err(RecvTimeoutError::Timeout) => bail!("no matching line in time:{others}"),
                Err(RecvTimeoutError::Disconnected) => bail!("the output ended early:{others}"),
            }
        }
    }

    /// Returns all further lines, until the pipe is closed.
    pub(crate) fn rest(&self) -> Vec<String> {
        self.0.iter().collect()
    }
}

/// A temporary folder of a test. It is removed when dropped.
pub(crate) struct Folder(PathBuf);

impl Folder {
    /// Creates a folder whose name contains this name.
    pub(crate) fn new(name: &str) -> io::Result<Self> {
        let path = env::temp_dir().join(format!("tcp-udp-trace-{name}-{}", process::id()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    /// Returns the path of the folder.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Returns the number of files in the folder.
    pub(crate) fn count(&self) -> io::Result<usize> {
        Ok(fs::read_dir(&self.0)?.count())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // After a failure, the rest stays in the system's temporary folder.
        let _ = fs::remove_dir_all(&self.0);
    }
}
