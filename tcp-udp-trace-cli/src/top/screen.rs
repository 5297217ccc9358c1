//! Draws the screen.

use std::{collections::HashMap, iter};

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Style},
    text::{Line, Span},
    widgets::{Block, Borders, Sparkline},
};

use super::{
    board::{Board, Bytes, Load, Owner},
    columns::{Columns, Step},
};

const SENT: Color = Color::Cyan;
const RECEIVED: Color = Color::LightGreen;
pub(crate) const DIM: Color = Color::DarkGray;
/// The height of the curves, in lines.
const CURVES: u16 = 6;
/// The width of the longest bar, in characters.
const BAR: usize = 18;

/// Draws the whole screen.
pub(crate) fn draw(frame: &mut Frame<'_>, board: &Board) {
    let processes = board.processes();
    // The processes get at most half of the lines below the curves.
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

/// Draws the rates of the latest seconds, the last one at the right edge.
fn curve<'a>(
    frame: &mut Frame<'_>,
    area: Rect,
    name: &str,
    rate: u64,
    history: impl DoubleEndedIterator<Item = &'a u64> + ExactSizeIterator,
    color: Color,
) {
    let mut title = Line::from(vec![
        Span::styled(format!(" {name} "), Style::new().fg(DIM)),
        Span::styled(format!("{}/s ", human(rate)), Style::new().fg(color).bold()),
    ]);
    // A cut number would show a wrong value, so the title loses whole parts.
    while title.width() > usize::from(area.width) && !title.spans.is_empty() {
        title.spans.remove(0);
    }
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
    let rows = processes.iter().take(area.height.into());
    let rows = rows.map(|(owner, load)| {
        let pid = owner.map_or_else(String::new, |owner| owner.pid.to_string());
        let count = flows.get(*owner).copied().unwrap_or_default().to_string();
        let start = [
            right(pid, DIM),
            Line::styled(name(owner), Style::new().bold()),
            right(count, Color::Reset),
        ];
        let bar = bar(load.rate, most.unwrap_or_default());
        start
            .into_iter()
            .chain(numbers(load))
            .chain([bar])
            .collect()
    });
    let header = [
        right("PID".into(), DIM),
        "PROCESS".into(),
        right("FLOWS".into(), DIM),
    ];
    let header = header.into_iter().chain(numbers_header());
    let columns = Columns::new(header.chain([Line::default()]).collect(), rows.collect());
    let steps = [
        Step::Drop(7),
        Step::Drop(2),
        Step::Drop(5),
        Step::Drop(6),
        Step::KeepStart(1),
        Step::Drop(0),
        Step::Drop(1),
    ];
    let title = format!(" processes {} ", processes.len());
    frame.render_widget(columns.fit(area.width, &steps).table(title), area);
}

fn draw_flows(frame: &mut Frame<'_>, area: Rect, board: &Board) {
    let flows = board.flows();
    let rows = flows.iter().take(area.height.into()).map(|(flow, load)| {
        let start = [
            name(&flow.owner).into(),
            Line::styled(flow.protocol.to_string(), Style::new().fg(DIM)),
            flow.local.to_string().into(),
            format!("> {}", flow.remote).into(),
        ];
        start.into_iter().chain(numbers(load)).collect()
    });
    let header = ["PROCESS", "", "LOCAL", "> PEER"].map(Line::from);
    let header = header.into_iter().chain(numbers_header());
    let columns = Columns::new(header.collect(), rows.collect());
    let steps = [
        Step::Drop(6),
        Step::Drop(7),
        Step::KeepStart(0),
        Step::Drop(2),
        Step::Drop(1),
        Step::KeepEnd(3),
        Step::Drop(0),
        Step::Drop(3),
    ];
    let title = format!(" flows {} ", flows.len());
    frame.render_widget(columns.fit(area.width, &steps).table(title), area);
}

pub(crate) fn section(title: Line<'_>) -> Block<'_> {
    let block = Block::new().borders(Borders::TOP).title(title);
    block.border_style(Style::new().fg(DIM))
}

/// Returns the cells of the rates and totals.
fn numbers(load: &Load) -> [Line<'static>; 4] {
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

fn numbers_header() -> [Line<'static>; 4] {
    ["SENT/s", "RECEIVED/s", "SENT", "RECEIVED"].map(|name| right(name.to_owned(), DIM))
}

fn right(text: String, color: Color) -> Line<'static> {
    Line::styled(text, Style::new().fg(color)).right_aligned()
}

fn name(owner: &Option<Owner>) -> String {
    owner.map_or_else(|| "?".to_owned(), |owner| owner.comm.to_string())
}

/// Returns a bar with the sent and the received rate, side by side.
fn bar(rate: Bytes, most: u64) -> Line<'static> {
    let length = |bytes: u64| match most {
        0 => 0,
        _ => (bytes as f64 / most as f64 * BAR as f64).round() as usize,
    };
    let piece = |bytes, color| Span::styled("▄".repeat(length(bytes)), Style::new().fg(color));
    Line::from(vec![piece(rate[0], SENT), piece(rate[1], RECEIVED)])
}

/// Formats bytes, such as `999 B`, `1.0 kB`, `12.3 MB`.
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

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use ratatui::{Terminal, backend::TestBackend};
    use tcp_udp_trace::{Event, Protocol};

    use super::*;

    /// Returns an event of a UDP flow, deserialized from JSON.
    fn flow(id: u64, comm: &str, [local, remote]: [&str; 2], bytes: u64) -> Event {
        let [local, remote] = [local, remote].map(|text| text.parse::<SocketAddr>().unwrap());
        serde_json::from_value(serde_json::json!({
            "time": "2026-01-31T12:00:00Z", "uptime_ns": 0,
            "kind": {"type": "flow", "approximate": false, "age_ns": 0, "last": false},
            "process": {"pid": 4_194_304, "tid": 4_194_304, "uid": 0, "comm": comm,
                        "origin": "creator", "started_ns": 0},
            "socket": {"protocol": Protocol::Udp, "id": id, "cookie": null, "local": local,
                       "remote": remote, "uid": 0, "netns": 0, "cgroup": 0, "age_ns": 0},
            "traffic": {"tx_bytes": bytes, "rx_bytes": bytes, "tx_packets": 1, "rx_packets": 1}
        }))
        .unwrap()
    }

    /// Returns a board with the widest values of each column.
    fn board() -> Board {
        let mut board = Board::default();
        let v4 = ["192.168.100.101:54321", "203.100.113.251:65535"];
        let v6 = [
            "[2001:db8:1111:2222:3333:4444:5555:6666]:54321",
            "[2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff]:65535",
        ];
        board.count(&flow(1, "fifteen-letters", v4, 1_999_800_000));
        board.count(&flow(2, "other-name-of15", v6, 1_777_600_000));
        board.tick();
        board
    }

    fn screen(width: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, 24)).unwrap();
        terminal.draw(|frame| draw(frame, &board())).unwrap();
        let buffer = terminal.backend().buffer();
        let row = |y| {
            (0..width)
                .map(|x| buffer[(x, y)].symbol())
                .collect::<String>()
        };
        (0..24).map(row).collect()
    }

    #[test]
    fn no_number_is_cut_at_any_width() {
        let whole = [
            "999.9 MB/s",
            "888.8 MB/s",
            "1.9 GB/s",
            "2.0 GB",
            "1.8 GB",
            "4194304",
            "1",
            "2",
            "192.168.100.101:54321",
            "203.100.113.251:65535",
        ];
        for width in (1..=200).chain([250]) {
            for row in screen(width) {
                // Each word with a digit is whole, or has a `…`.
                let mut words = row.split_whitespace().peekable();
                while let Some(word) = words.next() {
                    let unit = words.next_if(|word| word.contains('B') && word.len() <= 4);
                    let text = unit.map_or(word.to_owned(), |unit| format!("{word} {unit}"));
                    let is_number = text.contains(|letter: char| letter.is_ascii_digit());
                    let is_address = text.starts_with('[') && text.contains("]:");
                    let is_name = text.ends_with("of15");
                    assert!(
                        !is_number
                            || whole.contains(&&*text)
                            || is_address
                            || is_name
                            || text.contains('…'),
                        "{text:?} at {width} columns in {row:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn usual_widths_show_the_main_columns() {
        let shows = |width, words: &[&str]| {
            let screen = screen(width).join("\n");
            for word in words {
                assert!(screen.contains(word), "no {word} at {width}:\n{screen}");
            }
        };
        shows(40, &["999.9 MB/s", "888.8 MB/s", ":65535", "4194304"]);
        shows(60, &["999.9 MB/s", "fifteen-letters", "4194304", ":65535"]);
        shows(80, &["999.9 MB/s", "2.0 GB", "4194304", ":65535"]);
        shows(
            120,
            &["2.0 GB", "203.100.113.251:65535", "eeee:ffff]:65535"],
        );
        let all = [
            "192.168.100.101:54321",
            "5555:6666]:54321",
            "eeee:ffff]:65535",
            "1.8 GB",
        ];
        shows(200, &all);
    }
}
