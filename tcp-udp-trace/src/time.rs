//! From the kernel's clock to the wall clock.

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Shows a time as RFC 3339 in UTC with nanoseconds.
pub(crate) struct Rfc3339(pub(crate) SystemTime);

/// The last second that RFC 3339 can write: the end of the year 9999.
const LATEST: Duration = Duration::from_secs(253_402_300_799);

impl fmt::Display for Rfc3339 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = self.0.clamp(UNIX_EPOCH, UNIX_EPOCH + LATEST);
        humantime::format_rfc3339_nanos(time).fmt(f)
    }
}

/// The wall clock's distance from `CLOCK_BOOTTIME`, which kernel records carry.
///
/// Read anew for each batch of records, because the wall clock steps and slews; `CLOCK_BOOTTIME` does
/// neither, and it counts the time in suspend.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BootClock {
    boot: SystemTime,
}

impl BootClock {
    /// A clock of which `uptime` is `wall`.
    pub(crate) fn new(wall: SystemTime, uptime: Duration) -> Self {
        Self {
            boot: wall.checked_sub(uptime).unwrap_or(UNIX_EPOCH),
        }
    }

    /// The wall clock's time at `uptime`.
    pub(crate) fn wall(&self, uptime: Duration) -> SystemTime {
        self.boot.checked_add(uptime).unwrap_or(self.boot)
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
        assert_eq!(Rfc3339(after).to_string(), "9999-12-31T23:59:59.000000000Z");
    }

    #[test]
    fn wall_follows_uptime() {
        let wall = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let clock = BootClock::new(wall, Duration::from_secs(500));
        assert_eq!(
            clock.wall(Duration::from_secs(501)),
            wall + Duration::from_secs(1)
        );
        assert_eq!(
            clock.wall(Duration::from_secs(499)),
            wall - Duration::from_secs(1)
        );
    }
}
