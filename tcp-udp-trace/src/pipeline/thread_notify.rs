//! Lets a thread wait for the progress of tasks.

use std::{
    sync::{Condvar, Mutex, PoisonError},
    time::Duration,
};

use crate::lock::lock;

/// A notification of changes, for a thread that waits for a condition.
#[derive(Debug, Default)]
pub(crate) struct ThreadNotify {
    lock: Mutex<()>,
    changed: Condvar,
}

impl ThreadNotify {
    /// Notifies the waiting thread. The caller holds none of the locks that the thread's condition
    /// takes.
    pub(crate) fn notify(&self) {
        drop(self.lock.lock());
        self.changed.notify_all();
    }

    /// Blocks until `is_done`, at most for `time`. Returns whether it is done.
    pub(crate) fn wait(&self, time: Duration, is_done: impl Fn() -> bool) -> bool {
        let guard = lock(&self.lock);
        let waited = self
            .changed
            .wait_timeout_while(guard, time, |()| !is_done());
        let (_guard, result) = waited.unwrap_or_else(PoisonError::into_inner);
        !result.timed_out()
    }
}
