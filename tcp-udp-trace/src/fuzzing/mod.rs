//! The properties that hold for any bytes. The fuzzers in `fuzz/` use them, and so do the tests
//! here, which replay the fuzzers' seeds.
//!
//! This module is no part of the API, and is compiled for these two only. A new target is a
//! function here and its test, a program in `fuzz/fuzz_targets` that calls it, and its seeds in
//! `fuzz/corpus`.

#![allow(
    clippy::missing_panics_doc,
    reason = "a panic is the report of a failure"
)]

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    time::{Duration, UNIX_EPOCH},
};

use crate::{
    consumer::{Connections, Growth, replay},
    event::{
        Event, EventKind, LossStage, Protocol,
        comm::Comm,
        escape::{Escaped, is_deceptive, unescape},
        process::{Origin, Parent, Process, ProcessDetails, User},
        sample_info::SampleInfo,
    },
    filter::{Filter, Members, Membership},
    kernel,
    pipeline::{
        cgroup_path,
        clock::BootClock,
        decode::{Malformed, decode},
    },
    sock_diag,
};

/// Checks a record, as the ring passes it on.
pub fn record(bytes: &[u8]) {
    let decode = |bytes| {
        let clock = BootClock::new(UNIX_EPOCH + YEAR * 56, YEAR);
        decode(bytes, clock, |cookie| {
            (cookie != 0).then(|| SampleInfo::Tcp(Box::default()))
        })
    };
    let Ok(decoded) = decode(bytes) else { return };
    if let Some(decoded) = decoded {
        any_event(&decoded.event);
    }
    // A record of another length is malformed.
    let longer = [bytes, &[0]].concat();
    for other in [&longer, &bytes[..bytes.len() - 1]] {
        assert_eq!(decode(other), Err(Malformed));
    }
}

/// Checks the kernel's BTF.
pub fn btf(bytes: &[u8]) {
    if let Err(error) = kernel::check_btf(bytes) {
        can_be_shown(&error.to_string());
    }
}

/// Checks a datagram of sock_diag.
pub fn netlink(bytes: &[u8]) {
    for info in sock_diag::parse_answers(bytes) {
        any_event(&an_event(EventKind::Sample { info }, None));
    }
}

/// Checks an event in its JSON form, and the same bytes as recorded lines, for all that consumes
/// them.
pub fn event_json(bytes: &[u8]) {
    if let Ok(event) = serde_json::from_slice::<Event>(bytes) {
        any_event(&event);
    }
    let (mut growth, mut connections) = (Growth::with_capacity(2), Connections::with_capacity(2));
    for event in replay(bytes) {
        match event {
            Ok(event) => {
                let _ = (growth.add(&event), connections.add(&event));
            }
            Err(error) => can_be_shown(&error.to_string()),
        }
    }
}

/// No process and no cgroup is a member of a tree.
struct NoMembers;

impl Members for NoMembers {
    fn has_process(&self, _: &Process) -> Membership {
        Membership::default()
    }

    fn has_cgroup(&self, _: u64) -> bool {
        false
    }
}

/// Checks a filter in its text form.
pub fn filter(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    match text.parse::<Filter>() {
        Ok(filter) => {
            let shown = filter.to_string();
            can_be_shown(&shown);
            assert_eq!(shown.parse::<Filter>().ok(), Some(filter.clone()));
            if let Err(error) = filter.compile() {
                can_be_shown(&error.to_string());
            }
            let _ = filter.matches(&an_event(EventKind::Accept, None), &NoMembers);
        }
        Err(error) => can_be_shown(&error.to_string()),
    }
}

/// Checks names that a process chooses.
pub fn names(bytes: &[u8]) {
    let shown = Escaped(bytes).to_string();
    can_be_shown(&shown);
    assert_eq!(unescape(&shown).as_deref(), Some(bytes));

    let comm = Comm::from_bytes(bytes);
    let name = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    assert_eq!(comm.as_bytes(), &name[..name.len().min(Comm::LEN - 1)]);
    assert_eq!(comm.to_string().parse(), Ok(comm));

    any_event(&an_event(EventKind::Accept, Some(a_process(comm, bytes))));
}

fn a_process(comm: Comm, cmdline: &[u8]) -> Process {
    let words = cmdline.split(|&byte| byte == 0).map(OsStr::from_bytes);
    let details = ProcessDetails {
        exe: Some(OsStr::from_bytes(cmdline).into()),
        cmdline: words.map(Into::into).collect(),
        parent: Some(Parent { pid: 2, comm }),
        cgroup: Some(OsStr::from_bytes(cmdline).into()),
        container: cgroup_path::container(cmdline).map(Into::into),
        unit: cgroup_path::unit(cmdline).map(Into::into),
        slice: cgroup_path::slice(cmdline).map(Into::into),
        ns_pid: Some(1),
    };
    Process {
        pid: 1,
        tid: 1,
        uid: 1,
        comm,
        origin: Origin::Creator,
        cgroup: Some(1),
        started: Duration::ZERO,
        details: Some(details.into()),
    }
}

fn an_event(kind: EventKind, process: Option<Process>) -> Event {
    let user = process.as_ref().map(|process| User {
        pid: 2,
        tid: 3,
        uid: 1,
        comm: process.comm,
        cgroup: None,
        started: Duration::ZERO,
    });
    Event {
        kind,
        process,
        user,
        ..Event::gap(
            1,
            LossStage::Ring,
            Protocol::Tcp,
            UNIX_EPOCH,
            Duration::ZERO,
        )
    }
}

/// Checks that an event is safe to show in both forms, and that its JSON is complete.
fn any_event(event: &Event) {
    can_be_shown(&event.to_string());
    let json = serde_json::to_string(event).expect("an event can be written");
    can_be_shown(&json);
    let read: Event = serde_json::from_str(&json).expect("the written JSON can be read");
    assert_eq!(read, *event);
}

fn can_be_shown(text: &str) {
    assert!(!text.contains(is_deceptive), "{text:?}");
}

const YEAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);

#[cfg(test)]
mod replay;
#[cfg(test)]
pub(crate) mod seeds;
