//! The kinds of events, and the counters of each kind.

use std::{
    fmt,
    ops::{AddAssign, Index},
    str::FromStr,
};

use tcp_udp_trace_common::kind as record;

use super::{Event, EventKind};

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident $field:ident $name:literal,)+) => {
        /// The kind of an event: an [`EventKind`] without its fields. A gap ([`EventKind::Lost`])
        /// has no kind.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        #[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
        #[non_exhaustive]
        pub enum Kind {
            $($(#[$doc])* $kind,)+
        }

        impl Kind {
            /// All kinds.
            pub const ALL: &[Self] = &[$(Self::$kind,)+];

            /// Returns the name, as in JSON: `state_change`, `accept`, …
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$kind => $name,)+ }
            }
        }

        /// The counters of events, by kind. The JSON form leaves out kinds whose counters are all
        /// zero.
        #[derive(Clone, Copy, Default, PartialEq, Eq)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        #[non_exhaustive]
        pub struct EventCountsByKind {
            $(
                $(#[$doc])*
                #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "EventCounts::is_nothing"))]
                pub $field: EventCounts,
            )+
        }

        impl Index<Kind> for EventCountsByKind {
            type Output = EventCounts;

            fn index(&self, kind: Kind) -> &EventCounts {
                match kind { $(Kind::$kind => &self.$field,)+ }
            }
        }

        impl EventCountsByKind {
            pub(crate) fn each(mut self, counts: impl Fn(Kind, &mut EventCounts)) -> Self {
                $(counts(Kind::$kind, &mut self.$field);)+
                self
            }
        }
    };
}

kinds! {
    /// [`EventKind::StateChange`].
    StateChange state_change "state_change",
    /// [`EventKind::Accept`].
    Accept accept "accept",
    /// [`EventKind::Retransmit`].
    Retransmit retransmit "retransmit",
    /// [`EventKind::Reset`].
    Reset reset "reset",
    /// [`EventKind::ListenOverflow`].
    ListenOverflow listen_overflow "listen_overflow",
    /// [`EventKind::Connect`].
    Connect connect "connect",
    /// [`EventKind::ConnectFailed`].
    ConnectFailed connect_failed "connect_failed",
    /// [`EventKind::Flow`].
    Flow flow "flow",
    /// [`EventKind::Send`].
    Send send "send",
    /// [`EventKind::Receive`].
    Receive receive "receive",
    /// [`EventKind::Close`].
    Close close "close",
    /// [`EventKind::Sample`].
    Sample sample "sample",
}

/// The counters of events. After the tracer is closed,
/// `emitted == delivered + ring_lost + queue_shed + reader_filtered + discarded`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct EventCounts {
    /// Events that the hooks produced.
    pub emitted: u64,
    /// Events that the consumer took from the stream.
    pub delivered: u64,
    /// Events that found the buffer between kernel and reader full.
    pub ring_lost: u64,
    /// Events that the queue shed because the consumer was too slow.
    pub queue_shed: u64,
    /// Events that the [filter](crate::Filter) rejected in user space, after the programs had
    /// produced them. In JSON: `filtered`.
    #[cfg_attr(feature = "serde", serde(rename = "filtered"))]
    pub reader_filtered: u64,
    /// Events that were in the queue when the tracer was closed.
    pub discarded: u64,
    /// Events that the [filter](crate::Filter) rejected in the kernel, before they were produced.
    /// They are not part of `emitted`. In JSON: `rejected`.
    #[cfg_attr(feature = "serde", serde(rename = "rejected"))]
    pub kernel_filtered: u64,
}

impl EventCounts {
    fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// Shows only the kinds with a counter above zero.
impl fmt::Debug for EventCountsByKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = Kind::ALL.iter().map(|&kind| (kind.name(), self[kind]));
        f.debug_map()
            .entries(kinds.filter(|(_, counts)| !counts.is_nothing()))
            .finish()
    }
}

impl AddAssign for EventCounts {
    fn add_assign(&mut self, other: Self) {
        let Self {
            emitted,
            delivered,
            ring_lost,
            queue_shed,
            reader_filtered,
            discarded,
            kernel_filtered,
        } = other;
        self.emitted += emitted;
        self.delivered += delivered;
        self.ring_lost += ring_lost;
        self.queue_shed += queue_shed;
        self.reader_filtered += reader_filtered;
        self.discarded += discarded;
        self.kernel_filtered += kernel_filtered;
    }
}

impl Kind {
    /// Returns the kind of an event; `None` for a gap.
    #[must_use]
    pub fn of(event: &Event) -> Option<Self> {
        Some(match event.kind {
            EventKind::StateChange { .. } => Self::StateChange,
            EventKind::Accept => Self::Accept,
            EventKind::Retransmit { .. } => Self::Retransmit,
            EventKind::Reset { .. } => Self::Reset,
            EventKind::ListenOverflow => Self::ListenOverflow,
            EventKind::Connect => Self::Connect,
            EventKind::ConnectFailed { .. } => Self::ConnectFailed,
            EventKind::Flow { .. } => Self::Flow,
            EventKind::Send { .. } => Self::Send,
            EventKind::Receive { .. } => Self::Receive,
            EventKind::Close { .. } => Self::Close,
            EventKind::Sample { .. } => Self::Sample,
            EventKind::Lost { .. } => return None,
        })
    }
}

impl Kind {
    /// Returns the kinds of the records that its events come from.
    pub(crate) const fn records(self) -> &'static [u32] {
        match self {
            Self::StateChange => &[record::STATE_CHANGE],
            Self::Accept => &[record::ACCEPT],
            Self::Retransmit => &[record::RETRANSMIT],
            Self::Reset => &[record::RESET_SENT, record::RESET_RECEIVED],
            Self::ListenOverflow => &[record::LISTEN_OVERFLOW],
            Self::Connect => &[record::CONNECT],
            Self::ConnectFailed => &[record::CONNECT_FAILED_TCP, record::CONNECT_FAILED_UDP],
            Self::Flow => &[record::FLOW],
            Self::Send => &[record::SEND],
            Self::Receive => &[record::RECEIVE],
            Self::Close => &[record::CLOSE],
            Self::Sample => &[record::SAMPLE_TCP, record::SAMPLE_UDP],
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(name: &str) -> Result<Self, UnknownKind> {
        let mut kinds = Self::ALL.iter().copied();
        kinds
            .find(|kind| kind.name() == name)
            .ok_or(UnknownKind(()))
    }
}

/// The error of a text that is not the name of a [`Kind`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a kind of event: state_change, accept, retransmit, reset, listen_overflow, connect, \
     connect_failed, flow, send, receive, close or sample"
)]
pub struct UnknownKind(());

/// A counter for each kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts([u64; Kind::ALL.len()]);

impl Counts {
    /// Counts an event, unless it is a gap.
    pub(crate) fn add(&mut self, event: &Event) {
        if let Some(kind) = Kind::of(event) {
            self.0[kind as usize] += 1;
        }
    }

    pub(crate) fn of(&self, kind: Kind) -> u64 {
        self.0[kind as usize]
    }

    pub(crate) fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for kind in Kind::ALL {
            assert_eq!(kind.name().parse(), Ok(*kind));
        }
        assert_eq!("lost".parse::<Kind>(), Err(UnknownKind(())));
    }
}
