//! What must hold whatever the bytes. For the fuzzers in `fuzz/`, and for the tests here, which replay the fuzzers' seeds.
//!
//! Not a part of the API: it is compiled for these two only. A new target is a function here and its test, a program in
//! `fuzz/fuzz_targets` that calls it, and its seeds in `fuzz/corpus`.

#![allow(clippy::missing_panics_doc, reason = "to panic is how they report")]

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    time::{Duration, UNIX_EPOCH},
};

use crate::{
    event::{
        Event, EventKind, LossStage, Protocol,
        comm::Comm,
        escape::{Escaped, is_deceptive, unescape},
        process::{Origin, Process, ProcessDetails},
        sample_info::SampleInfo,
    },
    filter::{Filter, Membership},
    kernel,
    pipeline::{
        clock::BootClock,
        decode::{Malformed, decode},
    },
    sock_diag,
};

/// A record as the ring hands it over.
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
    // A record is known by its length too.
    let longer = [bytes, &[0]].concat();
    for other in [&longer, &bytes[..bytes.len() - 1]] {
        assert_eq!(decode(other), Err(Malformed));
    }
}

/// The kernel's BTF.
pub fn btf(bytes: &[u8]) {
    if let Err(error) = kernel::check_btf(bytes) {
        can_be_shown(&error.to_string());
    }
}

/// A datagram of sock_diag.
pub fn netlink(bytes: &[u8]) {
    for info in sock_diag::parse_answers(bytes) {
        any_event(&an_event(EventKind::Sample { info }, None));
    }
}

/// An event in its JSON form.
pub fn event_json(bytes: &[u8]) {
    if let Ok(event) = serde_json::from_slice::<Event>(bytes) {
        any_event(&event);
    }
}

/// A filter in its text form.
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
            let _ = filter.matches(&an_event(EventKind::Accept, None), |_| {
                Membership::default()
            });
        }
        Err(error) => can_be_shown(&error.to_string()),
    }
}

/// The names that a process gives itself.
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
    };
    Process {
        pid: 1,
        tid: 1,
        uid: 1,
        comm,
        origin: Origin::Creator,
        started: Duration::ZERO,
        details: Some(details.into()),
    }
}

fn an_event(kind: EventKind, process: Option<Process>) -> Event {
    Event {
        kind,
        process,
        ..Event::gap(
            1,
            LossStage::Ring,
            Protocol::Tcp,
            UNIX_EPOCH,
            Duration::ZERO,
        )
    }
}

/// It can be shown in both forms, and its JSON says all of it.
fn any_event(event: &Event) {
    can_be_shown(&event.to_string());
    let json = serde_json::to_string(event).expect("an event can be written");
    can_be_shown(&json);
    let read: Event = serde_json::from_str(&json).expect("what was written can be read");
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
