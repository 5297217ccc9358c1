//! Runs other programs. Errors name the command.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read},
    os::unix::fs::MetadataExt as _,
    process::{Child, Command},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// Shows `command`, runs it with this program's output streams, and fails unless it succeeds.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let line = shell_line(command);
    eprintln!("$ {line}");
    let status = command
        .status()
        .with_context(|| format!("cannot start `{line}`"))?;
    if !status.success() {
        bail!("`{line}` failed: {status}");
    }
    Ok(())
}

/// Runs `command` without showing it, and returns its standard output.
pub(crate) fn stdout(command: &mut Command) -> Result<String> {
    let bytes = stdout_bytes(command)?;
    String::from_utf8(bytes)
        .with_context(|| format!("the output of `{}` is not UTF-8", shell_line(command)))
}

/// Like [`stdout`], for output that is not text.
pub(crate) fn stdout_bytes(command: &mut Command) -> Result<Vec<u8>> {
    let line = shell_line(command);
    let output = command
        .output()
        .with_context(|| format!("cannot start `{line}`"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("`{line}` failed: {}\n{}", output.status, stderr.trim_end());
    }
    Ok(output.stdout)
}

/// Sends the lines of `output`, without their ends, after `each` has seen them.
pub(crate) fn lines(
    output: impl Read + Send + 'static,
    mut each: impl FnMut(&str) + Send + 'static,
) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut bytes = Vec::new();
        while output
            .read_until(b'\n', &mut bytes)
            .is_ok_and(|read| read > 0)
        {
            let line = String::from_utf8_lossy(&bytes);
            let line = line.trim_end_matches(['\r', '\n']).to_owned();
            each(&line);
            if sender.send(line).is_err() {
                break;
            }
            bytes.clear();
        }
    });
    receiver
}

/// Waits for a line that matches. The error shows the others.
pub(crate) fn wait_for_line(
    lines: &mpsc::Receiver<String>,
    timeout: Duration,
    mut is_match: impl FnMut(&str) -> bool,
) -> Result<()> {
    let deadline = Instant::now() + timeout;
    let mut others = String::new();
    while let Ok(line) = lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        if is_match(&line) {
            return Ok(());
        }
        others.push_str(&line);
        others.push('\n');
    }
    bail!("the expected line did not come:\n{others}")
}

/// Returns the command as a line for a shell, without its environment.
pub(crate) fn shell_line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| quote(&word.to_string_lossy()))
        .collect::<Vec<_>>()
        .join(" ")
}

/// Quotes `word` for a POSIX shell if necessary.
pub(crate) fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+./:,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Whether this process runs as root. The owner of `/proc/self` is the effective user, so no
/// dependency for `geteuid` is needed.
pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

/// Returns a command that runs `program` as root: directly, or through `sudo -E`, which keeps the
/// environment.
pub(crate) fn as_root(program: impl AsRef<std::ffi::OsStr>) -> Command {
    if is_root() {
        Command::new(program)
    } else {
        let mut command = Command::new("sudo");
        command.arg("-E").arg(program);
        command
    }
}

/// Returns a command that runs a script of the shell. Its mounts and processes end with it.
pub(crate) fn isolated(script: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child"]);
    command.args(["sh", "-euc", script]);
    command
}

/// A program that ends when this is dropped.
pub(crate) struct Ended(pub(crate) Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // Both fail only if the program has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Returns a command that runs `program` of the nightly toolchain.
pub(crate) fn nightly(program: &str) -> Command {
    let mut command = Command::new("rustup");
    command
        .args(["run", "nightly", program])
        // The cargo that runs this program sets these for its own compiler.
        .env_remove("RUSTC")
        .env_remove("RUSTDOC");
    command
}

#[cfg(test)]
mod tests {
    use super::quote;

    #[test]
    fn quotes_only_what_a_shell_would_split() {
        assert_eq!(quote("tcp::close-4.1"), "tcp::close-4.1");
        assert_eq!(quote("a b"), "'a b'");
        assert_eq!(quote("it's"), r"'it'\''s'");
        assert_eq!(quote(""), "''");
    }
}
