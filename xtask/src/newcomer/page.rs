//! The commands of a page.

use std::fmt;

use pulldown_cmark::{CodeBlockKind, Event, HeadingLevel, Parser, Tag, TagEnd};

/// One command of a page.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) page: String,
    pub(super) command: String,
    pub(super) user: User,
    pub(super) folder: Folder,
    /// A program of the page, which the reader writes before the command.
    pub(super) program: Option<String>,
    /// Output that shows that a command works which runs until it is stopped.
    pub(super) shows: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum User {
    Newcomer,
    Root,
}

/// Where a command runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Folder {
    /// The folder where the previous command ended; for the first command, the home folder.
    Project,
    Clone,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}{}",
            if self.user == User::Root { "# " } else { "$ " },
            self.command
        )
    }
}

/// Returns the commands of the `sh` blocks of a page.
///
/// The commands of README's introduction make a new project. All others run in a clone.
pub(super) fn steps(page: &str, text: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut in_introduction = page == "README.md";
    let (mut language, mut code) = (None, String::new());
    let mut program = None;
    for event in Parser::new(text) {
        match event {
            Event::Start(Tag::Heading {
                level: HeadingLevel::H2,
                ..
            }) => in_introduction = false,
            Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(name))) => {
                language = Some(name.into_string());
                code.clear();
            }
            Event::Text(text) if language.is_some() => code.push_str(&text),
            Event::End(TagEnd::CodeBlock) => match language.take().as_deref() {
                Some("rust") if in_introduction => program = Some(code.clone()),
                Some("sh") => steps.extend(code.lines().map(|line| {
                    let folder = if in_introduction {
                        Folder::Project
                    } else {
                        Folder::Clone
                    };
                    Step {
                        folder,
                        program: program.take(),
                        ..step(page, line)
                    }
                })),
                _ => {}
            },
            _ => {}
        }
    }
    steps
}

/// Returns a step for a command that is on no page.
pub(super) fn in_the_clone(command: &str) -> Step {
    Step {
        command: command.to_owned(),
        shows: None,
        ..step("the command line", command)
    }
}

fn step(page: &str, line: &str) -> Step {
    let (command, comment) = line.split_once(" #").unwrap_or((line, ""));
    let command = command.trim();
    let as_root = comment.trim().starts_with("as root");
    Step {
        page: page.to_owned(),
        // CI runs the project's own commands, which take hours in all. Here only their options are
        // checked.
        command: if command.starts_with("cargo xtask ") {
            format!("{command} --help")
        } else {
            command.to_owned()
        },
        user: if as_root { User::Root } else { User::Newcomer },
        folder: Folder::Clone,
        program: None,
        shows: shows(command),
    }
}

fn shows(command: &str) -> Option<&'static str> {
    if command.contains("--example trace") {
        // Possibly no event passes the filter.
        let is_filtered = command.contains("--filter");
        Some(match command.contains("--json") {
            _ if is_filtered => "ready:",
            true => "{\"",
            false => " tcp ",
        })
    } else {
        command.contains("sudo target/").then_some(" tcp ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_of_a_page() {
        let page = "```sh\ncargo new a\n```\n```rust\nfn main() {}\n```\n\
                    ```sh\ncargo build && sudo target/debug/a\n```\n\
                    ## Try\n```sh\ncargo run --example trace  # as root: all\ncargo xtask lint\n```\n\
                    ```text\nno command\n```\n";
        let steps = steps("README.md", page);
        let lines: Vec<_> = steps.iter().map(ToString::to_string).collect();
        assert_eq!(
            lines,
            [
                "$ cargo new a",
                "$ cargo build && sudo target/debug/a",
                "# cargo run --example trace",
                "$ cargo xtask lint --help"
            ]
        );
        assert_eq!(steps[1].program.as_deref(), Some("fn main() {}\n"));
        assert_eq!(steps[1].folder, Folder::Project);
        assert_eq!(steps[2].folder, Folder::Clone);
        assert_eq!(steps[3].shows, None);
    }
}
