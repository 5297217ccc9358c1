//! The results of each run of tests, and their table.

use std::{ops::AddAssign, time::Duration};

/// The number of tests for each result.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    /// Tests that failed, and passed when they ran again.
    pub(crate) flaky: u64,
    pub(crate) skipped: u64,
}

/// How long a run of tests may make no progress. The test program itself ends a test after five
/// minutes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(6 * 60);

/// The results in the output of the tests, collected line by line.
#[derive(Debug, Default)]
pub(crate) struct Output {
    pub(crate) counts: Counts,
    /// The messages of the tests that failed, to be shown again before the table.
    pub(crate) failures: Vec<String>,
    in_failures: bool,
    running: Vec<String>,
    /// The tests that have ended without a failure so far.
    pub(crate) good: Vec<(String, Counts)>,
    /// The tests that have failed so far.
    pub(crate) failed: Vec<String>,
    /// The tests that passed when they ran again, each with the message of its failure.
    pub(crate) flaky: Vec<String>,
    /// The cost of each eBPF program, as `cargo xtask gate` reads it.
    pub(crate) programs: Vec<String>,
}

/// The most lines of failures that are shown again for each run.
const MAX_FAILURE_LINES: usize = 40;

impl Output {
    /// Reads a line. Returns whether to show it: the beginnings of tests are too many.
    pub(crate) fn line(&mut self, line: &str) -> bool {
        if let Some(name) = line.trim().strip_prefix("begins: ") {
            self.running.push(name.to_owned());
            return false;
        }
        self.counts.add_summary_line(line);
        if let Some((name, counts)) = verdict(line) {
            self.running.retain(|running| *running != name);
            match counts {
                Some(counts) => self.good.push((name, counts)),
                None => self.failed.push(name),
            }
        }
        if let Some((_, flaky)) = line.split_once("flaky: ") {
            self.flaky.push(flaky.chars().take(400).collect());
            self.counts.failed = self.counts.failed.saturating_sub(1);
            self.counts.flaky += 1;
        }
        if line.starts_with("failed again: ") {
            self.failures.push(line.chars().take(400).collect());
        }
        if let Some((_, cost)) = line.split_once("@@program ") {
            self.programs.push(cost.to_owned());
        }
        // The list of failures begins and ends with these lines, each once or twice.
        if line.trim_end() == "failures:" {
            self.in_failures = true;
        } else if line.contains("test result: ") {
            self.in_failures = false;
        } else if self.in_failures && self.failures.len() < MAX_FAILURE_LINES && !line.is_empty() {
            self.failures.push(line.chars().take(400).collect());
        }
        true
    }

    /// Returns the tests that have begun and not ended, in words.
    pub(crate) fn running(&self) -> String {
        match &*self.running {
            [] => "no test".to_owned(),
            running => running.join(", "),
        }
    }
}

/// Returns the test that has ended, from a line like `test bytes::one ... ok`, and its count unless
/// it failed.
fn verdict(line: &str) -> Option<(String, Option<Counts>)> {
    let (name, verdict) = line.trim().strip_prefix("test ")?.split_once(" ... ")?;
    let mut counts = Counts::default();
    let counts = match verdict.split(' ').next()? {
        "ok" => {
            counts.passed = 1;
            Some(counts)
        }
        "ignored" => {
            counts.skipped = 1;
            Some(counts)
        }
        "FAILED" => None,
        _ => return None,
    };
    Some((name.trim_end().to_owned(), counts))
}

impl Counts {
    /// Adds the counts of a line like `test result: ok. 3 passed; 0 failed; 1 ignored; …`. Other
    /// lines have none.
    fn add_summary_line(&mut self, line: &str) {
        let Some((_, summary)) = line.split_once("test result: ") else {
            return;
        };
        for field in summary.split([';', '.']) {
            let mut words = field.split_whitespace();
            let (Some(Ok(count)), Some(result)) =
                (words.next().map(str::parse::<u64>), words.next())
            else {
                continue;
            };
            match result {
                "passed" => self.passed += count,
                "failed" => self.failed += count,
                "ignored" => self.skipped += count,
                _ => {}
            }
        }
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.flaky += other.flaky;
        self.skipped += other.skipped;
    }
}

/// How a run ended.
pub(crate) enum Outcome {
    Passed(Counts),
    Failed(Counts),
    /// The run ended without a verdict of the tests, in the way that the text says.
    Broken(String),
    /// The run did not start, for a reason outside this project. The text says what to do.
    NotRun(String),
}

/// One line of the table.
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) outcome: Outcome,
    pub(crate) elapsed: Duration,
    /// Another fact about the run, such as a crash of the guest.
    pub(crate) note: Option<String>,
    /// See [`Output::failures`].
    pub(crate) failures: Vec<String>,
    /// See [`Output::flaky`].
    pub(crate) flaky: Vec<String>,
    /// See [`Output::programs`].
    pub(crate) programs: Vec<String>,
}

impl Row {
    /// Returns a row of a run that took no time.
    pub(crate) fn new(name: impl Into<String>, outcome: Outcome) -> Self {
        Self {
            name: name.into(),
            outcome,
            elapsed: Duration::ZERO,
            note: None,
            failures: Vec::new(),
            flaky: Vec::new(),
            programs: Vec::new(),
        }
    }

    /// Returns the counts for the sum. A run that broke counts as one failure, else the sum would
    /// hide it.
    fn counts(&self) -> Counts {
        match &self.outcome {
            Outcome::Passed(counts) => *counts,
            // The program may have ended before it could write the counts.
            Outcome::Failed(counts) => Counts {
                failed: counts.failed.max(1),
                ..*counts
            },
            Outcome::Broken(_) => Counts {
                failed: 1,
                ..Counts::default()
            },
            Outcome::NotRun(_) => Counts::default(),
        }
    }
}

/// Prints the failures, the table and, as the last line, the sum. Returns whether no test failed.
pub(crate) fn print(rows: &[Row]) -> bool {
    for row in rows.iter().filter(|row| !row.failures.is_empty()) {
        println!("\nfailures of {}:\n{}", row.name, row.failures.join("\n"));
    }
    let width = rows
        .iter()
        .map(|row| row.name.len())
        .max()
        .unwrap_or(0)
        .max("run".len());
    println!(
        "\n{:width$}  {:8}  {:>6}  {:>6}  {:>5}  {:>7}  {:>7}",
        "run", "result", "passed", "failed", "flaky", "skipped", "seconds"
    );
    let mut sum = Counts::default();
    for row in rows {
        let counts = row.counts();
        sum += counts;
        let (result, note) = match &row.outcome {
            Outcome::Passed(_) => ("ok", None),
            Outcome::Failed(_) => ("FAILED", None),
            Outcome::Broken(note) => ("BROKEN", Some(note)),
            Outcome::NotRun(note) => ("not run", Some(note)),
        };
        println!(
            "{:width$}  {result:8}  {:>6}  {:>6}  {:>5}  {:>7}  {:>7.1}",
            row.name,
            counts.passed,
            counts.failed,
            counts.flaky,
            counts.skipped,
            row.elapsed.as_secs_f64()
        );
        for note in note.into_iter().chain(&row.note) {
            println!("{:width$}  {note}", "");
        }
        for test in &row.flaky {
            println!("{:width$}  flaky: {test}", "");
        }
    }
    println!(
        "\n{} passed, {} failed, {} flaky, {} skipped",
        sum.passed, sum.failed, sum.flaky, sum.skipped
    );
    sum.failed == 0
}

#[cfg(test)]
mod tests {
    use super::{Counts, Output};

    #[test]
    fn failures_are_found_in_the_output() {
        let mut output = Output::default();
        let lines = "test a ... FAILED\ntest b::c    ... ok\ntest d ... ignored (no e)\n\nfailures:\n\n\
                     ---- a ----\nwrong\n\nfailures:\n    a\n\ntest result: FAILED. 0 passed; 1 failed\n\
                     the slowest tests:\n   12.3 s  b::c";
        lines.lines().for_each(|line| {
            output.line(line);
        });
        assert_eq!(output.failures, ["---- a ----", "wrong", "    a"]);
        assert_eq!(output.counts.failed, 1);
        let names: Vec<_> = output.good.iter().map(|(name, _)| &**name).collect();
        assert_eq!(names, ["b::c", "d"]);
        assert_eq!(output.failed, ["a"]);
    }

    #[test]
    fn running_tests_have_begun_and_not_ended() {
        let mut output = Output::default();
        assert_eq!(output.running(), "no test");
        for name in ["a", "b", "c"] {
            assert!(!output.line(&format!("begins: {name}")));
        }
        assert!(output.line("test b   ... ok"));
        assert_eq!(output.running(), "a, c");
    }

    #[test]
    fn flaky_tests_are_no_failures_but_counted() {
        let mut output = Output::default();
        let lines = "test a ... FAILED\ntest b ... FAILED\ntest result: FAILED. 3 passed; 2 failed\n\
                     flaky: a: wrong\nfailed again: b: worse";
        lines.lines().for_each(|line| {
            output.line(line);
        });
        let counts = Counts {
            passed: 3,
            failed: 1,
            flaky: 1,
            skipped: 0,
        };
        assert_eq!(output.counts, counts);
        assert_eq!(output.flaky, ["a: wrong"]);
        assert_eq!(output.failures, ["failed again: b: worse"]);
    }

    #[test]
    fn counts_come_from_the_summary_line() {
        let check = |line: &str, passed, failed, skipped| {
            let mut counts = Counts::default();
            counts.add_summary_line(line);
            assert_eq!(
                counts,
                Counts {
                    passed,
                    failed,
                    flaky: 0,
                    skipped
                }
            );
        };
        check(
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.10s",
            3,
            0,
            1,
        );
        check(
            "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out",
            3,
            2,
            0,
        );
        check("[ 1.0] x: test result: ok. 7 passed; 0 failed", 7, 0, 0);
        check("test tcp::close ... ok", 0, 0, 0);
    }
}
