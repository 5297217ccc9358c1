//! A tracer for programs without a runtime.

use std::{
    future::Future,
    mem,
    pin::pin,
    process,
    sync::{Arc, mpsc},
    task::{Context, Poll, Wake},
    thread::{self, Thread},
};

use tokio::{
    runtime::{Builder, Handle},
    sync::oneshot,
};

use crate::{
    config::Config,
    error::{Error, ErrorKind, ResultExt as _},
    event::Event,
    stats::Stats,
    tracer::{Tracer, TracerHandle},
};

/// A tracer for programs without a runtime: an [`Iterator`] of events.
///
/// [`TcpTracerBuilder::blocking`](crate::TcpTracerBuilder::blocking) and
/// [`UdpTracerBuilder::blocking`](crate::UdpTracerBuilder::blocking) start it. It has a thread of
/// its own that reads the kernel's records, also while the program does other work.
///
/// [`next`](Iterator::next) blocks until there is an event. It returns `None` only after
/// [`TracerHandle::stop`], which another thread may call, or if reading fails.
/// [`close`](Self::close) then returns the error.
///
/// A drop detaches everything and ends the thread, as described for
/// [`TcpTracer`](crate::TcpTracer).
#[derive(Debug)]
#[must_use = "a tracer without a consumer fills its queue"]
pub struct BlockingTracer {
    /// Dropped first, because its tasks run on the thread.
    tracer: Tracer,
    driver: Driver,
}

impl BlockingTracer {
    pub(crate) fn start(config: Config) -> Result<Self, Error> {
        let driver = Driver::start()?;
        let (sender, started) = mpsc::channel();
        driver.runtime.spawn(async move {
            // The receiver waits.
            let _ = sender.send(Tracer::start(config).await);
        });
        let tracer = started
            .recv()
            .or_error(ErrorKind::NoRuntime, "the tracer's thread has ended")??;
        Ok(Self { tracer, driver })
    }

    /// Returns a handle for other threads.
    #[must_use]
    pub fn handle(&self) -> TracerHandle {
        self.tracer.handle()
    }

    /// Detaches the programs, reads the remaining records, and returns the final counts.
    ///
    /// Events that the consumer has not taken are discarded, as described for
    /// [`TcpTracer::close`](crate::TcpTracer::close).
    ///
    /// # Errors
    ///
    /// The error that ended the events before: reading failed (`Read`).
    pub fn close(self) -> Result<Stats, Error> {
        let Self { tracer, driver } = self;
        let stats = block_on(tracer.close());
        drop(driver);
        stats
    }
}

impl Iterator for BlockingTracer {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        block_on(self.tracer.next())
    }
}

impl std::iter::FusedIterator for BlockingTracer {}

/// A runtime, and the thread that drives it.
#[derive(Debug)]
struct Driver {
    runtime: Handle,
    /// A drop of the sender ends the thread.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
    /// The process that has the thread.
    process: u32,
}

impl Driver {
    fn start() -> Result<Self, Error> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .or_error(ErrorKind::NoRuntime, "cannot make a runtime")?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = thread::Builder::new()
            .name("tracer".into())
            .spawn(move || drop(runtime.block_on(stopped)))
            .or_error(ErrorKind::NoRuntime, "cannot start the tracer's thread")?;
        Ok(Self {
            runtime: handle,
            stop: Some(stop),
            thread: Some(thread),
            process: process::id(),
        })
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.process != process::id() {
            // A fork does not have the thread, and shares the file descriptor that wakes it.
            mem::forget(self.stop.take());
            return;
        }
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported already.
            let _ = thread.join();
        }
    }
}

/// Wakes a thread that waits for a future.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Blocks the calling thread until the future is ready.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let waker = Arc::new(Unpark(thread::current())).into();
    let mut cx = Context::from_waker(&waker);
    loop {
        match future.as_mut().poll(&mut cx) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}
