//! Translated code for people to read: listings of chosen units, and a map for `perf`.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;

use iced_x86::{Decoder, DecoderOptions, FastFormatter};

use super::guest_code::Item;

/// What is told of translated code.
#[derive(Debug, Default)]
pub struct Listings {
    /// Units that hold the instruction at this guest address are listed.
    pub address: Option<u64>,
    /// `/tmp/perf-PID.map`: a line for each unit.
    pub map: Option<File>,
}

impl Listings {
    /// Whether a unit of these instructions is listed.
    pub fn wants(&self, items: &[Item]) -> bool {
        self.address.is_some_and(|address| items.iter().any(|item| item.instruction.ip() == address))
    }

    /// Whether the chosen address may lie in a unit from `linear` on.
    pub fn address_is_near(&self, linear: u64) -> bool {
        self.address.is_some_and(|address| address / polder_memory::PAGE_SIZE == linear / polder_memory::PAGE_SIZE)
    }

    /// Lists a unit: each guest instruction (after `>`) and the host code that it became. `starts` are the places of the
    /// instructions in `code`, which lies at `host`.
    pub fn list(&self, items: &[Item], starts: &[usize], code: &[u8], host: u64) {
        if self.wants(items) {
            tracing::info!(target: "polder::translation", "\n{}", listing(items, starts, code, host));
        }
    }

    /// Writes a unit's line of the map.
    pub fn name(&mut self, linear: u64, host: u64, len: usize) {
        if let Some(map) = &mut self.map {
            // A map that cannot be written is a map that lacks a line.
            let _ = writeln!(map, "{host:x} {len:x} guest_{linear:x}");
        }
    }
}

fn listing(items: &[Item], starts: &[usize], code: &[u8], host: u64) -> String {
    let mut formatter = FastFormatter::new();
    let mut text = String::new();
    let mut decoder = Decoder::with_ip(64, code, host, DecoderOptions::NONE);
    let mut next = items.iter().zip(starts).peekable();
    while decoder.can_decode() {
        let position = decoder.position();
        while let Some((item, _)) = next.next_if(|&(_, &start)| start <= position) {
            let _ = write!(text, "> {:x} ", item.instruction.ip());
            formatter.format(&item.instruction, &mut text);
            text.push('\n');
        }
        let instruction = decoder.decode();
        let _ = write!(text, "    {:x} ", instruction.ip());
        formatter.format(&instruction, &mut text);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::translate::guest_code::{ITEMS_MAX, decode};

    #[test]
    fn guest_instructions_stand_above_their_host_code() {
        // add eax, 1; ret
        let items = decode(&[0x83, 0xc0, 1, 0xc3], 0x1000, DecoderOptions::NONE, ITEMS_MAX);
        let text = listing(&items, &[0, 3], &[0x83, 0xc0, 1, 0x90, 0xc3], 0x7000);
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        assert_eq!(lines.len(), 5, "{text}");
        assert!(lines[0].starts_with("> 1000 add eax"), "{text}");
        assert!(lines[1].starts_with("7000 add eax"), "{text}");
        assert!(lines[2].starts_with("> 1003 ret") && lines[4].starts_with("7004 ret"), "{text}");
        let listings = Listings { address: Some(0x1003), map: None };
        assert!(listings.wants(&items) && !Listings { address: Some(0x1001), map: None }.wants(&items));
    }
}
