//! The error type.

use std::{error::Error as StdError, fmt};

/// The reason why a tracer could not start, or stopped.
///
/// The message names the missing requirement and the remedy. [`source`](StdError::source) is the
/// error of the operating system or a library.
///
/// `Debug` shows the message and its causes, one per line, for an error that `main` returns.
/// `{:#?}` shows the fields.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// The kind of an [`Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A privilege is missing, or another mechanism forbids what the privileges allow. The message
    /// names the capability, the limit, or the likely mechanism: a seccomp filter, a user
    /// namespace, kernel lockdown.
    Permission,
    /// This operating system, kernel or machine lacks a required feature.
    Unsupported,
    /// A setting of the builder is out of its range.
    InvalidConfig,
    /// A [`Filter`](crate::Filter) is invalid. The message names the setting.
    InvalidFilter,
    /// There is no Tokio runtime, or it has I/O or time disabled.
    NoRuntime,
    /// The kernel refused a program or a map for another reason than permission, or memory, file
    /// descriptors or threads ran out. The message names the reason.
    Load,
    /// The kernel refused to attach a program to a required hook, or another process has detached
    /// one.
    Attach,
    /// Reading the kernel's records failed.
    Read,
    /// The tracer has ended, and cannot carry out the request.
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

    /// Returns the kind of the error.
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

/// Shows the message and its causes, one per line. `{:#?}` shows the fields.
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
