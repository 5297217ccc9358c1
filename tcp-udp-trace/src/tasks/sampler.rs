//! The enrichment task: a periodic look at every live socket, by sock_diag.
//!
//! A round has a thread of its own, which enters each network namespace in turn and then ends. In each namespace it asks sock_diag for
//! every socket, which also gives each its cookie; keeps the answers ([`PendingSamples`](crate::pipeline::pending_samples::PendingSamples)); and lets the kernel walk
//! through the same sockets with a program of ours, which writes a record of each into the ring. The reader joins the two by
//! the cookie.
//!
//! The thread goes ahead only as fast as the consumer follows: a sample never sheds an event.

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

/// How long the reader may take for the records of a step.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait for a ring that is crowded by events.
const RESPITE: Duration = Duration::from_millis(10);

/// Has a round now and then once in each interval, until the tracer ends.
pub(super) async fn run(shared: Arc<Shared>, every: Duration) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(done) = shared.begin_round(round) else {
            return;
        };
        // An error is the thread's end too.
        let _ = done.await;
    }
}

/// Why a round is over before its end: the tracer is.
struct Over;

/// One round; on a thread that ends after it, because it does not come back from the namespaces.
fn round(shared: &Shared) {
    let began = Instant::now();
    let round = Round { shared };
    let result = round.everywhere();
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
        if !filter.wants_samples() {
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
            if !filter.wants_netns(namespace.inode()) {
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

    /// Samples the namespace that the thread is in.
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

    /// Lets the kernel write a record of each socket of the namespace that the thread is in.
    fn read_socket_iter(&self) -> io::Result<()> {
        let shared = self.shared;
        let mut file = shared.open_socket_iter()?;
        let mut step = vec![0; shared.limits.step];
        let mut expected = shared.samples.taken();
        loop {
            let has_room = || shared.is_over() || shared.queue.has_room_to_spare();
            // However long the consumer takes.
            while !shared.queue.changed.wait(PATIENCE, has_room) {}
            if shared.is_over() {
                return Ok(());
            }
            match file.read(&mut step) {
                Ok(0) => return Ok(()),
                // A byte stands for a record.
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

    /// Counts what went wrong, unless it did because the tracer is over.
    fn fault(&self, what: &str, error: &dyn Display) -> Result<(), Over> {
        self.go_on()?;
        self.shared.samples.count(|counts| counts.faults += 1);
        log::warn!("no samples of {what} this time: {error}");
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
