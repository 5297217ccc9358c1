//! What is done with the kernel's records on their way to the consumer. No I/O and no clock: all of it
//! is tested without root.

pub(crate) mod clock;
#[cfg(target_os = "linux")]
pub(crate) mod decode;
#[cfg(target_os = "linux")]
pub(crate) mod flows;
#[cfg(target_os = "linux")]
pub(crate) mod images;
#[cfg(target_os = "linux")]
pub(crate) mod pending_samples;
pub(crate) mod queue;
pub(crate) mod thread_notify;
