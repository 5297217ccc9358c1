//! What a tracer reports, compared with what really happened. Run as root; takes the arguments of `cargo test`.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test fails by panicking, and tells what it could not check on stderr"
)]

use std::process::ExitCode;

use integration_tests::actor;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

/// A list of tests, each with what it needs, named after their module.
macro_rules! trials {
    ($($needs:ident: [$($name:ident,)+],)+) => {{
        use integration_tests::suite::{Needs, trial};
        let topic = module_path!().rsplit("::").next().unwrap();
        vec![$($(trial(topic, stringify!($name), Needs::$needs, $name),)+)+]
    }};
}

mod bytes;
mod delivery;
mod exhaustion;
mod faults;
mod lifecycle;
mod namespaces;
mod owner;
mod privileges;
mod samples;
mod sampling;
mod snapshot;
mod states;
mod udp_lifecycle;
mod udp_numbers;
mod udp_peers;

fn main() -> ExitCode {
    if let Some(code) = actor::run_if_asked() {
        return code;
    }
    // Before Linux 5.11, maps count against it. A library must not change it; a program may.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    let arguments = libtest_mimic::Arguments::from_args();
    let topics = [
        states::trials(),
        owner::trials(),
        bytes::trials(),
        delivery::trials(),
        lifecycle::trials(),
        privileges::trials(),
        faults::trials(),
        exhaustion::trials(),
        samples::trials(),
        sampling::trials(),
        namespaces::trials(),
        snapshot::trials(),
        udp_numbers::trials(),
        udp_peers::trials(),
        udp_lifecycle::trials(),
    ];
    libtest_mimic::run(&arguments, topics.into_iter().flatten().collect()).exit_code()
}
