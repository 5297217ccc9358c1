//! Lookups in BTF, and errors of malformed BTF.

use std::time::{Duration, Instant};

use tcp_udp_trace_common::FIELDS;

use super::{test_builder::Builder, *};

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const FLAG: u32 = 1 << 31;

fn at(offset: u32, size: u32) -> Option<Field> {
    Some(Field { offset, size })
}

fn check(btf: &Builder, path: &str, expected: Option<Field>) {
    let data = btf.build();
    let btf = Btf::parse(&data).expect("valid BTF");
    assert_eq!(btf.field(path), expected, "{path}");
}

#[test]
fn finds_an_enumerator() {
    let data = sample().build();
    let btf = Btf::parse(&data).expect("valid BTF");
    assert_eq!(btf.enumerator("state", "POS"), Some(7));
    assert_eq!(btf.enumerator("state", "BIG"), None);
    assert_eq!(btf.enumerator("wide", "BIG"), None);
}

/// Returns BTF with one of each thing that can be looked up.
fn sample() -> Builder {
    let mut b = Builder::new();
    let short = b.int(2);
    let int = b.int(4);
    let pointer = b.add("", kind::PTR << 24, int, &[]);
    let constant = b.add("", kind::CONST << 24, short, &[]);
    let family = b.add("family_t", kind::TYPEDEF << 24, constant, &[]);
    let array = b.add("", kind::ARRAY << 24, 0, &[int, int, 4]);
    let ports = b.structure("", 4, &[("num", short, 0), ("dport", short, 16)]);
    let union = b.aggregate(kind::UNION, "", 4, &[("pair", int, 0), ("", ports, 0)]);
    let common = b.structure(
        "common",
        32,
        &[
            ("family", family, 0),
            ("", union, 32),
            ("next", pointer, 64),
            ("addr", array, 128),
        ],
    );
    b.structure("sock", 40, &[("err", int, 0), ("__common", common, 64)]);
    let names = [b.name("NEG"), b.name("POS")];
    b.add(
        "state",
        FLAG | kind::ENUM << 24 | 2,
        4,
        &[names[0], u32::MAX, names[1], 7],
    );
    let name = b.name("BIG");
    b.add("wide", kind::ENUM64 << 24 | 1, 8, &[name, 1, 2]);
    let names = [b.name("sk"), b.name("flags")];
    let prototype = b.add(
        "",
        kind::FUNC_PROTO << 24 | 3,
        int,
        &[names[0], pointer, names[1], int, 0, 0],
    );
    b.add("accept", kind::FUNC << 24, prototype, &[]);
    b
}

/// Returns the BTF of a kernel that has only the fields in use, in various forms.
fn small_kernel() -> Builder {
    let mut b = Builder::new();
    let byte = b.int(1);
    for (index, field) in FIELDS.iter().enumerate() {
        let path = field.path.split(" | ").next().expect("a path");
        let int = b.int(field.size);
        let mut members = path.rsplit('.');
        let last = members.next().expect("a member");
        let (mut name, mut ty) = match index % 4 {
            0 => (last, int),
            1 => {
                let constant = b.add("", kind::CONST << 24, int, &[]);
                (last, b.add("", kind::TYPEDEF << 24, constant, &[]))
            }
            2 => {
                let half = b.int(field.size.div_ceil(2));
                let row = b.add("", kind::ARRAY << 24, 0, &[half, byte, field.size.min(2)]);
                (last, b.add("", kind::ARRAY << 24, 0, &[row, byte, 1]))
            }
            _ => (
                "",
                b.aggregate(kind::UNION, "", 16, &[("", byte, 0), (last, int, 0)]),
            ),
        };
        // The last of these is the struct's own name.
        for parent in members {
            let is_outer = path.starts_with(&format!("{parent}."));
            ty = b.structure(if is_outer { parent } else { "" }, 64, &[(name, ty, 64)]);
            name = parent;
        }
    }
    let prototype = b.add("", kind::FUNC_PROTO << 24, 0, &[]);
    for name in ["bpf_iter_tcp", "bpf_iter_task_file"] {
        b.add(name, kind::FUNC << 24, prototype, &[]);
    }
    b
}

#[test]
fn a_small_kernel_has_every_field() {
    crate::kernel::check_btf(&small_kernel().build()).expect("every required field is found");
}

#[test]
#[ignore = "writes the fuzzers' seeds"]
fn write_seeds() {
    crate::fuzzing::seeds::write_seed("btf", "small_kernel", &small_kernel().build());
    crate::fuzzing::seeds::write_seed("btf", "other_kinds", &sample().build());
}

#[test]
fn fields_of_nested_and_anonymous_aggregates_are_found() {
    let btf = sample();
    check(&btf, "sock.err", at(0, 4));
    check(&btf, "sock.__common", at(8, 32));
    check(&btf, "sock.__common.family", at(8, 2));
    check(&btf, "sock.__common.pair", at(12, 4));
    check(&btf, "sock.__common.num", at(12, 2));
    check(&btf, "sock.__common.dport", at(14, 2));
    check(&btf, "sock.__common.next", at(16, 8));
    check(&btf, "sock.__common.addr", at(24, 16));
    check(&btf, "common.dport", at(6, 2));
}

#[test]
fn missing_fields_are_none() {
    let btf = sample();
    for path in [
        "",
        ".",
        "sock",
        "sock.",
        ".err",
        "sock.er",
        "sock.error",
        "soc.err",
        "sock.family",
        "sock.err.x",
        "sock.__common.",
        "sock.__common..dport",
        "sock.__common.next.x",
        "sock.__common.addr.x",
        "sock.__common.addr.",
    ] {
        check(&btf, path, None);
    }
}

#[test]
fn fields_of_the_first_element_of_an_array_are_found() {
    let mut b = Builder::new();
    let int = b.int(4);
    let element = b.structure("element", 16, &[("a", int, 0), ("b", int, 32)]);
    // The kernel's flexible arrays have no elements.
    for (name, len) in [("flexible", 0), ("old", 1)] {
        let array = b.add("", kind::ARRAY << 24, 0, &[element, int, len]);
        b.structure(name, 96, &[("elements", array, 640)]);
        check(&b, &format!("{name}.elements.b"), at(84, 4));
        check(&b, &format!("{name}.elements.c"), None);
    }
}

#[test]
fn among_structs_of_one_name_the_first_with_the_field_counts() {
    let mut b = Builder::new();
    let int = b.int(4);
    b.add("twice", kind::FWD << 24, 0, &[]);
    b.structure("twice", 8, &[("a", int, 32)]);
    b.structure("twice", 16, &[("a", int, 64), ("b", int, 96)]);
    check(&b, "twice.a", at(4, 4));
    check(&b, "twice.b", at(12, 4));
}

#[test]
fn a_function_has_the_id_of_its_type() {
    let mut b = Builder::new();
    let int = b.int(4);
    // A type of another kind has the same name.
    b.structure("bpf_iter_tcp", 4, &[("a", int, 0)]);
    let prototype = b.add("", kind::FUNC_PROTO << 24, 0, &[]);
    let longer = b.add("bpf_iter_tcp_seq", kind::FUNC << 24, prototype, &[]);
    let function = b.add("bpf_iter_tcp", kind::FUNC << 24, prototype, &[]);
    let data = b.build();
    let btf = Btf::parse(&data).expect("well-formed BTF");
    assert_eq!(btf.id(kind::FUNC, "bpf_iter_tcp"), Some(function));
    assert_eq!(btf.id(kind::FUNC, "bpf_iter_tcp_seq"), Some(longer));
    assert_eq!(btf.id(kind::FUNC, "bpf_iter"), None);
}

#[test]
fn arrays_of_arrays_have_a_size() {
    let mut b = Builder::new();
    let int = b.int(4);
    let row = b.add("", kind::ARRAY << 24, 0, &[int, int, 3]);
    let row = b.add("", kind::TYPEDEF << 24, row, &[]);
    let matrix = b.add("", kind::ARRAY << 24, 0, &[row, int, 5]);
    let flexible = b.add("", kind::ARRAY << 24, 0, &[matrix, int, 0]);
    let huge = b.add("", kind::ARRAY << 24, 0, &[matrix, int, u32::MAX]);
    let members = [("m", matrix, 0), ("f", flexible, 480), ("h", huge, 480)];
    b.structure("s", 60, &members);
    check(&b, "s.m", at(0, 60));
    check(&b, "s.f", at(60, 0));
    check(&b, "s.h", None);
}

#[test]
fn bitfields_are_found_only_in_whole_bytes() {
    let mut b = Builder::new();
    let int = b.int(4);
    let extra: Vec<u32> = [
        ("bit", 1, 0),
        ("byte", 8, 8),
        ("odd", 8, 17),
        ("word", 0, 32),
    ]
    .into_iter()
    .flat_map(|(name, width, bit)| [b.name(name), int, width << 24 | bit])
    .collect();
    b.add("flagged", FLAG | kind::STRUCT << 24 | 4, 8, &extra);
    check(&b, "flagged.bit", None);
    check(&b, "flagged.byte", at(1, 1));
    check(&b, "flagged.odd", None);
    check(&b, "flagged.word", at(4, 4));
    let data = b.build();
    let btf = Btf::parse(&data).expect("valid BTF");
    assert_eq!(btf.bitfield("flagged.bit"), Some((0, 1)));
    assert_eq!(btf.bitfield("flagged.byte"), Some((1, 0xff)));
    assert_eq!(btf.bitfield("flagged.odd"), None, "in two bytes");
    assert_eq!(btf.bitfield("flagged.word"), None, "not a bitfield");

    // Without the flag, the integer has the width, and may have an offset of its own.
    let three = b.add("", kind::INT << 24, 4, &[3]);
    let byte = b.add("", kind::INT << 24, 4, &[8 << 16 | 8]);
    b.structure("plain", 8, &[("three", three, 0), ("byte", byte, 32)]);
    check(&b, "plain.three", None);
    check(&b, "plain.byte", at(5, 1));
}

#[test]
fn every_kind_has_its_length() {
    // By kind from 1: words after the header, and words for each of `count`.
    const LENGTHS: [(usize, usize); 19] = [
        (1, 0),
        (0, 0),
        (3, 0),
        (0, 3),
        (0, 3),
        (0, 2),
        (0, 0),
        (0, 0),
        (0, 0),
        (0, 0),
        (0, 0),
        (0, 0),
        (0, 2),
        (1, 0),
        (0, 3),
        (0, 0),
        (1, 0),
        (0, 0),
        (0, 3),
    ];
    let mut all = Builder::new();
    for (kind, (fixed, each)) in (1..).zip(LENGTHS) {
        for count in [0_u32, 1, 3, 300] {
            let extra = vec![0; fixed + each * count as usize];
            let mut one = Builder::new();
            for b in [&mut one, &mut all] {
                b.add("", kind << 24 | count, 0, &extra);
            }
            let int = one.int(4);
            one.structure("marker", 4, &[("x", int, 0)]);
            check(&one, "marker.x", at(0, 4));
        }
    }
    let int = all.int(4);
    all.structure("marker", 4, &[("x", int, 0)]);
    check(&all, "marker.x", at(0, 4));
}

#[test]
fn a_longer_header_is_skipped() {
    let mut data = sample().build();
    data.splice(24..24, [0xff; 8]);
    data[4] = 32;
    let btf = Btf::parse(&data).expect("valid BTF");
    assert_eq!(btf.field("sock.__common.dport"), at(14, 2));
}

#[test]
fn errors_name_the_fault() {
    fn error(change: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut data = sample().build();
        change(&mut data);
        let result = Btf::parse(&data).map(drop);
        result.expect_err("invalid BTF").to_string()
    }
    let cases = [
        (
            error(|data| data.truncate(7)),
            "BTF of 7 bytes is shorter than its header of 24 bytes",
        ),
        (
            error(|data| data.swap(0, 1)),
            "BTF is big-endian; only little-endian BTF can be read",
        ),
        (
            error(|data| data[..4].copy_from_slice(b"\x7fELF")),
            "not BTF: magic number 0x457f instead of 0xeb9f",
        ),
        (
            error(|data| data[2] = 2),
            "BTF has version 2, only version 1 can be read",
        ),
        (
            error(|data| data.splice(4..8, [0, 0, 1, 0]).for_each(drop)),
            "BTF header claims a length of 65536 bytes in 490 bytes of data",
        ),
        (
            error(|data| data[4] = 23),
            "BTF header claims a length of 23 bytes in 490 bytes of data",
        ),
        (
            error(|data| data[11] = 1),
            "type section (offset 16777216, length 360) reaches past the end of the BTF",
        ),
        (
            error(|data| data.truncate(489)),
            "string section (offset 360, length 106) reaches past the end of the BTF",
        ),
        (
            error(|data| *data.last_mut().expect("strings") = b'x'),
            "string section does not begin and end with a NUL byte",
        ),
        (
            error(|data| data[12] -= 4),
            "type section ends inside type 14",
        ),
        (
            error(|data| data[31] = 31),
            "type 1 is of unknown kind 31; the kernel may be newer than this reader",
        ),
        (
            error(|data| data[31] = 0),
            "type 1 is of unknown kind 0; the kernel may be newer than this reader",
        ),
    ];
    for (error, expected) in cases {
        assert_eq!(error, expected);
    }
}

#[test]
fn truncated_btf_is_rejected() {
    let data = sample().build();
    for len in 0..data.len() {
        assert!(Btf::parse(&data[..len]).is_err(), "cut at {len}");
    }
    // The type section alone may end only at a boundary between types.
    let types = sample().types.len();
    let mut valid = 0;
    for len in 0..=types {
        let mut cut = data.clone();
        cut[12..16].copy_from_slice(&u32::try_from(len).expect("short").to_le_bytes());
        valid += usize::from(Btf::parse(&cut).is_ok());
    }
    assert_eq!(valid, 1 + 14);
}

#[test]
fn cycles_of_typedefs_end() {
    let mut b = Builder::new();
    b.add("a", kind::TYPEDEF << 24, 2, &[]);
    b.add("b", kind::TYPEDEF << 24, 1, &[]);
    b.add("", kind::ARRAY << 24, 0, &[3, 3, 1]);
    let void = 0;
    let members = [
        ("t", 1, 0),
        ("a", 3, 0),
        ("v", void, 0),
        ("o", 99, 0),
        ("", 1, 0),
    ];
    b.structure("s", 8, &members);
    for path in ["s.t", "s.t.x", "s.a", "s.v", "s.o", "s.none"] {
        check(&b, path, None);
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn structs_inside_themselves_end() {
    let start = Instant::now();
    // 40 levels of anonymous structs, each with two members of the next level: 2^40 paths to the
    // last level, which contains the first one again.
    let mut b = Builder::new();
    for id in 1..40 {
        b.structure(
            if id == 1 { "fan" } else { "" },
            8,
            &[("", id + 1, 0), ("", id + 1, 0)],
        );
    }
    let last = b.structure("", 8, &[("", 1, 0), ("", 40, 0)]);
    assert_eq!(last, 40);
    check(&b, "fan.x", None);

    let mut b = Builder::new();
    b.structure("s", 8, &[("", 1, 8), ("me", 1, 8)]);
    check(&b, "s.none", None);
    check(&b, "s.me.me.me", at(3, 8));
    check(&b, &format!("s{}", ".me".repeat(100_000)), None);
    assert!(start.elapsed() < Duration::from_secs(5), "bounded time");
}

#[test]
fn counts_and_offsets_out_of_range_are_rejected() {
    let mut b = Builder::new();
    b.add("s", kind::STRUCT << 24 | 0x00ff_ffff, 8, &[0; 30]);
    let error = Btf::parse(&b.build()).err();
    assert_eq!(error, Some(BtfError::Truncated { id: 1 }));

    let mut b = Builder::new();
    let int = b.int(4);
    let inner = b.structure("", 8, &[("far", int, u32::MAX - 7)]);
    b.structure("s", 8, &[("", inner, 8), ("near", int, 0)]);
    b.add("n", kind::STRUCT << 24 | 1, 8, &[u32::MAX, int, 0]);
    check(&b, "s.far", None);
    check(&b, "s.near", at(0, 4));
    check(&b, "n.x", None);
}

/// Checks fields that user space and the eBPF programs rely on, in the running kernel's BTF.
#[test]
#[cfg_attr(miri, ignore = "reads files of the kernel")]
#[allow(clippy::print_stderr, reason = "a skipped test reports that")]
fn the_running_kernel_has_known_fields() {
    let data = match std::fs::read(VMLINUX) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("skipped: no {VMLINUX}");
            return;
        }
        data => data.expect("BTF is readable"),
    };
    let btf = Btf::parse(&data).expect("the kernel's BTF is valid");
    for (path, expected) in [
        ("sock.__sk_common.skc_daddr", at(0, 4)),
        ("sock.__sk_common.skc_rcv_saddr", at(4, 4)),
        ("sock.__sk_common.skc_dport", at(12, 2)),
        ("sock.__sk_common.skc_num", at(14, 2)),
        ("sock.__sk_common.skc_family", at(16, 2)),
        ("sock.__sk_common.skc_state", at(18, 1)),
        (
            "tcp_sock.inet_conn.icsk_inet.sk.__sk_common.skc_family",
            at(16, 2),
        ),
        ("sock.skc_family", None),
        ("sock.sk_socket.file", None),
    ] {
        assert_eq!(btf.field(path), expected, "{path}");
    }
    for (path, size) in [
        ("sock.__sk_common.skc_net.net", 8),
        ("sock.__sk_common.skc_cookie", 8),
        ("sock.sk_socket", 8),
        ("sock.sk_protocol", 2),
        ("inet_sock.inet_sport", 2),
        ("tcp_sock.bytes_acked", 8),
        ("tcp_sock.bytes_received", 8),
        ("tcp_sock.srtt_us", 4),
        ("net.ns.inum", 4),
        ("socket.file", 8),
        ("cred.uid", 4),
        ("socket_alloc.vfs_inode.i_ino", 8),
        ("sk_buff.len", 4),
    ] {
        assert_eq!(
            btf.field(path).map(|field| field.size),
            Some(size),
            "{path}"
        );
    }
}
