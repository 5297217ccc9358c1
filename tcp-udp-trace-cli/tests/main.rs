//! Runs each command on real traffic, and compares its output with the traffic.
//!
//! The tests need root. The program takes the arguments of `cargo test`.
#![allow(
    clippy::unwrap_used,
    reason = "a test fails by a panic, also in its threads"
)]

use std::process::ExitCode;

use integration_tests::{
    actor,
    suite::{Needs, Test},
};

/// Makes tests, named after their module and their function.
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

mod collectors;
mod command;
mod depmap;
mod life;
mod ndjson;
mod otlp;
mod prometheus;
mod slo;
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
        trace::ends_when_its_reader_does,
        life::each_connection_is_one_line,
        life::connection_older_than_the_tracer_is_marked,
        life::ends_when_its_reader_does,
        depmap::client_and_server_have_the_bytes,
        depmap::other_formats_have_the_same,
        slo::times_and_failures_by_network,
        slo::text_has_the_same,
        command::doctor_reports_that_both_tracers_start,
        command::missing_privilege_has_its_exit_code,
        command::wrong_command_line_has_its_exit_code,
        command::manual_and_completions_are_complete,
        command::pipe_gets_no_escapes,
        top::pipe_is_refused,
        ndjson::no_line_is_lost_or_cut,
        ndjson::oldest_files_are_removed,
        ndjson::existing_content_is_kept,
        prometheus::counters_have_the_bytes,
        prometheus::retransmissions_are_counted,
        otlp::collector_gets_everything_by_the_end,
        otlp::three_capabilities_are_enough,
        top::picture_shows_processes_and_bytes,
        top::screen_ends_with_q,
    ];
    let mut trials: Vec<_> = tests.map(|test| test.as_it_is().trial()).into();
    // They need programs that others wrote.
    if collectors::are_here() {
        let tests = tests![
            collectors::prometheus_has_the_bytes,
            collectors::rotel_passes_on_everything,
            collectors::absence_is_noticed_and_made_up_for,
            collectors::silence_does_not_stall_the_tracer,
            collectors::duckdb_answers_the_page,
        ];
        trials.extend(tests.map(|test| test.as_it_is().trial()));
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}
