//! Where there is no Linux, everything compiles and nothing starts.

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

/// Never made.
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

/// Never made either.
#[derive(Debug)]
pub(crate) struct Tasks {
    pub(crate) reader: JoinHandle<()>,
    pub(crate) sampler: Option<JoinHandle<()>>,
}

pub(crate) async fn start(_: Config) -> Result<(Arc<Shared>, Tasks), Error> {
    Err(Error::new(
        ErrorKind::Unsupported,
        "eBPF is Linux: this library traces only there, on x86_64 and aarch64, from kernel 5.10 on",
    ))
}
