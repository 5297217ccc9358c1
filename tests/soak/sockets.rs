//! Very many sockets, one after the other: the tracer must forget each of them.

use std::{
    net::{TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use anyhow::ensure;
use integration_tests::{collector::check_conservation, netns::Netns, tcp_pair::loopback};
use tcp_udp_trace::{TcpTracer, UdpTracer};

use crate::{
    Footprint,
    work::{self, count_tcp, count_udp},
};

/// Half of them are UDP, half TCP, whose `connect` is refused.
pub(crate) fn run(sockets: u64) -> anyhow::Result<()> {
    Netns::enter_new()?;
    let here = Netns::current()?.inode()?;
    // A port without a listener.
    let refused = TcpListener::bind(loopback(false))?.local_addr()?;
    let (tcp, tcp_handle) = count_tcp(TcpTracer::builder(), here)?;
    let (udp, udp_handle) = count_udp(UdpTracer::builder(), here)?;
    let each = sockets / 2;
    let began = Instant::now();
    let mut footprints = Vec::new();
    thread::scope(|scope| {
        let work = [
            scope.spawn(move || {
                for _ in 0..each {
                    TcpStream::connect(refused).unwrap_err();
                }
            }),
            scope.spawn(move || {
                for _ in 0..each {
                    UdpSocket::bind(loopback(false)).unwrap();
                }
            }),
        ];
        while work.iter().any(|work| !work.is_finished()) {
            thread::sleep(Duration::from_secs(1));
            footprints.push(Footprint::now().unwrap());
        }
    });
    let took = began.elapsed();
    let counted = [
        work::finish(tcp, &tcp_handle, each)?,
        work::finish(udp, &udp_handle, each)?,
    ];
    println!("sockets              {sockets} in {took:.0?}");
    println!("resident, each tenth of the time, kB:");
    let step = footprints.len().div_ceil(10).max(1);
    let resident: Vec<_> = footprints.iter().map(|f| f.resident_kb).collect();
    println!(
        "                     {:?}",
        resident.iter().step_by(step).collect::<Vec<_>>()
    );
    for (name, counted) in ["TCP", "UDP"].iter().zip(&counted) {
        crate::print(name, &counted.stats);
        let stats = &counted.stats;
        check_conservation(stats)?;
        // The maps have room for 65,536, so each socket has left them.
        ensure!(stats.untracked == 0, "{stats:?}");
        let lost = stats.ring_lost + stats.queue_shed;
        ensure!(
            counted.closes <= each && counted.closes + lost >= each,
            "{} closes, {stats:?}",
            counted.closes
        );
        println!("{name:20} closes reported {} of {each}", counted.closes);
    }
    let (first, last) = (resident[resident.len() / 10], resident[resident.len() - 1]);
    ensure!(
        last < first + first / 10 + 4096,
        "the process has grown from {first} to {last} kB"
    );
    println!("flat");
    Ok(())
}
