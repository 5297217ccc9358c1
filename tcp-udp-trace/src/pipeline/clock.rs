//! Converts the kernel's clock to the wall clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The difference between the wall clock and `CLOCK_BOOTTIME`, and between `CLOCK_BOOTTIME` and the
/// kernel's own clock, whose times are in the records.
///
/// The reader reads it again for each batch of records, because the wall clock steps and slews.
/// `CLOCK_BOOTTIME` does neither, and it includes time in suspend.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BootClock {
    boot: SystemTime,
    /// In nanoseconds.
    offset: i64,
}

impl BootClock {
    /// Makes a clock on which `uptime` is the time `wall`.
    pub(crate) fn new(wall: SystemTime, uptime: Duration) -> Self {
        Self {
            boot: wall.checked_sub(uptime).unwrap_or(UNIX_EPOCH),
            offset: 0,
        }
    }

    /// Returns the clock in a time namespace with this offset.
    pub(crate) fn with_offset(self, offset: i64) -> Self {
        Self { offset, ..self }
    }

    /// Converts nanoseconds of the kernel's own clock to `CLOCK_BOOTTIME`.
    pub(crate) fn uptime(&self, nanos: u64) -> Duration {
        Duration::from_nanos(nanos.saturating_add_signed(self.offset))
    }

    /// Returns the wall clock's time at `uptime`.
    pub(crate) fn wall(&self, uptime: Duration) -> SystemTime {
        self.boot.checked_add(uptime).unwrap_or(self.boot)
    }
}

/// Returns the offset that a time namespace adds to the kernel's own `CLOCK_BOOTTIME`, in
/// nanoseconds, from the text of `/proc/self/timens_offsets`.
pub(crate) fn namespace_offset(timens_offsets: &str) -> i64 {
    // A line for each clock: its name, seconds, nanoseconds (time_namespaces(7)).
    let fields = timens_offsets
        .lines()
        .find_map(|line| line.strip_prefix("boottime"));
    let mut numbers = fields.into_iter().flat_map(|fields| {
        fields
            .split_whitespace()
            .map_while(|field| field.parse::<i64>().ok())
    });
    let (seconds, nanos) = (numbers.next(), numbers.next());
    seconds
        .unwrap_or_default()
        .saturating_mul(1_000_000_000)
        .saturating_add(nanos.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offset_of_a_time_namespace() {
        let ahead = "monotonic           1         2\nboottime        86400 500000000\n";
        assert_eq!(namespace_offset(ahead), 86_400_500_000_000);
        let behind = "monotonic           0         0\nboottime          -10 500000000\n";
        assert_eq!(namespace_offset(behind), -9_500_000_000);
        // A kernel without time namespaces.
        assert_eq!(namespace_offset(""), 0);
        let clock = BootClock::new(UNIX_EPOCH, Duration::ZERO);
        assert_eq!(clock.with_offset(-5).uptime(7), Duration::from_nanos(2));
        assert_eq!(clock.with_offset(-5).uptime(4), Duration::ZERO);
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
