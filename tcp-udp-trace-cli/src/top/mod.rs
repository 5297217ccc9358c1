//! The command `top`: shows the traffic of processes and flows, every second. `q` quits.
//!
//! ```text
//! tcp-udp-trace top
//! ```

mod board;
mod columns;
mod screen;
mod svg;

use std::{
    fs,
    io::{self, IsTerminal as _},
    path::PathBuf,
    thread,
    time::Duration,
};

use anyhow::ensure;

use futures_util::{StreamExt as _, stream};
use ratatui::{
    DefaultTerminal, Terminal,
    backend::TestBackend,
    crossterm::event::{self, Event as Input, KeyCode, KeyEvent, KeyModifiers},
};
use tcp_udp_trace::{Filter, TcpTracer, UdpTracer};
use tokio::sync::mpsc;

use self::board::Board;

/// Show the processes and flows that send and receive most.
///
/// Needs root, or CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only sockets that pass this filter, such as "port=443".
    #[arg(long, default_value = "")]
    filter: Filter,
    /// Write a picture of the screen to this file and exit, instead of showing the screen.
    #[arg(long, value_name = "FILE.svg")]
    picture: Option<PathBuf>,
    /// How many seconds to trace before the picture is drawn.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    after: u64,
}

/// The time between two drawings of the screen, and between two samples of each TCP socket. Only
/// samples show the bytes of a connection that is still open.
const SECOND: Duration = Duration::from_secs(1);

/// The size of a picture, in characters.
const PICTURE: (u16, u16) = (112, 36);

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    ensure!(
        args.picture.is_some() || io::stdout().is_terminal(),
        "standard output is not a terminal: use --picture FILE.svg"
    );
    let tcp = TcpTracer::builder().filter(args.filter.clone());
    let mut tcp = tcp.sample_interval(SECOND).start().await?;
    let udp = UdpTracer::builder().filter(args.filter);
    let mut udp = udp.sample_interval(None).interval(SECOND).start().await?;
    crate::stop_at_signal(vec![tcp.handle(), udp.handle()])?;

    let mut terminal = match args.picture {
        Some(_) => None,
        None => Some(Screen::open()?),
    };
    if terminal.is_none() {
        eprintln!("ready");
    }
    let mut board = Board::default();
    let mut quit = quit_key(terminal.is_some());
    let mut events = stream::select(&mut tcp, &mut udp);
    let mut ticks = tokio::time::interval(SECOND);
    let mut seconds = 0;
    // The first tick completes immediately.
    ticks.tick().await;
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some(event) => board.count(&event),
                None => break,
            },
            _ = ticks.tick() => {
                board.tick();
                seconds += 1;
                match &mut terminal {
                    Some(Screen(terminal)) => {
                        terminal.draw(|frame| screen::draw(frame, &board))?;
                    }
                    None if seconds >= args.after => break,
                    None => {}
                }
            }
            Some(()) = quit.recv() => break,
        }
    }
    drop(terminal);
    if let Some(file) = args.picture {
        let mut terminal = Terminal::new(TestBackend::new(PICTURE.0, PICTURE.1))?;
        terminal.draw(|frame| screen::draw(frame, &board))?;
        fs::write(file, svg::picture(terminal.backend().buffer()))?;
    }
    drop(events);
    tcp.close().await?;
    udp.close().await?;
    Ok(())
}

/// The terminal. Dropping it restores the terminal's previous state.
struct Screen(DefaultTerminal);

impl Screen {
    fn open() -> anyhow::Result<Self> {
        Ok(Self(ratatui::try_init()?))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Returns a channel with a message for each key press that quits. Reading keys blocks, so a thread
/// reads them. The thread ends with the process.
fn quit_key(is_terminal: bool) -> mpsc::Receiver<()> {
    let (sender, receiver) = mpsc::channel(1);
    if is_terminal {
        thread::spawn(move || {
            while let Ok(input) = event::read() {
                if quits(&input) {
                    let _ = sender.blocking_send(());
                }
            }
        });
    }
    receiver
}

fn quits(input: &Input) -> bool {
    let Input::Key(KeyEvent {
        code, modifiers, ..
    }) = input
    else {
        return false;
    };
    match code {
        KeyCode::Char('q') | KeyCode::Esc => true,
        // In raw mode, the terminal sends no SIGINT for Ctrl-C.
        KeyCode::Char('c') => modifiers.contains(KeyModifiers::CONTROL),
        _ => false,
    }
}
