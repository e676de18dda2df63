//! What an app's load will be in a few minutes, from what it was.
//!
//! Five simple models each say how the load will have changed `h` slots from now; what each would have said over the last day is
//! known, so is how wrong it was. The forecast is their mean, weighted by the inverse of their squared errors (inverse-variance
//! combination, Bates and Granger 1969):
//!
//! * nothing changes;
//! * the trend of the last half hour goes on, damped (Holt's linear method with Gardner and McKenzie's damping);
//! * it changes as it did at this time of the last days;
//! * it changes as it did at this time a week ago;
//! * trend and day together, half each.
//!
//! The error that is stated is an empirical quantile of how much more came than the same combination had forecast: no distribution is
//! assumed. Without a day of history only the first two models speak.

use super::history::DAY_SLOTS;

const WEEK_SLOTS: usize = 7 * DAY_SLOTS;
/// Errors are judged over the last day.
const JUDGED: usize = DAY_SLOTS;
/// Fewer forecasts to judge by than this tell nothing.
const JUDGED_LEAST: usize = 6;
/// The share of past forecasts that were too low by no more than the margin. The most tenths with which the tuning series of
/// `bench autoscale` costs no more than 1.1 times the reactive rule.
pub const QUANTILE: f64 = 0.7;
/// Days that the daily model looks back.
const DAYS: usize = 7;
/// Damping of the trend per slot.
const DAMPING: f64 = 0.8;
/// Slots over which the trend is taken.
const TREND: usize = 6;
const MODELS: usize = 5;

/// What will be, and how sure that is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Forecast {
    /// The change against the newest slot, in the series' unit.
    pub change: f64,
    /// So much more may come, by [`QUANTILE`] of the last day's forecasts.
    pub margin: f64,
    /// The mean absolute error of the last day's forecasts.
    pub error: f64,
}

/// How each model says that the load changes from slot `at` to `at + h`. Knows nothing after `at`.
fn changes(series: &[f64], at: usize, h: usize) -> [Option<f64>; MODELS] {
    let delta = |from: usize| {
        // A mean of three slots on both sides: one day's noise is not the season.
        let smooth = |i: usize| {
            let (a, b) = (i.saturating_sub(1), (i + 1).min(at));
            series[a..=b].iter().sum::<f64>() / (b - a + 1) as f64
        };
        smooth(from + h) - smooth(from)
    };
    let trend = (at >= TREND).then(|| {
        let (mut sum, mut weights) = (0.0, 0.0);
        for back in 0..TREND {
            let weight = DAMPING.powi(i32::try_from(back).unwrap_or(i32::MAX));
            sum += weight * (series[at - back] - series[at - back - 1]);
            weights += weight;
        }
        let slope = sum / weights;
        let damped: f64 = (1..=h).map(|i| DAMPING.powi(i32::try_from(i).unwrap_or(i32::MAX))).sum();
        slope * damped
    });
    let (mut sum, mut weights) = (0.0, 0.0);
    for day in 1..=DAYS {
        let Some(from) = at.checked_sub(day * DAY_SLOTS) else { break };
        let weight = 1.0 / day as f64;
        sum += weight * delta(from);
        weights += weight;
    }
    let daily = (weights > 0.0).then(|| sum / weights);
    let weekly = at.checked_sub(WEEK_SLOTS).map(delta);
    let both = daily.zip(trend).map(|(d, t)| (d + t) / 2.0);
    [Some(0.0), trend, daily, weekly, both]
}

fn combine(said: [Option<f64>; MODELS], squares: &[f64; MODELS]) -> f64 {
    let (mut sum, mut weights) = (0.0, 0.0);
    for (change, square) in said.iter().zip(squares) {
        if let Some(change) = change.filter(|_| square.is_finite()) {
            let weight = 1.0 / (square + 1e-9);
            sum += weight * change;
            weights += weight;
        }
    }
    if weights > 0.0 { sum / weights } else { 0.0 }
}

/// How the load changes within the next `h` slots, at most, by a series without gaps, oldest first. `None` for a series that is
/// too short to know how wrong a forecast is.
pub fn forecast(series: &[f64], h: usize) -> Option<Forecast> {
    let h = h.max(1);
    let now = series.len().checked_sub(1)?;
    let first = (now + 1).saturating_sub(JUDGED + h).max(TREND);
    let judged = (now + 1).checked_sub(h)?.checked_sub(first)?;
    if judged < JUDGED_LEAST {
        return None;
    }
    // What each model would have said at every slot of the last day, and what came.
    let mut squares = [0.0; MODELS];
    let mut counts = [0usize; MODELS];
    let past: Vec<([Option<f64>; MODELS], f64)> =
        (first..=now - h).map(|at| (changes(series, at, h), series[at + h] - series[at])).collect();
    for (said, came) in &past {
        for (i, change) in said.iter().enumerate() {
            if let Some(change) = change {
                squares[i] += (came - change).powi(2);
                counts[i] += 1;
            }
        }
    }
    for (square, count) in squares.iter_mut().zip(counts) {
        // One that could not speak for most of the time has not been judged.
        *square = if count * 2 > past.len() { *square / count as f64 } else { f64::INFINITY };
    }
    let mut missed: Vec<f64> = past.iter().map(|(said, came)| came - combine(*said, &squares)).collect();
    let error = missed.iter().map(|e| e.abs()).sum::<f64>() / missed.len() as f64;
    missed.sort_by(f64::total_cmp);
    let margin = quantile(&missed, QUANTILE).max(0.0);
    let change = (1..=h).map(|ahead| combine(changes(series, now, ahead), &squares)).fold(f64::NEG_INFINITY, f64::max);
    Some(Forecast { change, margin, error })
}

/// Of sorted values.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = ((sorted.len() - 1) as f64 * q).round() as usize;
    sorted[at]
}
