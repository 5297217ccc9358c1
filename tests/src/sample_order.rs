//! Checks that samples fit in with the other events of their sockets.

use std::{collections::HashMap, time::Duration};

use anyhow::{bail, ensure};
use tcp_udp_trace::{Event, EventKind, Protocol};

use crate::{collector::show, expected_tcp::grows, kernel};

/// A sample, and how many other events had come before it.
#[derive(Debug, Clone)]
pub(crate) struct SampleOrder {
    pub(crate) event: Event,
    pub(crate) position: usize,
}

/// How long a program may be held up between its look at a socket and its record, where the guest's
/// CPUs wait for the host's.
const HELD_UP: Duration = Duration::from_millis(250);

/// Checks that each sample fits in with the events of its socket before and after it.
pub(crate) fn check(samples: &[SampleOrder], events: &[Event]) -> anyhow::Result<()> {
    let mut observed = HashMap::<u64, Vec<(usize, &Event)>>::new();
    for (position, event) in events.iter().enumerate() {
        observed
            .entry(event.socket.id)
            .or_default()
            .push((position, event));
    }
    // Before that version, the kernel iterates over TCP sockets without their locks, as it does
    // over UDP sockets on every kernel.
    let iterator_holds_lock = kernel::is_at_least(5, 15)?;
    for SampleOrder { event, position } in samples {
        let of_socket = observed
            .get(&event.socket.id)
            .map_or(&[][..], Vec::as_slice);
        let (before, after) =
            of_socket.split_at(of_socket.partition_point(|(at, _)| at < position));
        // A flow has totals of its own.
        let is_of_socket = |event: &&Event| !matches!(event.kind, EventKind::Flow { .. });
        let before = before
            .iter()
            .rev()
            .map(|(_, event)| *event)
            .find(is_of_socket);
        let after = after.iter().map(|(_, event)| *event).find(is_of_socket);
        let fits = || {
            for other in [before, after].into_iter().flatten() {
                let (socket, as_of) = (&event.socket, &other.socket);
                ensure!(socket.netns == as_of.netns && socket.uid == as_of.uid);
                ensure!(
                    as_of.cookie.is_none() || socket.cookie == as_of.cookie,
                    "another cookie"
                );
            }
            let owners = [before, after]
                .into_iter()
                .flatten()
                .map(|other| &other.process);
            let is_accepted_now = after.is_some_and(|after| after.kind == EventKind::Accept);
            let is_known = before.is_none() && (after.is_none() || is_accepted_now)
                || owners.into_iter().any(|owner| *owner == event.process);
            ensure!(is_known, "another owner");
            // Two records of one moment are in the order of their clocks and counters only if both
            // were written under the socket's lock, which not every hook of an accept holds.
            let is_ordered = |other: &Event| {
                event.socket.protocol == Protocol::Tcp
                    && iterator_holds_lock
                    && other.kind != EventKind::Accept
                    || event.uptime.abs_diff(other.uptime) > HELD_UP
            };
            if let Some(before) = before {
                ensure!(!before.is_end(), "a sample after the close");
            }
            if let Some(before) = before.filter(|before| is_ordered(before)) {
                ensure!(before.uptime <= event.uptime, "time went back");
                ensure!(grows(before, event), "the traffic shrank");
            }
            if let Some(after) = after.filter(|after| is_ordered(after)) {
                ensure!(event.uptime <= after.uptime, "time went back behind it");
                ensure!(grows(event, after), "the traffic shrank behind it");
            }
            Ok(())
        };
        if let Err(error) = fits() {
            let of_socket: Vec<_> = of_socket
                .iter()
                .map(|(_, event)| (*event).clone())
                .collect();
            bail!(
                "{error:#}: {event} {:?} between {before:?} and {after:?} of{}",
                event.socket,
                show(&of_socket)
            );
        }
    }
    Ok(())
}
