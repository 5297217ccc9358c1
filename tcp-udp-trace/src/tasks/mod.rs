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
    source::{Attached, BATCH},
};
use crate::{
    config::Config,
    error::{Error, ErrorKind},
    kernel::{Kernel, SampleScope},
    pipeline::{flows::Flows, images::Images, pending_samples::Samples, queue::Queue},
};

/// The tasks of a tracer.
#[derive(Debug)]
pub(crate) struct Tasks {
    pub(crate) reader: JoinHandle<()>,
    pub(crate) enrichment: Option<JoinHandle<()>>,
}

/// Loads, attaches and starts to read.
pub(crate) async fn start(config: Config) -> Result<(Arc<Shared>, Tasks), Error> {
    let no_runtime = |what| Error::new(ErrorKind::NoRuntime, what);
    let runtime = Handle::try_current().map_err(|source| {
        no_runtime("no Tokio runtime here: call `start` from within one").with_source(source)
    })?;
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
        .map_err(|source| {
            no_runtime("the runtime was shut down during the start").with_source(source)
        })??;
    let limits = Limits::new(&config, ring.parts());
    // Tokio panics when its drivers are off, and offers no way to ask.
    let ring = catch_unwind(AssertUnwindSafe(|| {
        drop(sleep(Duration::ZERO));
        #[allow(
            deprecated,
            reason = "its successor is unsafe; the ring owns its descriptor and keeps it open"
        )]
        AsyncFd::with_interest(ring, Interest::READABLE)
    }))
    .map_err(|_| {
        no_runtime("this Tokio runtime has I/O or time disabled: build it with `enable_all`")
    })?
    .map_err(|source| {
        Error::new(ErrorKind::Read, "cannot wait for the buffer of records").with_source(source)
    })?;

    let samples = Arc::new(Samples::default());
    let flows = Flows::new(interval, max_flows as usize);
    let images = process_details.then(Images::default);
    let attached = Attached::new(
        kernel,
        ring,
        protocol,
        flows,
        Arc::clone(&samples),
        filter,
        images,
    );
    let queue = Queue::new(queue, overflow);
    let shared = Arc::new(Shared::new(queue, limits, samples, attached));
    let reader = Reader {
        shared: Arc::clone(&shared),
        latency,
        details: process_details.then(Details::default),
        batch: Vec::with_capacity(BATCH),
    };
    let tasks = Tasks {
        reader: runtime.spawn(reader.run()),
        enrichment: sample_interval
            .filter(|_| shared.sample_scope != SampleScope::Nothing)
            .map(|every| runtime.spawn(sampler::run(Arc::clone(&shared), every))),
    };
    Ok((shared, tasks))
}
