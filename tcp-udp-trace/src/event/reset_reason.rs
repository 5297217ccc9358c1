//! The kernel's reasons of resets.

use std::{borrow::Cow, fmt, sync::OnceLock};

/// The reason why this side sent a reset, by the kernel's name (`enum sk_rst_reason` without its
/// prefix), such as `TCP_ABORT_ON_CLOSE`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(transparent))]
pub struct ResetReason(Cow<'static, str>);

impl ResetReason {
    /// Returns the kernel's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0
    }

    /// Returns the reason of a record: its number on the running kernel plus 1, or 0 for none.
    pub(crate) fn from_record(number: u32) -> Option<Self> {
        let number = number.checked_sub(1)?;
        let names = NAMES.get()?.iter();
        let mut names = names.filter(|(value, _)| *value == number);
        names.next().map(|(_, name)| Self(Cow::Borrowed(name)))
    }
}

impl fmt::Display for ResetReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// The numbers and the names of the running kernel, which differ from version to version. All
/// tracers of a process have the same kernel.
static NAMES: OnceLock<Vec<(u32, String)>> = OnceLock::new();

/// Sets the names of the running kernel, unless they are known.
pub(crate) fn set_names(names: impl FnOnce() -> Vec<(u32, String)>) {
    NAMES.get_or_init(names);
}
