//! The decoded blocks of one vCPU.
//!
//! Blocks are found in two steps. The jump table leads from a linear address straight to a block; an entry counts only while [`crate::tlb::Tlb::fetch_tag`]
//! is what it was. Behind it, buckets lead from guest-physical addresses to blocks, so that a block outlives every change of translations.
//! Both the ops and the blocks live in arenas of fixed size; when one is full, everything is dropped and decoding starts again.
//!
//! Before bytes are decoded for keeping, their granules are watched in the memory's notes; whoever writes there has the
//! engine call [`Blocks::invalidate`] on each vCPU's thread.

use std::cell::Cell;
use std::collections::HashMap;

use iced_x86::{Decoder, DecoderError, FlowControl, Instruction};
use polder_machine::AccessSize;
use polder_memory::{GuestMemory, PAGE_SIZE, PageNotes, raw};

use crate::block::{Block, COLD_FOR_EVER, Successor};
use crate::cpu::{CS, CodeSize, Cpu, is_canonical};
use crate::fault::Fault;
use crate::lower::{self, CodeContext};
use crate::op::{Flow, Op, end_block};
use crate::page_walk::{Access, Privilege};

/// Ops that a vCPU keeps decoded: 16 MiB.
const OPS_MAX: usize = 512 << 10;
/// Blocks that a vCPU keeps decoded.
const BLOCKS_MAX: usize = 128 << 10;
/// Instructions in a block.
const BLOCK_OPS_MAX: usize = 64;
/// Bytes of a block.
const BLOCK_BYTES_MAX: usize = 512;
/// The longest instruction (SDM vol. 2, 2.3.11).
const INSTRUCTION_BYTES_MAX: usize = 15;
const BUCKETS: usize = 64 << 10;
const JUMPS: usize = 16384;
const NO_BLOCK: u32 = u32::MAX;
/// Attempts to decode bytes that another processor keeps changing, before they are run without keeping them.
const DECODES_MAX: u32 = 4;

/// Decoded blocks, owned beside a [`Cpu`].
pub struct Blocks {
    ops: Vec<Op>,
    blocks: Vec<Block>,
    buckets: Box<[u32]>,
    jumps: Box<[Successor]>,
    /// Blocks with bytes on a guest-physical page.
    pages: HashMap<u64, Vec<u32>>,
    /// An instruction that is not kept: its op, a terminator, and its block.
    single_ops: Box<[Op; 2]>,
    single_block: Box<Block>,
}

// SAFETY: the pointers point into the arenas that move along.
unsafe impl Send for Blocks {}

/// Bytes of one instruction that are not kept, with the pages they lie on.
struct Fetched {
    bytes: [u8; INSTRUCTION_BYTES_MAX],
    len: usize,
    /// All bytes lie in RAM.
    ram: bool,
    physical: u64,
    last_page: u64,
}

impl Default for Blocks {
    fn default() -> Self {
        Self::new()
    }
}

impl Blocks {
    /// An empty cache.
    pub fn new() -> Self {
        let empty = Op::empty(end_block);
        Blocks {
            ops: Vec::with_capacity(OPS_MAX),
            blocks: Vec::with_capacity(BLOCKS_MAX),
            buckets: vec![NO_BLOCK; BUCKETS].into_boxed_slice(),
            jumps: vec![Successor::NONE; JUMPS].into_boxed_slice(),
            pages: HashMap::new(),
            single_ops: Box::new([empty.clone(), empty]),
            single_block: Box::new(Block {
                ops: std::ptr::null(),
                op_count: 0,
                bytes: 0,
                physical: 0,
                last_page: 0,
                code: CodeSize::Bits16,
                valid: Cell::new(false),
                heat: Cell::new(COLD_FOR_EVER),
                next: Cell::new(NO_BLOCK),
                starts_fused: false,
                chains: false,
                successors: [const { Cell::new(Successor::NONE) }; 2],
            }),
        }
    }

    /// Drops every block.
    pub fn flush(&mut self) {
        self.ops.clear();
        self.blocks.clear();
        self.pages.clear();
        self.buckets.fill(NO_BLOCK);
        self.jumps.fill(Successor::NONE);
    }

    /// Drops the blocks with bytes in the 64-byte granules (a bit mask) of a guest-physical page.
    pub fn invalidate(&mut self, page_number: u64, granules: u64) {
        let Some(on_page) = self.pages.get_mut(&page_number) else { return };
        let mut dropped = Vec::new();
        on_page.retain(|&id| {
            let stale = self.blocks[id as usize].granules(page_number) & granules != 0;
            if stale {
                dropped.push(id);
            }
            !stale
        });
        for id in dropped {
            self.unlink(id);
        }
    }

    /// Takes a block out of its bucket; the jump table sees that it is not valid. Its memory comes free with the next flush.
    fn unlink(&mut self, id: u32) {
        let block = &self.blocks[id as usize];
        block.valid.set(false);
        let bucket = bucket(block.physical, block.code);
        let next = block.next.get();
        if self.buckets[bucket] == id {
            self.buckets[bucket] = next;
            return;
        }
        let mut at = self.buckets[bucket];
        while at != NO_BLOCK {
            let cell = &self.blocks[at as usize].next;
            at = cell.get();
            if at == id {
                cell.set(next);
                return;
            }
        }
    }

    /// A block that leads nowhere: what a run of blocks begins behind.
    pub(crate) fn nowhere(&self) -> *const Block {
        &raw const *self.single_block
    }

    /// As [`Blocks::find`], on the way out of the block `last`.
    #[inline(always)]
    pub(crate) fn find_after(&mut self, last: *const Block, cpu: &mut Cpu) -> Result<*const Block, Fault> {
        // SAFETY: `last` points into the arena of blocks or to the single block, whose memory stays in place. Even if it has been given to another
        // block since, successors there are as true as here.
        let last = unsafe { &*last };
        if !last.chains {
            return self.find(cpu);
        }
        let linear = linear_rip(cpu);
        for successor in &last.successors {
            let Successor { linear: to, fetch_tag, block } = successor.get();
            if to == linear && fetch_tag == cpu.tlb.fetch_tag {
                // SAFETY: successors point into the arena of blocks and are cleared with it.
                let next = unsafe { &*block };
                if next.valid.get() && (cpu.is_64_bit() || inside_limit(cpu, next.bytes)) {
                    return Ok(block);
                }
            }
        }
        let block = self.find(cpu)?;
        if !std::ptr::eq(block, &raw const *self.single_block) {
            last.successors[1].set(last.successors[0].get());
            last.successors[0].set(Successor { linear, fetch_tag: cpu.tlb.fetch_tag, block });
        }
        Ok(block)
    }

    /// The block at `cpu.rip`, decoded if need be; or the fault of the instruction fetch.
    #[inline(always)]
    pub(crate) fn find(&mut self, cpu: &mut Cpu) -> Result<*const Block, Fault> {
        let linear = linear_rip(cpu);
        let jump = &self.jumps[jump_index(linear)];
        if jump.linear == linear && jump.fetch_tag == cpu.tlb.fetch_tag && !jump.block.is_null() {
            // SAFETY: entries point into the arena of blocks and are cleared with it.
            let block = unsafe { &*jump.block };
            if block.valid.get() && (cpu.is_64_bit() || inside_limit(cpu, block.bytes)) {
                return Ok(block);
            }
        }
        self.find_slow(cpu, linear)
    }

    /// As [`Blocks::find`], but the first op of the block is a single instruction.
    pub(crate) fn find_single(&mut self, cpu: &mut Cpu) -> Result<*const Block, Fault> {
        let block = self.find(cpu)?;
        // SAFETY: `find` gives a valid block.
        if unsafe { (*block).starts_fused } {
            let linear = linear_rip(cpu);
            let fetched = fetch(cpu, linear)?;
            return self.decode_single(cpu, &fetched);
        }
        Ok(block)
    }

    /// Sets how often the block at RIP counts as having run.
    pub(crate) fn set_heat(&mut self, cpu: &mut Cpu, heat: u32) {
        if let Ok(block) = self.find(cpu) {
            // SAFETY: `find` gives a valid block.
            unsafe { (*block).heat.set(heat) };
        }
    }

    /// Tidies up after running: nothing points into the arenas any more.
    pub(crate) fn finish(&mut self, cpu: &mut Cpu) {
        if cpu.running.abandoned {
            cpu.running.abandoned = false;
            let index = (cpu.running.block() as usize).wrapping_sub(self.blocks.as_ptr() as usize) / size_of::<Block>();
            if index < self.blocks.len() && self.blocks[index].valid.get() {
                let (first, last) = (self.blocks[index].first_page(), self.blocks[index].last_page);
                for page in [first, last] {
                    if let Some(on_page) = self.pages.get_mut(&page) {
                        on_page.retain(|&id| id as usize != index);
                    }
                }
                self.unlink(index as u32);
            }
        }
        cpu.running.clear();
    }

    /// Remembers the way from a linear address to a block.
    fn remember(&mut self, cpu: &mut Cpu, linear: u64, block: *const Block) {
        // SAFETY: callers have just found the block.
        let bytes = unsafe { (*block).bytes };
        cpu.tlb.note_way(linear);
        cpu.tlb.note_way(linear.wrapping_add(u64::from(bytes) - 1));
        self.jumps[jump_index(linear)] = Successor { linear, fetch_tag: cpu.tlb.fetch_tag, block };
    }

    #[cold]
    #[inline(never)]
    fn find_slow(&mut self, cpu: &mut Cpu, linear: u64) -> Result<*const Block, Fault> {
        check_rip(cpu, linear)?;
        let page_number = code_page(cpu, linear)?;
        let physical = page_number * PAGE_SIZE + linear % PAGE_SIZE;
        let code = cpu.mode.code;
        if cpu.debugger.cuts_at(linear) {
            if cpu.debugger.stops_at(linear) {
                return Err(cpu.raise_debugger());
            }
            let fetched = fetch(cpu, linear)?;
            return self.decode_single(cpu, &fetched);
        }
        // The usual reason to be here is that some translation has changed, but not this one.
        let jump = self.jumps[jump_index(linear)];
        if jump.linear == linear && !jump.block.is_null() {
            // SAFETY: entries point into the arena of blocks and are cleared with it.
            let block = unsafe { &*jump.block };
            let same = block.physical == physical && block.code == code && block.last_page == page_number;
            if same && block.valid.get() && (cpu.is_64_bit() || inside_limit(cpu, block.bytes)) {
                let block: *const Block = block;
                self.remember(cpu, linear, block);
                return Ok(block);
            }
        }
        let mut at = self.buckets[bucket(physical, code)];
        while let Some(block) = self.blocks.get(at as usize) {
            let is_whole = cpu.debugger.uncut(linear, block.bytes as usize) == block.bytes as usize;
            let same = block.physical == physical && block.code == code && is_whole;
            if same && (cpu.is_64_bit() || inside_limit(cpu, block.bytes)) {
                let crosses = linear % PAGE_SIZE + u64::from(block.bytes) > PAGE_SIZE;
                if !crosses || code_page(cpu, (linear | (PAGE_SIZE - 1)).wrapping_add(1))? == block.last_page {
                    let block: *const Block = block;
                    self.remember(cpu, linear, block);
                    return Ok(block);
                }
            }
            at = block.next.get();
        }
        if self.ops.len() + BLOCK_OPS_MAX + 1 > OPS_MAX || self.blocks.len() == BLOCKS_MAX {
            cpu.running.clear();
            self.flush();
        }
        for _ in 0..DECODES_MAX {
            match self.decode_block(cpu, linear, physical) {
                Decoded::Kept(block) => {
                    self.remember(cpu, linear, block);
                    return Ok(block);
                }
                Decoded::Changed => {}
                Decoded::Single => break,
            }
        }
        let fetched = fetch(cpu, linear)?;
        if fetched.ram && fetched.last_page != page_number {
            let end = fetched.len;
            if let Some(block) = self.keep_crossing(cpu, &fetched, end) {
                self.remember(cpu, linear, block);
                return Ok(block);
            }
        }
        self.decode_single(cpu, &fetched)
    }

    /// Decodes a block inside one page of RAM.
    fn decode_block(&mut self, cpu: &mut Cpu, linear: u64, physical: u64) -> Decoded {
        let Some(page) = cpu.services.memory.page(physical / PAGE_SIZE) else { return Decoded::Single };
        if physical / PAGE_SIZE == cpu.apic_page {
            return Decoded::Single;
        }
        let offset = (linear % PAGE_SIZE) as usize;
        let mut readable = BLOCK_BYTES_MAX.min(PAGE_SIZE as usize - offset);
        if !cpu.is_64_bit() {
            let left = u64::from(cpu.segments[CS as usize].limit) - cpu.rip;
            readable = readable.min(usize::try_from(left).unwrap_or(usize::MAX).saturating_add(1));
        }
        readable = cpu.debugger.uncut(linear, readable);
        let mut bytes = [0; BLOCK_BYTES_MAX];
        // SAFETY: `readable` bytes from `offset` lie in the page.
        let source = unsafe { page.pointer.add(offset) };
        // SAFETY: as above; the buffer is long enough.
        unsafe { raw::copy(source, bytes.as_mut_ptr(), readable) };
        let first_op = self.ops.len();
        let lowered = self.lower_bytes(cpu, &bytes[..readable]);
        let len = lowered.len;
        if len == 0 {
            self.ops.truncate(first_op);
            return Decoded::Single;
        }
        let granules = GuestMemory::granules(offset as u64, len as u64);
        if cpu.services.memory.notes().watch_code(page.page_index, granules) {
            PageNotes::publish();
        }
        let mut again = [0; BLOCK_BYTES_MAX];
        // SAFETY: as above.
        unsafe { raw::copy(source, again.as_mut_ptr(), len) };
        if again[..len] != bytes[..len] {
            self.ops.truncate(first_op);
            return Decoded::Changed;
        }
        let page_number = physical / PAGE_SIZE;
        Decoded::Kept(self.keep(first_op, lowered, physical, page_number, cpu.mode.code))
    }

    /// Lowers instructions from `bytes` into the arena of ops, up to the block's end or the last whole instruction.
    fn lower_bytes(&mut self, cpu: &Cpu, bytes: &[u8]) -> Lowered {
        let context = CodeContext { code: cpu.mode.code, block_rip: cpu.rip };
        let mut decoder = Decoder::with_ip(bitness(cpu.mode.code), bytes, cpu.rip, cpu.model.decoder_options());
        let mut instruction = Instruction::default();
        let mut before = Instruction::default();
        let first_op = self.ops.len();
        let mut len = 0;
        let mut starts_fused = false;
        for _ in 0..BLOCK_OPS_MAX {
            if !decoder.can_decode() {
                break;
            }
            decoder.decode_out(&mut instruction);
            if instruction.is_invalid() {
                let rest = &bytes[len..];
                if rest.len() >= INSTRUCTION_BYTES_MAX {
                    if is_too_long(cpu, rest) {
                        let mut op = Op::empty(too_long);
                        op.len = INSTRUCTION_BYTES_MAX as u8;
                        len += INSTRUCTION_BYTES_MAX;
                        op.next_offset = len as u16;
                        self.ops.push(op);
                        return Lowered { len, starts_fused, chains: false };
                    }
                } else if decoder.last_error() == DecoderError::NoMoreBytes {
                    break;
                }
            }
            let (op, ends_block) = lower::lower_for(&cpu.model, &instruction, context);
            len += instruction.len();
            let fused = self.ops[first_op..].last().and_then(|last| lower::fuse(&before, last, &instruction, &op));
            match fused {
                Some(fused) => {
                    self.ops.pop();
                    starts_fused = self.ops.len() == first_op;
                    self.ops.push(fused);
                }
                None => self.ops.push(op),
            }
            if ends_block {
                break;
            }
            before = instruction;
        }
        // After a last instruction that always leaves the block too: one whose handler goes on by mistake finds an end there.
        let mut end = Op::empty(end_block);
        end.next_offset = len as u16;
        self.ops.push(end);
        let indirect = matches!(
            instruction.flow_control(),
            FlowControl::IndirectBranch | FlowControl::IndirectCall | FlowControl::Return
        );
        Lowered { len, starts_fused, chains: !indirect }
    }

    /// Makes a block of the ops from `first_op` on.
    fn keep(
        &mut self,
        first_op: usize,
        lowered: Lowered,
        physical: u64,
        last_page: u64,
        code: CodeSize,
    ) -> *const Block {
        let bucket = bucket(physical, code);
        let id = self.blocks.len() as u32;
        self.blocks.push(Block {
            // SAFETY: callers push at least one op from there on; the arena never moves, as it never outgrows its capacity.
            ops: unsafe { self.ops.as_ptr().add(first_op) },
            op_count: (self.ops.len() - first_op) as u32,
            bytes: lowered.len as u32,
            physical,
            last_page,
            code,
            valid: Cell::new(true),
            heat: Cell::new(0),
            next: Cell::new(self.buckets[bucket]),
            starts_fused: lowered.starts_fused,
            chains: lowered.chains,
            successors: [const { Cell::new(Successor::NONE) }; 2],
        });
        self.buckets[bucket] = id;
        let first_page = physical / PAGE_SIZE;
        self.pages.entry(first_page).or_default().push(id);
        if last_page != first_page {
            self.pages.entry(last_page).or_default().push(id);
        }
        &raw const self.blocks[id as usize]
    }

    /// Keeps an instruction over two pages of RAM; `None` if its bytes changed meanwhile.
    fn keep_crossing(&mut self, cpu: &mut Cpu, fetched: &Fetched, len: usize) -> Option<*const Block> {
        let offset = fetched.physical % PAGE_SIZE;
        let in_first = (PAGE_SIZE - offset) as usize;
        let pages = [(fetched.physical / PAGE_SIZE, offset, in_first), (fetched.last_page, 0, len - in_first)];
        for (page_number, offset, len) in pages {
            let page = cpu.services.memory.page(page_number)?;
            let granules = GuestMemory::granules(offset, len as u64);
            if cpu.services.memory.notes().watch_code(page.page_index, granules) {
                PageNotes::publish();
            }
        }
        let mut again = [0; INSTRUCTION_BYTES_MAX];
        for (index, byte) in again[..len].iter_mut().enumerate() {
            let (page_number, offset) = if index < in_first {
                (pages[0].0, offset + index as u64)
            } else {
                (pages[1].0, (index - in_first) as u64)
            };
            *byte = read_code(cpu, page_number * PAGE_SIZE + offset);
        }
        if again[..len] != fetched.bytes[..len] {
            return None;
        }
        let first_op = self.ops.len();
        let op = decode_one(cpu, &fetched.bytes[..len]);
        self.push_single(op);
        let lowered = Lowered { len, starts_fused: false, chains: false };
        Some(self.keep(first_op, lowered, fetched.physical, fetched.last_page, cpu.mode.code))
    }

    fn push_single(&mut self, (op, _): (Op, bool)) {
        let mut end = Op::empty(end_block);
        end.next_offset = op.next_offset;
        self.ops.push(op);
        self.ops.push(end);
    }

    /// Makes the block for an instruction that is not kept.
    fn decode_single(&mut self, cpu: &mut Cpu, fetched: &Fetched) -> Result<*const Block, Fault> {
        let (op, _) = decode_one(cpu, &fetched.bytes[..fetched.len]);
        self.single_ops[1].next_offset = op.next_offset;
        self.single_ops[1].handler.set(end_block);
        self.single_ops[0] = op;
        *self.single_block = Block {
            ops: self.single_ops.as_ptr(),
            op_count: 2,
            bytes: fetched.len as u32,
            physical: fetched.physical,
            last_page: fetched.last_page,
            code: cpu.mode.code,
            valid: Cell::new(true),
            heat: Cell::new(COLD_FOR_EVER),
            next: Cell::new(NO_BLOCK),
            starts_fused: false,
            chains: false,
            successors: [const { Cell::new(Successor::NONE) }; 2],
        };
        Ok(&raw const *self.single_block)
    }
}

/// What instructions became when they were lowered for a block.
struct Lowered {
    /// Their bytes; 0 if there is not even one.
    len: usize,
    starts_fused: bool,
    chains: bool,
}

/// What became of an attempt to decode a block.
enum Decoded {
    Kept(*const Block),
    /// The bytes changed while they were decoded.
    Changed,
    /// Not RAM, or the first instruction reaches over the end of the page or segment.
    Single,
}

fn decode_one(cpu: &Cpu, bytes: &[u8]) -> (Op, bool) {
    let context = CodeContext { code: cpu.mode.code, block_rip: cpu.rip };
    let instruction = Decoder::with_ip(bitness(cpu.mode.code), bytes, cpu.rip, cpu.model.decoder_options()).decode();
    lower::lower_for(&cpu.model, &instruction, context)
}

/// #GP(0): the instruction is longer than 15 bytes.
extern "sysv64" fn too_long(cpu: &mut Cpu, _op: &Op) -> Flow {
    let _ = cpu.raise_gp(0);
    Flow::Fault
}

fn bitness(code: CodeSize) -> u32 {
    match code {
        CodeSize::Bits16 => 16,
        CodeSize::Bits32 => 32,
        CodeSize::Bits64 => 64,
    }
}

#[inline(always)]
pub(crate) fn linear_rip(cpu: &Cpu) -> u64 {
    if cpu.is_64_bit() { cpu.rip } else { cpu.segments[CS as usize].base.wrapping_add(cpu.rip) & 0xffff_ffff }
}

#[inline(always)]
fn inside_limit(cpu: &Cpu, bytes: u32) -> bool {
    cpu.rip + u64::from(bytes) - 1 <= u64::from(cpu.segments[CS as usize].limit)
}

#[inline(always)]
fn jump_index(linear: u64) -> usize {
    (linear ^ linear >> 12) as usize & (JUMPS - 1)
}

fn bucket(physical: u64, code: CodeSize) -> usize {
    ((physical << 2 | code as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as usize & (BUCKETS - 1)
}

/// Faults if the instruction pointer itself is not canonical or past the code segment's limit.
fn check_rip(cpu: &mut Cpu, linear: u64) -> Result<(), Fault> {
    let good = if cpu.is_64_bit() {
        is_canonical(linear, cpu.linear_bits())
    } else {
        cpu.rip <= u64::from(cpu.segments[CS as usize].limit)
    };
    if good { Ok(()) } else { Err(cpu.raise_gp(0)) }
}

/// The guest-physical page number behind a linear address, for instruction fetch.
pub(crate) fn code_page(cpu: &mut Cpu, linear: u64) -> Result<u64, Fault> {
    if let Some(page_number) = cpu.tlb.code_page(linear) {
        return Ok(page_number);
    }
    let translation = cpu.translate(linear, Access::Fetch, Privilege::Current)?;
    let page_number = translation.physical / PAGE_SIZE;
    if cpu.mode.cpl == 3 && cpu.counters.first_user_instruction_ns == 0 {
        cpu.counters.first_user_instruction_ns = cpu.services.clock.monotonic_ns();
    }
    cpu.tlb.fill_code(linear, page_number, translation.scope);
    Ok(page_number)
}

/// A byte of code. What is not RAM is read through the bus as data would be.
fn read_code(cpu: &Cpu, physical: u64) -> u8 {
    match cpu.services.memory.page(physical / PAGE_SIZE) {
        // SAFETY: the offset lies in the page.
        Some(page) => unsafe { raw::load_u8(page.pointer.add((physical % PAGE_SIZE) as usize)) },
        None => cpu.services.mmio.read(physical, AccessSize::Byte) as u8,
    }
}

/// Fetches the bytes of one instruction, as few as it takes: the second page is touched only by an instruction that reaches into it.
fn fetch(cpu: &mut Cpu, linear: u64) -> Result<Fetched, Fault> {
    check_rip(cpu, linear)?;
    let page_number = code_page(cpu, linear)?;
    let physical = page_number * PAGE_SIZE + linear % PAGE_SIZE;
    let mut fetched = Fetched {
        bytes: [0; INSTRUCTION_BYTES_MAX],
        len: 0,
        ram: cpu.services.memory.page(page_number).is_some(),
        physical,
        last_page: page_number,
    };
    loop {
        if fetched.len == INSTRUCTION_BYTES_MAX {
            return Err(cpu.raise_gp(0));
        }
        let at = linear.wrapping_add(fetched.len as u64);
        let at = if cpu.is_64_bit() { at } else { at & 0xffff_ffff };
        if !cpu.is_64_bit() && !inside_limit(cpu, fetched.len as u32 + 1) {
            return Err(cpu.raise_gp(0));
        }
        if fetched.len > 0 && at.is_multiple_of(PAGE_SIZE) {
            if cpu.is_64_bit() && !is_canonical(at, cpu.linear_bits()) {
                return Err(cpu.raise_gp(0));
            }
            fetched.last_page = code_page(cpu, at)?;
            fetched.ram &= cpu.services.memory.page(fetched.last_page).is_some();
        }
        fetched.bytes[fetched.len] = read_code(cpu, fetched.last_page * PAGE_SIZE + at % PAGE_SIZE);
        fetched.len += 1;
        let bytes = &fetched.bytes[..fetched.len];
        let mut decoder = Decoder::with_ip(bitness(cpu.mode.code), bytes, cpu.rip, cpu.model.decoder_options());
        let wants_more = decoder.decode().is_invalid()
            && (decoder.last_error() == DecoderError::NoMoreBytes || is_too_long(cpu, bytes));
        if !wants_more {
            return Ok(fetched);
        }
    }
}

/// Whether an invalid instruction is so because it goes on after 15 bytes. The decoder calls those invalid for any other reason alike, so this asks
/// whether one byte less leaves it undecided.
fn is_too_long(cpu: &Cpu, bytes: &[u8]) -> bool {
    if bytes.len() < INSTRUCTION_BYTES_MAX {
        return false;
    }
    let bytes = &bytes[..INSTRUCTION_BYTES_MAX - 1];
    let mut decoder = Decoder::with_ip(bitness(cpu.mode.code), bytes, cpu.rip, cpu.model.decoder_options());
    decoder.decode().is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes
}
