//! The examples, run on real traffic, and what they tell compared with what was sent. Run as root; takes the arguments of `cargo test`.
#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking, and so its threads"
)]

use std::process::ExitCode;

use integration_tests::{
    actor,
    suite::{Needs, Test},
};

/// Tests, named after their module and their function.
macro_rules! tests {
    ($($topic:ident :: $name:ident),+ $(,)?) => {
        [$(Test {
            topic: stringify!($topic),
            name: stringify!($name),
            needs: Needs::Nothing,
            body: $topic::$name,
        }),+]
    };
}

mod ndjson;
mod otlp;
mod prometheus;
mod tcplife;
mod tool;
mod top;
mod trace;
mod traffic;

fn main() -> ExitCode {
    if let Some(code) = actor::run_if_asked() {
        return code;
    }
    let arguments = libtest_mimic::Arguments::from_args();
    let tests = tests![
        trace::json_has_the_bytes,
        trace::ends_after_its_duration,
        trace::ends_when_nobody_reads,
        tcplife::each_connection_is_one_line,
        tcplife::connection_that_was_there_before_is_marked,
        ndjson::no_line_is_lost_or_cut,
        ndjson::old_files_go,
        ndjson::what_was_there_stays,
        prometheus::counters_have_the_bytes,
        prometheus::retransmissions_are_counted,
        otlp::collector_gets_everything_by_the_end,
        otlp::three_capabilities_are_enough,
        top::picture_shows_processes_and_bytes,
        top::screen_ends_with_q,
    ];
    let trials = tests.map(Test::trial);
    libtest_mimic::run(&arguments, trials.into()).exit_code()
}
