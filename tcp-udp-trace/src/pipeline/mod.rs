//! The kernel's records on their way to the consumer. These modules do no I/O and read no clock, so
//! their tests need no root.

#[cfg(target_os = "linux")]
pub(crate) mod cgroup_path;
pub(crate) mod clock;
#[cfg(target_os = "linux")]
pub(crate) mod decode;
#[cfg(target_os = "linux")]
mod ending;
#[cfg(target_os = "linux")]
pub(crate) mod flows;
#[cfg(target_os = "linux")]
pub(crate) mod images;
#[cfg(target_os = "linux")]
pub(crate) mod pending_samples;
pub(crate) mod queue;
pub(crate) mod thread_notify;
