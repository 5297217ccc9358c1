//! Runs a test: on a thread or in a process of its own, in a network namespace of its own.

use std::{
    any::Any,
    cell::Cell,
    env,
    error::Error,
    fmt::{self, Write as _},
    fs,
    io::{self, Read as _, Write as _},
    panic::catch_unwind,
    process::{Child, Command, Stdio, exit},
    sync::{
        Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail};
use libtest_mimic::{Completion, Failed, Trial};
use serde::{Deserialize, Serialize};
use tcp_udp_trace::Buffer;

use crate::netns::Netns;

/// The environment variable that makes a process run one test.
const ALONE: &str = "TUT_ALONE";
/// How long a test may take before it counts as hanging.
const PATIENCE: Duration = Duration::from_secs(300);

/// The surroundings that a test needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Other tests may run at the same time.
    Nothing,
    /// No other test of this process may run: the test counts things that belong to the process or
    /// the machine.
    Solitude,
    /// The test has a process of its own, and runs on its main thread, which at first is its only
    /// one.
    Process,
}

/// The lock that ordinary tests share, and that tests which need solitude hold exclusively.
static SOLITUDE: RwLock<()> = RwLock::new(());

/// Whether each test prints a line when it begins.
static ANNOUNCED: AtomicBool = AtomicBool::new(false);

/// Makes each test print a line when it begins. `cargo xtask test` reads the lines, to report which
/// tests ran when a kernel crashed or made no progress.
pub fn announce() {
    ANNOUNCED.store(true, Ordering::Relaxed);
}

/// A test that has ended.
#[derive(Debug, Clone)]
struct Ended {
    name: String,
    duration: Duration,
    /// Why it failed.
    failure: Option<String>,
}

/// The tests of this process that have ended.
static ENDED: Mutex<Vec<Ended>> = Mutex::new(Vec::new());

fn ended() -> MutexGuard<'static, Vec<Ended>> {
    ENDED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the `count` slowest tests of this process, longest first.
///
/// The time that a test waited for solitude does not count. The time that other processes took from
/// the CPUs does.
#[must_use]
pub fn slowest(count: usize) -> Vec<(Duration, String)> {
    let mut durations: Vec<_> = ended()
        .iter()
        .map(|test| (test.duration, test.name.clone()))
        .collect();
    durations.sort_by(|one, other| other.cmp(one));
    durations.truncate(count);
    durations
}

/// The most tests that run again. If more fail, chance is not the reason.
const MOST_AGAIN: usize = 10;

/// Runs each test that failed once more, alone, and prints a line with the result. Returns whether
/// all of them passed.
///
/// `cargo xtask test` reads the lines.
#[must_use]
pub fn failed_pass_again(runs: &[Run]) -> bool {
    let failed: Vec<_> = ended()
        .iter()
        .filter_map(|test| Some((test.name.clone(), test.failure.clone()?)))
        .collect();
    if failed.len() > MOST_AGAIN {
        println!("{} tests failed, so none runs again", failed.len());
        return false;
    }
    let mut all_pass = true;
    for (name, reason) in failed {
        let passes = runs
            .iter()
            .filter(|run| run.name() == name)
            .all(|run| match run.attempt() {
                Verdict::Passed => true,
                Verdict::Skipped(reason) | Verdict::Failed(reason) => {
                    println!("failed again: {name}: {reason}");
                    false
                }
            });
        if passes {
            println!("flaky: {name}: {}", reason.replace('\n', "; "));
        }
        all_pass &= passes;
    }
    all_pass
}

/// The error of a test that cannot run here, for a reason that lies in the machine.
#[derive(Debug)]
pub struct Skip(pub String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "skipped: {}", self.0)
    }
}

impl Error for Skip {}

/// Ends the test as ignored, for this reason.
pub fn skip<T>(reason: impl fmt::Display) -> anyhow::Result<T> {
    Err(Skip(reason.to_string()).into())
}

/// The verdict of a process that is one test: the last line of its standard output.
#[derive(Debug, Serialize, Deserialize)]
enum Verdict {
    Passed,
    Skipped(String),
    Failed(String),
}

/// A test named `topic::name`.
#[derive(Debug, Clone, Copy)]
pub struct Test {
    /// The part before `::`.
    pub topic: &'static str,
    /// The part after `::`.
    pub name: &'static str,
    /// The surroundings that the test needs.
    pub needs: Needs,
    /// The test itself, which fails by an error or by a panic.
    pub body: fn() -> anyhow::Result<()>,
}

thread_local! {
    static BUFFER: Cell<Option<Buffer>> = const { Cell::new(None) };
}

/// The buffer that the tracers of this thread's test must use, if any.
#[must_use]
pub fn buffer() -> Option<Buffer> {
    BUFFER.get()
}

impl Test {
    /// Whether this is the test's topic, or its full name.
    #[must_use]
    pub fn is_of(&self, name: &str) -> bool {
        name == self.topic || name.split_once("::") == Some((self.topic, self.name))
    }

    /// Returns the test as it is.
    #[must_use]
    pub fn as_it_is(self) -> Run {
        Run {
            test: self,
            buffer: None,
        }
    }

    /// Returns the same test as `perf::topic::name`, whose tracers use perf buffers.
    #[must_use]
    pub fn with_perf_buffers(self) -> Run {
        Run {
            test: self,
            buffer: Some(Buffer::Perf),
        }
    }
}

/// A test, and the buffer that its tracers must use.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    test: Test,
    buffer: Option<Buffer>,
}

impl Run {
    /// Returns the name in the results.
    #[must_use]
    pub fn name(&self) -> String {
        let Test { topic, name, .. } = self.test;
        match self.buffer {
            None => format!("{topic}::{name}"),
            Some(_) => format!("perf::{topic}::{name}"),
        }
    }

    /// Whether `name` is this name, or the part of it before the last `::`.
    #[must_use]
    pub fn is_of(&self, name: &str) -> bool {
        let rest = self.name().strip_prefix(name).map(str::to_owned);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
    }

    /// Returns the test for the command line of `libtest_mimic`.
    #[must_use]
    pub fn trial(self) -> Trial {
        if env::var_os(ALONE).is_some() {
            return Trial::test(self.name(), move || {
                BUFFER.set(self.buffer);
                alone(self.test.body)
            });
        }
        Trial::ignorable_test(self.name(), move || match self.attempt() {
            Verdict::Passed => Ok(Completion::Completed),
            Verdict::Skipped(reason) => Ok(Completion::ignored_with(reason)),
            Verdict::Failed(reason) => Err(Failed::from(reason)),
        })
    }

    /// Runs the test, as soon as the others leave it the solitude that it needs.
    fn attempt(self) -> Verdict {
        let Test { needs, body, .. } = self.test;
        // A poisoned lock only means that another test failed.
        let (_shared, _alone) = match needs {
            Needs::Nothing | Needs::Process => (
                Some(SOLITUDE.read().unwrap_or_else(PoisonError::into_inner)),
                None,
            ),
            Needs::Solitude => (
                None,
                Some(SOLITUDE.write().unwrap_or_else(PoisonError::into_inner)),
            ),
        };
        let (started, name) = (Instant::now(), self.name());
        if ANNOUNCED.load(Ordering::Relaxed) {
            println!("begins: {name}");
        }
        let run = move || {
            BUFFER.set(self.buffer);
            Netns::enter_new()?;
            match needs {
                Needs::Process => in_process(&self.name()),
                Needs::Nothing | Needs::Solitude => body(),
            }
        };
        let verdict = match thread::Builder::new()
            .name(self.test.name.to_owned())
            .spawn(run)
        {
            Err(error) => Verdict::Failed(error.to_string()),
            Ok(test) => match needs {
                // The test's process has a limit of its own, and is killed at its end.
                Needs::Process => verdict(test.join()),
                Needs::Nothing | Needs::Solitude => verdict_in_time(test),
            },
        };
        let failure = match &verdict {
            Verdict::Failed(reason) => Some(reason.clone()),
            Verdict::Passed | Verdict::Skipped(_) => None,
        };
        ended().push(Ended {
            name,
            duration: started.elapsed(),
            failure,
        });
        verdict
    }
}

/// Waits for the test. A test that hangs keeps its thread, and the others go on.
fn verdict_in_time(test: JoinHandle<anyhow::Result<()>>) -> Verdict {
    let deadline = Instant::now() + PATIENCE;
    while !test.is_finished() {
        if Instant::now() > deadline {
            return Verdict::Failed(format!("hangs; the threads are in: {}", threads()));
        }
        thread::sleep(Duration::from_millis(10));
    }
    verdict(test.join())
}

/// Returns each thread of this process, and the system call that it waits in.
fn threads() -> String {
    let mut threads = String::new();
    for task in fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten()
    {
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let _ = write!(
            threads,
            "\n{}: {}",
            read("comm").trim(),
            read("syscall").trim()
        );
    }
    threads
}

fn verdict(result: thread::Result<anyhow::Result<()>>) -> Verdict {
    match result {
        Ok(Ok(())) => Verdict::Passed,
        Ok(Err(error)) => match error.downcast_ref::<Skip>() {
            Some(Skip(reason)) => Verdict::Skipped(reason.clone()),
            None => Verdict::Failed(format!("{error:#}")),
        },
        Err(panic) => Verdict::Failed(message(panic.as_ref())),
    }
}

/// Runs the test, and ends the process.
fn alone(body: fn() -> anyhow::Result<()>) -> ! {
    let verdict = verdict(catch_unwind(body));
    let mut line = serde_json::to_vec(&verdict).unwrap();
    line.insert(0, b'\n');
    io::stdout().write_all(&line).unwrap();
    exit(0)
}

/// Runs the test of that name in a process: this program again.
fn in_process(name: &str) -> anyhow::Result<()> {
    let child = Command::new("/proc/self/exe")
        // With one test thread, the test runs on the main thread.
        .args([name, "--exact", "--test-threads=1"])
        .env(ALONE, "")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let output = end_of(child)?;
    let last = output.lines().last().unwrap_or_default();
    match serde_json::from_str(last).with_context(|| output.clone())? {
        Verdict::Passed => Ok(()),
        Verdict::Skipped(reason) => skip(reason),
        Verdict::Failed(reason) => Err(anyhow!(reason)),
    }
}

/// Reads the output of the process until its end.
fn end_of(mut child: Child) -> anyhow::Result<String> {
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            bail!("hangs");
        }
        thread::sleep(Duration::from_millis(10));
    }
    let mut output = String::new();
    child.stdout.take().unwrap().read_to_string(&mut output)?;
    Ok(output)
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("panicked")
        .to_owned()
}
