//! fio as the client of an NBD server.

use super::session::{Sample, Session, number};
use crate::command::capture;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::process::Command;

/// What fio is to do.
#[derive(Clone, Copy)]
pub struct Job {
    /// As fio's `--rw` names it.
    pub pattern: &'static str,
    pub block: u32,
    /// Of each connection.
    pub depth: u32,
    pub connections: u32,
    /// The disk's first bytes, which the job keeps to.
    pub range: u64,
    pub length: Length,
    /// A flush after so many writes.
    pub flush_every: Option<u64>,
    /// Bytes that no packing makes smaller and no two blocks share.
    pub fresh_bytes: bool,
}

/// When a job is over.
#[derive(Clone, Copy)]
pub enum Length {
    Seconds(f64),
    /// So many operations of all connections together.
    Operations(u64),
    /// The range once; with writes, a flush at the end counts.
    Once,
}

impl Job {
    /// Blocks of 4 KiB at random places.
    pub fn random(session: &Session, pattern: &'static str, depth: u32) -> Self {
        Job {
            pattern,
            block: 4096,
            depth,
            connections: 1,
            range: session.disk_bytes,
            length: Length::Seconds(session.seconds),
            flush_every: None,
            fresh_bytes: false,
        }
    }

    /// Blocks of 1 MiB one after the other, four at a time.
    pub fn sequential(pattern: &'static str, range: u64, length: Length) -> Self {
        Job { pattern, block: 1 << 20, depth: 4, connections: 1, range, length, flush_every: None, fresh_bytes: false }
    }

    /// Runs it; a sample of `p50`, `p99`, `rate` and `speed` of the reads or writes, and `flush` and `flush_p99` where there were flushes.
    pub fn run(&self, session: &Session, uri: &str, seed: u64) -> Result<Sample> {
        let output = session.place.path("fio.json");
        let mut command = Command::new("fio");
        command.args(["--name=job", "--ioengine=nbd", &format!("--uri={uri}"), &format!("--rw={}", self.pattern)]);
        command.args([&format!("--bs={}", self.block), &format!("--iodepth={}", self.depth)]);
        command.args([&format!("--size={}", self.range), &format!("--randseed={seed}"), "--percentile_list=50:99"]);
        if self.connections > 1 {
            command.args([&format!("--numjobs={}", self.connections), "--group_reporting"]);
        }
        match self.length {
            Length::Seconds(seconds) => {
                command.args(["--time_based", &format!("--runtime={}ms", (seconds * 1e3) as u64)]);
            }
            Length::Operations(operations) => {
                command.arg(format!("--number_ios={}", operations / u64::from(self.connections)));
            }
            Length::Once if self.pattern.contains("write") => {
                command.arg("--end_fsync=1");
            }
            Length::Once => {}
        }
        if let Some(writes) = self.flush_every {
            command.arg(format!("--fsync={writes}"));
        }
        if self.fresh_bytes {
            command.arg("--refill_buffers");
        }
        command.args(["--output-format=json", "--output"]).arg(&output);
        let said = capture(&mut command)?;
        let result = std::fs::read_to_string(&output)?;
        let result: Value =
            serde_json::from_str(&result).with_context(|| format!("fio wrote no JSON; it said: {said}"))?;
        let job = result.pointer("/jobs/0").with_context(|| format!("fio told of no job: {result}"))?;
        if number(job, "/error")? != 0.0 {
            bail!("fio had an error: {}", job["error"]);
        }
        self.sample(job)
    }

    fn sample(&self, job: &Value) -> Result<Sample> {
        let kind = if self.pattern.contains("write") { "write" } else { "read" };
        let of = |what: &str| number(job, &format!("/{kind}/{what}"));
        let mut sample = vec![
            ("p50", of("clat_ns/percentile/50.000000")?),
            ("p99", of("clat_ns/percentile/99.000000")?),
            ("rate", of("iops")?),
            ("speed", of("bw_bytes")?),
        ];
        if self.flush_every.is_some() {
            sample.push(("flush", number(job, "/sync/lat_ns/percentile/50.000000")?));
            sample.push(("flush_p99", number(job, "/sync/lat_ns/percentile/99.000000")?));
        }
        Ok(sample)
    }
}
