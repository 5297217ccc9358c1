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
    Comm, Event, EventKind, Filter, LossStage, Origin, Process, ProcessDetails, Protocol,
    SampleInfo, User,
    decode::{Malformed, decode},
    enrich,
    escape::{Escaped, is_deceptive, unescape},
    filter::Standing,
    kernel,
    time::BootClock,
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
    if let Err(error) = kernel::ask_btf(bytes) {
        can_be_shown(&error.to_string());
    }
}

/// A datagram of sock_diag.
pub fn netlink(bytes: &[u8]) {
    for info in enrich::told(bytes) {
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
            let _ = filter.matches(&an_event(EventKind::Accept, None), |_| Standing::default());
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
pub(crate) mod tests {
    use std::{
        collections::HashSet,
        fs,
        hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher},
        io::{Read as _, Write as _},
        net::{TcpListener, TcpStream, UdpSocket},
        path::PathBuf,
    };

    use super::*;
    use crate::{TcpInfo, UdpInfo, builder::Config, kernel::Kernel};

    #[test]
    fn record_survives() {
        replay("record", record);
    }

    #[test]
    fn btf_survives() {
        replay("btf", btf);
    }

    #[test]
    fn netlink_survives() {
        replay("netlink", netlink);
    }

    #[test]
    fn event_json_survives() {
        replay("event_json", event_json);
    }

    #[test]
    fn filter_survives() {
        replay("filter", filter);
    }

    #[test]
    fn names_survive() {
        replay("names", names);
    }

    /// Checks the seeds of a target; each of them with one damage, wherever it is; and at random some with several, and any bytes.
    fn replay(target: &str, check: fn(&[u8])) {
        let seeds = seeds(target);
        for seed in &seeds {
            checked(seed, check);
            // For what is damaged, Miri is too slow.
            if cfg!(miri) {
                continue;
            }
            // Of a large one, not every place.
            for place in (0..seed.len()).step_by(1 + seed.len() / PLACES) {
                damaged_at(place, seed, |damaged| checked(damaged, check));
            }
        }

        let mut random = Random::default();
        for case in 0..if cfg!(miri) { 0 } else { 2_000 } {
            let bytes = if case % 10 == 0 {
                let length = random.below(600);
                random.bytes(length)
            } else {
                let seed = &seeds[random.below(seeds.len())];
                random.damage(seed)
            };
            checked(&bytes, check);
        }
    }

    /// Random numbers, the same in each run, so that a failure can be repeated.
    #[derive(Default)]
    struct Random {
        drawn: u64,
    }

    impl Random {
        fn next(&mut self) -> u64 {
            self.drawn += 1;
            BuildHasherDefault::<DefaultHasher>::default().hash_one(self.drawn)
        }

        fn below(&mut self, end: usize) -> usize {
            (self.next() % end as u64) as usize
        }

        fn bytes(&mut self, length: usize) -> Vec<u8> {
            (0..length).map(|_| self.next() as u8).collect()
        }

        /// Damages a seed in 1 to 5 places: bytes are overwritten, inserted, or the rest is cut off.
        fn damage(&mut self, seed: &[u8]) -> Vec<u8> {
            let mut bytes = seed.to_vec();
            for _ in 0..=self.below(5) {
                let place = self.below(bytes.len() + 1);
                let length = 1 + self.below(4);
                let new = self.bytes(length);
                let old = match self.below(10) {
                    0 => 0,
                    1 => bytes.len() - place,
                    _ => new.len().min(bytes.len() - place),
                };
                bytes.splice(place..place + old, new);
            }
            bytes
        }
    }

    /// How many places of a seed are damaged one by one.
    const PLACES: usize = 512;

    /// Cuts the bytes off at a place, or changes what is there.
    fn damaged_at(place: usize, bytes: &[u8], take: impl Fn(&[u8])) {
        take(&bytes[..place]);
        let old = bytes[place];
        let flipped = (0..8).map(|bit| old ^ 1 << bit);
        for byte in flipped.chain([0, 1, 0x7f, 0x80, 0xff]) {
            let mut bytes = bytes.to_vec();
            bytes[place] = byte;
            take(&bytes);
        }
        for word in [
            0,
            1,
            0xffff,
            0x7fff_ffff,
            0x8000_0000,
            u32::MAX - 11,
            u32::MAX,
        ] {
            let mut bytes = bytes.to_vec();
            if let Some(word_there) = bytes.get_mut(place..place + 4) {
                word_there.copy_from_slice(&u32::to_ne_bytes(word));
                take(&bytes);
            }
        }
    }

    /// Checks bytes, and shows them if that fails.
    fn checked(bytes: &[u8], check: fn(&[u8])) {
        struct Input<'a>(&'a [u8]);
        impl Drop for Input<'_> {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    eprintln!("with the input {}", Escaped(self.0));
                }
            }
        }
        let _input = Input(bytes);
        check(bytes);
    }

    fn folder(target: &str) -> PathBuf {
        [env!("CARGO_MANIFEST_DIR"), "../fuzz/corpus", target]
            .iter()
            .collect()
    }

    fn seeds(target: &str) -> Vec<Vec<u8>> {
        let folder = folder(target);
        let entries = fs::read_dir(&folder).expect("a folder of seeds for each target");
        let mut paths: Vec<_> = entries.map(|entry| entry.expect("listed").path()).collect();
        paths.sort();
        let seeds: Vec<_> = paths
            .iter()
            .map(|path| fs::read(path).expect("a seed"))
            .collect();
        assert!(!seeds.is_empty(), "no seeds in {}", folder.display());
        seeds
    }

    /// For the tests that make seeds: `cargo test --package tcp-udp-trace --lib -- --ignored write_seeds`.
    pub(crate) fn write_seed(target: &str, name: &str, bytes: &[u8]) {
        let folder = folder(target);
        fs::create_dir_all(&folder).expect("a folder of seeds");
        fs::write(folder.join(name), bytes).expect("written");
    }

    #[test]
    #[ignore = "writes the fuzzers' seeds, as root"]
    fn write_seeds() {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let mut seen = HashSet::new();
            own_records(protocol, |bytes| {
                let clock = BootClock::new(UNIX_EPOCH + YEAR * 56, YEAR);
                let info = |_| match protocol {
                    Protocol::Tcp => {
                        TcpInfo::decode(&[1; 280]).map(|info| SampleInfo::Tcp(info.into()))
                    }
                    Protocol::Udp => Some(SampleInfo::Udp(UdpInfo::default().into())),
                };
                let decoded = decode(bytes, clock, info).expect("a record");
                let event = decoded.expect("not without its info").event;
                if event
                    .process
                    .as_ref()
                    .is_none_or(|process| process.pid != std::process::id())
                {
                    return;
                }
                let json = serde_json::to_value(&event).expect("an event can be written");
                let kind = json["kind"]["type"].as_str().expect("a kind");
                let family = if event.socket.local.is_ipv4() { 4 } else { 6 };
                let error = if json["kind"]["error"].is_number() {
                    "_error"
                } else {
                    ""
                };
                let name = format!("{protocol}{family}_{kind}{error}");
                if seen.insert(name.clone()) {
                    write_seed("record", &name, bytes);
                    write_event(&name, &event);
                }
            });
        }
        let mut last = an_event(EventKind::Accept, None);
        last.time = UNIX_EPOCH + crate::time::LATEST;
        write_event("last_moment", &last);
        let gap = EventKind::Lost {
            count: 1,
            stage: LossStage::Queue,
        };
        write_event("lost", &an_event(gap, None));
        let process = a_process(Comm::from_bytes(b"curl"), b"/usr/bin/curl\0-v\0\xff\x1b\\");
        write_event("details", &an_event(EventKind::Accept, Some(process)));
        for (name, text) in [
            ("empty", ""),
            ("processes", "pid=1,2 pid_tree=3 uid=0,1000 exclude_self"),
            ("comm", r"comm=nginx,a\x20b\x2cc\xff"),
            (
                "networks",
                "local=127.0.0.1 remote=10.0.0.0/8,fe80::/10,::1",
            ),
            (
                "places",
                "port=443,53 cgroup=1 netns=4026531840 family=ipv4,ipv6",
            ),
            (
                "names",
                r"only_self cgroup=/a\x20b,7 comm=longer-than-the-kernels STATE=Listen",
            ),
            ("kinds", "kind=state_change,close state=ESTABLISHED,CLOSE"),
            ("wrong", "pid=0 remote=10.0.0.1/8 color=\u{202e}"),
        ] {
            write_seed("filter", name, text.as_bytes());
        }
        for (name, bytes) in [
            ("bytes", &b"bad\xff\xc3utf8 \\x1b"[..]),
            (
                "cmdline",
                b"curl\0-v\0\0https://example.org/?q=caf\xc3\xa9\0",
            ),
            ("directions", "a\u{202e}b\u{2066}c\u{61c}".as_bytes()),
            ("empty", b""),
            ("invisible", "\u{200b}\u{ad}\u{e0041}\u{fe0f}".as_bytes()),
            ("lines", "two\nlines\r\u{85}\u{2028}".as_bytes()),
            ("terminal", b"\x1b]0;title\x07\x1b[31mred"),
        ] {
            write_seed("names", name, bytes);
        }
    }

    fn write_event(name: &str, event: &Event) {
        let json = serde_json::to_string(event).expect("an event can be written");
        write_seed("event_json", name, json.as_bytes());
    }

    /// What a tracer gets to see, of connections and datagrams of our own and of others.
    fn own_records(protocol: Protocol, mut take: impl FnMut(&[u8])) {
        let config = Config {
            per_datagram: true,
            resets: true,
            ..Config::new(protocol)
        };
        let (mut kernel, mut ring) = Kernel::start(&config).expect("a tracer");
        // No socket may connect to the second of these as it is.
        for (host, nowhere) in [
            ("127.0.0.1:0", "255.255.255.255:1"),
            ("[::1]:0", "[fe80::1]:1"),
        ] {
            // What is open is sampled.
            let _open: [Box<dyn std::any::Any>; 2] = match protocol {
                Protocol::Tcp => {
                    let listener = TcpListener::bind(host).expect("a listener");
                    let address = listener.local_addr().expect("bound");
                    let client = TcpStream::connect(address).expect("connected");
                    let (mut server, _) = listener.accept().expect("accepted");
                    server.write_all(b"four").expect("written");
                    drop((listener, server));
                    TcpStream::connect(address).expect_err("nobody listens");
                    TcpStream::connect(nowhere).expect_err("no address of a machine");
                    [Box::new(client), Box::new(())]
                }
                Protocol::Udp => {
                    let server = UdpSocket::bind(host).expect("a socket");
                    let client = UdpSocket::bind(host).expect("a socket");
                    let address = server.local_addr().expect("bound");
                    client.connect(address).expect("connected");
                    client.send(b"four").expect("sent");
                    server.recv(&mut [0; 4]).expect("received");
                    client.connect(nowhere).expect_err("refused");
                    [Box::new(client), Box::new(server)]
                }
            };
            let mut walk = kernel.walk().expect("a walk");
            while walk.read(&mut [0; 4096]).expect("walked") > 0 {}
        }
        while ring.next(&mut take) {}
    }
}
