//! The project's own commands: `cargo xtask <verb>`. One module for each verb.
#![allow(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a command-line program talks to whoever runs it"
)]

mod api;
mod apt;
mod arch;
mod bench;
mod deps;
mod ebpf;
mod fuzz;
mod gate;
mod lint;
mod miri;
mod newcomer;
mod package;
mod process;
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
    Ebpf(ebpf::Args),
    Fuzz(fuzz::Args),
    Gate(gate::Args),
    /// Check formatting, lints, documentation and the project's own rules.
    Lint,
    Miri(miri::Args),
    Newcomer(newcomer::Args),
    Package(package::Args),
    Test(test::Args),
    Soak(soak::Args),
    Bench(bench::Args),
    /// Install what the other verbs need and this machine lacks (Debian and its descendants).
    Setup,
}

fn main() -> ExitCode {
    let result = match Verb::parse() {
        Verb::Api(args) => api::run(&args),
        Verb::Ebpf(args) => ebpf::run(&args),
        Verb::Fuzz(args) => fuzz::run(&args),
        Verb::Gate(args) => gate::run(&args),
        Verb::Lint => lint::run(),
        Verb::Miri(args) => miri::run(&args),
        Verb::Newcomer(args) => newcomer::run(&args),
        Verb::Package(args) => package::run(&args),
        Verb::Test(args) => test::run(&args),
        Verb::Soak(args) => soak::run(&args),
        Verb::Bench(args) => bench::run(&args),
        Verb::Setup => deps::setup(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Not by returning it: with RUST_BACKTRACE set, which tests want, a backtrace would bury the message.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
