//! The project's own commands: `cargo xtask <verb>`. One module for each verb.
#![allow(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a command-line program writes to the terminal"
)]

// Layers, each uses only those after it: gate -> bench, collectors, dist, package, soak
// -> api, ebpf, fuzz, lint, miri, newcomer, programs, setup, test -> vm -> apt, report
// -> arch -> deps -> process, workspace.
mod api;
mod apt;
mod arch;
mod bench;
mod collectors;
mod deps;
mod dist;
mod ebpf;
mod fuzz;
mod gate;
mod lint;
mod miri;
mod newcomer;
mod package;
mod process;
mod programs;
mod report;
mod setup;
mod soak;
mod test;
mod vm;
mod workspace;

use std::process::ExitCode;

use clap::Parser;

/// The project's own commands.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Verb {
    Api(api::Args),
    Collectors(collectors::Args),
    Dist(dist::Args),
    Ebpf(ebpf::Args),
    Fuzz(fuzz::Args),
    Gate(gate::Args),
    /// Check formatting, lints, documentation and the project's own rules.
    Lint,
    Miri(miri::Args),
    Newcomer(newcomer::Args),
    Package(package::Args),
    Programs(programs::Args),
    Test(test::Args),
    Soak(soak::Args),
    Bench(bench::Args),
    /// Install the missing packages that the other verbs need (Debian and its derivatives).
    Setup,
}

fn main() -> ExitCode {
    let result = match Verb::parse() {
        Verb::Api(args) => api::run(&args),
        Verb::Collectors(args) => collectors::run(&args),
        Verb::Dist(args) => dist::run(&args),
        Verb::Ebpf(args) => ebpf::run(&args),
        Verb::Fuzz(args) => fuzz::run(&args),
        Verb::Gate(args) => gate::run(&args),
        Verb::Lint => lint::run(),
        Verb::Miri(args) => miri::run(&args),
        Verb::Newcomer(args) => newcomer::run(&args),
        Verb::Package(args) => package::run(&args),
        Verb::Programs(args) => programs::run(&args),
        Verb::Test(args) => test::run(&args),
        Verb::Soak(args) => soak::run(&args),
        Verb::Bench(args) => bench::run(&args),
        Verb::Setup => setup::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Returning the error would print a backtrace after the message if RUST_BACKTRACE is set,
        // as it is for tests.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
