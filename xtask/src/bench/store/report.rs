//! What was measured: values of each runner by rounds, the bars they are held against, as tables for people and JSON for programs.

use crate::bench::report::processor;
use crate::command::{capture, in_root};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::path::Path;

/// What a value is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Nanoseconds,
    Seconds,
    PerSecond,
    BytesPerSecond,
    Bytes,
    Number,
}

/// On which side of its bound a value has to be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    AtMost,
    AtLeast,
}

/// A promise about a table.
struct Bar {
    text: String,
    values: Vec<f64>,
    side: Side,
    bound: f64,
}

/// One thing measured of several runners, by turns.
pub struct Table {
    pub name: String,
    unit: Unit,
    runners: Vec<(String, Vec<f64>)>,
    bars: Vec<Bar>,
    notes: Vec<String>,
}

impl Table {
    pub fn new(name: impl Into<String>, unit: Unit) -> Self {
        Table { name: name.into(), unit, runners: Vec::new(), bars: Vec::new(), notes: Vec::new() }
    }

    pub fn with(mut self, runner: impl Into<String>, values: Vec<f64>) -> Self {
        self.runners.push((runner.into(), values));
        self
    }

    fn values(&self, runner: &str) -> Option<&[f64]> {
        self.runners.iter().find(|(name, _)| name == runner).map(|(_, values)| values.as_slice())
    }

    /// Holds the ratio of two runners, round by round, against a bound. Without one of the two there is no bar.
    pub fn ratio(self, ours: &str, peer: &str, side: Side, bound: f64) -> Self {
        let (Some(a), Some(b)) = (self.values(ours), self.values(peer)) else { return self };
        let values = a.iter().zip(b).map(|(a, b)| a / b).collect();
        self.bar(format!("{ours} / {peer}"), values, side, bound)
    }

    /// Holds the difference of two runners, round by round, against a bound in the table's unit.
    pub fn difference(self, ours: &str, peer: &str, side: Side, bound: f64) -> Self {
        let (Some(a), Some(b)) = (self.values(ours), self.values(peer)) else { return self };
        let values = a.iter().zip(b).map(|(a, b)| a - b).collect();
        let unit = self.unit;
        let text = format!("{ours} - {peer}, in {}", plain_unit(unit));
        self.bar(text, values, side, bound)
    }

    /// Holds values, one a round, against a bound.
    pub fn bar(mut self, text: String, values: Vec<f64>, side: Side, bound: f64) -> Self {
        self.bars.push(Bar { text, values, side, bound });
        self
    }

    pub fn note(mut self, text: impl Into<String>) -> Self {
        self.notes.push(text.into());
        self
    }

    pub fn print(&self) {
        println!("\n{}", self.name);
        println!("| runner | median | least to most |\n|---|---|---|");
        for (runner, values) in &self.runners {
            let (least, most) = ends(values);
            let (middle, least, most) =
                (shown(median(values), self.unit), shown(least, self.unit), shown(most, self.unit));
            println!("| {runner} | {middle} | {least} to {most} |");
        }
        for bar in &self.bars {
            println!("{}", bar.line());
        }
        for note in &self.notes {
            println!("{note}");
        }
    }

    fn to_json(&self) -> Value {
        let runners: Value = self
            .runners
            .iter()
            .map(|(runner, values)| json!({ "runner": runner, "median": median(values), "values": values }))
            .collect();
        let bars: Value = self
            .bars
            .iter()
            .map(|bar| {
                json!({
                    "bar": bar.text, "median": median(&bar.values), "values": bar.values, "bound": bar.bound,
                    "side": if bar.side == Side::AtMost { "at most" } else { "at least" }, "holds": bar.holds(),
                })
            })
            .collect();
        json!({ "table": self.name, "unit": plain_unit(self.unit), "runners": runners, "bars": bars, "notes": self.notes })
    }
}

impl Bar {
    fn holds(&self) -> bool {
        let value = median(&self.values);
        match self.side {
            Side::AtMost => value <= self.bound,
            Side::AtLeast => value >= self.bound,
        }
    }

    fn line(&self) -> String {
        let (least, most) = ends(&self.values);
        format!(
            "{}: {} {:.3} ({least:.3} to {most:.3}), {} {:.3} is asked",
            if self.holds() { "holds" } else { "MISSED" },
            self.text,
            median(&self.values),
            if self.side == Side::AtMost { "at most" } else { "at least" },
            self.bound
        )
    }
}

/// The rows of this run and of earlier ones.
pub struct Report {
    rows: Vec<Value>,
    quick: bool,
}

impl Report {
    /// Takes over what an earlier run wrote.
    pub fn open(file: &Path, quick: bool) -> Self {
        let written = std::fs::read_to_string(file).ok().and_then(|text| serde_json::from_str::<Value>(&text).ok());
        let rows = written.and_then(|report| report["rows"].as_array().cloned()).unwrap_or_default();
        Report { rows, quick }
    }

    /// Puts a row in, in place of an earlier one of that name.
    pub fn put(&mut self, name: &str, about: &str, tables: &[Table], rounds: u32) {
        let row = json!({
            "row": name, "about": about, "rounds": rounds, "quick": self.quick, "date_utc": date(), "commit": commit(),
            "load_average": std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
            "tables": tables.iter().map(Table::to_json).collect::<Value>(),
        });
        match self.rows.iter_mut().find(|row| row["row"] == name) {
            Some(old) => *old = row,
            None => self.rows.push(row),
        }
    }

    pub fn write(&self, file: &Path) -> Result<()> {
        let report = json!({ "format": 1, "bench": "store", "processor": processor(), "rows": self.rows });
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(file, serde_json::to_string_pretty(&report)? + "\n")
            .with_context(|| format!("cannot write {}", file.display()))
    }
}

fn date() -> String {
    let date = capture(std::process::Command::new("date").args(["--utc", "+%Y-%m-%d %H:%M"]));
    date.unwrap_or_default().trim().to_owned()
}

/// The commit that is measured, with a plus if something was changed since.
fn commit() -> String {
    let commit = capture(in_root("git").args(["describe", "--always", "--dirty=+", "--abbrev=10"]));
    commit.unwrap_or_default().trim().to_owned()
}

/// Of an even number of values the mean of the middle two.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => sorted[len / 2],
        len => (sorted[len / 2 - 1] + sorted[len / 2]) / 2.0,
    }
}

fn ends(values: &[f64]) -> (f64, f64) {
    values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), &value| (least.min(value), most.max(value)))
}

fn plain_unit(unit: Unit) -> &'static str {
    match unit {
        Unit::Nanoseconds => "ns",
        Unit::Seconds => "s",
        Unit::PerSecond => "1/s",
        Unit::BytesPerSecond => "B/s",
        Unit::Bytes => "B",
        Unit::Number => "1",
    }
}

fn shown(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Nanoseconds if value < 1e3 => format!("{value:.0} ns"),
        Unit::Nanoseconds if value < 1e6 => format!("{:.1} us", value / 1e3),
        Unit::Nanoseconds => format!("{:.2} ms", value / 1e6),
        Unit::Seconds if value < 1.0 => format!("{:.1} ms", value * 1e3),
        Unit::Seconds => format!("{value:.2} s"),
        Unit::PerSecond => format!("{value:.0} /s"),
        Unit::BytesPerSecond => format!("{:.0} MiB/s", value / f64::from(1 << 20)),
        Unit::Bytes => format!("{:.1} MiB", value / f64::from(1 << 20)),
        Unit::Number => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_of_the_turns_of_one_round() {
        // The machine was four times slower in the second round: the ratio says nothing of it.
        let table = Table::new("read", Unit::Nanoseconds).with("ours", vec![10.0, 40.0, 11.0]);
        let table = table.with("peer", vec![10.0, 40.0, 10.0]).ratio("ours", "peer", Side::AtMost, 1.15);
        assert_eq!(median(&table.bars[0].values), 1.0);
        assert!(table.bars[0].holds());
        assert!(table.bars[0].line().starts_with("holds: ours / peer 1.000 (1.000 to 1.100), at most 1.150"));
    }

    #[test]
    fn a_bar_that_is_missed_says_so() {
        let table = Table::new("iops", Unit::PerSecond).with("in process", vec![150.0]).with("NBD", vec![100.0]);
        let table =
            table.ratio("in process", "NBD", Side::AtLeast, 2.0).ratio("in process", "nobody", Side::AtLeast, 2.0);
        assert_eq!(table.bars.len(), 1, "without the peer there is nothing to compare with");
        assert!(table.bars[0].line().starts_with("MISSED"));
    }

    #[test]
    fn a_row_that_is_measured_again_takes_the_place_of_the_old_one() {
        let mut report = Report { rows: vec![json!({ "row": "read" }), json!({ "row": "write" })], quick: true };
        report.put("read", "", &[], 3);
        assert_eq!(report.rows.len(), 2);
        assert_eq!((&report.rows[0]["row"], &report.rows[0]["rounds"]), (&json!("read"), &json!(3)));
    }

    #[test]
    fn the_median_of_two_is_between_them() {
        assert_eq!(median(&[1.0, 3.0]), 2.0);
        assert_eq!(median(&[9.0, 1.0, 3.0]), 3.0);
    }
}
