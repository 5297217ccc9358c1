//! The traffic of a soak, and the tracers' counts of it.

use std::{
    net::UdpSocket,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use futures_util::{Stream, StreamExt as _};
use integration_tests::{
    actor::{Actor, Command, Endpoint, Exchange, Operation, Outcome},
    collector::check_conservation,
    tcp_pair::loopback,
};
use tcp_udp_trace::{
    Buffer, Error, Event, EventKind, Stats, TcpState, TcpTracer, TcpTracerBuilder, TracerHandle,
    UdpTracer, UdpTracerBuilder,
};

use crate::{interrupted::Unclosed, upheaval::VISITED_PORT};

/// How many connections or datagrams an actor makes before it looks at the clock.
const CONNECTIONS: u32 = 200;
const DATAGRAMS: u64 = 50_000;

/// How long the work goes on.
#[derive(Debug, Clone)]
pub(crate) struct Clock {
    over: Arc<AtomicBool>,
}

impl Clock {
    /// Starts the clock.
    pub(crate) fn start(time: Duration) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let when_over = Arc::clone(&over);
        thread::spawn(move || {
            thread::sleep(time);
            when_over.store(true, Ordering::Relaxed);
        });
        Self { over }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

/// The true counts of the traffic.
#[derive(Debug, Clone, Default)]
pub(crate) struct Truth {
    pub(crate) connections: Arc<AtomicU64>,
    /// Sent over connections, in both directions.
    pub(crate) bytes: Arc<AtomicU64>,
    pub(crate) datagrams: Arc<AtomicU64>,
    pub(crate) udp_sockets: Arc<AtomicU64>,
}

pub(crate) type Worker = JoinHandle<anyhow::Result<()>>;

/// Starts pairs of processes that connect to this listener of the server's, floods of datagrams,
/// and short-lived UDP sockets.
pub(crate) fn begin(
    clock: &Clock,
    truth: &Truth,
    server: &Actor,
    listener: &Endpoint,
) -> anyhow::Result<Vec<Worker>> {
    let mut workers = Vec::new();
    for seed in 0..2 {
        let mut acceptor = Actor::spawn("acceptor")?;
        let fd = acceptor.take(server, listener.fd)?.fd;
        let mut client = Actor::spawn("client")?;
        let (clock, truth, to) = (clock.clone(), truth.clone(), listener.local);
        workers.push(thread::spawn(move || {
            let mut round = seed;
            while !clock.is_over() {
                acceptor.begin(&Command::Serve(fd, CONNECTIONS))?;
                client.begin(&Command::Churn {
                    to,
                    connections: CONNECTIONS,
                    seed: round,
                })?;
                let exchanges = [client.finish_exchanges()?, acceptor.finish_exchanges()?];
                let sent = |exchange: &Exchange| exchange.sent;
                let bytes = exchanges.iter().flatten().map(sent).sum();
                truth.bytes.fetch_add(bytes, Ordering::Relaxed);
                truth
                    .connections
                    .fetch_add(u64::from(CONNECTIONS), Ordering::Relaxed);
                round += 2;
            }
            Ok(())
        }));
    }
    workers.push(thread::spawn({
        let (clock, truth) = (clock.clone(), truth.clone());
        move || flood(&clock, &truth)
    }));
    workers.push(thread::spawn({
        let (clock, truth) = (clock.clone(), truth.clone());
        move || {
            while !clock.is_over() {
                let socket = UdpSocket::bind(loopback(false))?;
                socket.send_to(b"to itself", socket.local_addr()?)?;
                socket.recv(&mut [0; 16])?;
                drop(socket);
                truth.udp_sockets.fetch_add(1, Ordering::Relaxed);
                truth.datagrams.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_micros(500));
            }
            Ok(())
        }
    }));
    Ok(workers)
}

fn flood(clock: &Clock, truth: &Truth) -> anyhow::Result<()> {
    let (mut sender, mut receiver) = (Actor::spawn("sender")?, Actor::spawn("receiver")?);
    while !clock.is_over() {
        let mut sockets = Vec::new();
        for actor in [&mut sender, &mut receiver] {
            let socket = actor.socket(Command::OpenUdp { v6: false })?;
            sockets.push(actor.socket(Command::Bind(socket.fd, loopback(false)))?);
        }
        sender.run(Command::Connect(sockets[0].fd, sockets[1].local))?;
        receiver.run(Command::Connect(sockets[1].fd, sockets[0].local))?;
        receiver.begin(&Command::Udp(sockets[1].fd, Operation::Absorb))?;
        let flood = Operation::Flood {
            count: DATAGRAMS,
            size: 100,
        };
        for outcome in [
            sender.run(Command::Udp(sockets[0].fd, flood))?,
            receiver.finish()?,
        ] {
            let Outcome::Transfers(transfers) = outcome else {
                anyhow::bail!("{outcome:?}");
            };
            truth
                .datagrams
                .fetch_add(transfers[0].datagrams, Ordering::Relaxed);
        }
        sender.close(&sockets[0])?;
        receiver.close(&sockets[1])?;
        truth.udp_sockets.fetch_add(2, Ordering::Relaxed);
    }
    Ok(())
}

/// The counts of a tracer for the sockets of one network namespace, and for those of the namespaces
/// that come and go.
#[derive(Debug, Default)]
pub(crate) struct Counted {
    pub(crate) closes: u64,
    pub(crate) tx: u64,
    pub(crate) rx: u64,
    pub(crate) unclosed: Unclosed,
    pub(crate) stats: Stats,
}

pub(crate) type Counting = JoinHandle<anyhow::Result<Counted>>;

pub(crate) fn count_tcp(
    builder: TcpTracerBuilder,
    netns: u32,
) -> anyhow::Result<(Counting, TracerHandle)> {
    count(
        netns,
        false,
        builder.start(),
        TcpTracer::handle,
        TcpTracer::close,
    )
}

pub(crate) fn count_udp(
    builder: UdpTracerBuilder,
    netns: u32,
) -> anyhow::Result<(Counting, TracerHandle)> {
    count(
        netns,
        true,
        builder.start(),
        UdpTracer::handle,
        UdpTracer::close,
    )
}

/// Waits until the queue has overflowed, which takes an emulated machine longer.
async fn pause(handle: &TracerHandle) {
    let (began, shed) = (Instant::now(), handle.stats().queue_shed);
    while handle.stats().queue_shed == shed && began.elapsed() < Duration::from_secs(10) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Reads a tracer to its end on a thread of its own. If `pauses`, the thread sleeps now and then,
/// so the queue overflows.
fn count<T, C>(
    netns: u32,
    pauses: bool,
    start: impl Future<Output = Result<T, Error>> + Send + 'static,
    handle: impl FnOnce(&T) -> TracerHandle + Send + 'static,
    close: impl FnOnce(T) -> C + Send + 'static,
) -> anyhow::Result<(Counting, TracerHandle)>
where
    T: Stream<Item = Event> + Unpin,
    C: Future<Output = Result<Stats, Error>>,
{
    let (ready, started) = mpsc::channel();
    let thread = thread::spawn(move || {
        block_on(async {
            let mut tracer = start.await?;
            let handle = handle(&tracer);
            ready.send(handle.clone())?;
            let mut counted = Counted::default();
            let mut paused = Instant::now();
            while let Some(event) = tracer.next().await {
                if pauses && paused.elapsed() > Duration::from_secs(5) {
                    pause(&handle).await;
                    paused = Instant::now();
                }
                let ports = [event.socket.local.port(), event.socket.remote.port()];
                if event.socket.netns != netns && !ports.contains(&VISITED_PORT) {
                    continue;
                }
                if is_of_connection(&event) {
                    counted.unclosed.see(&event);
                }
                if !event.is_end() || is_other(&event) {
                    continue;
                }
                counted.closes += 1;
                counted.tx += event.traffic.tx_bytes;
                counted.rx += event.traffic.rx_bytes;
            }
            counted.stats = close(tracer).await?;
            Ok(counted)
        })
    });
    Ok((thread, started.recv().context("the tracer did not start")?))
}

/// Whether a TCP socket that does not listen has changed its state.
fn is_of_connection(event: &Event) -> bool {
    let EventKind::StateChange { from, to, .. } = event.kind else {
        return false;
    };
    from != TcpState::Listen && to != TcpState::Listen
}

/// Whether it is the end of a socket that no count includes: the listener, and a child that was
/// never established.
fn is_other(event: &Event) -> bool {
    let EventKind::StateChange { from, .. } = event.kind else {
        return false;
    };
    matches!(from, TcpState::SynRecv | TcpState::Listen)
}

/// Ends a tracer after this many closes, or after a long time without a new one.
pub(crate) fn finish(
    counting: Counting,
    handle: &TracerHandle,
    expected: u64,
) -> anyhow::Result<Counted> {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut seen = handle.stats().emitted;
    // The tracer's own counts are of the whole machine. A second without a new event ends the wait.
    loop {
        thread::sleep(Duration::from_secs(1));
        let now = handle.stats().emitted;
        if now == seen && now >= expected || Instant::now() > deadline {
            break;
        }
        seen = now;
    }
    handle.stop();
    counting.join().unwrap()
}

/// Starts a tracer, reads some of its events, and ends it in one of the possible ways.
pub(crate) fn start_and_stop(round: u64) -> anyhow::Result<()> {
    const GLANCE: Duration = Duration::from_millis(200);
    let buffer = if round % 4 < 2 {
        Buffer::Ring
    } else {
        Buffer::Perf
    };
    block_on(async {
        let stats = if round.is_multiple_of(2) {
            let mut tracer = TcpTracer::builder()
                .buffer(buffer)
                .retransmits(true)
                .resets(true)
                .start()
                .await?;
            let _ = tokio::time::timeout(GLANCE, (&mut tracer).for_each(async |_| ())).await;
            if round.is_multiple_of(3) {
                return Ok(());
            }
            tracer.close().await?
        } else {
            let mut tracer = UdpTracer::builder()
                .buffer(buffer)
                .per_datagram(true)
                .start()
                .await?;
            let _ = tokio::time::timeout(GLANCE, (&mut tracer).for_each(async |_| ())).await;
            if round.is_multiple_of(3) {
                return Ok(());
            }
            tracer.close().await?
        };
        check_conservation(&stats)?;
        ensure!(stats.malformed == 0, "{stats:?}");
        Ok(())
    })
}

pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    // The runtime of `#[tokio::main]`.
    tokio::runtime::Runtime::new().unwrap().block_on(future)
}
