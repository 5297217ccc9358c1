//! Holds the answers of sock_diag until the kernel's own record of each socket arrives.
//!
//! sock_diag and the programs identify a socket by the same cookie, so an answer and a record are
//! joined exactly. The record comes through the ring, at its position among the other records. So a
//! sample never comes after the close of its socket.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::{event::sample_info::SampleInfo, lock::lock};

/// The answers of sock_diag that wait for their record.
#[derive(Debug, Default)]
pub(crate) struct PendingSamples {
    state: Mutex<State>,
    /// Whether `state` has any infos. It saves the reader from taking the lock.
    any: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    /// By cookie.
    infos: HashMap<u64, SampleInfo>,
    taken: u64,
    counts: Counts,
}

/// The counters of the sampler.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) rounds: u64,
    pub(crate) faults: u64,
    pub(crate) malformed: u64,
    pub(crate) last_round: Duration,
}

impl PendingSamples {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Stores the answer for a socket, if there are less than `limit` others.
    pub(crate) fn put(&self, cookie: u64, info: SampleInfo, limit: usize) {
        let mut state = self.lock();
        if state.infos.len() < limit {
            state.infos.insert(cookie, info);
            self.any.store(true, Ordering::Relaxed);
        }
    }

    /// Returns the answer for a socket whose record has arrived, and removes it.
    pub(crate) fn take(&self, cookie: u64) -> Option<SampleInfo> {
        self.lock().infos.remove(&cookie)
    }

    /// Notes that this number of records has arrived, and that their events are in the queue.
    pub(crate) fn taken_in(&self, records: u64) {
        self.lock().taken += records;
    }

    /// Removes the answer for a closed socket, so that no sample follows its close.
    pub(crate) fn forget(&self, cookie: Option<u64>) {
        if let Some(cookie) = cookie.filter(|_| self.any.load(Ordering::Relaxed)) {
            self.lock().infos.remove(&cookie);
        }
    }

    /// Returns how many records have arrived so far.
    pub(crate) fn taken(&self) -> u64 {
        self.lock().taken
    }

    /// Removes all answers, for which no more records will arrive.
    pub(crate) fn clear(&self) {
        let mut state = self.lock();
        state.infos = HashMap::new();
        self.any.store(false, Ordering::Relaxed);
    }

    pub(crate) fn counts(&self) -> Counts {
        self.lock().counts
    }

    /// Changes the counters.
    pub(crate) fn count(&self, add: impl FnOnce(&mut Counts)) {
        add(&mut self.lock().counts);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::udp_info::UdpInfo;

    fn info(drops: u32) -> SampleInfo {
        SampleInfo::Udp(Box::new(UdpInfo {
            drops,
            ..UdpInfo::default()
        }))
    }

    #[test]
    fn each_socket_is_sampled_once_and_not_after_its_close() {
        let samples = PendingSamples::default();
        for cookie in 1..=4 {
            samples.put(cookie, info(cookie as u32), 3);
        }
        assert_eq!(samples.take(1), Some(info(1)));
        assert_eq!(samples.take(1), None, "a second record in one round");
        samples.forget(Some(2));
        assert_eq!(samples.take(2), None, "after its close");
        assert_eq!(samples.take(4), None, "beyond the limit");
        samples.clear();
        assert_eq!(samples.take(3), None, "of an earlier round");
    }
}
