//! The one error type.

use std::{error::Error as StdError, fmt};

/// Why a tracer could not start, or stopped.
///
/// The message says what was missing and what to do about it; [`source`](StdError::source) is what the operating
/// system or a library said.
///
/// `Debug` shows the message and below it the causes, for an error that leaves `main`. `{:#?}` shows
/// the fields.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// What an [`Error`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A privilege is missing, or something forbids what the privileges allow; the message names the capability, the limit, or what it
    /// may be: a seccomp filter, a user namespace, kernel lockdown.
    Permission,
    /// This operating system, kernel or machine lacks something that cannot be done without.
    Unsupported,
    /// A setting of the builder is out of its range.
    InvalidConfig,
    /// A [`Filter`](crate::Filter) makes no sense; the message names the setting.
    InvalidFilter,
    /// There is no Tokio runtime, or it has I/O or time disabled.
    NoRuntime,
    /// The kernel refused a program or a map, for another reason than permission; or there is too little memory, or too few file descriptors or
    /// threads. The message says which.
    Load,
    /// The kernel refused to attach a program to a hook without which nothing can be traced.
    Attach,
    /// Reading what the kernel produced failed.
    Read,
    /// The tracer has ended, and cannot do what it was asked.
    Ended,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            source: None,
        }))
    }

    pub(crate) fn with_source(
        mut self,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// What the error is about.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }
}

/// Turns another error into an [`Error`] that has it as its source.
pub(crate) trait ResultExt<T> {
    fn or_error(self, kind: ErrorKind, message: impl Into<String>) -> Result<T, Error>;
}

impl<T, E: Into<Box<dyn StdError + Send + Sync>>> ResultExt<T> for Result<T, E> {
    fn or_error(self, kind: ErrorKind, message: impl Into<String>) -> Result<T, Error> {
        self.map_err(|source| Error::new(kind, message).with_source(source))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

/// The message and its causes, one a line: so an error that leaves `main` can be read. With `{:#?}`
/// the fields.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !f.alternate() {
            f.write_str(&self.0.message)?;
            let mut cause = StdError::source(self);
            if cause.is_some() {
                f.write_str("\n\nCaused by:")?;
            }
            while let Some(error) = cause {
                write!(f, "\n    {error}")?;
                cause = error.source();
            }
            return Ok(());
        }
        let Inner {
            kind,
            message,
            source,
        } = &*self.0;
        f.debug_struct("Error")
            .field("kind", kind)
            .field("message", message)
            .field("source", source)
            .finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_is_the_message_and_its_causes() {
        let error = || Error::new(ErrorKind::Permission, "tracing takes CAP_BPF");
        assert_eq!(format!("{:?}", error()), "tracing takes CAP_BPF");
        let cause = Error::new(ErrorKind::Load, "the map").with_source("not permitted");
        assert_eq!(
            format!("{:?}", error().with_source(cause)),
            "tracing takes CAP_BPF\n\nCaused by:\n    the map\n    not permitted"
        );
        let fields = format!("{:#?}", error().with_source("why"));
        assert!(
            fields.starts_with("Error {\n    kind: Permission"),
            "{fields}"
        );
        assert!(fields.contains("\"why\""), "{fields}");
    }
}
