//! What a tracer reports, compared with what really happened. Run as root; takes the arguments of `cargo test`.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test fails by panicking, and tells what it could not check on stderr"
)]

use std::process::ExitCode;

use integration_tests::actor;

/// A list of tests, each with what it needs, named after their module.
macro_rules! trials {
    ($($needs:ident: [$($name:ident,)+],)+) => {{
        use integration_tests::suite::{Needs, Test};
        let topic = module_path!().rsplit("::").next().unwrap();
        vec![$($(Test { topic, name: stringify!($name), needs: Needs::$needs, body: $name },)+)+]
    }};
}

mod bytes;
mod delivery;
mod lifecycle;
mod namespaces;
mod owner;
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
    let arguments = libtest_mimic::Arguments::from_args();
    let tests = [
        states::trials(),
        owner::trials(),
        bytes::trials(),
        delivery::trials(),
        lifecycle::trials(),
        samples::trials(),
        sampling::trials(),
        namespaces::trials(),
        snapshot::trials(),
        udp_numbers::trials(),
        udp_peers::trials(),
        udp_lifecycle::trials(),
    ]
    .concat();
    let perf = tests.iter().map(|test| test.with_perf_buffers());
    let trials = tests.iter().map(|test| test.trial()).chain(perf).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
