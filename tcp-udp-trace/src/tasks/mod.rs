//! The tasks of a running tracer.

mod process_details;
mod reader;
mod sampler;
mod shared;
mod source;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Handle,
    task::JoinHandle,
    time::sleep,
};

pub(crate) use self::shared::Shared;
use self::{
    process_details::Details,
    reader::Reader,
    shared::Limits,
    source::{BATCH, Source},
};
use crate::{
    config::Config,
    error::{Error, ErrorKind, ResultExt as _},
    kernel::{Kernel, SampleScope},
    pipeline::{flows::Flows, images::Images, pending_samples::PendingSamples, queue::Queue},
};

/// The tasks of a tracer.
#[derive(Debug)]
pub(crate) struct Tasks {
    pub(crate) reader: JoinHandle<()>,
    pub(crate) sampler: Option<JoinHandle<()>>,
}

/// Loads and attaches the programs, and spawns the tasks.
pub(crate) async fn start(config: Config) -> Result<(Arc<Shared>, Tasks), Error> {
    let runtime = Handle::try_current().or_error(
        ErrorKind::NoRuntime,
        "no Tokio runtime here: call `start` from within one",
    )?;
    let Config {
        protocol,
        queue,
        overflow,
        latency,
        interval,
        sample_interval,
        process_details,
        max_flows,
        ref filter,
        ..
    } = config;
    let filter = filter.clone();
    let settings = config.clone();
    let (kernel, ring) = runtime
        .spawn_blocking(move || Kernel::start(&settings))
        .await
        .or_error(
            ErrorKind::NoRuntime,
            "the runtime was shut down during the start",
        )??;
    let limits = Limits::new(&config, ring.parts());
    // Tokio panics if its drivers are disabled, and has no function to check that.
    let ring = catch_unwind(AssertUnwindSafe(|| {
        drop(sleep(Duration::ZERO));
        #[allow(
            deprecated,
            reason = "its successor is unsafe. The ring owns its descriptor and keeps it open"
        )]
        AsyncFd::with_interest(ring, Interest::READABLE)
    }))
    .map_err(|_| {
        let message = "this Tokio runtime has I/O or time disabled: build it with `enable_all`";
        Error::new(ErrorKind::NoRuntime, message)
    })?
    .or_error(ErrorKind::Read, "cannot wait for the buffer of records")?;

    let samples = Arc::new(PendingSamples::default());
    let flows = Flows::new(interval, max_flows as usize);
    let images = process_details.then(Images::default);
    let source = Source::new(
        kernel,
        ring,
        protocol,
        flows,
        Arc::clone(&samples),
        filter,
        images,
    );
    let queue = Queue::new(queue, overflow);
    let shared = Arc::new(Shared::new(queue, limits, samples, source));
    let reader = Reader {
        shared: Arc::clone(&shared),
        latency,
        details: process_details.then(Details::default),
        batch: Vec::with_capacity(BATCH),
    };
    let tasks = Tasks {
        reader: runtime.spawn(reader.run()),
        sampler: sample_interval
            .filter(|_| shared.sample_scope != SampleScope::Nothing)
            .map(|every| runtime.spawn(sampler::run(Arc::clone(&shared), every))),
    };
    Ok((shared, tasks))
}
