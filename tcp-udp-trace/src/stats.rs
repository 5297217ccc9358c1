//! What a tracer counts about itself.

use std::time::Duration;

use crate::{Fate, Fates};

/// What has become of every event, and what the kernel could not do; all counts since the start.
///
/// Once a tracer is closed,
/// `emitted == delivered + ring_lost + queue_shed + filtered + malformed + discarded`, and the same of each kind in [`kinds`](Self::kinds) (where
/// a malformed record has none).
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
    /// Events that the queue shed, the oldest first, because the consumer was too slow.
    pub queue_shed: u64,
    /// Events that the [filter](crate::Filter) turned out after they had been produced: totals of UDP flows whose socket it does not want any more,
    /// and closes of UDP sockets that were produced for the sake of their flows.
    pub filtered: u64,
    /// Records that could not be decoded: an eBPF object and a library that do not belong together.
    pub malformed: u64,
    /// Events that waited in the queue when the tracer was closed.
    pub discarded: u64,
    /// Not among `emitted`: events that the [filter](crate::Filter) kept from being produced.
    pub rejected: u64,
    /// The counts above, for each kind of event.
    pub kinds: Fates,
    /// Times that a hook found no room to remember a socket, because [`max_sockets`] others were,
    /// or all but an eighth of them were and the socket's user had a 64th of them or more. TCP:
    /// after the first, its events have no owner, and each has an id of its own. UDP: it has no
    /// events until there is room.
    ///
    /// [`max_sockets`]: crate::TcpTracerBuilder::max_sockets
    pub untracked: u64,
    /// State changes that no hook saw, noticed at the socket's next one. A missed close is reported
    /// when the kernel frees the socket. A close whose socket no hook saw freed either is not
    /// reported, and counted only when another socket gets its address. So this is a lower bound.
    pub missed: u64,
    /// TCP sockets left out because they are neither IPv4 nor IPv6.
    pub unknown_family: u64,
    /// Processes of a filter's [trees](crate::Filter::pid_tree) that could not be remembered, because too many others were: their events are not
    /// reported, nor are their descendants'.
    pub untracked_processes: u64,
    /// UDP flows that had to make room for others, because [`max_flows`] were remembered. They are
    /// flows of the user who has the most at that time. Each has told its totals before
    /// ([`last`](crate::EventKind::Flow::last)).
    ///
    /// [`max_flows`]: crate::UdpTracerBuilder::max_flows
    pub flows_evicted: u64,
    /// UDP datagrams that were counted for their socket and for no flow: the first report of their flow found the buffer between kernel
    /// and reader full, or new flows came faster than the reader could make room for them. Flows that begin later at the same socket are
    /// `approximate`.
    pub unassigned: u64,
    /// Rounds of samples that came to their end.
    pub sample_rounds: u64,
    /// How long the last of them took, from its beginning until the last sample was taken from the kernel. It goes no faster than the
    /// consumer.
    #[cfg_attr(
        feature = "serde",
        serde(rename = "sample_last_round_ns", with = "crate::json::nanos")
    )]
    pub sample_last_round: Duration,
    /// Times that a network namespace could not be sampled: netlink failed, or it may not be entered. It is tried again in the next
    /// round; the reason is logged.
    pub sample_faults: u64,
    /// Answers of netlink that could not be decoded.
    pub sample_malformed: u64,
    /// How often the kernel skipped one of the programs because it was already active on that CPU (`recursion_misses`
    /// of `/proc/self/fdinfo`); `None` where it does not tell (before 5.12). Signals with two programs lose nothing by it,
    /// because the other one was run.
    pub recursion_misses: Option<u64>,
}

impl Stats {
    /// Lets the kinds say what has become of the events, and sums that up.
    pub(crate) fn with_kinds(self, kinds: Fates) -> Self {
        let mut sum = Fate::default();
        for &kind in crate::Kind::ALL {
            sum += kinds[kind];
        }
        Self {
            emitted: sum.emitted + self.malformed,
            delivered: sum.delivered,
            ring_lost: sum.ring_lost,
            queue_shed: sum.queue_shed,
            filtered: sum.filtered,
            discarded: sum.discarded,
            rejected: sum.rejected,
            kinds,
            ..self
        }
    }
}

/// The counts of two tracers together; of their last rounds of samples the longer one.
impl std::ops::AddAssign for Stats {
    fn add_assign(&mut self, other: Self) {
        let Self {
            emitted,
            delivered,
            ring_lost,
            queue_shed,
            filtered,
            malformed,
            discarded,
            rejected,
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
        self.filtered += filtered;
        self.malformed += malformed;
        self.discarded += discarded;
        self.rejected += rejected;
        self.kinds = self.kinds.each(|kind, fate| *fate += kinds[kind]);
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
