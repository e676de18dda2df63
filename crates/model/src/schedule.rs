//! When a cron expression is due, in a time zone whose offset changes.
//!
//! An expression speaks of what clocks on the wall show. Between two changes of the zone's offset that is plain arithmetic;
//! around a change these rules hold, like in Vixie cron:
//!
//! * Clocks go forward: what is due at a time that no clock shows is due at the moment of the change, once.
//! * Clocks go back: what is due at a time that clocks show twice is due the first time only.
//! * An expression that holds in every hour (`*/10 * * * *`) is one of intervals, not of times: it goes on through a change
//!   without a gap or a repetition of its own.
//!
//! Architecture invariant: pure. The time zones are those that are built in, never the machine's: all servers agree.

use std::str::FromStr as _;

use croner::Cron;
use jiff::civil::{DateTime, Time};
use jiff::tz::{TimeZone, TimeZoneDatabase};
use jiff::{Span, Timestamp as Moment, ToSpan as _};

use crate::Timestamp;

/// What every expression matches that is taken.
pub const SCHEDULE_PATTERN: &str =
    r"^(@(hourly|daily|midnight|weekly|monthly|yearly|annually)|[-0-9A-Za-z*,/#?]+( [-0-9A-Za-z*,/#?]+){4})$";
/// What every name of a time zone matches.
pub const ZONE_PATTERN: &str = "^[A-Za-z][A-Za-z0-9_+/-]*$";

/// An expression that is due on no day of so many is taken for one that never is. 29 February on a given day of the week comes
/// after 40 years at the latest.
const DAYS: i32 = 41 * 366;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    #[error("not a cron expression: five fields such as `30 3 * * MON-FRI`, with one space between, or `@daily`{0}")]
    Expression(String),
    #[error("it is never due")]
    Never,
    #[error("there is no such time zone: use a name of the IANA database, such as `Europe/Berlin`")]
    Zone,
}

impl ScheduleError {
    /// The field of a spec that is at fault.
    pub fn field(&self) -> &'static str {
        match self {
            Self::Expression(_) | Self::Never => "schedule",
            Self::Zone => "timeZone",
        }
    }
}

/// A cron expression in a time zone.
#[derive(Debug, Clone)]
pub struct Schedule {
    cron: Cron,
    zone: TimeZone,
    /// Whether it is due in every hour, by some minute.
    hourly: bool,
}

/// A stretch of time with one offset from UTC.
struct Period {
    offset: i64,
    /// Where the next begins, with its offset.
    end: Option<(Moment, i64)>,
}

impl Schedule {
    pub fn new(expression: &str, zone: &str) -> Result<Self, ScheduleError> {
        let wrong = |why: &str| ScheduleError::Expression(why.to_owned());
        let fields = expression.split(' ').count();
        let ascii = expression.bytes().all(|b| b.is_ascii_graphic() || b == b' ') && expression.len() <= 100;
        if !ascii || !(fields == 5 || (fields == 1 && expression.starts_with('@'))) {
            return Err(wrong(""));
        }
        let cron = Cron::from_str(expression).map_err(|e| wrong(&format!(": {e}")))?;
        let zone = TimeZoneDatabase::bundled().get(zone).map_err(|_| ScheduleError::Zone)?;
        let matches = |hour| cron.pattern.hour_match(hour).unwrap_or(false);
        let hourly = (0..24).all(matches);
        let schedule = Self { cron, zone, hourly };
        let due = schedule.wall_from(DateTime::constant(2024, 1, 1, 0, 0, 0, 0));
        if due.is_some() { Ok(schedule) } else { Err(ScheduleError::Never) }
    }

    /// The first moment after `after` at which it is due.
    pub fn next(&self, after: Timestamp) -> Option<Timestamp> {
        let mut at = Moment::from_millisecond(after.as_millis()).ok()?;
        // A period that a run falls out of is passed over; nobody changes clocks more often than that.
        let mut from = wall(at, self.offset(at))?.checked_add(1.nanosecond()).ok()?;
        if !self.hourly
            && let Some(last) = self.shown_already(at)
        {
            from = from.max(last);
        }
        for _ in 0..400 {
            let period = self.period(at);
            let due = self.wall_from(from)?;
            let Some((change, offset)) = period.end else { return moment(due, period.offset) };
            let last = wall(change, period.offset)?;
            if due < last {
                return moment(due, period.offset);
            }
            let first = wall(change, offset)?;
            at = change;
            from = if self.hourly {
                first
            } else if due < first {
                // No clock shows that time.
                return Some(Timestamp::from_millis(change.as_millisecond()));
            } else {
                first.max(last)
            };
        }
        None
    }

    fn offset(&self, at: Moment) -> i64 {
        i64::from(self.zone.to_offset(at).seconds())
    }

    fn period(&self, at: Moment) -> Period {
        let offset = self.offset(at);
        let next = self.zone.following(at).find(|t| i64::from(t.offset().seconds()) != offset);
        Period { offset, end: next.map(|t| (t.timestamp(), i64::from(t.offset().seconds()))) }
    }

    /// If clocks at `at` show a time for the second time: until when they do.
    fn shown_already(&self, at: Moment) -> Option<DateTime> {
        let now = self.offset(at);
        let mut earlier = self.zone.preceding(at.checked_add(1.nanosecond()).ok()?);
        let change = earlier.next()?.timestamp();
        let before = self.offset(change.checked_sub(1.nanosecond()).ok()?);
        let last = wall(change, before)?;
        (before > now && wall(at, now)? < last).then_some(last)
    }

    /// The first time from `from` on that the expression names, whatever clocks do.
    fn wall_from(&self, from: DateTime) -> Option<DateTime> {
        let pattern = &self.cron.pattern;
        let mut date = from.date();
        let mut earliest = whole_minute(from)?;
        if earliest.date() != date {
            date = earliest.date();
        }
        for _ in 0..DAYS {
            let [year, month, day] = [i32::from(date.year()), i32::from(date.month()), i32::from(date.day())];
            let [month, day] = [month.unsigned_abs(), day.unsigned_abs()];
            let here = pattern.month_match(month).ok()? && pattern.day_match(year, month, day).ok()?;
            if here && let Some(time) = self.time_from(earliest.time()) {
                return Some(date.to_datetime(time));
            }
            date = date.tomorrow().ok()?;
            earliest = date.to_datetime(Time::midnight());
        }
        None
    }

    /// The first time of a day from `from` on, a whole minute.
    fn time_from(&self, from: Time) -> Option<Time> {
        let pattern = &self.cron.pattern;
        for hour in from.hour()..24 {
            if !pattern.hour_match(u32::from(hour.unsigned_abs())).ok()? {
                continue;
            }
            let first = if hour == from.hour() { from.minute() } else { 0 };
            let due = |m: &i8| pattern.minute_match(u32::from(m.unsigned_abs())).unwrap_or(false);
            if let Some(minute) = (first..60).find(due) {
                return Time::new(hour, minute, 0, 0).ok();
            }
        }
        None
    }
}

/// This minute if it has just begun, else the next.
fn whole_minute(at: DateTime) -> Option<DateTime> {
    let begun = at.date().to_datetime(Time::new(at.hour(), at.minute(), 0, 0).ok()?);
    if begun == at { Some(at) } else { begun.checked_add(1.minute()).ok() }
}

/// What clocks show that are `offset` seconds ahead of UTC.
fn wall(at: Moment, offset: i64) -> Option<DateTime> {
    TimeZone::UTC.to_datetime(at).checked_add(Span::new().try_seconds(offset).ok()?).ok()
}

fn moment(wall: DateTime, offset: i64) -> Option<Timestamp> {
    let utc = wall.checked_sub(Span::new().try_seconds(offset).ok()?).ok()?;
    let at = TimeZone::UTC.to_timestamp(utc).ok()?;
    Some(Timestamp::from_millis(at.as_millisecond()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        serde_json::from_str(&format!("\"{text}\"")).unwrap()
    }

    /// The runs in a stretch of time, in UTC without the date's year and the seconds.
    fn runs(expression: &str, zone: &str, from: &str, until: &str) -> Vec<String> {
        let schedule = Schedule::new(expression, zone).unwrap();
        let (mut now, until) = (at(from), at(until));
        let mut found = Vec::new();
        while let Some(next) = schedule.next(now).filter(|next| *next <= until) {
            assert!(next > now, "{expression}: {next} is not after {now}");
            found.push(next.to_string()[5..16].to_owned());
            now = next;
        }
        found
    }

    #[test]
    fn clocks_that_go_forward_delay_a_run_and_lose_none() {
        // In Berlin 02:00 becomes 03:00 on 30 March 2025, at 01:00 UTC.
        let spring = |expression| runs(expression, "Europe/Berlin", "2025-03-29T00:00:00Z", "2025-03-31T12:00:00Z");
        assert_eq!(spring("30 2 * * *"), ["03-29T01:30", "03-30T01:00", "03-31T00:30"]);
        assert_eq!(spring("0 3 * * *"), ["03-29T02:00", "03-30T01:00", "03-31T01:00"]);
        // Two times within the gap are one run, and it does not run again for the time that follows at once.
        assert_eq!(spring("0,30 2,3 * * *")[4..7], ["03-30T01:00", "03-30T01:30", "03-31T00:00"]);
        assert_eq!(spring("30 2 * * 0"), ["03-30T01:00"]);
    }

    #[test]
    fn clocks_that_go_back_run_nothing_twice() {
        // In Berlin 03:00 becomes 02:00 on 26 October 2025, at 01:00 UTC.
        let autumn = |expression| runs(expression, "Europe/Berlin", "2025-10-25T12:00:00Z", "2025-10-27T12:00:00Z");
        assert_eq!(autumn("30 2 * * *"), ["10-26T00:30", "10-27T01:30"]);
        assert_eq!(autumn("0 3 * * *"), ["10-26T02:00", "10-27T02:00"]);
        // Asked in the repeated hour, it is not due again.
        let schedule = Schedule::new("50 2 * * *", "Europe/Berlin").unwrap();
        assert_eq!(schedule.next(at("2025-10-26T01:10:00Z")), Some(at("2025-10-27T01:50:00Z")));
        assert_eq!(schedule.next(at("2025-10-26T00:10:00Z")), Some(at("2025-10-26T00:50:00Z")));
    }

    #[test]
    fn intervals_go_on_through_a_change() {
        for day in ["2025-03-30", "2025-10-26"] {
            let (from, until) = (format!("{day}T00:00:00Z"), format!("{day}T03:00:00Z"));
            assert_eq!(runs("*/20 * * * *", "Europe/Berlin", &from, &until).len(), 9, "{day}");
        }
        // Half an hour, in Lord Howe: 6 April 2025, 15:00 UTC on the 5th.
        let lord_howe = runs("0 * * * *", "Australia/Lord_Howe", "2025-04-05T13:30:00Z", "2025-04-05T17:00:00Z");
        assert_eq!(lord_howe, ["04-05T14:00", "04-05T15:30", "04-05T16:30"]);
    }

    #[test]
    fn every_run_is_a_wall_time_of_the_expression_over_years_and_zones() {
        let zones =
            ["UTC", "America/New_York", "Asia/Kathmandu", "America/Sao_Paulo", "Africa/Casablanca", "Pacific/Apia"];
        for zone in zones {
            let local = TimeZoneDatabase::bundled().get(zone).unwrap();
            let schedule = Schedule::new("0 12 * * *", zone).unwrap();
            // In Apia there was no 30 December 2011: what was due on it ran when the 31st began.
            let skipped = |next| zone == "Pacific/Apia" && next == at("2011-12-30T10:00:00Z");
            let (mut now, end, mut count) = (at("2010-01-01T12:00:00Z"), at("2012-06-01T12:00:00Z"), 0);
            while let Some(next) = schedule.next(now).filter(|next| *next <= end) {
                let shown = local.to_datetime(Moment::from_millisecond(next.as_millis()).unwrap());
                let hour = if skipped(next) { 0 } else { 12 };
                assert_eq!((shown.hour(), shown.minute()), (hour, 0), "{zone} at {next}");
                (now, count) = (next, count + 1);
            }
            assert_eq!(count, if zone == "Pacific/Apia" { 883 } else { 882 }, "{zone}");
        }
    }

    #[test]
    fn rare_days_are_found_and_what_never_comes_is_refused() {
        let leap = Schedule::new("0 0 29 2 *", "UTC").unwrap();
        assert_eq!(leap.next(at("2025-01-01T00:00:00Z")), Some(at("2028-02-29T00:00:00Z")));
        assert_eq!(Schedule::new("0 0 30 2 *", "UTC").unwrap_err(), ScheduleError::Never);
        assert_eq!(Schedule::new("0 0 * * *", "Mars/Olympus").unwrap_err(), ScheduleError::Zone);
        for wrong in
            ["", "* * * *", "* * * * * *", "60 * * * *", "a b c d e", "@sometimes", "*  * * * *", "* * * * *\n"]
        {
            assert!(matches!(Schedule::new(wrong, "UTC"), Err(ScheduleError::Expression(_))), "{wrong:?}");
        }
        assert_eq!(
            runs("@daily", "UTC", "2025-01-01T00:00:00Z", "2025-01-03T00:00:00Z"),
            ["01-02T00:00", "01-03T00:00"]
        );
        let friday = runs("15 9 * * FRI", "America/New_York", "2025-01-01T00:00:00Z", "2025-01-15T00:00:00Z");
        assert_eq!(friday, ["01-03T14:15", "01-10T14:15"]);
    }
}
