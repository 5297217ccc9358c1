//! Lets a thread wait for what tasks do, without being a task.

use std::{
    sync::{Condvar, Mutex, PoisonError},
    time::Duration,
};

use crate::lock::lock;

/// Something that is told of changes, and that a thread can wait at.
#[derive(Debug, Default)]
pub(crate) struct ThreadNotify {
    lock: Mutex<()>,
    changed: Condvar,
}

impl ThreadNotify {
    /// Something has changed. The caller holds none of the locks that the waiting thread's condition takes.
    pub(crate) fn notify(&self) {
        drop(self.lock.lock());
        self.changed.notify_all();
    }

    /// Blocks until `is_done`, at most for `time`; whether it is.
    pub(crate) fn wait(&self, time: Duration, is_done: impl Fn() -> bool) -> bool {
        let guard = lock(&self.lock);
        let waited = self
            .changed
            .wait_timeout_while(guard, time, |()| !is_done());
        let (_guard, result) = waited.unwrap_or_else(PoisonError::into_inner);
        !result.timed_out()
    }
}
