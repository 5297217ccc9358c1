//! The start and the end of a tracer.

use std::{
    collections::BTreeSet,
    fs,
    net::{TcpListener, TcpStream},
    time::Duration,
};

use anyhow::{bail, ensure};
use aya::maps::MapType;
use futures_util::{FutureExt as _, stream::FusedStream as _};
use integration_tests::{
    collector, hooks_page,
    kernel::{BpfObjects, is_at_least, is_emulated, open_files},
    suite::Test,
};
use tcp_udp_trace::{Buffer, ErrorKind, TcpTracer};
use tokio::runtime::{Builder, Runtime};

pub(crate) fn trials() -> Vec<Test> {
    trials![
        Nothing: [
            start_needs_a_runtime,
            every_signal_has_a_hook,
            stop_ends_the_stream_after_the_last_event,
        ],
        Solitude: [
            only_the_chosen_buffer_is_tried,
            start_and_stop_over_and_over,
            dropped_outside_of_a_runtime,
            runtime_dropped_before_the_tracer,
            start_cancelled_leaves_nothing,
        ],
    ]
}

fn runtime() -> anyhow::Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}

fn start_needs_a_runtime() -> anyhow::Result<()> {
    let Some(Err(error)) = collector::tcp().start().now_or_never() else {
        bail!("started without a runtime")
    };
    ensure!(error.kind() == ErrorKind::NoRuntime, "{error:?}");
    Ok(())
}

fn every_signal_has_a_hook() -> anyhow::Result<()> {
    let runtime = runtime()?;
    let builder = collector::tcp().retransmits(true).resets(true);
    let tracer = runtime.block_on(builder.listen_overflows(true).start())?;
    let hooks = tracer.handle().hooks();
    for hook in &hooks {
        eprintln!("{hook}");
        // It needs kprobes.
        let may_be_absent = hook.signal == "listen_overflow";
        ensure!(may_be_absent || !hook.programs.is_empty(), "{hook}");
    }
    hooks_page::check(&hooks)
}

/// A kernel without ring buffers refuses to make one, whatever it is for. On the real-time kernel
/// 5.10, programs must not use one.
fn only_the_chosen_buffer_is_tried() -> anyhow::Result<()> {
    let runtime = runtime()?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let ring_sleeps = release.contains("-rt-") && !is_at_least(6, 1)?;
    let default = if ring_sleeps {
        "map:perf_event_array"
    } else {
        "map:ringbuf"
    };
    for (chosen, expected) in [
        (None, default),
        (Some(Buffer::Ring), "map:ringbuf"),
        (Some(Buffer::Perf), "map:perf_event_array"),
    ] {
        let builder = TcpTracer::builder();
        let builder = match chosen {
            Some(buffer) => builder.buffer(buffer),
            None => builder,
        };
        let started = runtime.block_on(builder.start());
        if ring_sleeps && chosen == Some(Buffer::Ring) {
            let kind = started.err().map(|error| error.kind());
            ensure!(kind == Some(ErrorKind::Unsupported), "{kind:?}");
            continue;
        }
        let tracer = started?;
        let hooks = tracer.handle().hooks();
        let reported = hooks.iter().find(|hook| hook.signal == "buffer");
        let reported = reported.map(|hook| hook.programs.join("+"));
        ensure!(
            reported.as_deref() == Some(expected),
            "{chosen:?}: {reported:?}"
        );
        let types = BpfObjects::of_this_process()?.map_types()?;
        for (map, is_expected) in [
            (MapType::RingBuf, expected == "map:ringbuf"),
            (MapType::PerfEventArray, expected != "map:ringbuf"),
        ] {
            ensure!(types.contains(&map) == is_expected, "{chosen:?}: {types:?}");
        }
    }
    Ok(())
}

/// Events before `stop` are delivered, even if the consumer had read none. Then the stream ends,
/// and remains ended.
fn stop_ends_the_stream_after_the_last_event() -> anyhow::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    runtime()?.block_on(async {
        let mut tracer = collector::tcp().queue(1 << 20).start().await?;
        let client = TcpStream::connect(listener.local_addr()?)?;
        let port = client.local_addr()?.port();
        tracer.handle().stop();
        tracer.handle().stop();
        let mut opens = 0;
        while let Some(event) = tracer.next().await {
            let is_ours = [event.socket.local.port(), event.socket.remote.port()].contains(&port);
            opens += usize::from(is_ours && event.is_open());
        }
        ensure!(opens == 2, "{opens} of 2 ends were opened");
        ensure!(tracer.is_terminated() && tracer.next().await.is_none());
        let stats = tracer.close().await?;
        collector::check_conservation(&stats)
    })
}

/// Tracers are closed and dropped by turns. Nothing is left: no descriptor here, no program, map or
/// link in the kernel.
fn start_and_stop_over_and_over() -> anyhow::Result<()> {
    let files = open_files()?;
    let mut seen = BpfObjects::default();
    let runtime = runtime()?;
    // In an emulated guest, each turn takes a second.
    let turns = if is_emulated()? { 20 } else { 60 };
    for turn in 0..turns {
        // Small, to save time.
        let builder = collector::tcp().max_sockets(1_024);
        let tracer = runtime.block_on(builder.start())?;
        if turn % 10 < 2 {
            let objects = BpfObjects::of_this_process()?;
            ensure!(
                !objects.programs.is_empty() && !objects.maps.is_empty(),
                "unexpected BPF objects of the tracer: {objects:?}"
            );
            seen.extend(objects);
        }
        match turn % 2 {
            0 => drop(runtime.block_on(tracer.close())?),
            _ => drop(tracer),
        }
    }
    drop(runtime);
    ensure!(
        open_files()? == files,
        "files open before: {files:?}, after: {:?}",
        open_files()?
    );
    ensure_nothing_held()?;
    seen.await_freed()
}

fn dropped_outside_of_a_runtime() -> anyhow::Result<()> {
    let runtime = runtime()?;
    let tracer = runtime.block_on(collector::tcp().start())?;
    let objects = BpfObjects::of_this_process()?;
    drop(tracer);
    // The runtime does not run, so any remaining work would not be done.
    ensure_nothing_held()?;
    objects.await_freed()
}

/// The stream ends instead of waiting for a reader that has ended, and the kernel side is detached.
fn runtime_dropped_before_the_tracer() -> anyhow::Result<()> {
    let first = runtime()?;
    let mut tracer = first.block_on(collector::tcp().start())?;
    let objects = BpfObjects::of_this_process()?;
    drop(first);
    runtime()?.block_on(async {
        let end = async { while tracer.next().await.is_some() {} };
        let ended = tokio::time::timeout(Duration::from_secs(60), end).await;
        ensure!(ended.is_ok(), "the stream does not end");
        Ok(())
    })?;
    drop(tracer);
    ensure_nothing_held()?;
    objects.await_freed()
}

/// A cancelled start detaches all its programs, at whatever moment it is cancelled.
fn start_cancelled_leaves_nothing() -> anyhow::Result<()> {
    let files = open_files()?;
    for milliseconds in [0, 1, 2, 5, 10, 20, 50, 100] {
        let runtime = runtime()?;
        let limit = Duration::from_millis(milliseconds);
        let start = async { tokio::time::timeout(limit, collector::tcp().start()).await };
        if let Ok(started) = runtime.block_on(start) {
            drop(started?);
        }
        // Waits for the blocking work.
        drop(runtime);
    }
    let left: BTreeSet<_> = open_files()?.difference(&files).cloned().collect();
    ensure!(left.is_empty(), "{left:?}");
    ensure_nothing_held()
}

/// Checks that this process has no descriptor of a program, map or link.
fn ensure_nothing_held() -> anyhow::Result<()> {
    let held = BpfObjects::of_this_process()?;
    ensure!(held.is_empty(), "{held:?} in {:#?}", open_files()?);
    Ok(())
}
