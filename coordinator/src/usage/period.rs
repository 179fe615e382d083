//! Periods of UTC: minutes, hours, days, months.

use jiff::{Timestamp, ToSpan as _, tz::TimeZone};
use serde::{Deserialize, Serialize};

/// Milliseconds since the Unix epoch, UTC.
pub type Clock = i64;

pub(super) const MINUTE: i64 = 60_000;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = 24 * HOUR;

/// Usage of the last 6 hours is kept by minute.
pub(super) const MINUTES_KEPT: i64 = 6 * HOUR;
/// Usage of the last 35 days is kept by hour.
pub(super) const HOURS_KEPT: i64 = 35 * DAY;
/// Usage of the last 400 days is kept by day; older usage is kept by month, without a limit.
pub(super) const DAYS_KEPT: i64 = 400 * DAY;

/// Length of a period, shortest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Period {
    /// 60 s.
    Minute,
    /// 60 minutes.
    Hour,
    /// From midnight to midnight, UTC.
    Day,
    /// A calendar month, UTC.
    Month,
}

impl Period {
    /// All, shortest first.
    pub const ALL: [Self; 4] = [Self::Minute, Self::Hour, Self::Day, Self::Month];

    /// Start of the period that `time` is in.
    pub fn start(self, time: Clock) -> Clock {
        match self {
            Self::Minute => time - time.rem_euclid(MINUTE),
            Self::Hour => time - time.rem_euclid(HOUR),
            Self::Day => time - time.rem_euclid(DAY),
            Self::Month => first_of_month(time, 0),
        }
    }

    /// Start of the period after the one that `time` is in.
    pub fn end(self, time: Clock) -> Clock {
        match self {
            Self::Minute => self.start(time) + MINUTE,
            Self::Hour => self.start(time) + HOUR,
            Self::Day => self.start(time) + DAY,
            Self::Month => first_of_month(time, 1),
        }
    }

    /// The period by which usage of `time` is kept at `now`.
    pub(super) fn kept(time: Clock, now: Clock) -> Self {
        match now - time {
            age if age <= MINUTES_KEPT => Self::Minute,
            age if age <= HOURS_KEPT => Self::Hour,
            age if age <= DAYS_KEPT => Self::Day,
            _ => Self::Month,
        }
    }
}

/// First millisecond of the month of `time`, or of the month `months` later. Times outside of jiff's range, which are
/// 9999 years away, are their own month.
fn first_of_month(time: Clock, months: i32) -> Clock {
    let first = || {
        let date = Timestamp::from_millisecond(time).ok()?.to_zoned(TimeZone::UTC).date();
        let first = date.first_of_month().checked_add(months.months()).ok()?;
        Some(first.to_zoned(TimeZone::UTC).ok()?.timestamp().as_millisecond())
    };
    first().unwrap_or(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Clock {
        text.parse::<Timestamp>().unwrap().as_millisecond()
    }

    #[test]
    fn periods_are_those_of_utc() {
        let time = at("2024-02-29T23:59:59.999Z");
        let bounds = Period::ALL.map(|period| (period.start(time), period.end(time)));
        let march = at("2024-03-01T00:00:00Z");
        assert_eq!(bounds[0], (at("2024-02-29T23:59:00Z"), march));
        assert_eq!(bounds[1], (at("2024-02-29T23:00:00Z"), march));
        assert_eq!(bounds[2], (at("2024-02-29T00:00:00Z"), march));
        assert_eq!(bounds[3], (at("2024-02-01T00:00:00Z"), march));
        assert_eq!(Period::Month.start(march), march);
        assert_eq!(Period::Minute.start(-1), -60_000, "before 1970, too");
    }

    #[test]
    fn older_usage_is_kept_by_longer_periods() {
        let now = at("2026-01-01T00:00:00Z");
        let kept =
            [0, MINUTES_KEPT, MINUTES_KEPT + 1, HOURS_KEPT + 1, DAYS_KEPT + 1].map(|age| Period::kept(now - age, now));
        assert_eq!(kept, [Period::Minute, Period::Minute, Period::Hour, Period::Day, Period::Month]);
    }
}
