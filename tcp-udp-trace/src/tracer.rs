//! The tracers and their handle.

use std::{
    mem,
    pin::Pin,
    process,
    sync::Arc,
    task::{Context, Poll},
};

use futures_core::{FusedStream, Stream};
use tokio::runtime::Handle;

use crate::{
    config::Config,
    error::{Error, ErrorKind, ResultExt as _},
    event::Event,
    filter::Filter,
    hook::Hook,
    stats::Stats,
    tasks::{self, Shared, Tasks},
};

/// What both tracers are.
#[derive(Debug)]
pub(crate) struct Tracer {
    shared: Arc<Shared>,
    tasks: Tasks,
    /// The process that started it.
    process: u32,
}

impl Tracer {
    pub(crate) async fn start(config: Config) -> Result<Self, Error> {
        let (shared, tasks) = tasks::start(config).await?;
        Ok(Self {
            shared,
            tasks,
            process: process::id(),
        })
    }

    async fn close(mut self) -> Result<Stats, Error> {
        self.shared.queue.abandon();
        self.shared.stop();
        if let Err(source) = (&mut self.tasks.reader).await {
            let error = Error::new(ErrorKind::NoRuntime, "the reader did not come to its end");
            return Err(error.with_source(source));
        }
        self.shared.queue.take_result()?;
        Ok(self.shared.stats())
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        if self.process != process::id() {
            // A fork without the threads that hold the locks and do the work; and what is in the kernel is the other process's.
            mem::forget(Arc::clone(&self.shared));
            return;
        }
        self.shared.queue.abandon();
        self.shared.release();
        self.tasks.reader.abort();
        if let Some(sampler) = &self.tasks.sampler {
            sampler.abort();
        }
        self.shared.queue.finish(Ok(()));
    }
}

macro_rules! tracer {
    ($(#[$doc:meta])* $tracer:ident) => {
        $(#[$doc])*
        ///
        /// Made by [`builder`](Self::builder); several may run at once. The stream ends (`None`) only after
        /// [`TracerHandle::stop`], or if reading fails, which [`close`](Self::close) then reports.
        ///
        /// Dropping it detaches everything, at once and also outside of a runtime. That blocks until the kernel can be sure that
        /// no CPU runs our programs any more: about 0.1 s; [`close`](Self::close) does the same without blocking
        /// the runtime.
        ///
        /// A program that the process starts inherits nothing of it. A fork that starts none does: there the tracer can only be dropped, which does
        /// nothing, and as long as the fork lives the kernel keeps the programs.
        ///
        /// # Cancel safety
        ///
        /// An event leaves the queue when it is returned and not before, so a dropped `next()` loses nothing.
        #[derive(Debug)]
        #[must_use = "a tracer that nobody reads fills its queue"]
        pub struct $tracer(Tracer);

        impl $tracer {
            /// A handle for other tasks.
            #[must_use]
            pub fn handle(&self) -> TracerHandle {
                TracerHandle { shared: Arc::clone(&self.0.shared) }
            }

            /// Detaches, reads what the kernel had already produced, and gives the final counts.
            ///
            /// Events that nobody has taken are thrown away and counted as [`Stats::discarded`]; to take them, call
            /// [`TracerHandle::stop`] and read the stream to its end first.
            ///
            /// # Errors
            ///
            /// What ended the stream before: reading failed (`Read`), or the runtime was shut down (`NoRuntime`).
            ///
            /// # Cancel safety
            ///
            /// If the future is dropped, so is the tracer: everything is detached, and the counts are lost.
            pub async fn close(self) -> Result<Stats, Error> {
                self.0.close().await
            }
        }

        impl From<Tracer> for $tracer {
            fn from(tracer: Tracer) -> Self {
                Self(tracer)
            }
        }

        impl Stream for $tracer {
            type Item = Event;

            fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
                self.0.shared.queue.poll_pop(cx)
            }
        }

        impl FusedStream for $tracer {
            fn is_terminated(&self) -> bool {
                self.0.shared.queue.is_finished()
            }
        }
    };
}

tracer! {
    /// The TCP events of the whole machine, as a stream: each state change and each accept, and now and then a sample of each live
    /// socket.
    TcpTracer
}

tracer! {
    /// The UDP events of the whole machine, as a stream: the totals of each flow now and then, connects, and the end of each
    /// socket with its totals; each datagram on request; and now and then a sample of each live socket.
    UdpTracer
}

/// Looks at a tracer and steers it while another task reads its events.
#[derive(Debug, Clone)]
pub struct TracerHandle {
    shared: Arc<Shared>,
}

impl TracerHandle {
    /// The counts so far, or the final ones.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Which kernel hooks this machine allowed.
    #[must_use]
    pub fn hooks(&self) -> Vec<Hook> {
        self.shared.hooks().to_vec()
    }

    /// Which events are reported; `None` once the tracer has ended.
    #[must_use = "a filter is only a description"]
    pub fn filter(&self) -> Option<Filter> {
        self.shared.filter()
    }

    /// Reports only what this filter lets pass, from now on: the programs change over between two events, and one that happens just
    /// then may pass though neither filter wants it. What was produced before is still delivered; what is remembered of sockets, and their totals, are not touched.
    ///
    /// The work that blocks is done on a thread of the runtime's blocking pool.
    ///
    /// # Errors
    ///
    /// Then the filter of before stays. `InvalidFilter` names the setting that makes no sense, also a [`pid_tree`](Filter::pid_tree) of a
    /// process that is not there, a [`pid`](Filter::pid) that a child pid namespace does not have, and a
    /// [`cgroup_path`](Filter::cgroup_path) that is no cgroup of v2; `Permission`, `Attach` if the kernel refuses what a `pid_tree`, or a `pid` in a child pid namespace, needs;
    /// `Unsupported` if the kernel's list of network namespaces, which a [`netns`](Filter::netns) needs,
    /// is not the known one; `Ended` if the tracer has ended; `NoRuntime` outside of a Tokio runtime.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the filter may be changed or not.
    pub async fn set_filter(&self, filter: Filter) -> Result<(), Error> {
        let runtime = Handle::try_current().or_error(
            ErrorKind::NoRuntime,
            "no Tokio runtime here: call `set_filter` from within one",
        )?;
        let shared = Arc::clone(&self.shared);
        let changed = runtime.spawn_blocking(move || shared.set_filter(filter));
        changed.await.or_error(
            ErrorKind::NoRuntime,
            "the runtime was shut down during the change",
        )?
    }

    /// Detaches. The stream yields what had already been produced, and then ends.
    pub fn stop(&self) {
        self.shared.stop();
    }
}

/// The promises of the documentation.
const _: () = {
    const fn holds<T: Stream<Item = Event> + FusedStream + Send + Unpin>() {}
    const fn shares<T: Clone + Send + Sync>() {}
    holds::<TcpTracer>();
    holds::<UdpTracer>();
    shares::<TracerHandle>();
};
