//! The tasks on other systems than Linux, where the crate compiles, but no tracer starts.

use std::sync::Arc;

use tokio::task::JoinHandle;

use crate::{
    config::Config,
    error::{Error, ErrorKind},
    filter::Filter,
    hook::Hook,
    pipeline::queue::Queue,
    stats::Stats,
};

/// A type without values.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) queue: Queue,
    never: std::convert::Infallible,
}

impl Shared {
    pub(crate) fn hooks(&self) -> &[Hook] {
        match self.never {}
    }

    pub(crate) fn stats(&self) -> Stats {
        match self.never {}
    }

    pub(crate) fn set_filter(&self, _: Filter) -> Result<(), Error> {
        match self.never {}
    }

    pub(crate) fn filter(&self) -> Option<Filter> {
        match self.never {}
    }

    pub(crate) fn stop(&self) {
        match self.never {}
    }

    pub(crate) fn release(&self) {
        match self.never {}
    }
}

/// No value of this type ever exists.
#[derive(Debug)]
pub(crate) struct Tasks {
    pub(crate) reader: JoinHandle<()>,
    pub(crate) sampler: Option<JoinHandle<()>>,
}

pub(crate) async fn start(_: Config) -> Result<(Arc<Shared>, Tasks), Error> {
    Err(Error::new(
        ErrorKind::Unsupported,
        "this library needs Linux 5.10 or newer, on x86_64 or aarch64",
    ))
}
