//! Compares the events of a tracer with the traffic that really happened. Run as root; takes the
//! arguments of `cargo test`.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a test fails by panicking, and writes to stderr if it could not check something; the \
              times come after the verdicts, on the same stream"
)]

use std::{env, process::ExitCode};

use integration_tests::{actor, default_tests::DefaultTests, suite};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

/// Makes a list of tests, each with the surroundings that it needs, named after their module.
macro_rules! trials {
    ($($needs:ident: [$($name:ident,)+],)+) => {{
        use integration_tests::suite::{Needs, Test};
        let topic = module_path!().rsplit("::").next().unwrap();
        vec![$($(Test { topic, name: stringify!($name), needs: Needs::$needs, body: $name },)+)+]
    }};
}

mod anomalies;
mod btf;
mod bytes;
mod compared;
mod connects;
mod consumer;
mod delivery;
mod details;
mod errors;
mod exhaustion;
mod faults;
mod filter_changes;
mod filter_names;
mod filters;
mod first_steps;
mod harness;
mod identity;
mod lifecycle;
mod machines;
mod namespace_filters;
mod namespaces;
mod neighbors;
mod one_in_filters;
mod overflow;
mod owner;
mod privileges;
mod samples;
mod sampling;
mod snapshot;
mod states;
mod summaries;
mod udp_flows;
mod udp_lifecycle;
mod udp_nat;
mod udp_numbers;
mod udp_peers;
mod udp_sends;
mod unseen;
mod uring;
mod users;

/// Topics and tests that are run a second time, with perf buffers.
const WITH_PERF_BUFFERS: &[&str] = &[
    "states",
    "summaries::numbers_are_those_of_tcp_info",
    "summaries::only_summaries",
    "connects::that_fail_before_any_state_change",
    "bytes::veth_between_namespaces",
    "owner::inherited_listener_prefork",
    "owner::reuseport_three_processes",
    "owner::io_uring_accept",
    "users",
    "details::of_short_tcp_processes",
    "owner::connection_older_than_the_tracer",
    "delivery::two_tracers_at_once_give_the_same_events",
    "delivery::first_event_after_a_pause_wakes_the_reader",
    "delivery::sockets_that_move_between_cpus_stay_in_order",
    "delivery::churn_across_namespaces_under_load",
    "overflow::closes_outlive_a_flood_of_datagrams",
    "overflow::ring_overflow_is_counted_where_it_happened",
    "lifecycle::every_signal_has_a_hook",
    "lifecycle::stop_ends_the_stream_after_the_last_event",
    "machines::cpu_that_comes_and_goes",
    "machines::cpu_that_comes_and_goes_during_starts",
    "samples::tcp_sample_is_of_the_socket_of_the_state_changes",
    "samples::udp_sample_has_queues_buffers_and_drops",
    "udp_numbers::both_directions",
    "udp_numbers::recvmmsg",
    "udp_peers::one_server_and_its_clients",
    "udp_lifecycle::every_signal_has_a_hook",
];

/// The environment variable with the name of a kernel, as in docs/tests.md. With it, only the tests
/// run that this kernel has by default.
const DEFAULT_TESTS_OF: &str = "TUT_DEFAULT_TESTS_OF";

/// The environment variable with the names of the tests and topics to run, separated by commas.
const TESTS: &str = "TUT_TESTS";

/// How many of the slowest tests are printed after the verdicts.
const SLOWEST: usize = 10;

fn main() -> ExitCode {
    if let Some(code) = actor::run_if_asked() {
        return code;
    }
    // Before Linux 5.11, maps count against this limit. A library must not change it, but a program
    // may.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    let arguments = libtest_mimic::Arguments::from_args();
    // With one thread, the name of the test is already there, in an unfinished line.
    if arguments.test_threads != Some(1) {
        suite::announce();
    }
    let tests = [
        states::trials(),
        unseen::trials(),
        summaries::trials(),
        owner::trials(),
        details::trials(),
        uring::trials(),
        btf::trials(),
        bytes::trials(),
        anomalies::trials(),
        errors::trials(),
        connects::trials(),
        consumer::trials(),
        delivery::trials(),
        overflow::trials(),
        filters::trials(),
        one_in_filters::trials(),
        filter_changes::trials(),
        first_steps::trials(),
        harness::trials(),
        identity::trials(),
        filter_names::trials(),
        namespace_filters::trials(),
        lifecycle::trials(),
        machines::trials(),
        privileges::trials(),
        faults::trials(),
        exhaustion::trials(),
        neighbors::trials(),
        samples::trials(),
        sampling::trials(),
        namespaces::trials(),
        snapshot::trials(),
        udp_numbers::trials(),
        udp_peers::trials(),
        udp_nat::trials(),
        udp_sends::trials(),
        udp_flows::trials(),
        udp_lifecycle::trials(),
        users::trials(),
    ]
    .concat();
    let mut runs: Vec<_> = tests.iter().map(|test| test.as_it_is()).collect();
    for name in WITH_PERF_BUFFERS {
        let named = tests.iter().filter(|test| test.is_of(name));
        let before = runs.len();
        runs.extend(named.map(|test| test.with_perf_buffers()));
        assert!(runs.len() > before, "there is no test {name}");
    }
    let names: Vec<_> = runs.iter().map(suite::Run::name).collect();
    let default_tests = DefaultTests::of(&names).unwrap();
    if let Ok(kernel) = env::var(DEFAULT_TESTS_OF) {
        runs.retain(|run| default_tests.has(&run.name(), &kernel).unwrap());
        println!(
            "{} of {} tests run on this kernel by default",
            runs.len(),
            names.len()
        );
    }
    if let Ok(wanted) = env::var(TESTS) {
        for name in wanted.split(',') {
            assert!(
                runs.iter().any(|run| run.is_of(name)),
                "there is no test {name}"
            );
        }
        runs.retain(|run| wanted.split(',').any(|name| run.is_of(name)));
    }
    let trials = runs.iter().map(|run| run.trial()).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    let passed = !conclusion.has_failed() || suite::failed_pass_again(&runs);
    // A process that is one test has ended before this, so only the parent prints the list.
    let slowest = suite::slowest(SLOWEST);
    if !slowest.is_empty() {
        println!("the slowest tests:");
    }
    for (duration, name) in slowest {
        println!("{:7.1} s  {name}", duration.as_secs_f64());
    }
    if passed {
        ExitCode::SUCCESS
    } else {
        conclusion.exit_code()
    }
}
