//! The counters of a tracer.

use std::time::Duration;

use crate::event::kind::{EventCounts, EventCountsByKind, Kind};

/// The counters of a tracer since its start.
///
/// After a tracer is closed,
/// `emitted == delivered + ring_lost + queue_shed + reader_filtered + malformed + discarded`. The
/// same holds for each kind in [`kinds`](Self::kinds), where a malformed record has no kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Stats {
    /// Events that the hooks produced.
    pub emitted: u64,
    /// Events that the consumer took from the stream.
    pub delivered: u64,
    /// Events that found the buffer between kernel and reader full.
    pub ring_lost: u64,
    /// Events that the queue shed because the consumer was too slow.
    pub queue_shed: u64,
    /// Events that the [filter](crate::Filter) rejected in user space, after the programs had
    /// produced them: totals of UDP flows whose socket no longer passes, and closes of UDP sockets
    /// that the reader needed for their flows. In JSON: `filtered`.
    #[cfg_attr(feature = "serde", serde(rename = "filtered"))]
    pub reader_filtered: u64,
    /// Records that the reader could not decode. The eBPF object and the library do not belong
    /// together.
    pub malformed: u64,
    /// Events that were in the queue when the tracer was closed.
    pub discarded: u64,
    /// Events that the [filter](crate::Filter) rejected in the kernel, before they were produced.
    /// They are not part of `emitted`. In JSON: `rejected`.
    #[cfg_attr(feature = "serde", serde(rename = "rejected"))]
    pub kernel_filtered: u64,
    /// The counters above, for each kind of event.
    pub kinds: EventCountsByKind,
    /// Times that a hook found no room for a socket: the tracer already remembered [`max_sockets`],
    /// or it remembered seven eighths of them and the socket's user had a 64th or more. TCP: after
    /// the first event, the socket's events have no owner, and each has its own id. UDP: the socket
    /// has no events until there is room.
    ///
    /// [`max_sockets`]: crate::TcpTracerBuilder::max_sockets
    pub untracked: u64,
    /// State changes that no hook saw. The next change of the socket shows them. If a close was
    /// missed, the tracer reports it when the kernel frees the socket. If no hook saw that either,
    /// the tracer reports it when two searches, one in every fourth round of
    /// [samples](crate::TcpTracerBuilder::sample_interval), found the socket gone. This is a lower
    /// bound.
    pub missed: u64,
    /// TCP sockets that the tracer left out because they are neither IPv4 nor IPv6.
    pub unknown_family: u64,
    /// Processes of a filter's [trees](crate::Filter::pid_tree) for which there was no room. The
    /// tracer does not report their events, nor those of their descendants.
    pub untracked_processes: u64,
    /// UDP flows that made room for others, because the tracer remembered [`max_flows`]. They are
    /// flows of the user who had the most at that time. Each had its last report before
    /// ([`last`](crate::EventKind::Flow::last)).
    ///
    /// [`max_flows`]: crate::UdpTracerBuilder::max_flows
    pub flows_evicted: u64,
    /// UDP datagrams that were counted for their socket, but for no flow. Either the first report
    /// of their flow found the buffer between kernel and reader full, or new flows came faster than
    /// the reader could make room. Flows that begin later at the same socket are `approximate`.
    pub unassigned: u64,
    /// Rounds of samples that were completed.
    pub sample_rounds: u64,
    /// The duration of the last round, from its beginning until the reader took its last sample
    /// from the kernel. A round is never faster than the consumer.
    #[cfg_attr(
        feature = "serde",
        serde(
            rename = "sample_last_round_ns",
            with = "crate::event::serde_impls::nanos"
        )
    )]
    pub sample_last_round: Duration,
    /// Times that the tracer could not sample a network namespace, because netlink failed or the
    /// namespace may not be entered. The library logs the reason. The next round tries again.
    pub sample_faults: u64,
    /// Answers of netlink that could not be decoded.
    pub sample_malformed: u64,
    /// How often the kernel skipped a program because it was already active on that CPU
    /// (`recursion_misses` of `/proc/self/fdinfo`). `None` before Linux 5.12, which does not show
    /// it. A signal with two programs loses nothing, because the other program ran.
    pub recursion_misses: Option<u64>,
}

impl Stats {
    /// Sets the counters of each kind, and their sums.
    pub(crate) fn with_kinds(self, kinds: EventCountsByKind) -> Self {
        let mut sum = EventCounts::default();
        for &kind in Kind::ALL {
            sum += kinds[kind];
        }
        Self {
            emitted: sum.emitted + self.malformed,
            delivered: sum.delivered,
            ring_lost: sum.ring_lost,
            queue_shed: sum.queue_shed,
            reader_filtered: sum.reader_filtered,
            discarded: sum.discarded,
            kernel_filtered: sum.kernel_filtered,
            kinds,
            ..self
        }
    }
}

/// Adds the counters of two tracers. `sample_last_round` is the longer of the two.
impl std::ops::AddAssign for Stats {
    fn add_assign(&mut self, other: Self) {
        let Self {
            emitted,
            delivered,
            ring_lost,
            queue_shed,
            reader_filtered,
            malformed,
            discarded,
            kernel_filtered,
            kinds,
            untracked,
            missed,
            unknown_family,
            untracked_processes,
            flows_evicted,
            unassigned,
            sample_rounds,
            sample_last_round,
            sample_faults,
            sample_malformed,
            recursion_misses,
        } = other;
        self.emitted += emitted;
        self.delivered += delivered;
        self.ring_lost += ring_lost;
        self.queue_shed += queue_shed;
        self.reader_filtered += reader_filtered;
        self.malformed += malformed;
        self.discarded += discarded;
        self.kernel_filtered += kernel_filtered;
        self.kinds = self.kinds.each(|kind, counts| *counts += kinds[kind]);
        self.untracked += untracked;
        self.missed += missed;
        self.unknown_family += unknown_family;
        self.untracked_processes += untracked_processes;
        self.flows_evicted += flows_evicted;
        self.unassigned += unassigned;
        self.sample_rounds += sample_rounds;
        self.sample_last_round = self.sample_last_round.max(sample_last_round);
        self.sample_faults += sample_faults;
        self.sample_malformed += sample_malformed;
        if let Some(misses) = recursion_misses {
            *self.recursion_misses.get_or_insert(0) += misses;
        }
    }
}
