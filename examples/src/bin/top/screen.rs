//! How it looks.

use std::{collections::HashMap, iter};

use ratatui::{
    Frame,
    layout::{Alignment, Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Block, Borders, Cell, Row, Sparkline, Table},
};

use crate::board::{Board, Bytes, Load, Owner};

const SENT: Color = Color::Cyan;
const RECEIVED: Color = Color::LightGreen;
const DIM: Color = Color::DarkGray;
/// How many lines the curves have.
const CURVES: u16 = 6;
/// How many characters the longest bar has.
const BAR: usize = 18;

/// Draws everything.
pub(crate) fn draw(frame: &mut Frame<'_>, board: &Board) {
    let processes = board.processes();
    // The processes have half of the room, if they need it.
    let half = frame.area().height.saturating_sub(CURVES) / 2;
    let rows = u16::try_from(processes.len()).unwrap_or(u16::MAX);
    let [curves, upper, lower] = Layout::vertical([
        Constraint::Length(CURVES),
        Constraint::Length(rows.saturating_add(3).min(half)),
        Constraint::Min(0),
    ])
    .areas(frame.area());
    let [left, right] = Layout::horizontal([Constraint::Fill(1); 2])
        .spacing(2)
        .areas(curves);
    let [sent, received] = board.all.rate;
    curve(frame, left, "sent", sent, board.history[0].iter(), SENT);
    curve(
        frame,
        right,
        "received",
        received,
        board.history[1].iter(),
        RECEIVED,
    );
    draw_processes(frame, upper, board, &processes);
    draw_flows(frame, lower, board);
}

/// The latest seconds, the last one at the right edge.
fn curve<'a>(
    frame: &mut Frame<'_>,
    area: Rect,
    name: &str,
    rate: u64,
    history: impl DoubleEndedIterator<Item = &'a u64> + ExactSizeIterator,
    color: Color,
) {
    let title = Line::from(vec![
        Span::styled(format!(" {name} "), Style::new().fg(DIM)),
        Span::styled(format!("{}/s ", human(rate)), Style::new().fg(color).bold()),
    ]);
    let width = usize::from(area.width);
    let missing = width.saturating_sub(history.len());
    let skipped = history.len().saturating_sub(width);
    let curve = iter::repeat_n(0, missing).chain(history.copied().skip(skipped));
    let sparkline = Sparkline::default()
        .block(section(title))
        .data(curve.collect::<Vec<_>>())
        .style(Style::new().fg(color));
    frame.render_widget(sparkline, area);
}

fn draw_processes(
    frame: &mut Frame<'_>,
    area: Rect,
    board: &Board,
    processes: &[(&Option<Owner>, &Load)],
) {
    let mut flows = HashMap::<_, usize>::new();
    for (flow, _) in board.flows() {
        *flows.entry(flow.owner).or_default() += 1;
    }
    let most = processes.iter().map(|(_, load)| load.both()[0]).max();
    let rows = processes.iter().map(|(owner, load)| {
        let pid = owner.map_or_else(String::new, |owner| owner.pid.to_string());
        let start = [
            right(pid, DIM),
            Cell::from(name(owner)).style(Style::new().bold()),
            right(
                flows.get(*owner).copied().unwrap_or_default().to_string(),
                Color::Reset,
            ),
        ];
        let bar = Cell::from(bar(load.rate, most.unwrap_or_default()));
        Row::new(start.into_iter().chain(numbers(load)).chain([bar]))
    });
    let header = [
        "PID",
        "PROCESS",
        "FLOWS",
        "SENT/s",
        "RECEIVED/s",
        "SENT",
        "RECEIVED",
        "",
    ];
    let widths = [7, 15, 6, 11, 11, 10, 10, BAR as u16];
    let title = format!(" processes {} ", processes.len());
    frame.render_widget(table(rows, header, widths, &[1, 7], title), area);
}

fn draw_flows(frame: &mut Frame<'_>, area: Rect, board: &Board) {
    let flows = board.flows();
    let rows = flows.iter().map(|(flow, load)| {
        let start = [
            Cell::from(name(&flow.owner)),
            Cell::from(flow.protocol.to_string()).style(Style::new().fg(DIM)),
            Cell::from(format!("{} > {}", flow.local, flow.remote)),
        ];
        Row::new(start.into_iter().chain(numbers(load)))
    });
    let header = [
        "PROCESS",
        "",
        "FLOW",
        "SENT/s",
        "RECEIVED/s",
        "SENT",
        "RECEIVED",
    ];
    let widths = [15, 3, 42, 11, 11, 10, 10];
    let title = format!(" flows {} ", flows.len());
    frame.render_widget(table(rows, header, widths, &[0, 1, 2], title), area);
}

/// A table whose columns are numbers, but for those `of_words`.
fn table<'a, const N: usize>(
    rows: impl Iterator<Item = Row<'a>>,
    header: [&'a str; N],
    widths: [u16; N],
    of_words: &[usize],
    title: String,
) -> Table<'a> {
    let header = header.into_iter().enumerate().map(|(column, name)| {
        let alignment = match of_words.contains(&column) {
            true => Alignment::Left,
            false => Alignment::Right,
        };
        Cell::from(Line::from(name).alignment(alignment))
    });
    let title = Span::styled(title, Style::new().fg(DIM));
    Table::new(rows, widths.map(Constraint::Length))
        .header(Row::new(header).style(Style::new().fg(DIM).add_modifier(Modifier::BOLD)))
        .block(section(title.into()))
}

fn section(title: Line<'_>) -> Block<'_> {
    let block = Block::new().borders(Borders::TOP).title(title);
    block.border_style(Style::new().fg(DIM))
}

/// Rates and totals.
fn numbers(load: &Load) -> [Cell<'static>; 4] {
    let cell = |bytes, suffix, color| match bytes {
        0 => right("·".to_owned(), DIM),
        _ => right(human(bytes) + suffix, color),
    };
    let ([sent, received], [all_sent, all_received]) = (load.rate, load.total);
    [
        cell(sent, "/s", SENT),
        cell(received, "/s", RECEIVED),
        cell(all_sent, "", Color::Reset),
        cell(all_received, "", Color::Reset),
    ]
}

fn right(text: String, color: Color) -> Cell<'static> {
    Cell::from(Line::from(text).right_aligned()).style(Style::new().fg(color))
}

fn name(owner: &Option<Owner>) -> String {
    owner.map_or_else(|| "?".to_owned(), |owner| owner.comm.to_string())
}

/// What is sent and what is received, side by side.
fn bar(rate: Bytes, most: u64) -> Line<'static> {
    let length = |bytes: u64| match most {
        0 => 0,
        _ => (bytes as f64 / most as f64 * BAR as f64).round() as usize,
    };
    let piece = |bytes, color| Span::styled("▄".repeat(length(bytes)), Style::new().fg(color));
    Line::from(vec![piece(rate[0], SENT), piece(rate[1], RECEIVED)])
}

/// `999 B`, `1.0 kB`, `12.3 MB`.
fn human(bytes: u64) -> String {
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1000.0;
    let mut units = ["kB", "MB", "GB", "TB", "PB", "EB"].into_iter();
    let mut unit = units.next();
    while value >= 999.95 {
        value /= 1000.0;
        unit = units.next();
    }
    format!("{value:.1} {}", unit.unwrap_or_default())
}
