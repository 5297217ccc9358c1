//! The tracers and their handle.

use std::{
    future::{Future, poll_fn},
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

/// The common part of both tracers.
#[derive(Debug)]
pub(crate) struct Tracer {
    shared: Arc<Shared>,
    tasks: Tasks,
    /// The process that started the tracer.
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

    pub(crate) fn handle(&self) -> TracerHandle {
        TracerHandle {
            shared: Arc::clone(&self.shared),
        }
    }

    pub(crate) fn next(&mut self) -> impl Future<Output = Option<Event>> + Send + Unpin {
        poll_fn(|cx| self.shared.queue.poll_pop(cx))
    }

    pub(crate) async fn close(mut self) -> Result<Stats, Error> {
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
            // A fork has none of the threads that hold the locks and do the work. The programs and
            // maps in the kernel belong to the other process.
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
        /// [`builder`](Self::builder) returns its builder. Several tracers may run at once. The
        /// stream ends (`None`) only after [`TracerHandle::stop`], or if reading fails.
        /// [`close`](Self::close) then returns the error.
        ///
        /// A drop detaches everything at once, also outside of a runtime. It blocks for about 0.1
        /// s, until the kernel can be sure that no CPU runs the programs. [`close`](Self::close)
        /// does the same without blocking the runtime.
        ///
        /// A program that the process executes inherits nothing of the tracer. A fork without
        /// `exec` does. There, the tracer can only be dropped, which does nothing, and the kernel
        /// keeps the programs as long as the fork lives.
        ///
        /// The tracer is a [`Stream`], for the combinators of `futures-util` and similar crates. A
        /// program that only reads the events needs none of them, because
        /// [`next`](Self::next) is a method of the tracer itself.
        #[derive(Debug)]
        #[must_use = "a tracer without a consumer fills its queue"]
        pub struct $tracer(Tracer);

        impl $tracer {
            /// Returns a handle for other tasks.
            #[must_use]
            pub fn handle(&self) -> TracerHandle {
                self.0.handle()
            }

            /// Returns the next event as soon as there is one; `None` after the last one.
            ///
            /// # Cancel safety
            ///
            /// An event leaves the queue only when it is returned. So a future that is dropped
            /// loses no event. The same holds for any other way to poll the stream.
            #[allow(clippy::should_implement_trait, reason = "it is the `next` of a stream")]
            pub fn next(&mut self) -> impl Future<Output = Option<Event>> + Send + Unpin {
                self.0.next()
            }

            /// Detaches the programs, reads the remaining records, and returns the final counts.
            ///
            /// Events that the consumer has not taken are discarded and counted as
            /// [`Stats::discarded`]. To take them, call [`TracerHandle::stop`] and read the stream
            /// to its end before the close.
            ///
            /// # Errors
            ///
            /// The error that ended the stream before: reading failed (`Read`), or the runtime was
            /// shut down (`NoRuntime`).
            ///
            /// # Cancel safety
            ///
            /// If the future is dropped, the tracer is dropped, too: everything is detached, and
            /// the counts are lost.
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
    /// A stream of the TCP events of the whole machine: each state change and each accept, and
    /// regular samples of each live socket.
    TcpTracer
}

tracer! {
    /// A stream of the UDP events of the whole machine: regular totals of each flow, connects, the
    /// end of each socket with its totals, and regular samples of each live socket. Each datagram
    /// is an event on request.
    UdpTracer
}

/// Inspects and controls a tracer while another task reads its events.
#[derive(Debug, Clone)]
pub struct TracerHandle {
    shared: Arc<Shared>,
}

impl TracerHandle {
    /// Returns the counters so far, or the final ones.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Returns the kernel hooks that this machine allowed.
    #[must_use]
    pub fn hooks(&self) -> Vec<Hook> {
        self.shared.hooks().to_vec()
    }

    /// Returns the current filter; `None` after the tracer has ended.
    #[must_use = "a filter is only a description"]
    pub fn filter(&self) -> Option<Filter> {
        self.shared.filter()
    }

    /// Replaces the filter of a running tracer.
    ///
    /// The programs switch between two events. An event at that instant may pass although both
    /// filters reject it. Events that were produced before are still delivered. The tracer's memory
    /// of sockets and their totals do not change.
    ///
    /// The blocking work runs on a thread of the runtime's blocking pool.
    ///
    /// # Errors
    ///
    /// After an error, the old filter stays.
    ///
    /// - `InvalidFilter`: a setting is invalid, which the message names. Examples are a
    ///   [`pid_tree`](Filter::pid_tree) of a process that does not exist, a [`pid`](Filter::pid)
    ///   that a child pid namespace does not have, and a [`cgroup_path`](Filter::cgroup_path) that
    ///   is not a cgroup of v2.
    /// - `Permission`, `Attach`: the kernel refuses a hook that a `pid_tree`, or a `pid` in a child
    ///   pid namespace, needs.
    /// - `Unsupported`: the kernel's list of network namespaces, which a [`netns`](Filter::netns)
    ///   needs, has an unknown form.
    /// - `Ended`: the tracer has ended.
    /// - `NoRuntime`: the caller is outside of a Tokio runtime.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the filter may be the old one or the new one.
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

    /// Replaces the filter of a running tracer, for a program without a runtime.
    ///
    /// This is [`set_filter`](Self::set_filter), except that the blocking work runs on the calling
    /// thread.
    ///
    /// # Errors
    ///
    /// Those of [`set_filter`](Self::set_filter), except for `NoRuntime`.
    pub fn blocking_set_filter(&self, filter: Filter) -> Result<(), Error> {
        self.shared.set_filter(filter)
    }

    /// Detaches the programs. The stream yields the events that were already produced, and then
    /// ends.
    pub fn stop(&self) {
        self.shared.stop();
    }
}

/// Checks traits that the documentation promises.
const _: () = {
    const fn holds<T: Stream<Item = Event> + FusedStream + Send + Unpin>() {}
    const fn shares<T: Clone + Send + Sync>() {}
    holds::<TcpTracer>();
    holds::<UdpTracer>();
    shares::<TracerHandle>();
};
