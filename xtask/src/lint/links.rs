//! Checks that the targets of all links between the project's own pages exist.
//!
//! Links to other sites are not followed, because that would need a network, and this project
//! cannot repair them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use pulldown_cmark::{Event, Parser, Tag, TagEnd};

use super::files;
use crate::workspace;

pub(super) fn check() -> Result<()> {
    let pages = files::tracked(&["*.md"])?.into_iter();
    let pages = pages.map(|page| workspace::root().join(page));
    // The package has symbolic links to pages of the tree, whose links are relative to the tree.
    let broken = pages
        .filter(|page| !page.is_symlink())
        .map(|page| broken(&page))
        .collect::<Result<Vec<_>>>()?
        .concat();
    none(&broken)
}

/// Checks the links of one page.
pub(crate) fn check_page(page: &Path) -> Result<()> {
    none(&broken(page)?)
}

fn none(broken: &[String]) -> Result<()> {
    ensure!(
        broken.is_empty(),
        "the targets of these links do not exist:\n{}",
        broken.join("\n")
    );
    Ok(())
}

fn broken(page: &Path) -> Result<Vec<String>> {
    let mut broken = Vec::new();
    for link in links(&read(page)?) {
        if !target_exists(page, &link)? {
            broken.push(format!("{}: {link}", page.display()));
        }
    }
    Ok(broken)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn links(page: &str) -> Vec<String> {
    Parser::new(page)
        .filter_map(|event| match event {
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                Some(dest_url.into_string())
            }
            _ => None,
        })
        .collect()
}

fn target_exists(page: &Path, link: &str) -> Result<bool> {
    if link.contains("://") || link.starts_with("mailto:") {
        return Ok(true);
    }
    let (file, section) = link.split_once('#').unwrap_or((link, ""));
    let target = if file.is_empty() {
        page.to_owned()
    } else {
        page.parent()
            .map_or_else(PathBuf::new, |folder| folder.join(file))
    };
    if section.is_empty() {
        return Ok(target.exists());
    }
    Ok(target.is_file() && sections(&read(&target)?).contains(&section.to_owned()))
}

/// Returns the anchors that sites give to the headings of a page.
fn sections(page: &str) -> Vec<String> {
    let mut sections = Vec::new();
    let mut heading: Option<String> = None;
    for event in Parser::new(page) {
        match (event, &mut heading) {
            (Event::Start(Tag::Heading { .. }), _) => heading = Some(String::new()),
            (Event::Text(text) | Event::Code(text), Some(heading)) => heading.push_str(&text),
            (Event::End(TagEnd::Heading(_)), Some(text)) => {
                sections.push(slug(text));
                heading = None;
            }
            _ => {}
        }
    }
    sections
}

fn slug(heading: &str) -> String {
    heading
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headings_have_the_anchors_that_links_use() {
        let page = "# Bird's eye\n\n## `Lost`, and why\n";
        assert_eq!(sections(page), ["birds-eye", "lost-and-why"]);
    }

    #[test]
    fn links_and_pictures_are_found() {
        let page = "[a](b.md#c) ![d](e.svg)\n\n[f]: g.md\n[h][f] `[no](link)`\n";
        assert_eq!(links(page), ["b.md#c", "e.svg", "g.md"]);
    }
}
