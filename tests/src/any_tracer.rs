//! Runs a tracer of either protocol to its end.

use std::sync::mpsc;

use futures_util::{Stream, StreamExt as _};
use tcp_udp_trace::{Error, Event, Stats, TcpTracer, TracerHandle, UdpTracer};

/// The methods that both tracers have.
#[allow(async_fn_in_trait, reason = "only these two have it")]
pub trait Tracer: Stream<Item = Event> + Unpin {
    /// Returns the tracer's handle.
    fn handle(&self) -> TracerHandle;
    /// Detaches the tracer.
    async fn close(self) -> Result<Stats, Error>;
}

impl Tracer for TcpTracer {
    fn handle(&self) -> TracerHandle {
        self.handle()
    }

    async fn close(self) -> Result<Stats, Error> {
        self.close().await
    }
}

impl Tracer for UdpTracer {
    fn handle(&self) -> TracerHandle {
        self.handle()
    }

    async fn close(self) -> Result<Stats, Error> {
        self.close().await
    }
}

/// Returns every event that a stopped tracer still has, and its counts.
pub async fn rest(mut tracer: impl Tracer) -> Result<(Vec<Event>, Stats), Error> {
    let mut events = Vec::new();
    while let Some(event) = tracer.next().await {
        events.push(event);
    }
    Ok((events, tracer.close().await?))
}

/// Runs a tracer until it ends. Passes its handle on when it is ready, and each event.
pub(crate) fn collect<T: Tracer>(
    start: impl AsyncFnOnce() -> Result<T, Error>,
    mut put: impl FnMut(Event),
    ready: &mpsc::Sender<TracerHandle>,
) -> anyhow::Result<Stats> {
    // The runtime of `#[tokio::main]`.
    tokio::runtime::Runtime::new()?.block_on(async {
        let mut tracer = start().await?;
        ready.send(tracer.handle())?;
        while let Some(event) = tracer.next().await {
            put(event);
        }
        Ok(tracer.close().await?)
    })
}
