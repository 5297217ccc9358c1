//! Events from recorded JSON lines.

use std::{
    error::Error,
    fmt,
    io::{self, BufRead},
    pin::Pin,
    task::{Context, Poll},
};

use futures_core::{FusedStream, Stream};

use crate::event::{Event, escape::is_deceptive};

/// The longest line, in bytes. An event has at most some 50,000.
const MAX_LINE: usize = 1 << 20;
/// The longest part of an error of the JSON parser that is shown, in characters.
const MAX_MESSAGE: usize = 200;

/// Reads recorded events: JSON lines, as `trace --json` and `tcp-udp-trace ndjson` write them.
///
/// A program can so be tested without root, and without a kernel. The result is a [`Stream`], and
/// can be iterated. Empty lines are skipped. A line that is not an event is an error with its
/// number, and the next line is read after it. An error of the reader is the last item.
///
/// As a stream, it reads when it is polled, so a `reader` that blocks blocks the task. A line may
/// have 1 MiB at most, and is all that is in memory.
///
/// # Examples
///
/// ```no_run
/// use std::{fs::File, io::BufReader};
/// use tcp_udp_trace::consumer::{Growth, replay};
///
/// # fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let recorded = BufReader::new(File::open("events.ndjson")?);
/// let (mut growth, mut sent) = (Growth::new(), 0);
/// for event in replay(recorded) {
///     sent += growth.add(&event?).traffic.tx_bytes;
/// }
/// println!("{sent} bytes sent");
/// # Ok(())
/// # }
/// ```
pub fn replay<R: BufRead>(reader: R) -> Replay<R> {
    Replay(ReplayIter {
        reader,
        number: 0,
        line: Vec::new(),
        is_over: false,
    })
}

/// Recorded events, from [`replay`].
#[derive(Debug)]
#[must_use = "it reads nothing until it is polled or iterated"]
pub struct Replay<R>(ReplayIter<R>);

impl<R: BufRead + Unpin> Stream for Replay<R> {
    type Item = Result<Event, ReplayError>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Ready(self.0.next())
    }
}

impl<R: BufRead + Unpin> FusedStream for Replay<R> {
    fn is_terminated(&self) -> bool {
        self.0.is_over
    }
}

impl<R: BufRead> IntoIterator for Replay<R> {
    type Item = Result<Event, ReplayError>;
    type IntoIter = ReplayIter<R>;

    fn into_iter(self) -> ReplayIter<R> {
        self.0
    }
}

/// The iterator of a [`Replay`].
#[derive(Debug)]
pub struct ReplayIter<R> {
    reader: R,
    /// How many lines were read.
    number: u64,
    line: Vec<u8>,
    is_over: bool,
}

impl<R: BufRead> ReplayIter<R> {
    /// Reads a line without its end. Returns false at the end of the input.
    fn read_line(&mut self) -> Result<bool, Fault> {
        self.line.clear();
        let (mut is_there, mut is_too_long) = (false, false);
        loop {
            let read = match self.reader.fill_buf() {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Fault::Read(error)),
            };
            let end = read.iter().position(|&byte| byte == b'\n');
            let piece = &read[..end.unwrap_or(read.len())];
            is_there |= !read.is_empty();
            is_too_long |= self.line.len() + piece.len() > MAX_LINE;
            if !is_too_long {
                self.line.extend_from_slice(piece);
            }
            let (is_last, used) = match end {
                Some(end) => (true, end + 1),
                None => (read.is_empty(), read.len()),
            };
            self.reader.consume(used);
            if is_last {
                self.number += u64::from(is_there);
                return if is_too_long {
                    Err(Fault::TooLong)
                } else {
                    Ok(is_there)
                };
            }
        }
    }
}

impl<R: BufRead> Iterator for ReplayIter<R> {
    type Item = Result<Event, ReplayError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.is_over {
            let event = match self.read_line() {
                Ok(false) => {
                    self.is_over = true;
                    return None;
                }
                Ok(true) if self.line.trim_ascii().is_empty() => continue,
                Ok(true) => serde_json::from_slice(&self.line).map_err(|error| Fault::json(&error)),
                Err(fault) => Err(fault),
            };
            // The line that could not be read has no number yet.
            let mut line = self.number;
            if let Err(Fault::Read(_)) = event {
                self.is_over = true;
                line += 1;
            }
            return Some(event.map_err(|fault| ReplayError { line, fault }));
        }
        None
    }
}

impl<R: BufRead> std::iter::FusedIterator for ReplayIter<R> {}

/// The error of a recorded line: it is not an event, or could not be read.
#[derive(Debug)]
pub struct ReplayError {
    line: u64,
    fault: Fault,
}

#[derive(Debug)]
enum Fault {
    /// The message of the JSON parser.
    Json(String),
    TooLong,
    Read(io::Error),
}

impl Fault {
    fn json(error: &serde_json::Error) -> Self {
        let message = error.to_string();
        let place = format!(" at line {} column {}", error.line(), error.column());
        // The message may quote the line.
        let message = message.strip_suffix(&*place).unwrap_or(&message);
        let mut shown = format!("column {}: ", error.column());
        for letter in message.chars().take(MAX_MESSAGE) {
            if is_deceptive(letter) {
                shown.extend(letter.escape_unicode());
            } else {
                shown.push(letter);
            }
        }
        if message.chars().nth(MAX_MESSAGE).is_some() {
            shown.push('…');
        }
        Self::Json(shown)
    }
}

impl ReplayError {
    /// Returns the number of the line. The first line is 1.
    #[must_use]
    pub fn line(&self) -> u64 {
        self.line
    }
}

impl fmt::Display for ReplayError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}", self.line)?;
        match &self.fault {
            Fault::Json(message) => write!(f, ", {message}"),
            Fault::TooLong => write!(f, " has more than {MAX_LINE} bytes"),
            Fault::Read(_) => f.write_str(" cannot be read"),
        }
    }
}

impl Error for ReplayError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match &self.fault {
            Fault::Read(error) => Some(error),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufReader, Read};

    use super::*;

    const LINE: &str = r#"{"time":"2026-01-31T12:00:00.000000000Z","uptime_ns":9,"kind":{"type":"accept"},"process":null,"user":null,"socket":{"protocol":"tcp","id":1,"cookie":null,"local":"10.0.0.1:80","remote":"10.0.0.2:40000","uid":0,"netns":1,"netns_cookie":null,"cgroup":1,"device":null,"age_ns":5,"older":false},"traffic":{"tx_bytes":7,"rx_bytes":0,"tx_packets":1,"rx_packets":1}}"#;

    fn outcomes(text: &[u8]) -> Vec<String> {
        let show = |event: Result<Event, ReplayError>| match event {
            Ok(event) => format!("event {}", event.socket.id),
            Err(error) => error.to_string(),
        };
        // A small buffer, so that lines come in pieces.
        replay(BufReader::with_capacity(7, text))
            .into_iter()
            .map(show)
            .collect()
    }

    #[test]
    fn lines_are_events() {
        let text = format!("\n{LINE}\r\n  \n{LINE}");
        assert_eq!(outcomes(text.as_bytes()), ["event 1", "event 1"]);
        assert_eq!(outcomes(b""), [""; 0]);
    }

    #[test]
    fn errors_name_the_line_and_the_rest_is_read() {
        let cut = &LINE[..60];
        let strange = LINE.replace("accept", "\\u001b[2Jx\u{202e}");
        let long = "x".repeat(MAX_LINE + 1);
        let deep = "[".repeat(100_000);
        let text = format!("{cut}\n{LINE}\n{strange}\n{long}\n{deep}\n{LINE} x\n{LINE}");
        let outcomes = outcomes(text.as_bytes());
        let starts = [
            "line 1, column 60: EOF",
            "event 1",
            "line 3, column ",
            "line 4 has more than 1048576 bytes",
            "line 5, column ",
            "line 6, column ",
            "event 1",
        ];
        assert_eq!(outcomes.len(), starts.len(), "{outcomes:?}");
        for (outcome, start) in outcomes.iter().zip(starts) {
            assert!(outcome.starts_with(start), "{outcome:?}, {start:?}");
            assert!(!outcome.contains(is_deceptive) && outcome.len() < 1_000);
        }
        assert!(
            outcomes[2].contains(r"unknown variant `\u{1b}[2Jx\u{202e}`"),
            "{}",
            outcomes[2]
        );
        let bytes: Vec<_> = (0..=255).filter(|&byte| byte != b'\n').collect();
        assert!(self::outcomes(&bytes)[0].starts_with("line 1, column 1: "));
    }

    #[test]
    fn an_error_of_the_reader_is_the_last_item() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("the disk is gone"))
            }
        }
        let reader = BufReader::new(LINE.as_bytes().chain(&b"\n"[..]).chain(Broken));
        let mut events = replay(reader).into_iter();
        assert!(matches!(events.next(), Some(Ok(_))));
        let error = events.next().expect("an error").expect_err("broken");
        assert_eq!(
            (error.line(), error.to_string()),
            (2, "line 2 cannot be read".to_owned())
        );
        let source = error.source().expect("the reader's error");
        assert_eq!(source.to_string(), "the disk is gone");
        assert!(events.next().is_none());
    }
}
