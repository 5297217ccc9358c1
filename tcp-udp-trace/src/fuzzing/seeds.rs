//! Reads and writes the fuzzers' seeds.

use std::{
    collections::HashSet,
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
    path::PathBuf,
    time::UNIX_EPOCH,
};

use tcp_udp_trace_common::{Anomaly, kind, retransmission};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::{YEAR, a_process, an_event};
use crate::{
    config::Config,
    event::{
        Event, EventKind, LossStage, Protocol, comm::Comm, sample_info::SampleInfo,
        tcp_info::TcpInfo, udp_info::UdpInfo,
    },
    kernel::Kernel,
    pipeline::{clock::BootClock, decode::decode},
};

fn folder(target: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "../fuzz/corpus", target]
        .iter()
        .collect()
}

pub(super) fn seeds(target: &str) -> Vec<Vec<u8>> {
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

/// Writes a seed. For the tests that make seeds:
/// `cargo test --package tcp-udp-trace --lib -- --ignored write_seeds`.
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
        let mut write_record = |bytes: &[u8]| {
            let clock = BootClock::new(UNIX_EPOCH + YEAR * 56, YEAR);
            let info = |_| match protocol {
                Protocol::Tcp => {
                    TcpInfo::decode(&[1; 280]).map(|info| SampleInfo::Tcp(info.into()))
                }
                Protocol::Udp => Some(SampleInfo::Udp(UdpInfo::default().into())),
            };
            let decoded = decode(bytes, clock, info).expect("a record");
            let event = decoded.expect("a sample has its info").event;
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
        };
        own_records(protocol, |bytes| {
            write_record(bytes);
            // This kernel may have no hook of these, which have the same record as a reset.
            if let Ok(mut record) = Anomaly::read_from_bytes(bytes) {
                if record.head.kind == kind::RESET_RECEIVED {
                    (record.head.kind, record.what) = (kind::LISTEN_OVERFLOW, 0);
                    write_record(record.as_bytes());
                    (record.head.kind, record.what) = (kind::RETRANSMIT, retransmission::FAST);
                    (record.packets, record.bytes) = (2, 2_896);
                    write_record(record.as_bytes());
                }
            }
        });
    }
    let mut last = an_event(EventKind::Accept, None);
    last.time = UNIX_EPOCH + crate::event::rfc3339::LATEST;
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
            r"only_self cgroup=/a\x20b,7 cgroup_tree=/c,8 comm=longer-than-the-kernels STATE=Listen",
        ),
        ("kinds", "kind=state_change,close state=ESTABLISHED,CLOSE"),
        (
            "exclusions",
            "not_local=10.0.0.0/8 not_remote=::1 direction=inbound one_in=10 exclude_loopback",
        ),
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

/// Passes on the records of a tracer, from connections and datagrams of this process and of others.
fn own_records(protocol: Protocol, mut take: impl FnMut(&[u8])) {
    let config = Config {
        per_datagram: true,
        resets: true,
        ..Config::new(protocol)
    };
    let (mut kernel, mut ring) = Kernel::start(&config).expect("a tracer");
    // A connect to the second address of each pair fails.
    for (host, nowhere) in [
        ("127.0.0.1:0", "255.255.255.255:1"),
        ("[::1]:0", "[fe80::1]:1"),
    ] {
        // Open sockets are sampled.
        let _open: [Box<dyn std::any::Any>; 2] = match protocol {
            Protocol::Tcp => {
                let listener = TcpListener::bind(host).expect("a listener");
                let address = listener.local_addr().expect("bound");
                let client = TcpStream::connect(address).expect("connected");
                let (mut server, _) = listener.accept().expect("accepted");
                server.write_all(b"four").expect("written");
                drop((listener, server));
                TcpStream::connect(address).expect_err("there is no listener");
                TcpStream::connect(nowhere).expect_err("not the address of a machine");
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
        let mut iter = kernel.open_socket_iter().expect("an iterator");
        while iter.read(&mut [0; 4096]).expect("read") > 0 {}
    }
    while ring.next(&mut take) {}
}
