//! The reports of a flow: are their numbers those of the flow, and do they say so where they may not be?

use anyhow::ensure;
use integration_tests::{
    actor::{Operation, ReceiveCall, Segmentation, SendCall, SocketOption},
    suite::Test,
    trace::Trace,
    udp_scene::{Family, Site},
};
use tcp_udp_trace::{Event, EventKind};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            merged_receives_after_a_send_are_approximate,
        ],
    ]
}

/// Every report after the first receive says whether its numbers may be too small, though the flow began with a datagram sent.
fn merged_receives_after_a_send_are_approximate() -> anyhow::Result<()> {
    const SENDS: usize = 10;
    const BYTES: usize = 5_000;
    for family in Family::ALL {
        let trace = Trace::start_udp()?;
        let mut site = Site::new(family, true)?;
        site.sender.set(SocketOption::Merge)?;
        site.sender.send(SendCall::SendTo, None, &[5])?;
        site.receiver.receive(ReceiveCall::RecvFrom, 1)?;
        for _ in 0..SENDS {
            let by = Segmentation::ControlMessage;
            site.receiver.send_segments(by, None, BYTES, 500)?;
            let bytes = BYTES as u64;
            site.sender.run(Operation::ReceiveMerged { bytes })?;
        }
        let cookie = site.sender.socket.cookie;
        let is_received = |event: &Event| {
            matches!(event.kind, EventKind::Flow { .. })
                && event.socket.cookie == Some(cookie)
                && event.traffic.rx_bytes > 0
        };
        trace.wait_for("a report before the end", is_received)?;
        let approximate = !trace.names_every_peer();
        let lives = site.close()?;
        let mut seen = trace.finish_udp(2)?;
        let events = seen.check(&lives[0])?;
        for event in events.iter().filter(|event| is_received(event)) {
            let kind = EventKind::Flow { approximate };
            ensure!(event.kind == kind, "{kind:?} expected: {event}");
        }
        seen.check_all(&lives[1..])?;
    }
    Ok(())
}
