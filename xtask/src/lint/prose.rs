//! Checks comments and Markdown: the width of lines, and words that have a plainer replacement.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use pulldown_cmark::{Event, Options, Parser, Tag};

use super::files;

/// The most columns of a line.
const WIDTH: usize = 100;

/// Words that no file may have, alone or as a part of an identifier, each with its replacement. An
/// "s" at the end is also forbidden.
const WORDS: &[(&str, &str)] = &[
    ("fate", "\"outcome\", or the name of the outcome"),
    ("kin", "\"process tree\""),
    ("nobody", "\"no process\", \"no caller\": name who does not"),
    ("somebody", "name who: \"a process\", \"the consumer\""),
    ("tell", "\"report\", \"return\", \"show\""),
    ("told", "\"reported\", \"configured\", \"known\""),
    ("vital", "\"lifecycle\", \"required\""),
];

/// This file, which has to name the words.
const WORD_LIST: &str = "xtask/src/lint/prose.rs";

pub(super) fn check() -> Result<()> {
    let mut faults = Vec::new();
    for file in files::tracked(&["*.rs", "*.md"])? {
        let Some(text) = files::read(&file)? else {
            continue;
        };
        let wide = if file.ends_with(".md") {
            wide_markdown(&text)
        } else {
            wide_comments(&text)
        };
        let wide = wide.into_iter().map(|line| (line, wide_message()));
        let words = words(&text)
            .into_iter()
            .filter(|_| file != WORD_LIST)
            .map(|(line, word, instead)| (line, format!("\"{word}\": write {instead}")));
        let messages = wide.chain(words);
        faults.extend(messages.map(|(line, message)| (file.clone(), line, message)));
    }
    ensure!(faults.is_empty(), "{}", report(&faults));
    Ok(())
}

fn wide_message() -> String {
    format!("more than {WIDTH} columns")
}

/// Lists the faults, and counts them for each folder of the workspace.
fn report(faults: &[(String, usize, String)]) -> String {
    let mut counts = BTreeMap::<_, u64>::new();
    for (file, ..) in faults {
        let folder = file.split_once('/').map_or(".", |(folder, _)| folder);
        *counts.entry(folder).or_default() += 1;
    }
    let lines = faults
        .iter()
        .map(|(file, line, message)| format!("{file}:{line}: {message}"));
    let counts = counts
        .iter()
        .map(|(folder, count)| format!("{count} in {folder}"));
    format!(
        "comments or Markdown against the rules:\n{}\n{}",
        lines.collect::<Vec<_>>().join("\n"),
        counts.collect::<Vec<_>>().join(", ")
    )
}

/// Returns the numbers of the lines with a comment that are too wide.
///
/// Lines of tables and lines with a URL may be, because neither can be wrapped.
fn wide_comments(text: &str) -> Vec<usize> {
    let is_wide = |line: &str| {
        let comment = match line.trim_start() {
            trimmed if trimmed.starts_with("//") => trimmed.trim_start_matches(['/', '!', ' ']),
            _ => match line.rsplit_once(" // ") {
                Some((_, comment)) => comment,
                None => return false,
            },
        };
        line.chars().count() > WIDTH && !comment.starts_with('|') && !line.contains("://")
    };
    numbered(text)
        .filter(|(_, line)| is_wide(line))
        .map(|(number, _)| number)
        .collect()
}

/// Returns the numbers of the lines that are too wide, outside of tables, blocks of code,
/// definitions of links and lines with a URL.
fn wide_markdown(text: &str) -> Vec<usize> {
    let exempt: Vec<_> = Parser::new_ext(text, Options::ENABLE_TABLES)
        .into_offset_iter()
        .filter(|(event, _)| matches!(event, Event::Start(Tag::CodeBlock(_) | Tag::Table(_))))
        .map(|(_, range)| range)
        .collect();
    let mut start = 0;
    numbered(text)
        .filter(|(_, line)| {
            let at = start;
            start += line.len() + 1;
            line.chars().count() > WIDTH
                && !line.contains("://")
                && !is_link_definition(line)
                && !exempt.iter().any(|range| range.contains(&at))
        })
        .map(|(number, _)| number)
        .collect()
}

fn is_link_definition(line: &str) -> bool {
    line.starts_with('[') && line.contains("]: ")
}

/// Returns each forbidden word of a text: line, word, replacement.
fn words(text: &str) -> Vec<(usize, &'static str, &'static str)> {
    let in_line = |(number, line)| {
        let words = split(line);
        let forbidden = WORDS.iter().filter(move |(word, _)| {
            let mut words = words.iter();
            words.any(|found| found == word || found.strip_suffix('s') == Some(word))
        });
        forbidden.map(move |&(word, instead)| (number, word, instead))
    };
    numbered(text).flat_map(in_line).collect()
}

/// Splits a line into words, also inside of identifiers of either case; all in lower case.
fn split(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut was_lower = false;
    for c in line.chars() {
        if !c.is_alphabetic() || (was_lower && c.is_uppercase()) {
            words.push(String::new());
        }
        was_lower = c.is_lowercase();
        if let (true, Some(word)) = (c.is_alphabetic(), words.last_mut()) {
            word.extend(c.to_lowercase());
        }
    }
    words
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    (1..).zip(text.lines())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_comments_are_found() {
        let (wide, url) = ("x ".repeat(50), "https://example.org/".repeat(6));
        let text = format!(
            "//! {wide}\n    /// {wide}\n// {url}\n/// | {wide} |\nlet a = \"{wide}\";\n\
             let b = 1; // {wide}\n// {}\n",
            "ä".repeat(97)
        );
        assert_eq!(wide_comments(&text), [1, 2, 6]);
    }

    #[test]
    fn wide_markdown_is_found() {
        let wide = "x ".repeat(51);
        let text = format!(
            "# {wide}\n\n| a | b |\n|---|---|\n| {wide} | c |\n\n```text\n{wide}\n```\n\n\
             {wide}\n\n[a]: {wide}\n"
        );
        assert_eq!(wide_markdown(&text), [1, 11]);
    }

    #[test]
    fn words_are_found_in_prose_and_identifiers() {
        let check = |line, expected: &[&str]| {
            let found: Vec<_> = words(line).into_iter().map(|(_, word, _)| word).collect();
            assert_eq!(found, expected, "{line}");
        };
        check("It told nobody.", &["nobody", "told"]);
        check("fn is_kin(&self)", &["kin"]);
        check("struct EventFates; const KIN_MAX", &["fate", "kin"]);
        check("kind, skin, intelligent, fatal, unTelling", &[]);
    }
}
