//! Checks the dependencies of the library: permissive licences, one version of each crate, and no
//! crate that needs a newer Rust.
//!
//! cargo-deny checks licences and duplicates too, but compiling it takes minutes.

use std::{cmp::Ordering, collections::BTreeMap, fmt};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use spdx::{Expression, ParseMode};

/// Licences that require only attribution.
const LICENCES: &[&str] = &["MIT", "Apache-2.0", "Unicode-3.0", "Zlib"];

/// The crates of which two versions are accepted, and why.
const TWICE: &[(&str, &str)] = &[
    ("hashbrown", "aya and lru need different versions"),
    (
        "syn",
        "derive macros are moving from 2 to 3; it is not in the program",
    ),
];

/// Checks everything in the metadata of a crate that depends on the library.
pub(super) fn check(metadata: &Value, rust_version: &str) -> Result<()> {
    let packages: Vec<_> = metadata["packages"]
        .as_array()
        .context("no packages in the metadata")?
        .iter()
        // The user's crate has no licence.
        .filter(|package| !package["license"].is_null())
        .map(Package)
        .collect();
    for package in &packages {
        package.check_licence()?;
        package.check_rust_version(rust_version)?;
    }
    let mut versions = BTreeMap::<_, Vec<_>>::new();
    for package in &packages {
        versions
            .entry(package.text("name"))
            .or_default()
            .push(package);
    }
    versions.retain(|_, versions| versions.len() > 1);
    for (name, why) in TWICE {
        ensure!(
            versions.remove(name).is_some(),
            "{name} has one version now: remove it ({why}) from the list in \
             xtask/src/package/dependencies.rs"
        );
    }
    ensure!(
        versions.is_empty(),
        "crates with several versions: {versions:?}"
    );
    eprintln!("{} dependencies satisfy the rules", packages.len());
    Ok(())
}

struct Package<'a>(&'a Value);

impl Package<'_> {
    fn text(&self, key: &str) -> &str {
        self.0[key].as_str().unwrap_or_default()
    }

    fn check_licence(&self) -> Result<()> {
        let licence = self.text("license");
        let expression = Expression::parse_mode(licence, ParseMode::LAX)
            .with_context(|| format!("the licence of {self:?}"))?;
        let is_fine = expression.evaluate(|requirement| {
            let id = requirement.license.id();
            id.is_some_and(|id| LICENCES.contains(&id.name))
        });
        ensure!(
            is_fine,
            "the licence of {self:?} is not permitted: {licence}"
        );
        Ok(())
    }

    fn check_rust_version(&self, declared: &str) -> Result<()> {
        let needed = self.text("rust_version");
        ensure!(
            compare(needed, declared).is_le(),
            "{self:?} needs Rust {needed}, and the library declares {declared}"
        );
        Ok(())
    }
}

impl fmt::Debug for Package<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.text("name"), self.text("version"))
    }
}

/// Compares versions of Rust. A crate that declares none is older than any.
fn compare(one: &str, other: &str) -> Ordering {
    let numbers = |text: &str| {
        let mut numbers: Vec<u32> = text
            .split('.')
            .filter_map(|part| part.parse().ok())
            .collect();
        numbers.resize(3, 0);
        numbers
    };
    numbers(one).cmp(&numbers(other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(compare("1.100", "1.87.0").is_gt());
        assert!(compare("1.87", "1.87.0").is_eq());
        assert!(compare("", "1.87").is_lt());
    }
}
