//! `cargo xtask newcomer`: runs the commands of the pages as an ordinary user, as they are written.
//!
//! The commands come from the pages. They run in a clean Debian root file system, as a user who has
//! `sudo`, and rustup in the home folder. The toolchains and the crates are this machine's. All
//! mounts are in a mount namespace of the command, and end with it.

mod page;
mod root;

use std::{
    io::{Read, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    process::Stdio,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use self::{page::Step, root::Root};
use crate::{
    process::{self, Ended},
    workspace,
};

/// Run the commands of README.md and CONTRIBUTING.md as an unprivileged user of a clean Debian.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only this command, in the clone.
    command: Option<String>,
}

/// The pages, in the order in which a newcomer reads them.
const PAGES: &[&str] = &["README.md", "CONTRIBUTING.md"];

/// How long a command may write nothing. While cargo compiles, it shows each crate.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(5 * 60);
/// How long a program may go on after Ctrl-C.
const END_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(
        process::is_root(),
        "this makes and mounts a root file system: run it as root"
    );
    let steps = match &args.command {
        Some(command) => vec![page::in_the_clone(command)],
        None => steps()?,
    };
    let root = Root::new()?;
    let _traffic = Traffic::start()?;
    for step in &steps {
        eprintln!("{}: {step}", step.page);
        let started = Instant::now();
        root.prepare(step)?;
        follow(&root, step).with_context(|| format!("{}: {step}", step.page))?;
        eprintln!("    works, in {:.1} s", started.elapsed().as_secs_f64());
    }
    eprintln!("all {} commands of the pages work", steps.len());
    Ok(())
}

fn steps() -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for page in PAGES {
        let path = workspace::root().join(page);
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let found = page::steps(page, &text);
        ensure!(!found.is_empty(), "{page} has no commands");
        steps.extend(found);
    }
    Ok(steps)
}

/// Runs one command. A command that runs for ever is stopped by Ctrl-C, as soon as it has shown the
/// expected output.
fn follow(root: &Root, step: &Step) -> Result<()> {
    let mut command = root.command(step);
    let mut child = Ended(
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start unshare")?,
    );
    let mut terminal = child.0.stdin.take().context("no standard input")?;
    let output = pieces(child.0.stdout.take().context("no standard output")?);
    let mut shown = String::new();
    let mut deadline = Instant::now() + SILENCE_TIMEOUT;
    let mut stopped = false;
    loop {
        match output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(piece) => {
                shown.push_str(&piece);
                if !stopped {
                    deadline = Instant::now() + SILENCE_TIMEOUT;
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if stopped => {
                bail!("the command goes on after Ctrl-C:\n{shown}")
            }
            Err(RecvTimeoutError::Timeout) => bail!("the command hangs:\n{shown}"),
        }
        if !stopped && step.shows.is_some_and(|sign| shown.contains(sign)) {
            terminal.write_all(b"\x03").context("cannot send Ctrl-C")?;
            stopped = true;
            deadline = Instant::now() + END_TIMEOUT;
        }
    }
    let status = child.0.wait().context("cannot wait for the command")?;
    match step.shows {
        // The signal kills a program that does not handle it.
        Some(_) if stopped => Ok(()),
        Some(sign) => bail!("the command ended ({status}) without {sign:?}:\n{shown}"),
        None => {
            ensure!(status.success(), "{status}:\n{shown}");
            Ok(())
        }
    }
}

/// Returns a channel of the pieces of text that a command writes.
fn pieces(mut output: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(read @ 1..) = output.read(&mut bytes) {
            let piece = String::from_utf8_lossy(&bytes[..read]).into_owned();
            if sender.send(piece).is_err() {
                break;
            }
        }
    });
    receiver
}

/// A thread that makes connections on loopback, which the tracers show.
struct Traffic(#[allow(dead_code, reason = "dropping it ends the thread")] mpsc::Sender<()>);

impl Traffic {
    fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen")?;
        let address = listener.local_addr()?;
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let pause = Duration::from_millis(200);
            while receiver.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                let connected = TcpStream::connect(address);
                if connected.is_ok() {
                    drop(listener.accept());
                }
            }
        });
        Ok(Self(sender))
    }
}
