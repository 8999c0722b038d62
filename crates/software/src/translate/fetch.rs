//! The bytes that become a unit.

use iced_x86::InstructionInfoFactory;
use polder_memory::{GuestMemory, PAGE_SIZE, PageNotes, raw};

use super::guest_code::{self, INSTRUCTION_BYTES_MAX, ITEMS_MAX, Item};
use crate::block_cache;
use crate::cpu::Cpu;

/// Attempts to read bytes that another processor keeps changing.
const READS_MAX: u32 = 4;

/// Bytes of code in one page of RAM.
struct Piece {
    page_index: usize,
    offset: u64,
    source: *const u8,
    len: usize,
}

impl Piece {
    fn new(cpu: &Cpu, page_number: u64, offset: u64, len: usize) -> Option<Piece> {
        let page = cpu.services.memory.page(page_number)?;
        debug_assert!(offset as usize + len <= PAGE_SIZE as usize);
        // SAFETY: inside the page.
        let source = unsafe { page.pointer.add(offset as usize) };
        Some(Piece { page_index: page.page_index, offset, source, len })
    }
}

/// Bytes that a unit and what it depends on may lie in.
const BYTES_MAX: usize = PAGE_SIZE as usize + INSTRUCTION_BYTES_MAX;
/// Most units and what their jumps lead to lie in so many bytes.
const BYTES_OFTEN: usize = 1024;

type Bytes = Box<[u8; BYTES_MAX]>;

/// Bytes of all pieces, one after the other.
fn read(pieces: &[Option<Piece>; 2], bytes: &mut [u8; BYTES_MAX]) {
    let mut at = 0;
    for piece in pieces.iter().flatten() {
        let to = &mut bytes[at..at + piece.len];
        // SAFETY: the piece lies in a page of RAM; `to` is as long.
        unsafe { raw::copy(piece.source, to.as_mut_ptr(), piece.len) };
        at += piece.len;
    }
}

/// Where a unit's code is.
pub struct Extent {
    /// The 64-byte granules of the first page that its instructions lie in, or whose bytes they depend on: those tell which flags are live.
    pub granules: u64,
    /// Number of the second page of a single instruction that lies in two.
    pub second_page: Option<u64>,
}

/// Reads code; keeps memory for it.
pub struct Reader {
    /// The instructions of the unit that was read last.
    pub items: Vec<Item>,
    info: InstructionInfoFactory,
    bytes: Bytes,
    again: Bytes,
}

impl Default for Reader {
    fn default() -> Reader {
        Reader {
            items: Vec::new(),
            info: InstructionInfoFactory::new(),
            bytes: Box::new([0; BYTES_MAX]),
            again: Box::new([0; BYTES_MAX]),
        }
    }
}

impl Reader {
    /// Reads the unit at `linear`; what it depends on is watched from now on. `readable` bytes of the first page may be used.
    pub fn read(&mut self, cpu: &mut Cpu, linear: u64, page_number: u64, readable: usize) -> Option<Extent> {
        let often = readable.min(BYTES_OFTEN);
        let extent = self.read_bytes(cpu, linear, page_number, often, often == readable);
        if extent.is_none() && often < readable {
            return self.read_bytes(cpu, linear, page_number, readable, true);
        }
        extent
    }

    /// As [`Reader::read`]. Without `is_all` there is more in the page: the answer is `None` if more is needed.
    fn read_bytes(
        &mut self,
        cpu: &mut Cpu,
        linear: u64,
        page_number: u64,
        readable: usize,
        is_all: bool,
    ) -> Option<Extent> {
        let Reader { items, info, bytes, again } = self;
        let offset = linear % PAGE_SIZE;
        let options = cpu.model.decoder_options();
        let mut pieces = [Some(Piece::new(cpu, page_number, offset, readable)?), None];
        let mut second_page = None;
        for _ in 0..READS_MAX {
            read(&pieces, bytes);
            let mut looked = guest_code::decode_into(items, info, &bytes[..readable], linear, options, ITEMS_MAX);
            if items.is_empty() && offset as usize + readable == PAGE_SIZE as usize && readable < INSTRUCTION_BYTES_MAX
            {
                let next = next_page(linear);
                let len = INSTRUCTION_BYTES_MAX - readable;
                if second_page.is_none() {
                    let number = block_cache::code_page(cpu, next).ok()?;
                    if number == cpu.apic_page || cpu.debugger.uncut(next, len) != len {
                        return None;
                    }
                    pieces[1] = Some(Piece::new(cpu, number, 0, len)?);
                    second_page = Some(number);
                    read(&pieces, bytes);
                }
                guest_code::decode_into(items, info, &bytes[..INSTRUCTION_BYTES_MAX], linear, options, 1);
                let len = items.last()?.instruction.len();
                // Without a look at what is behind it.
                guest_code::decode_into(items, info, &bytes[..len], linear, options, 1);
                looked = 0;
            }
            let len = items.last()?.instruction.next_ip().wrapping_sub(linear) as usize;
            if !is_all && readable - len < INSTRUCTION_BYTES_MAX {
                return None;
            }
            let looked_at = looked;
            let granules = GuestMemory::granules(offset, len.min(readable) as u64) | looked;
            let mut left = len;
            for piece in pieces.iter().flatten() {
                let here = left.min(piece.len);
                left -= here;
                let granules = GuestMemory::granules(piece.offset, here as u64) | std::mem::take(&mut looked);
                if granules != 0 && cpu.services.memory.notes().watch_code(piece.page_index, granules) {
                    PageNotes::publish();
                }
            }
            read(&pieces, again);
            let is_same = |granule: u64| {
                // Of what was read.
                let start = ((granule * 64).saturating_sub(offset) as usize).min(readable);
                let end = ((granule * 64 + 64).saturating_sub(offset) as usize).min(readable);
                again[start..end] == bytes[start..end]
            };
            if again[..len] == bytes[..len] && (0..64).filter(|granule| looked_at >> granule & 1 != 0).all(is_same) {
                return Some(Extent { granules, second_page: second_page.filter(|_| len > readable) });
            }
        }
        None
    }
}

/// The start of the page behind that of an address.
pub fn next_page(linear: u64) -> u64 {
    (linear | (PAGE_SIZE - 1)).wrapping_add(1)
}
