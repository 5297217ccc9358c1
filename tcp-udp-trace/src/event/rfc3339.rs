//! The text form of times.

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Shows a time as RFC 3339 in UTC with nanoseconds.
pub(crate) struct Rfc3339(pub(crate) SystemTime);

/// The last instant that RFC 3339 can express: the end of the year 9999.
pub(crate) const LATEST: Duration = Duration::new(253_402_300_799, 999_999_999);

impl fmt::Display for Rfc3339 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = self.0.clamp(UNIX_EPOCH, UNIX_EPOCH + LATEST);
        humantime::format_rfc3339_nanos(time).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_times_outside_of_rfc3339_clamped() {
        let before = UNIX_EPOCH - Duration::from_secs(1);
        assert_eq!(
            Rfc3339(before).to_string(),
            "1970-01-01T00:00:00.000000000Z"
        );
        let after = UNIX_EPOCH + LATEST * 2;
        assert_eq!(Rfc3339(after).to_string(), "9999-12-31T23:59:59.999999999Z");
    }
}
