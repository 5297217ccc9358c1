//! Untrusted bytes as text that is safe to show, and back.
//!
//! Printable UTF-8 stays unchanged. All other bytes (control characters, invisible and
//! direction-changing characters, invalid UTF-8, the backslash) become `\xNN`. So they cannot reach
//! a terminal or break a log line.

use std::fmt;

/// Shows untrusted bytes.
pub(crate) struct Escaped<'a>(pub(crate) &'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let escape = |f: &mut fmt::Formatter<'_>, bytes: &[u8]| {
            bytes.iter().try_for_each(|b| write!(f, "\\x{b:02x}"))
        };
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                if is_deceptive(c) || c == '\\' {
                    escape(f, c.encode_utf8(&mut [0; 4]).as_bytes())?;
                } else {
                    write!(f, "{c}")?;
                }
            }
            escape(f, chunk.invalid())?;
        }
        Ok(())
    }
}

/// Returns whether a character can make a line of text misleading: a control character, or one that
/// breaks lines, changes directions or is invisible.
///
/// Source: Unicode's general category Cc; the line and paragraph separators; the annotation
/// characters; and the property Default_Ignorable_Code_Point.
pub(crate) fn is_deceptive(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{2028}' | '\u{2029}' | '\u{fff9}'..='\u{fffb}')
        || matches!(
            c,
            '\u{ad}'
                | '\u{34f}'
                | '\u{61c}'
                | '\u{115f}'..='\u{1160}'
                | '\u{17b4}'..='\u{17b5}'
                | '\u{180b}'..='\u{180f}'
                | '\u{200b}'..='\u{200f}'
                | '\u{202a}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{3164}'
                | '\u{fe00}'..='\u{fe0f}'
                | '\u{feff}'
                | '\u{ffa0}'
                | '\u{fff0}'..='\u{fff8}'
                | '\u{1bca0}'..='\u{1bca3}'
                | '\u{1d173}'..='\u{1d17a}'
                | '\u{e0000}'..='\u{e0fff}'
        )
}

/// Returns the original bytes; `None` if a backslash is not part of `\xNN`.
pub(crate) fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = match (first, tail) {
            (b'\\', [b'x', high, low, tail @ ..]) => {
                let digit = |d: &u8| char::from(*d).to_digit(16);
                bytes.push(u8::try_from(digit(high)? << 4 | digit(low)?).ok()?);
                tail
            }
            (b'\\', _) => return None,
            _ => {
                bytes.push(*first);
                tail
            }
        };
    }
    Some(bytes)
}
