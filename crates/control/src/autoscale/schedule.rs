//! What the windows of a schedule hold at a moment: local times of the day, in their own time zones.

use jiff::Timestamp;
use nexus_model::kind::{ScaleWindow, Weekday};

fn weekday(of: jiff::civil::Weekday) -> Weekday {
    use jiff::civil::Weekday as W;
    match of {
        W::Monday => Weekday::Mon,
        W::Tuesday => Weekday::Tue,
        W::Wednesday => Weekday::Wed,
        W::Thursday => Weekday::Thu,
        W::Friday => Weekday::Fri,
        W::Saturday => Weekday::Sat,
        W::Sunday => Weekday::Sun,
    }
}

/// Whether a window is open at a moment (milliseconds since 1970). One that crosses midnight belongs to the day on which it began.
fn is_open(window: &ScaleWindow, millis: i64) -> bool {
    let (Some(zone), Some((start, end))) = (window.zone(), window.minutes()) else { return false };
    let Ok(moment) = Timestamp::from_millisecond(millis) else { return false };
    let local = moment.to_zoned(zone);
    let minute = u32::try_from(local.hour()).unwrap_or(0) * 60 + u32::try_from(local.minute()).unwrap_or(0);
    let day = local.weekday();
    let on = |day: jiff::civil::Weekday| window.days.is_empty() || window.days.contains(&weekday(day));
    if start < end {
        return on(day) && (start..end).contains(&minute);
    }
    (minute >= start && on(day)) || (minute < end && on(day.previous()))
}

/// The most that open windows hold; `None` when none is open.
pub fn holds(windows: &[ScaleWindow], millis: i64) -> Option<u32> {
    windows.iter().filter(|w| is_open(w, millis)).map(|w| w.min_replicas).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> i64 {
        text.parse::<Timestamp>().unwrap().as_millisecond()
    }

    fn window(days: &[Weekday], start: &str, end: &str, zone: &str, min_replicas: u32) -> ScaleWindow {
        ScaleWindow { days: days.to_vec(), start: start.into(), end: end.into(), time_zone: zone.into(), min_replicas }
    }

    #[test]
    fn a_window_follows_the_clock_of_its_zone_also_when_that_is_put_forward() {
        let office = [window(&[Weekday::Mon, Weekday::Tue], "08:00", "18:00", "Europe/Berlin", 6)];
        // A Monday in winter (UTC+1), one in summer (UTC+2), a Wednesday.
        assert_eq!(holds(&office, at("2026-01-12T07:00:00Z")), Some(6));
        assert_eq!(holds(&office, at("2026-01-12T06:59:59Z")), None);
        assert_eq!(holds(&office, at("2026-07-13T06:00:00Z")), Some(6));
        assert_eq!(holds(&office, at("2026-07-13T16:00:00Z")), None);
        assert_eq!(holds(&office, at("2026-07-15T10:00:00Z")), None);
    }

    #[test]
    fn a_window_that_crosses_midnight_is_of_the_day_on_which_it_began_and_the_most_holds() {
        let night = window(&[Weekday::Fri], "22:00", "02:00", "UTC", 3);
        let always = window(&[], "00:00", "00:00", "UTC", 1);
        let both = [night, always];
        assert_eq!(holds(&both, at("2026-07-17T23:00:00Z")), Some(3));
        assert_eq!(holds(&both, at("2026-07-18T01:59:00Z")), Some(3));
        assert_eq!(holds(&both, at("2026-07-18T02:00:00Z")), Some(1));
        assert_eq!(holds(&both, at("2026-07-17T01:00:00Z")), Some(1));
    }
}
