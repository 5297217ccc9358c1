//! Network namespaces that come and go, processes that are killed amid their connections, and a CPU
//! that goes offline and comes back.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream, UdpSocket},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{bail, ensure};
use integration_tests::{
    actor::{Actor, Command, Endpoint, Outcome},
    kernel,
    netns::Netns,
    tcp_pair::loopback,
};

use crate::work::{Clock, Truth, Worker};

/// The port of all sockets that are in a namespace which comes and goes. The tracers' counts
/// include such a socket in any namespace.
pub(crate) const VISITED_PORT: u16 = 47_913;
/// The connections in each such namespace, and the bytes in each direction of each.
const VISITS: u64 = 4;
const VISITED_BYTES: usize = 1000;

/// The connections of each process that is killed.
const VICTIMS: usize = 8;

/// The CPU that goes offline, in a guest.
const SECOND_CPU: &str = "/sys/devices/system/cpu/cpu1/online";

/// The numbers of upheavals so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Upheavals {
    pub(crate) namespaces: Arc<AtomicU64>,
    pub(crate) killed: Arc<AtomicU64>,
    pub(crate) hotplugs: Arc<AtomicU64>,
}

/// Starts all of them. Each process that is killed is one end of connections to this listener, and
/// the survivor is the other end.
pub(crate) fn begin(
    clock: &Clock,
    truth: &Truth,
    upheavals: &Upheavals,
    mut survivor: Actor,
    listener: Endpoint,
) -> anyhow::Result<Vec<Worker>> {
    let mut workers = Vec::new();
    workers.push(thread::spawn({
        let (clock, truth, upheavals) = (clock.clone(), truth.clone(), upheavals.clone());
        move || {
            while !clock.is_over() {
                Netns::new()?.run(|| visit(&truth))?;
                upheavals.namespaces.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        }
    }));
    workers.push(thread::spawn({
        let (clock, truth, upheavals) = (clock.clone(), truth.clone(), upheavals.clone());
        move || {
            let mut round = 0;
            while !clock.is_over() {
                let mut victim = Actor::spawn("victim")?;
                let mut ends = Vec::new();
                // Every second victim is the end that accepts.
                if round % 2 == 0 {
                    for _ in 0..VICTIMS {
                        let near = victim.connect(listener.local)?;
                        ends.push((near, survivor.accept(&listener)?));
                    }
                } else {
                    let taken = victim.take(&survivor, listener.fd)?;
                    for _ in 0..VICTIMS {
                        let far = survivor.connect(listener.local)?;
                        ends.push((victim.accept(&taken)?, far));
                    }
                }
                // The survivor sends nothing: data that a victim has not read would turn its close
                // into a reset, which discards data under way.
                let (near, far) = ends[0];
                victim.begin(&Command::Send(near.fd, u64::MAX))?;
                survivor.begin(&Command::ReceiveAll(far.fd))?;
                thread::sleep(Duration::from_millis(round % 50));
                victim.kill()?;
                let Outcome::Bytes(bytes) = survivor.finish()? else {
                    bail!("no count of bytes");
                };
                for (_, far) in &ends {
                    survivor.close(far)?;
                }
                truth.bytes.fetch_add(bytes, Ordering::Relaxed);
                truth
                    .connections
                    .fetch_add(ends.len() as u64, Ordering::Relaxed);
                upheavals.killed.fetch_add(1, Ordering::Relaxed);
                round += 1;
            }
            Ok(())
        }
    }));
    if kernel::is_emulated()? && Path::new(SECOND_CPU).exists() {
        let (clock, upheavals) = (clock.clone(), upheavals.clone());
        workers.push(thread::spawn(move || {
            while !clock.is_over() {
                for online in ["0", "1"] {
                    thread::sleep(Duration::from_secs(2));
                    fs::write(SECOND_CPU, online)?;
                }
                upheavals.hotplugs.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        }));
    }
    Ok(workers)
}

/// Makes a little traffic in the calling thread's namespace.
fn visit(truth: &Truth) -> anyhow::Result<()> {
    let mut address = loopback(false);
    address.set_port(VISITED_PORT);
    let listener = TcpListener::bind(address)?;
    for _ in 0..VISITS {
        let near = TcpStream::connect(address)?;
        let (far, _) = listener.accept()?;
        let mut sent = 0;
        for (mut from, mut to) in [(&near, &far), (&far, &near)] {
            let mut received = Vec::new();
            from.write_all(&[0; VISITED_BYTES])?;
            from.shutdown(Shutdown::Write)?;
            to.read_to_end(&mut received)?;
            ensure!(received.len() == VISITED_BYTES);
            sent += received.len() as u64;
        }
        truth.bytes.fetch_add(sent, Ordering::Relaxed);
        truth.connections.fetch_add(1, Ordering::Relaxed);
    }
    let socket = UdpSocket::bind(address)?;
    socket.send_to(b"to itself", address)?;
    socket.recv(&mut [0; 16])?;
    truth.udp_sockets.fetch_add(1, Ordering::Relaxed);
    truth.datagrams.fetch_add(1, Ordering::Relaxed);
    // The namespace lives long enough to be sampled now and then.
    thread::sleep(Duration::from_millis(50));
    Ok(())
}
