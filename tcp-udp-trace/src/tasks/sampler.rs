//! The sampler: samples every live socket periodically, by sock_diag.
//!
//! A round has a thread of its own, which enters each network namespace in turn and then ends. In
//! each namespace, the thread requests every socket from sock_diag, which also gives each socket
//! its cookie. It stores the answers
//! ([`PendingSamples`](crate::pipeline::pending_samples::PendingSamples)). Then the kernel's
//! iterator over the same sockets runs a program that writes a record of each into the ring. The
//! reader joins answer and record by the cookie.
//!
//! The thread is never faster than the consumer, so a sample never sheds an event.

use std::{
    fmt::Display,
    io::{self, Read as _},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    runtime,
    time::{MissedTickBehavior, interval},
};

use super::shared::Shared;
use crate::{
    kernel::SampleScope,
    netns,
    sock_diag::{self, SocketInfo, dump},
};

/// The time limit for the reader to take the records of a step.
const PATIENCE: Duration = Duration::from_secs(10);
/// The pause if the ring is crowded by events.
const RESPITE: Duration = Duration::from_millis(10);

/// A search for sockets that are gone takes about 2 µs for each live socket.
const ROUNDS_A_SEARCH: u32 = 4;
/// How many replaced sockets the programs remember.
const MOST_REPLACED: usize = 64;

/// Runs a round at once and then once per interval, until the tracer ends.
pub(super) async fn run(shared: Arc<Shared>, every: Duration) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for number in 1.. {
        ticks.tick().await;
        let Some(done) = shared.begin_round(move |shared| round(shared, number)) else {
            return;
        };
        // An error means that the thread has ended, too.
        let _ = done.await;
    }
}

/// The round stops because the tracer is over.
struct Over;

/// Runs one round. The thread must end afterwards, because it stays in the last namespace.
fn round(shared: &Shared, number: u32) {
    let began = Instant::now();
    let round = Round { shared };
    let result = round.everywhere().and_then(|()| round.find_gone(number));
    shared.samples.clear();
    if result.is_ok() {
        shared.samples.count(|counts| {
            counts.rounds += 1;
            counts.last_round = began.elapsed();
        });
    }
}

struct Round<'a> {
    shared: &'a Shared,
}

impl Round<'_> {
    fn everywhere(&self) -> Result<(), Over> {
        let filter = self.shared.filter().ok_or(Over)?;
        if !filter.passes_samples() {
            return Ok(());
        }
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => return self.fault("a round of samples", &error),
        };
        self.here(&runtime, "its own network namespace")?;
        if self.shared.sample_scope != SampleScope::EveryNamespace {
            return Ok(());
        }
        let namespaces = match netns::others() {
            Ok(namespaces) => namespaces,
            Err(error) => return self.fault("listing the network namespaces", &error),
        };
        for namespace in namespaces {
            if !filter.passes_netns(namespace.inode()) {
                continue;
            }
            let name = format!("network namespace {}", namespace.inode());
            match namespace.enter() {
                Ok(true) => self.here(&runtime, &name)?,
                Ok(false) => {}
                Err(error) => self.fault(&name, &error)?,
            }
        }
        Ok(())
    }

    /// Samples the thread's namespace.
    fn here(&self, runtime: &runtime::Runtime, name: &str) -> Result<(), Over> {
        let Shared {
            samples, limits, ..
        } = self.shared;
        samples.clear();
        let take = |answer| {
            match answer {
                Ok(None) => {}
                Ok(Some(SocketInfo { cookie, info })) => samples.put(cookie, info, limits.sockets),
                Err(sock_diag::Malformed) => samples.count(|counts| counts.malformed += 1),
            }
            !self.shared.is_over()
        };
        if let Err(error) = runtime.block_on(dump(self.shared.protocol, take)) {
            return self.fault(name, &error);
        }
        match self.read_socket_iter() {
            Ok(()) => self.go_on(),
            Err(error) => self.fault(name, &error),
        }
    }

    /// Lets the kernel write a record of each socket of the thread's namespace.
    fn read_socket_iter(&self) -> io::Result<()> {
        let shared = self.shared;
        let mut file = shared.open_socket_iter()?;
        let mut step = vec![0; shared.limits.step];
        let mut expected = shared.samples.taken();
        loop {
            let has_room = || shared.is_over() || shared.queue.has_room_to_spare();
            // The consumer may take any time.
            while !shared.queue.changed.wait(PATIENCE, has_room) {}
            if shared.is_over() {
                return Ok(());
            }
            match file.read(&mut step) {
                Ok(0) => return Ok(()),
                // Each byte represents a record.
                Ok(records) => expected += records as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    shared.queue.changed.wait(RESPITE, || shared.is_over());
                    continue;
                }
                Err(error) => return Err(error),
            }
            shared.wake.notify_one();
            let are_taken = || shared.is_over() || shared.samples.taken() >= expected;
            // While the queue is full, the reader leaves records in the ring.
            while !shared.queue.changed.wait(PATIENCE, are_taken) {
                if !shared.queue.has_room_to_spare() {
                    continue;
                }
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the reader does not take the samples",
                ));
            }
        }
    }

    /// Reports the ends of TCP sockets that no hook saw, in one of [`ROUNDS_A_SEARCH`] rounds.
    fn find_gone(&self, number: u32) -> Result<(), Over> {
        let Some(sockets) = self.shared.tcp_sockets() else {
            return Ok(());
        };
        if !number.is_multiple_of(ROUNDS_A_SEARCH) {
            return Ok(());
        }
        // The programs take the number before the first one for a search that did not exist.
        let search = number / ROUNDS_A_SEARCH + 1;
        let check = |address| {
            self.go_on()?;
            let found = self.shared.check_gone(address, search);
            found.or_else(|error| self.fault("sockets that are gone", &error).map(|()| false))
        };
        for _ in 0..MOST_REPLACED {
            if !check(0)? {
                break;
            }
        }
        for address in sockets.addresses() {
            match address {
                Ok(address) => check(address)?,
                Err(error) => return self.fault("sockets that are gone", &error),
            };
        }
        Ok(())
    }

    /// Counts and logs a failure, unless its cause is the end of the tracer.
    fn fault(&self, operation: &str, error: &dyn Display) -> Result<(), Over> {
        self.go_on()?;
        self.shared.samples.count(|counts| counts.faults += 1);
        log::warn!("no samples of {operation} this time: {error}");
        Ok(())
    }

    fn go_on(&self) -> Result<(), Over> {
        if self.shared.is_over() {
            Err(Over)
        } else {
            Ok(())
        }
    }
}
