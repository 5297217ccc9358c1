//! Compares the events that pass a filter with the events of a tracer without a filter.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use integration_tests::collector::{Collector, show, without_summary};
use tcp_udp_trace::{Event, EventKind, Filter};

/// A filter, and a function that applies its documentation to an event.
pub(crate) struct Case {
    filter: Filter,
    passes: Box<dyn Fn(&Event) -> bool>,
}

impl Case {
    pub(crate) fn new(filter: Filter, passes: impl Fn(&Event) -> bool + 'static) -> Self {
        Self {
            filter,
            passes: Box::new(passes),
        }
    }
}

/// Sets each filter in turn on one tracer, runs `act`, and compares the events with those of
/// another tracer without a filter. Exactly the events that pass must come. `act` returns how many
/// sockets it has closed.
pub(crate) fn compare(
    collectors: [Collector; 2],
    cases: &[Case],
    mut act: impl FnMut() -> anyhow::Result<usize>,
) -> anyhow::Result<()> {
    let [filtered, reference] = collectors;
    let mut before = [0, 0];
    let mut sockets = 0;
    for Case { filter, passes } in cases {
        filtered.set_filter(filter.clone())?;
        ensure!(filtered.handle().filter().as_ref() == Some(filter));
        sockets += act()?;
        reference.wait_closed(sockets)?;
        let events = &reference.events()[before[1]..];
        let passes_or_ends = |event: &&Event| passes(event) || ends_flows(event, events, passes);
        let should_come: Vec<_> = events.iter().filter(passes_or_ends).cloned().collect();
        let expected = before[0] + should_come.len();
        let context = || format!("with the filter {:?}", filter.to_string());
        let came = filtered.wait_count(expected).with_context(context)?;
        let [came, should_come] = [&came[before[0]..], &should_come].map(described);
        ensure!(
            came == should_come,
            "{}: {came:#?}\nnot\n{should_come:#?}",
            context()
        );
        before = [expected, reference.events().len()];
    }
    let stats = filtered.handle().stats();
    ensure!(stats.kernel_filtered > 0, "{stats:?}");
    // Events that came too late are counted here.
    let came = filtered.finish_all()?;
    ensure!(
        came.len() == before[0],
        "more than expected: {}",
        show(&came[before[0]..])
    );
    reference.finish_all().map(drop)
}

/// Whether this is the end of a UDP socket of which a flow passes. The filter's kind still counts.
fn ends_flows(event: &Event, events: &[Event], passes: &dyn Fn(&Event) -> bool) -> bool {
    let EventKind::Close { .. } = event.kind else {
        return false;
    };
    let flows = events.iter().filter(|flow| {
        matches!(flow.kind, EventKind::Flow { .. }) && flow.socket.id == event.socket.id
    });
    flows.into_iter().any(|flow| {
        let mut end = event.clone();
        end.socket.local = flow.socket.local;
        end.socket.remote = flow.socket.remote;
        passes(flow) && passes(&end)
    })
}

/// Returns the parts of events that two tracers must agree on, without their order: on two CPUs,
/// each tracer may see another event first.
pub(crate) fn described(events: &[Event]) -> BTreeMap<String, usize> {
    let mut described = BTreeMap::new();
    for event in events {
        let Event {
            kind,
            process,
            socket,
            traffic,
            ..
        } = event;
        let pid = process.as_ref().map(|process| process.pid);
        let (local, remote) = (socket.local, socket.remote);
        // Where the hook of an accept does not hold the socket's lock, the socket may change
        // meanwhile.
        let traffic = (*kind != EventKind::Accept).then_some(traffic);
        let kind = match &event.kind {
            // The two tracers have seen the socket for different times.
            EventKind::Flow { last, .. } => format!("flow, last: {last}"),
            _ => format!("{:?}", without_summary(event)),
        };
        let line = format!("{kind} {pid:?} {local} {remote} {traffic:?}");
        *described.entry(line).or_default() += 1;
    }
    described
}
