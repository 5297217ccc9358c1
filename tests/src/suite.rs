//! How a test runs: on a thread of its own, in a network namespace of its own.

use std::{
    any::Any,
    cell::Cell,
    error::Error,
    fmt,
    sync::{PoisonError, RwLock},
    thread,
};

use libtest_mimic::{Completion, Failed, Trial};
use tcp_udp_trace::Buffer;

use crate::netns::Netns;

/// What a test needs of its surroundings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Others may run at the same time.
    Nothing,
    /// No other test of this process may run: it counts things that belong to the process or the machine.
    Solitude,
}

/// Held shared by ordinary tests, exclusively by those that need solitude.
static SOLITUDE: RwLock<()> = RwLock::new(());

/// A test cannot run here, for a reason that lies in the machine.
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

/// A test named `topic::name`.
#[derive(Debug, Clone, Copy)]
pub struct Test {
    /// See there.
    pub topic: &'static str,
    /// See there.
    pub name: &'static str,
    /// What it needs of its surroundings.
    pub needs: Needs,
    /// It fails by an error, or by a panic.
    pub body: fn() -> anyhow::Result<()>,
}

thread_local! {
    static BUFFER: Cell<Option<Buffer>> = const { Cell::new(None) };
}

/// What the tracers of this thread's test shall use, if that is prescribed.
#[must_use]
pub fn buffer() -> Option<Buffer> {
    BUFFER.get()
}

impl Test {
    /// Whether this is its topic, or its name with the topic.
    #[must_use]
    pub fn is_of(&self, name: &str) -> bool {
        name == self.topic || name.split_once("::") == Some((self.topic, self.name))
    }

    /// The test as it is.
    #[must_use]
    pub fn trial(self) -> Trial {
        self.run(format!("{}::{}", self.topic, self.name), None)
    }

    /// The same, named `perf::topic::name`: its tracers use perf buffers.
    #[must_use]
    pub fn with_perf_buffers(self) -> Trial {
        let name = format!("perf::{}::{}", self.topic, self.name);
        self.run(name, Some(Buffer::Perf))
    }

    fn run(self, full_name: String, buffer: Option<Buffer>) -> Trial {
        let Self {
            name, needs, body, ..
        } = self;
        let thread = thread::Builder::new().name(name.to_owned());
        Trial::ignorable_test(full_name, move || {
            // A poisoned lock only means that another test failed.
            let (_shared, _alone) = match needs {
                Needs::Nothing => (
                    Some(SOLITUDE.read().unwrap_or_else(PoisonError::into_inner)),
                    None,
                ),
                Needs::Solitude => (
                    None,
                    Some(SOLITUDE.write().unwrap_or_else(PoisonError::into_inner)),
                ),
            };
            let run = move || {
                BUFFER.set(buffer);
                Netns::enter_new()?;
                body()
            };
            match thread.spawn(run)?.join() {
                Ok(Ok(())) => Ok(Completion::Completed),
                Ok(Err(error)) => match error.downcast_ref::<Skip>() {
                    Some(Skip(reason)) => Ok(Completion::ignored_with(reason)),
                    None => Err(Failed::from(format!("{error:#}"))),
                },
                Err(panic) => Err(Failed::from(message(panic.as_ref()))),
            }
        })
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("panicked")
        .to_owned()
}
