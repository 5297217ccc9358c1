//! What the examples share.

mod growth;

use std::io;

use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use tcp_udp_trace::{Event, Protocol, TracerHandle};
use tokio::signal::unix::{SignalKind, signal};

pub use growth::Growth;

/// Before Linux 5.11, the tracers' maps count against the limit on locked memory. The library must not change it; a program may.
pub fn raise_memlock_limit() {
    // Without the privilege it stays as it is, and only those old kernels mind.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
}

/// Stops these tracers at SIGINT or SIGTERM: their streams then yield what had happened until then, and end.
///
/// # Errors
///
/// The system's, if it refuses to tell us of signals.
pub fn stop_at_signal(handles: Vec<TracerHandle>) -> io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        handles.iter().for_each(TracerHandle::stop);
    });
    Ok(())
}

/// The protocol of an event, as metrics call it.
#[must_use]
pub fn transport(event: &Event) -> &'static str {
    match event.socket.protocol {
        Protocol::Udp => "udp",
        _ => "tcp",
    }
}
