//! What was measured, as a table for people and JSON for programs.

use anyhow::{Context, Result, bail};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;

/// Who runs the rows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Runner {
    Native,
    Polder,
    /// Polder without translation.
    Interpreter,
    Tcg,
}

impl Runner {
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Polder => "polder",
            Self::Interpreter => "interpreter",
            Self::Tcg => "tcg",
        }
    }
}

impl FromStr for Runner {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "native" => Ok(Self::Native),
            "polder" => Ok(Self::Polder),
            "interpreter" => Ok(Self::Interpreter),
            "tcg" => Ok(Self::Tcg),
            other => bail!("there is no runner {other}: choose from native, polder, interpreter and tcg"),
        }
    }
}

/// What a row spends its time in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Compute,
    Kernel,
}

/// Rows that mostly run the guest's kernel: system calls, switches, processes, page tables, files.
const KERNEL_ROWS: [&str; 12] = [
    "getpid",
    "read1",
    "stat",
    "pipe",
    "yield",
    "fork",
    "forkexec",
    "forkexecdyn",
    "mmap1",
    "fault256",
    "file",
    "sh_loop",
];

impl Kind {
    fn of(row: &str) -> Kind {
        if KERNEL_ROWS.contains(&row) { Kind::Kernel } else { Kind::Compute }
    }
}

/// One row of one run.
struct Row {
    name: String,
    nanoseconds: f64,
    checksum: Option<String>,
}

/// Everything one run printed.
#[derive(Default)]
struct Measured {
    rows: Vec<Row>,
    failed: Vec<String>,
}

impl Measured {
    /// Reads the lines ROW, OPENSSL and FAIL; everything else on a console is not ours.
    fn parse(output: &str) -> Self {
        let mut measured = Self::default();
        for line in output.lines().map(str::trim) {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["ROW", name, time, checksum] => {
                    if let Ok(nanoseconds) = time.parse() {
                        measured.rows.push(Row { name: name.into(), nanoseconds, checksum: Some(checksum.into()) });
                    }
                }
                ["OPENSSL", name, figures] => measured.rows.extend(openssl_row(name, figures)),
                ["FAIL", name, ..] => measured.failed.push(name.to_string()),
                _ => {}
            }
        }
        measured
    }
}

/// `openssl speed -mr`: bytes a second of 8 KiB blocks, or private operations a second for RSA.
fn openssl_row(name: &str, figures: &str) -> Option<Row> {
    let fields: Vec<&str> = figures.split(':').collect();
    let nanoseconds = if name.contains("rsa") {
        1e9 / fields.get(2)?.parse::<f64>().ok()?
    } else {
        8192.0 / fields.last()?.parse::<f64>().ok()? * 1e9
    };
    (nanoseconds.is_finite() && nanoseconds > 0.0).then(|| Row { name: name.into(), nanoseconds, checksum: None })
}

/// All rounds of all runners.
#[derive(Default)]
pub struct Report {
    /// Rows in the order they were first seen.
    order: Vec<String>,
    times: BTreeMap<(String, Runner), Vec<f64>>,
    checksums: BTreeMap<(String, Runner), String>,
    runners: Vec<Runner>,
    failures: Vec<String>,
    /// A run did not come to its end.
    incomplete: bool,
}

impl Report {
    /// Takes in what a run printed. Its rows are kept as ROW, or as ROW/VARIANT if the run is a variant, in which the checksums are
    /// the same as in the row itself.
    pub fn add(&mut self, runner: Runner, variant: Option<&str>, output: &str) {
        let mut measured = Measured::parse(output);
        if !output.contains("BENCH END") {
            let tail: Vec<&str> = output.lines().rev().take(15).collect();
            println!("{} did not come to its end; its last lines were:", runner.name());
            tail.iter().rev().for_each(|line| println!("  | {line}"));
            self.incomplete = true;
        }
        if let Some(variant) = variant {
            measured.rows.iter_mut().for_each(|row| row.name = format!("{}/{variant}", row.name));
        }
        if !self.runners.contains(&runner) {
            self.runners.push(runner);
        }
        self.failures.extend(measured.failed.iter().map(|row| format!("{row} failed in {}", runner.name())));
        for row in measured.rows {
            if !self.order.contains(&row.name) {
                self.order.push(row.name.clone());
            }
            if let Some(checksum) = row.checksum {
                let others = self.checksums.iter().filter(|((name, _), _)| program(name) == program(&row.name));
                if let Some((_, other)) = others.map(|(key, sum)| (key.1, sum)).find(|(_, sum)| **sum != checksum) {
                    self.failures.push(format!("{} gave {checksum} in {}, elsewhere {other}", row.name, runner.name()));
                }
                self.checksums.insert((row.name.clone(), runner), checksum);
            }
            self.times.entry((row.name, runner)).or_default().push(row.nanoseconds);
        }
    }

    /// The median time of a row.
    pub fn median(&self, row: &str, runner: Runner) -> Option<f64> {
        let mut times = self.times.get(&(row.to_string(), runner))?.clone();
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied()
    }

    /// How many times longer `runner` takes than `base`.
    fn ratio(&self, row: &str, runner: Runner, base: Runner) -> Option<f64> {
        Some(self.median(row, runner)? / self.median(row, base)?)
    }

    pub fn print(&self) {
        println!("| row | native | polder | interpreter | tcg | polder / native | tcg / native | tcg / polder |");
        println!("|---|---|---|---|---|---|---|---|");
        for row in &self.order {
            let time = |runner| self.median(row, runner).map_or("-".to_string(), shown_time);
            let ratio = |a, b| self.ratio(row, a, b).map_or("-".to_string(), |ratio| format!("{ratio:.2}"));
            println!(
                "| {row} | {} | {} | {} | {} | {} | {} | {} |",
                time(Runner::Native),
                time(Runner::Polder),
                time(Runner::Interpreter),
                time(Runner::Tcg),
                ratio(Runner::Polder, Runner::Native),
                ratio(Runner::Tcg, Runner::Native),
                ratio(Runner::Tcg, Runner::Polder),
            );
        }
        for (kind, name) in [(Some(Kind::Compute), "compute"), (Some(Kind::Kernel), "kernel"), (None, "all")] {
            if let Some((mean, rows)) = self.geometric_mean(kind) {
                println!(
                    "Over the {name} rows, TCG needs {mean:.2} times polder's time (geometric mean of {rows} rows)."
                );
            }
        }
        let slower: Vec<&str> = self
            .order
            .iter()
            .filter(|row| self.ratio(row, Runner::Tcg, Runner::Polder).is_some_and(|ratio| ratio < 1.0))
            .map(String::as_str)
            .collect();
        if !slower.is_empty() {
            println!("Slower than TCG: {}.", slower.join(", "));
        }
        for failure in &self.failures {
            println!("WRONG: {failure}");
        }
    }

    /// The geometric mean of TCG's time by polder's over the rows of a kind that both ran, and how many these are.
    fn geometric_mean(&self, kind: Option<Kind>) -> Option<(f64, usize)> {
        let ratios: Vec<f64> = self
            .order
            .iter()
            .filter(|row| kind.is_none_or(|kind| kind == Kind::of(row)))
            .filter_map(|row| self.ratio(row, Runner::Tcg, Runner::Polder))
            .map(f64::ln)
            .collect();
        (!ratios.is_empty()).then(|| ((ratios.iter().sum::<f64>() / ratios.len() as f64).exp(), ratios.len()))
    }

    pub fn write(&self, bench: &str, file: &Path) -> Result<()> {
        let rows: Vec<_> = self
            .order
            .iter()
            .map(|row| {
                let mut entry = json!({ "row": row });
                for runner in &self.runners {
                    entry[format!("{}_ns", runner.name())] = json!(self.median(row, *runner));
                    entry[format!("{}_checksum", runner.name())] = json!(self.checksums.get(&(row.clone(), *runner)));
                }
                entry
            })
            .collect();
        let report = json!({
            "format": 1, "bench": bench, "processor": processor(), "rows": rows,
            "tcg_by_polder": {
                "compute": self.geometric_mean(Some(Kind::Compute)).map(|mean| mean.0),
                "kernel": self.geometric_mean(Some(Kind::Kernel)).map(|mean| mean.0),
            },
            "failures": self.failures, "incomplete": self.incomplete,
        });
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(file, serde_json::to_string_pretty(&report)? + "\n")
            .with_context(|| format!("cannot write {}", file.display()))
    }

    /// An error if a result was wrong or missing: a fast wrong engine is no engine.
    pub fn verdict(&self) -> Result<()> {
        if !self.failures.is_empty() {
            bail!("{} results were wrong", self.failures.len());
        }
        if self.incomplete {
            bail!("a run did not come to its end");
        }
        Ok(())
    }
}

/// The row that a row is a variant of: itself if it is none.
fn program(row: &str) -> &str {
    row.split_once('/').map_or(row, |(program, _)| program)
}

/// The model name of this machine's processor.
pub fn processor() -> String {
    let facts = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    facts.lines().find_map(|line| line.strip_prefix("model name\t: ")).unwrap_or("unknown").to_string()
}

fn shown_time(nanoseconds: f64) -> String {
    match nanoseconds {
        time if time < 1e3 => format!("{time:.0} ns"),
        time if time < 1e6 => format!("{:.2} us", time / 1e3),
        time if time < 1e9 => format!("{:.2} ms", time / 1e6),
        time => format!("{:.2} s", time / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_checksum_fails_the_bench_however_fast_it_was() {
        let mut report = Report::default();
        report.add(Runner::Native, None, "noise\nROW fib 100.0 00aa\nBENCH END\n");
        report.add(Runner::Polder, None, "ROW fib 10.0 00ab\r\n");
        assert!(report.verdict().is_err());
        assert_eq!(report.ratio("fib", Runner::Polder, Runner::Native), Some(0.1));
    }

    #[test]
    fn a_variant_must_give_the_checksum_of_its_row() {
        let mut report = Report::default();
        report.add(Runner::Polder, None, "ROW compile 20.0 00aa\nBENCH END\n");
        report.add(Runner::Tcg, Some("2vcpus"), "ROW compile 10.0 00aa\nBENCH END\n");
        report.verdict().unwrap();
        report.add(Runner::Polder, Some("2vcpus"), "ROW compile 10.0 00ab\nBENCH END\n");
        assert!(report.verdict().is_err());
        assert_eq!(report.median("compile/2vcpus", Runner::Tcg), Some(10.0));
    }

    #[test]
    fn means_are_of_compute_and_kernel_rows_apart() {
        let mut report = Report::default();
        report.add(Runner::Polder, None, "ROW fib 10.0 1\nROW sha256 10.0 2\nROW getpid 10.0 3\n");
        report.add(Runner::Tcg, None, "ROW fib 20.0 1\nROW sha256 80.0 2\nROW getpid 30.0 3\n");
        let (compute, rows) = report.geometric_mean(Some(Kind::Compute)).unwrap();
        assert!((compute - 4.0).abs() < 1e-9 && rows == 2);
        let (kernel, rows) = report.geometric_mean(Some(Kind::Kernel)).unwrap();
        assert!((kernel - 3.0).abs() < 1e-9 && rows == 1);
        assert_eq!(report.geometric_mean(None).map(|mean| mean.1), Some(3));
    }

    #[test]
    fn openssl_figures_become_times() {
        let measured = Measured::parse(
            "OPENSSL openssl_sha256 22:sha256:1000000\nOPENSSL openssl_rsa2048 4:2048:1000.0:30000.0\n",
        );
        assert_eq!(measured.rows[0].nanoseconds, 8_192_000.0);
        assert_eq!(measured.rows[1].nanoseconds, 1e6);
    }
}
