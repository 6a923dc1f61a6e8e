//! Calendar time for names and records. Times inside the process are monotonic ([`crate::frame::now_ns`]); only what is kept on disk needs a date.

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970 of a moment on the clock of [`crate::frame::now_ns`], by the wall clock as it stands now.
pub fn unix_ms_of(moment_ns: u64) -> i64 {
    let wall_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX));
    let age_ms = crate::frame::now_ns().saturating_sub(moment_ns) / 1_000_000;
    wall_ms.saturating_sub(i64::try_from(age_ms).unwrap_or(i64::MAX))
}

/// `20261124T203015.123Z`: ISO 8601 basic format, no characters that any file system minds, sorts by time.
pub fn compact(unix_ms: i64) -> String {
    let (year, month, day, hour, minute, second, ms) = split(unix_ms);
    format!("{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}.{ms:03}Z")
}

/// `2026-11-24T20:30:15.123Z`: ISO 8601 extended format (RFC 3339).
pub fn extended(unix_ms: i64) -> String {
    let (year, month, day, hour, minute, second, ms) = split(unix_ms);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

/// Year, month, day, hour, minute, second, millisecond (days to civil date after Howard Hinnant's `civil_from_days`).
fn split(unix_ms: i64) -> (i64, i64, i64, i64, i64, i64, i64) {
    let days = unix_ms.div_euclid(86_400_000);
    let in_day = unix_ms.rem_euclid(86_400_000);
    let shifted = days.saturating_add(719_468);
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_shifted + 2) / 5 + 1;
    let month = if month_shifted < 10 { month_shifted + 3 } else { month_shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day, in_day / 3_600_000, in_day / 60_000 % 60, in_day / 1_000 % 60, in_day % 1_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        assert_eq!(compact(0), "19700101T000000.000Z");
        assert_eq!(extended(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(extended(1_795_552_215_123), "2026-11-24T20:30:15.123Z");
        assert_eq!(extended(4_107_542_399_999), "2100-02-28T23:59:59.999Z");
    }
}
