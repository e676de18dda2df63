//! What a bench tells: one row per figure, as a table or as JSON, and the processor time that it took.

use anyhow::Context as _;
use serde::Serialize;

/// One figure.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Row {
    pub name: String,
    pub value: f64,
    pub unit: &'static str,
    /// Who else was measured, in the same run and on the same machine.
    pub peer: Option<String>,
    pub peer_value: Option<f64>,
    /// `value / peer_value`.
    pub ratio: Option<f64>,
    pub cpu_seconds_per_op: Option<f64>,
}

impl Row {
    pub fn new(name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { name: name.into(), value, unit, ..Self::default() }
    }

    pub fn peer(mut self, peer: impl Into<String>, value: f64) -> Self {
        self.peer = Some(peer.into());
        self.peer_value = Some(value);
        self.ratio = (value != 0.0).then(|| self.value / value);
        self
    }

    pub fn cpu_per_op(mut self, seconds: f64) -> Self {
        self.cpu_seconds_per_op = Some(seconds);
        self
    }
}

/// The middle of some measurements: of an even number, the mean of the two in the middle.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// The smallest value that is not below the given share of all.
pub fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(place.max(1) - 1).copied().unwrap_or(f64::NAN)
}

/// Seconds of processor time that this process has used, all threads, in user and kernel.
pub fn cpu_seconds() -> f64 {
    // SAFETY: all-zero is a valid `rusage`, and the call only writes to it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

pub fn print_json(rows: &[Row]) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(rows).context("writing JSON")?);
    Ok(())
}

pub fn print_table(rows: &[Row]) -> anyhow::Result<()> {
    let head = ["NAME", "VALUE", "UNIT", "PEER", "ITS VALUE", "RATIO", "CPU S/OP"].map(str::to_owned);
    let dash = || "-".to_owned();
    let mut table = vec![head];
    for row in rows {
        table.push([
            row.name.clone(),
            number(row.value),
            row.unit.to_owned(),
            row.peer.clone().unwrap_or_else(dash),
            row.peer_value.map_or_else(dash, number),
            row.ratio.map_or_else(dash, |r| format!("{r:.2}")),
            row.cpu_seconds_per_op.map_or_else(dash, |s| format!("{s:.3e}")),
        ]);
    }
    let width = |column: usize| table.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..7).map(width).collect();
    for row in &table {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, w)| format!("{cell:<w$}")).collect();
        println!("{}", cells.join("  ").trim_end());
    }
    Ok(())
}

fn number(value: f64) -> String {
    let decimals = match value.abs() {
        v if v >= 1000.0 || v == 0.0 => 0,
        v if v >= 10.0 => 1,
        _ => 4,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_gives_a_ratio() {
        let row = Row::new("x", 30.0, "ops/s").peer("other", 20.0);
        assert_eq!(row.ratio, Some(1.5));
        assert_eq!(Row::new("x", 30.0, "ops/s").peer("dead", 0.0).ratio, None);
    }

    #[test]
    fn the_median_ignores_outliers() {
        assert_eq!(median(&[1000.0, 1.0, 3.0]), 3.0);
        assert_eq!(median(&[4.0, 2.0]), 3.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!((percentile(&values, 0.99), percentile(&values, 1.0)), (198.0, 200.0));
        assert_eq!(percentile(&[7.0], 0.0), 7.0);
        assert!(percentile(&[], 0.5).is_nan());
    }
}
