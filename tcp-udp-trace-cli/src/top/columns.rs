//! A table that fits its width: columns are left out, or shortened with a visible `…`.

use ratatui::{
    layout::Constraint,
    style::{Modifier, Style},
    text::{Line, Span},
    widgets::{Row, Table},
};

use super::screen::{DIM, section};

/// The least characters that a shortened column keeps.
const SHORT: usize = 8;

/// A way to make the table narrower.
#[derive(Clone, Copy)]
pub(crate) enum Step {
    /// Leaves a column out.
    Drop(usize),
    /// Shortens the cells of a column at their end, by as much as the table is too wide.
    KeepStart(usize),
    /// Shortens the cells of a column at their start. The end of an address is its port.
    KeepEnd(usize),
}

/// The columns of a table.
pub(crate) struct Columns {
    columns: Vec<Column>,
}

struct Column {
    /// The column's name, and then its cells.
    cells: Vec<Line<'static>>,
    /// In characters. 0 if the column is left out.
    width: usize,
}

impl Columns {
    /// Creates the columns from their names and the rows.
    pub(crate) fn new(header: Vec<Line<'static>>, rows: Vec<Vec<Line<'static>>>) -> Self {
        let mut columns: Vec<_> = header.into_iter().map(|name| vec![name]).collect();
        for row in rows {
            for (column, cell) in columns.iter_mut().zip(row) {
                column.push(cell);
            }
        }
        let columns = columns.into_iter().map(|cells| Column {
            width: cells.iter().map(Line::width).max().unwrap_or_default(),
            cells,
        });
        Self {
            columns: columns.collect(),
        }
    }

    /// Applies the steps until the table fits the width. If they are not enough, the first columns
    /// are left out.
    pub(crate) fn fit(mut self, width: u16, steps: &[Step]) -> Self {
        let all = 0..self.columns.len();
        for step in steps.iter().copied().chain(all.map(Step::Drop)) {
            let excess = self.width().saturating_sub(width.into());
            if excess == 0 {
                break;
            }
            match step {
                Step::Drop(column) => self.columns[column].width = 0,
                Step::KeepStart(column) => self.columns[column].shorten(excess, false),
                Step::KeepEnd(column) => self.columns[column].shorten(excess, true),
            }
        }
        self.columns.retain(|column| column.width > 0);
        self
    }

    /// Returns the width of the table, with a gap between two columns.
    fn width(&self) -> usize {
        let shown = self.columns.iter().filter(|column| column.width > 0);
        let width: usize = shown.map(|column| column.width + 1).sum();
        width.saturating_sub(1)
    }

    pub(crate) fn table(self, title: String) -> Table<'static> {
        let widths = self.columns.iter().map(|column| column.width as u16);
        let widths: Vec<_> = widths.map(Constraint::Length).collect();
        let mut columns: Vec<_> = self
            .columns
            .into_iter()
            .map(|column| column.cells.into_iter())
            .collect();
        let mut rows = std::iter::from_fn(|| {
            let row: Option<Vec<_>> = columns.iter_mut().map(Iterator::next).collect();
            row.filter(|row| !row.is_empty()).map(Row::new)
        });
        let header = rows.next().unwrap_or_default();
        let title = Span::styled(title, Style::new().fg(DIM));
        Table::new(rows, widths)
            .header(header.style(Style::new().fg(DIM).add_modifier(Modifier::BOLD)))
            .block(section(title.into()))
    }
}

impl Column {
    fn shorten(&mut self, excess: usize, keeps_end: bool) {
        self.width = self.width.saturating_sub(excess).max(SHORT.min(self.width));
        for cell in &mut self.cells {
            if cell.width() <= self.width {
                continue;
            }
            let letters: Vec<_> = cell.to_string().chars().collect();
            let kept = (self.width - 1).min(letters.len());
            let text = if keeps_end {
                let end: String = letters[letters.len() - kept..].iter().collect();
                format!("…{end}")
            } else {
                let start: String = letters[..kept].iter().collect();
                format!("{start}…")
            };
            *cell = Line::styled(text, cell.style);
        }
    }
}
