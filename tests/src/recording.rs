//! A tracer whose events a test takes in their order.

use std::{
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use tcp_udp_trace::{BlockingTracer, Error, Event, EventKind, Stats, TracerHandle};

use crate::{collector::check_conservation, netns::Netns};

/// How long a test waits for its next event.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running tracer. Its events, samples and gaps included, come from a thread of its own.
#[derive(Debug)]
pub struct Recording {
    handle: TracerHandle,
    netns: Vec<u32>,
    events: Receiver<Event>,
    /// The events that were received so far.
    received: Vec<Event>,
    thread: thread::JoinHandle<Result<Stats, Error>>,
}

impl Recording {
    /// Takes the events of these namespaces from a tracer, and those of the calling thread's one.
    pub fn of(mut tracer: BlockingTracer, others: &[u32]) -> anyhow::Result<Self> {
        let (sender, events) = mpsc::channel();
        let netns = [&[Netns::current()?.inode()?], others].concat();
        Ok(Self {
            handle: tracer.handle(),
            netns,
            events,
            received: Vec::new(),
            thread: thread::spawn(move || {
                for event in tracer.by_ref() {
                    // The receiver is gone if the test has failed.
                    let _ = sender.send(event);
                }
                tracer.close()
            }),
        })
    }

    /// Waits for an event of the test that matches, after those of earlier calls.
    pub fn wait_for(&mut self, what: &str, is_it: impl Fn(&Event) -> bool) -> anyhow::Result<()> {
        loop {
            let event = self.events.recv_timeout(PATIENCE);
            let event = event.with_context(|| format!("no {what} after {PATIENCE:?}"))?;
            let found = self.is_ours(&event) && is_it(&event);
            self.received.push(event);
            if found {
                return Ok(());
            }
        }
    }

    /// Waits until this many sockets of the test have ended.
    pub fn wait_ends(&mut self, ends: usize) -> anyhow::Result<()> {
        let ours = self.received.iter().filter(|event| self.is_ours(event));
        for _ in ours.filter(|event| event.is_end()).count()..ends {
            self.wait_for("end of a socket", Event::is_end)?;
        }
        Ok(())
    }

    /// Ends the tracer. Returns all events of the test and the gaps, and the counters.
    pub fn finish(self) -> anyhow::Result<(Vec<Event>, Stats)> {
        self.handle.stop();
        let mut events = self.received;
        events.extend(self.events.iter());
        let stats = self.thread.join().unwrap()?;
        check_conservation(&stats)?;
        ensure!(stats.discarded == 0, "{stats:?}");
        let netns = self.netns;
        events.retain(|event| {
            netns.contains(&event.socket.netns) || matches!(event.kind, EventKind::Lost { .. })
        });
        Ok((events, stats))
    }

    fn is_ours(&self, event: &Event) -> bool {
        self.netns.contains(&event.socket.netns)
    }
}
