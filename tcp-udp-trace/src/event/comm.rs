//! A process name, as the kernel stores it.

use std::{fmt, str::FromStr};

use super::escape::{Escaped, unescape};

/// A process name (`comm`): at most 15 bytes, chosen by the process itself and therefore untrusted.
///
/// `Comm` stores the bytes unchanged. `Display` and the JSON form keep printable UTF-8. They write
/// all other bytes (control characters, invisible and direction-changing characters, invalid UTF-8,
/// the backslash) as `\xNN`. So a hostile name cannot reach a terminal or break a log line.
/// [`FromStr`] is the inverse.
///
/// Source: `task_struct.comm` of the main thread, which `/proc/PID/comm` shows.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Comm([u8; Comm::LEN]);

impl Comm {
    /// The size of the kernel's buffer (`TASK_COMM_LEN`), its terminating NUL included.
    pub const LEN: usize = 16;

    /// Makes a name from the kernel's buffer. The name ends before the first NUL.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut comm = [0; Self::LEN];
        for (to, &from) in comm[..Self::LEN - 1].iter_mut().zip(bytes) {
            if from == 0 {
                break;
            }
            *to = from;
        }
        Self(comm)
    }

    /// Returns the bytes of the name, without the padding.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        let len = self.0.iter().position(|&b| b == 0).unwrap_or(Self::LEN);
        &self.0[..len]
    }
}

impl fmt::Display for Comm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Escaped(self.as_bytes()).fmt(f)
    }
}

impl fmt::Debug for Comm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Comm(\"{self}\")")
    }
}

/// The error of a text that is not a process name: longer than 15 bytes, or with a malformed
/// `\xNN`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a process name: at most 15 bytes, none of them NUL, a backslash only as part of \\xNN"
)]
pub struct ParseCommError(());

impl FromStr for Comm {
    type Err = ParseCommError;

    fn from_str(s: &str) -> Result<Self, ParseCommError> {
        let name = unescape(s).ok_or(ParseCommError(()))?;
        if name.len() >= Self::LEN || name.contains(&0) {
            return Err(ParseCommError(()));
        }
        Ok(Self::from_bytes(&name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(bytes: &[u8], shown: &str) {
        let comm = Comm::from_bytes(bytes);
        assert_eq!(comm.to_string(), shown);
        assert_eq!(shown.parse(), Ok(comm), "{shown} does not parse back");
    }

    #[test]
    fn shows_names_safely_and_parses_them_back() {
        check(b"curl", "curl");
        check(b"", "");
        check("café".as_bytes(), "café");
        check(b"nginx\0garbage", "nginx");
        check(b"\x1b[31mred", r"\x1b[31mred");
        check(b"two\nlines", r"two\x0alines");
        check(b"back\\slash", r"back\x5cslash");
        check(b"bad\xff\xc3utf8", r"bad\xff\xc3utf8");
        check("a\u{202e}b".as_bytes(), r"a\xe2\x80\xaeb");
        check(
            "a\u{61c}b\u{e0041}".as_bytes(),
            r"a\xd8\x9cb\xf3\xa0\x81\x81",
        );
    }

    #[test]
    fn keeps_at_most_fifteen_bytes() {
        assert_eq!(Comm::from_bytes(&[b'x'; 40]).as_bytes(), [b'x'; 15]);
        assert_eq!("x".repeat(16).parse::<Comm>(), Err(ParseCommError(())));
    }

    #[test]
    fn rejects_text_that_display_never_writes() {
        for text in [r"\", r"\x", r"\x1", r"\xgg", r"\x00", r"\n"] {
            assert_eq!(text.parse::<Comm>(), Err(ParseCommError(())), "{text}");
        }
    }
}
