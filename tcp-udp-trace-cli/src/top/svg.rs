//! Renders the screen as a picture.

use std::fmt::Write as _;

use ratatui::{
    buffer::{Buffer, Cell},
    style::{Color, Modifier},
};

/// The size of a character, in pixels.
const WIDTH: u16 = 8;
const HEIGHT: u16 = 18;
const MARGIN: u16 = 14;
/// The distance of the letters' baseline from the upper edge of a line, in pixels.
const BASELINE: u16 = 13;

/// The line above each section. It is drawn as a rectangle, because letters would leave gaps.
const LINE: &str = "─";

/// Returns the buffer as SVG.
pub(crate) fn picture(buffer: &Buffer) -> String {
    let area = buffer.area;
    let (width, height) = (
        area.width * WIDTH + 2 * MARGIN,
        area.height * HEIGHT + 2 * MARGIN,
    );
    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace" font-size="13">
<rect width="{width}" height="{height}" rx="8" fill="#16181d"/>
"##
    );
    for y in 0..area.height {
        let row: Vec<_> = (0..area.width).map(|x| &buffer[(x, y)]).collect();
        let mut x = 0;
        // Adjacent cells that look alike become one element.
        for run in row.chunk_by(|left, right| is_alike(left, right)) {
            let length = run.len() as u16;
            piece(&mut svg, run, x, y);
            x += length;
        }
    }
    svg + "</svg>\n"
}

fn is_alike(left: &Cell, right: &Cell) -> bool {
    let look = |cell: &Cell| {
        let letter = cell.symbol();
        let kind = (letter == " ", letter == LINE, eighths(cell).is_some());
        (cell.fg, cell.modifier, kind)
    };
    look(left) == look(right)
}

fn piece(svg: &mut String, run: &[&Cell], x: u16, y: u16) {
    let (left, top) = (MARGIN + x * WIDTH, MARGIN + y * HEIGHT);
    let first = run[0];
    let color = color(first.fg);
    if first.symbol() == " " {
        return;
    }
    if eighths(first).is_some() {
        for (cell, left) in run.iter().zip((left..).step_by(WIDTH.into())) {
            let height = f32::from(HEIGHT) * eighths(cell).unwrap_or_default() / 8.0;
            let top = f32::from(top + HEIGHT) - height;
            // Writing into a string cannot fail, here and below.
            let _ = writeln!(
                svg,
                r#"<rect x="{left}" y="{top}" width="{WIDTH}" height="{height}" fill="{color}"/>"#
            );
        }
        return;
    }
    if first.symbol() == LINE {
        let (middle, length) = (top + HEIGHT / 2, run.len() as u16 * WIDTH);
        let _ = writeln!(
            svg,
            r#"<rect x="{left}" y="{middle}" width="{length}" height="1" fill="{color}"/>"#
        );
        return;
    }
    let weight = match first.modifier.contains(Modifier::BOLD) {
        true => r#" font-weight="bold""#,
        false => "",
    };
    let (baseline, length) = (top + BASELINE, run.len() as u16 * WIDTH);
    let _ = write!(
        svg,
        r#"<text x="{left}" y="{baseline}" textLength="{length}" lengthAdjust="spacingAndGlyphs" fill="{color}"{weight}>"#
    );
    for cell in run {
        for letter in cell.symbol().chars() {
            match letter {
                '&' => svg.push_str("&amp;"),
                '<' => svg.push_str("&lt;"),
                '>' => svg.push_str("&gt;"),
                letter => svg.push(letter),
            }
        }
    }
    svg.push_str("</text>\n");
}

/// Returns the height of a block such as `▃`, in eighths of a line.
fn eighths(cell: &Cell) -> Option<f32> {
    let letter = cell.symbol().chars().next()?;
    let number = u32::from(letter).checked_sub(u32::from('▁'))?;
    (number < 8).then_some(number as f32 + 1.0)
}

/// Returns the picture's color for a color of the terminal.
fn color(color: Color) -> &'static str {
    match color {
        Color::Cyan => "#56b6d8",
        Color::LightGreen => "#8cc265",
        Color::DarkGray => "#7a8290",
        _ => "#d5dae3",
    }
}
