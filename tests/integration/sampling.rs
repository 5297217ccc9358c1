//! Sampling never costs events, whatever fails, and however many sockets there are.

use std::{
    collections::{HashMap, HashSet},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use futures_util::StreamExt as _;
use integration_tests::{
    actor::{Actor, Command},
    collector::{self, Collector, check_conservation},
    netns::Netns,
    suite::Test,
    tcp_pair::{TcpPair, loopback},
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tcp_udp_trace::{
    Event, EventKind,
    TcpState::{Established, FinWait1, FinWait2},
    TracerHandle,
};
use tokio::runtime::{Builder, Runtime};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Solitude: [
            sampling_sheds_nothing,
            failing_netlink_is_counted_and_tried_again,
            many_sockets,
        ],
    ]
}

fn runtime() -> anyhow::Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}

fn is_of(event: &Event, cookie: u64) -> bool {
    event.socket.cookie == Some(cookie)
}

/// However many sockets there are, and however long the consumer pauses, no event is dropped. The
/// samples come as soon as the consumer reads.
fn sampling_sheds_nothing() -> anyhow::Result<()> {
    const QUEUE: usize = 64;
    const SOCKETS: usize = 1_000;
    let netns = Netns::current()?.inode()?;
    let listeners = (0..SOCKETS)
        .map(|_| TcpListener::bind("127.0.0.1:0"))
        .collect::<Result<Vec<_>, _>>()?;
    runtime()?.block_on(async {
        let builder = collector::tcp().queue(QUEUE).ring_bytes(1 << 16);
        let mut tracer = builder
            .sample_interval(Duration::from_millis(100))
            .start()
            .await?;
        let handle = tracer.handle();
        let address = listeners[0].local_addr()?;
        wait_until(&handle, "room for samples is used", |handle| {
            handle.stats().emitted >= QUEUE as u64 / 4
        })
        .await?;
        // The consumer does not read. There is room for these events, however many samples there
        // might be.
        let client = TcpStream::connect(address)?;
        let local = client.local_addr()?;
        drop(client);
        tokio::time::sleep(Duration::from_millis(500)).await;
        let mut sampled = HashSet::new();
        let mut states = Vec::new();
        while sampled.len() < SOCKETS || !states.contains(&FinWait2) {
            let event = tracer.next().await.context("the stream has ended")?;
            match event.kind {
                EventKind::Sample { .. } if event.socket.netns == netns => {
                    sampled.insert(event.socket.id);
                }
                EventKind::StateChange { to, .. } if event.socket.local == local => states.push(to),
                _ => {}
            }
        }
        ensure!(
            states.starts_with(&[Established, FinWait1, FinWait2]),
            "{states:?}"
        );
        let stats = tracer.close().await?;
        ensure!(stats.queue_shed == 0 && stats.ring_lost == 0, "{stats:?}");
        check_conservation(&stats)
    })
}

async fn wait_until(
    handle: &TracerHandle,
    what: &str,
    is_done: impl Fn(&TracerHandle) -> bool,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_done(handle) {
        ensure!(
            Instant::now() < deadline,
            "not {what}: {:?}",
            handle.stats()
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// No descriptor is free, so there is no netlink socket. That is a fault, which is counted. The
/// events go on, and so do the samples afterwards.
fn failing_netlink_is_counted_and_tried_again() -> anyhow::Result<()> {
    let mut pair = TcpPair::traced_by(Collector::start_sampling()?, loopback(false))?;
    let connection = pair.connect()?;
    let client = connection.client.cookie;
    pair.collector
        .wait_for_sample("the client", |event| is_of(event, client))?;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let limit = FewFiles { soft, hard };
    setrlimit(Resource::RLIMIT_NOFILE, 3, hard)?;
    let handle = pair.collector.handle().clone();
    let before = handle.stats();
    let deadline = Instant::now() + Duration::from_secs(60);
    while handle.stats().sample_faults < before.sample_faults + 3 {
        ensure!(Instant::now() < deadline, "no faults: {:?}", handle.stats());
        std::thread::sleep(Duration::from_millis(10));
    }
    let second = pair.client.connect(pair.listener.local)?;
    pair.collector
        .wait_for("a connection while netlink fails", |event| {
            event.is_open() && event.socket.local == second.local
        })?;
    drop(limit);
    pair.collector
        .wait_for_sample("the client", |event| is_of(event, client))?;
    ensure!(handle.stats().sample_rounds > before.sample_rounds);
    Ok(())
}

struct FewFiles {
    soft: u64,
    hard: u64,
}

impl Drop for FewFiles {
    fn drop(&mut self) {
        setrlimit(Resource::RLIMIT_NOFILE, self.soft, self.hard).unwrap();
    }
}

/// 100,000 TCP sockets and 20,000 UDP sockets, of eight processes. Each is sampled once in a round,
/// with the default queue and the right owner. Meanwhile connections are reported as usual.
fn many_sockets() -> anyhow::Result<()> {
    const TCP: u32 = 100_000;
    const UDP: u32 = 20_000;
    const HOLDERS: u32 = 8;
    let mut holders = Vec::new();
    for index in 0..HOLDERS {
        let mut holder = Actor::spawn("holder")?;
        let address = std::net::Ipv4Addr::from([127, 0, 1, u8::try_from(index)?]);
        holder.begin(&Command::Hold {
            address: SocketAddr::new(address.into(), 10_000),
            tcp: TCP / HOLDERS,
            udp: UDP / HOLDERS,
        })?;
        holders.push(holder);
    }
    for holder in &mut holders {
        holder.finish()?;
    }
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let crowd = Crowd {
        netns: Netns::current()?.inode()?,
        pids: holders.iter().map(Actor::pid).collect(),
    };
    runtime()?.block_on(async {
        const ONCE: Duration = Duration::from_secs(3_600);
        let builder = collector::tcp().max_sockets(1 << 18).sample_interval(ONCE);
        let mut tcp = builder.start().await?;
        crowd.is_sampled(&mut tcp, TCP, Some(&listener)).await?;
        let has_ended = |handle: &TracerHandle| handle.stats().sample_rounds > 0;
        wait_until(&tcp.handle(), "a whole round", has_ended).await?;
        let tcp = tcp.close().await?;
        let mut udp = collector::udp().sample_interval(ONCE).start().await?;
        crowd.is_sampled(&mut udp, UDP, None).await?;
        wait_until(&udp.handle(), "a whole round", has_ended).await?;
        let udp = udp.close().await?;
        for stats in [tcp, udp] {
            let lost = [
                stats.queue_shed,
                stats.ring_lost,
                stats.untracked,
                stats.sample_faults,
            ];
            ensure!(lost == [0; 4], "{stats:?}");
        }
        let (tcp, udp) = (tcp.sample_last_round, udp.sample_last_round);
        eprintln!("{TCP} TCP sockets in {tcp:?}, {UDP} UDP sockets in {udp:?}");
        Ok(())
    })
}

/// The sockets of some processes, the same number of each.
struct Crowd {
    netns: u32,
    pids: Vec<u32>,
}

impl Crowd {
    /// Reads the first round of samples: this many of this namespace, each once and with an owner.
    /// Connects once, in the middle of the round.
    async fn is_sampled(
        &self,
        tracer: &mut (impl futures_util::Stream<Item = Event> + Unpin),
        count: u32,
        connect_to: Option<&TcpListener>,
    ) -> anyhow::Result<()> {
        let mut times = HashMap::<u64, u32>::new();
        let mut of_process = HashMap::<u32, u32>::new();
        let mut client = None;
        let mut is_open = connect_to.is_none();
        while times.len() < count as usize || !is_open {
            let event = tokio::time::timeout(Duration::from_secs(60), tracer.next()).await;
            let event = event
                .with_context(|| format!("{} of {count} samples, and no more", times.len()))?
                .context("the stream has ended")?;
            if event.socket.netns != self.netns {
                continue;
            }
            if let Some(client) = &client {
                let local = TcpStream::local_addr(client)?;
                is_open |= event.is_open() && event.socket.local == local;
            }
            let process = event.process.as_ref().map(|process| process.pid);
            let pid = process.filter(|pid| self.pids.contains(pid));
            if let (EventKind::Sample { .. }, Some(pid)) = (&event.kind, pid) {
                *times.entry(event.socket.id).or_default() += 1;
                *of_process.entry(pid).or_default() += 1;
                if let Some(listener) =
                    connect_to.filter(|_| client.is_none() && times.len() == count as usize / 2)
                {
                    client = Some(TcpStream::connect(listener.local_addr()?)?);
                }
            }
        }
        let twice = times.values().filter(|times| **times > 1).count();
        ensure!(twice == 0, "{twice} sockets were sampled twice");
        let share = count / self.pids.len() as u32;
        ensure!(
            of_process.values().all(|sockets| *sockets == share),
            "{of_process:?}"
        );
        Ok(())
    }
}
