//! The tests that run on a kernel by default: the table in docs/tests.md.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};

const PAGE: &str = include_str!("../../docs/tests.md");

/// The kernels of each name in the table.
#[derive(Debug)]
pub struct DefaultTests(BTreeMap<&'static str, &'static str>);

impl DefaultTests {
    /// Reads the table. Each of `tests` must have a row, and each name of a row must have a test.
    pub fn of(tests: &[String]) -> anyhow::Result<Self> {
        let mut rows = BTreeMap::new();
        for row in PAGE.lines().filter(|line| line.starts_with("| `")) {
            let columns: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
            let [names, kernels, _reason] = *columns else {
                anyhow::bail!("not three columns: {row}");
            };
            for name in names.split(", ").map(|name| name.trim_matches('`')) {
                let has_test = tests.iter().any(|test| {
                    let rest = test.strip_prefix(name);
                    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
                });
                ensure!(has_test, "docs/tests.md: no test is {name}");
                ensure!(
                    rows.insert(name, kernels).is_none(),
                    "docs/tests.md: two rows for {name}"
                );
            }
        }
        let table = Self(rows);
        for test in tests {
            table.kernels(test)?;
        }
        Ok(table)
    }

    /// Whether the test runs on this kernel by default.
    pub fn has(&self, test: &str, kernel: &str) -> anyhow::Result<bool> {
        let kernels = self.kernels(test)?;
        Ok(kernels == "all" || kernels.split(", ").any(|name| name == kernel))
    }

    /// Returns the kernels of the row with the longest name of the test.
    fn kernels(&self, test: &str) -> anyhow::Result<&'static str> {
        let mut name = test;
        loop {
            if let Some(kernels) = self.0.get(name) {
                return Ok(kernels);
            }
            (name, _) = name
                .rsplit_once("::")
                .with_context(|| format!("docs/tests.md has no row for {test}"))?;
        }
    }
}
