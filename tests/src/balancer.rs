//! BPF programs at a cgroup that replace addresses, as those of a socket load balancer do.

use std::{
    fs::File,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, ensure};
use aya::{
    Ebpf,
    programs::{CgroupAttachMode, CgroupSockAddr},
};

use crate::{cgroup::Cgroup, cgroup_program::object};

/// The programs, attached until this value is dropped.
#[derive(Debug)]
pub struct Balancer {
    _programs: Ebpf,
}

impl Balancer {
    /// Sends the datagrams of this cgroup for `service` to `backend`, and names `service` as the
    /// sender of those that come from there. Connected sockets are not balanced.
    pub fn at(cgroup: &Cgroup, service: SocketAddr, backend: SocketAddr) -> anyhow::Result<Self> {
        ensure!(service.is_ipv4() == backend.is_ipv4(), "one family");
        let version = if service.is_ipv4() { 4 } else { 6 };
        let sections = ["sendmsg", "recvmsg"].map(|hook| format!("cgroup/{hook}{version}"));
        let programs = [
            ("forth", &*sections[0], code(service, backend)),
            ("back", &*sections[1], code(backend, service)),
        ];
        let mut ebpf = Ebpf::load(&object(&programs)?)?;
        for (name, ..) in programs {
            let program = ebpf.program_mut(name).context("a program")?;
            let program: &mut CgroupSockAddr = program.try_into()?;
            program.load()?;
            // A link allows other programs at the same cgroup.
            program.attach(File::open(cgroup.path())?, CgroupAttachMode::Single)?;
        }
        Ok(Self { _programs: ebpf })
    }
}

/// The words of an address and its port, with their offsets in a `struct bpf_sock_addr`.
fn words(address: SocketAddr) -> Vec<(u8, u32)> {
    const IP4: u8 = 4;
    const IP6: u8 = 8;
    const PORT: u8 = 24;
    let (at, octets) = match address.ip() {
        IpAddr::V4(ip) => (IP4, ip.octets().to_vec()),
        IpAddr::V6(ip) => (IP6, ip.octets().to_vec()),
    };
    let word = |bytes: &[u8]| u32::from_ne_bytes(bytes.try_into().expect("four bytes"));
    let words = octets.chunks(4).map(word);
    let mut words: Vec<_> = (at..).step_by(4).zip(words).collect();
    words.push((PORT, address.port().to_be().into()));
    words
}

/// If the address is `from`, replaces it by `to`. Returns 1: the call goes on.
fn code(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let (from, to) = (words(from), words(to));
    let mut code = Vec::new();
    let mut add = |opcode: u8, registers: u8, offset: i16, value: u32| {
        code.extend([opcode, registers]);
        code.extend(offset.to_ne_bytes());
        code.extend(value.to_ne_bytes());
    };
    for (nth, &(at, value)) in from.iter().enumerate() {
        // Three instructions for each further comparison, two for each word that is replaced.
        let rest = 3 * (from.len() - nth - 1) + 2 * to.len();
        // r2 = *(u32 *)(r1 + at); w3 = value; if r2 != r3 goto end
        add(0x61, 0x12, at.into(), 0);
        add(0xb4, 0x03, 0, value);
        add(0x5d, 0x32, rest as i16, 0);
    }
    for (at, value) in to {
        // w3 = value; *(u32 *)(r1 + at) = r3
        add(0xb4, 0x03, 0, value);
        add(0x63, 0x31, at.into(), 0);
    }
    // end: r0 = 1; exit
    add(0xb7, 0, 0, 1);
    add(0x95, 0, 0, 0);
    code
}
