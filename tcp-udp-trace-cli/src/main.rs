//! The program `tcp-udp-trace`: shows the library's events as text, screen, files or metrics.
#![allow(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "this is a program for a terminal, or a service"
)]

mod depmap;
mod doctor;
#[expect(
    dead_code,
    reason = "as an example of the library, the file has its own `main`"
)]
mod life;
mod ndjson;
mod otlp;
mod prometheus;
mod slo;
mod top;
#[expect(
    dead_code,
    reason = "as an example of the library, the file has its own `main`"
)]
mod trace;

use std::{
    error::Error,
    io::{self, Write as _},
    process::ExitCode,
};

use clap::{CommandFactory as _, Parser, Subcommand, error::ErrorKind::InvalidValue};
use clap_complete::Shell;
use futures_util::TryFutureExt as _;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use tcp_udp_trace::{ErrorKind, Event, Protocol, TracerHandle};
use tokio::signal::unix::{SignalKind, signal};

const EXIT_CODES: &str = "\
Exit codes:
  0   The command succeeded, a signal ended it, or the reader of its output went away.
  1   The command failed. Standard error has the reason.
  2   The command line or the value of an option is invalid.
  77  A privilege is missing. Standard error names it.";

/// Trace the TCP and UDP sockets of this machine: processes, peers and byte counts.
///
/// Tracing needs root, or CAP_BPF, CAP_PERFMON and, for UDP, CAP_NET_ADMIN. `tcp-udp-trace doctor`
/// checks whether the tracers can start on this machine.
#[derive(Parser)]
#[command(name = "tcp-udp-trace", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Trace(trace::Args),
    Life(life::Args),
    Top(top::Args),
    Depmap(depmap::Args),
    Slo(slo::Args),
    Ndjson(ndjson::Args),
    Prometheus(prometheus::Args),
    Otlp(otlp::Args),
    Doctor(doctor::Args),
    /// Print the manual page of this program, or of one of its commands.
    ///
    /// To read it: `tcp-udp-trace man top | man -l -`
    Man {
        /// The command. Default: the program itself.
        command: Option<String>,
    },
    /// Print a completion script for a shell.
    ///
    /// For bash: `source <(tcp-udp-trace completions bash)`
    Completions {
        /// The shell.
        shell: Shell,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    let command = Cli::parse().command;
    // Before Linux 5.11, maps count against this limit. Raising it fails without the privilege.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    match run(command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", trace::describe(error.as_ref()));
            exit_code(&error)
        }
    }
}

/// Returns the exit code of an error, as documented in [`EXIT_CODES`].
fn exit_code(error: &anyhow::Error) -> ExitCode {
    let kind = error
        .chain()
        .find_map(|error| error.downcast_ref::<tcp_udp_trace::Error>())
        .map(tcp_udp_trace::Error::kind);
    ExitCode::from(match kind {
        Some(ErrorKind::Permission) => 77,
        Some(ErrorKind::InvalidConfig | ErrorKind::InvalidFilter) => 2,
        _ => 1,
    })
}

async fn run(command: Command) -> anyhow::Result<()> {
    let result = match command {
        Command::Top(args) => return top::run(args).await,
        Command::Ndjson(args) => return ndjson::run(args).await,
        Command::Prometheus(args) => return prometheus::run(args).await,
        Command::Otlp(args) => return otlp::run(args).await,
        Command::Trace(args) => trace::trace(&args).await.map_err(unboxed),
        Command::Life(args) => {
            let life = life::life(args).map_err(unboxed);
            while_output_is_open(life).await
        }
        Command::Depmap(args) => while_output_is_open(depmap::run(args)).await,
        Command::Slo(args) => while_output_is_open(slo::run(args)).await,
        Command::Doctor(args) => doctor::run(args).await,
        Command::Man { command } => man(command.as_deref()),
        Command::Completions { shell } => completions(shell),
    };
    match result {
        // The reader of standard output has gone away, as in `tcp-udp-trace life | head`.
        Err(error) if error.chain().any(is_broken_pipe) => Ok(()),
        result => result,
    }
}

/// Converts the error of an example. [`exit_code`] could not downcast the boxed error.
fn unboxed(error: Box<dyn Error + Send + Sync>) -> anyhow::Error {
    match error.downcast::<tcp_udp_trace::Error>() {
        Ok(error) => (*error).into(),
        Err(error) => match error.downcast::<io::Error>() {
            Ok(error) => (*error).into(),
            Err(error) => anyhow::Error::from_boxed(error),
        },
    }
}

fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    error
        .downcast_ref()
        .is_some_and(|error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Runs `work` to its end, or until the reader of standard output goes away.
async fn while_output_is_open(
    work: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<()> {
    let output_closes = async {
        let mut check = tokio::time::interval(trace::CHECK_OUTPUT);
        loop {
            check.tick().await;
            if trace::output_is_closed()? {
                return Ok(());
            }
        }
    };
    tokio::select! {
        result = work => result,
        result = output_closes => result,
    }
}

fn man(command: Option<&str>) -> anyhow::Result<()> {
    let mut cli = Cli::command();
    cli.build();
    let command = match command {
        Some(name) => match cli.find_subcommand(name) {
            Some(command) => command.clone(),
            None => {
                let message = format!("there is no command {name:?}");
                cli.error(InvalidValue, message).exit()
            }
        },
        None => cli,
    };
    clap_mangen::Man::new(command).render(&mut io::stdout().lock())?;
    Ok(())
}

fn completions(shell: Shell) -> anyhow::Result<()> {
    // `generate` panics if it cannot write, as to a closed pipe.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tcp-udp-trace", &mut script);
    io::stdout().lock().write_all(&script)?;
    Ok(())
}

/// Stops these tracers at SIGINT or SIGTERM. Their streams yield the events until then, and end.
fn stop_at_signal(handles: Vec<TracerHandle>) -> io::Result<()> {
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

/// Returns the protocol of an event as the value of a metric's label.
fn transport(event: &Event) -> &'static str {
    match event.socket.protocol {
        Protocol::Udp => "udp",
        _ => "tcp",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn each_command_has_a_manual_page() {
        let mut cli = Cli::command();
        cli.build();
        for command in cli.get_subcommands() {
            let mut page = Vec::new();
            clap_mangen::Man::new(command.clone())
                .render(&mut page)
                .unwrap();
            assert!(command.get_about().is_some(), "{}", command.get_name());
            assert!(!page.is_empty());
        }
    }
}
