//! Two engines, one truth: each unit's translation is compared with the interpreter.
//!
//! In lockstep a vCPU runs every piece of translated code twice. First translated: units are not linked, jumps backwards leave the unit, and
//! before a page is stored to, its bytes are kept ([`Journal`]). Then memory and registers are put back, and the interpreter runs on to the same address.
//! Registers, flags that anybody may read, vector and x87 registers, system registers and the pages stored to must be the same. The
//! interpreter's state is what the guest goes on with, so that one difference is told of once.
//!
//! Whatever has effects outside of registers and RAM is left to the interpreter alone: handlers are not called from translated code, and
//! registers of devices are no RAM. What is not compared: links, jump tables, and how handlers are called; whole programs on both tiers are for those.
//!
//! One vCPU only: another one, or a device, that writes a page while a unit is compared looks like a difference.

use polder_machine::state::SegmentState;
use polder_memory::{PAGE_SIZE, raw};

use super::Translator;
use super::arena::CpuBox;
use super::frame::exit;
use super::guest_code::{self, ITEMS_MAX, Item};
use crate::block_cache::{self, Blocks};
use crate::cpu::{Cpu, Mode, SystemCallRegisters};
use crate::flags;
use crate::run::Outcome;
use crate::vector::{Pointers, Ymm};

/// Differences that are told in words.
const TOLD_MAX: usize = 8;
/// Instructions that the interpreter runs at most to get where a unit has led.
const STEPS_MAX: usize = 2 * ITEMS_MAX;

/// The flags that floating-point instructions set in MXCSR and leave there.
const MXCSR_STICKY: u32 = 0x3f;

/// The accessed and the dirty bit of an entry of a page table.
const WALK_BITS: u8 = 0x60;

/// What lockstep has seen.
#[derive(Debug, Default)]
pub struct Lockstep {
    /// Units compared.
    pub units: u64,
    /// Instructions in them.
    pub instructions: u64,
    pub differences: u64,
    /// The first differences.
    pub told: Vec<String>,
}

/// A page's bytes, kept.
struct Kept {
    page: *mut u8,
    bytes: Box<[u8; PAGE_SIZE as usize]>,
}

/// Pages as they were before translated code stored to them.
#[derive(Default)]
pub struct Journal(Vec<Kept>);

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Journal").field(&self.0.len()).finish()
    }
}

// SAFETY: the pointers lead into guest memory, which every vCPU's thread may use and which outlives the processor.
unsafe impl Send for Journal {}

impl Journal {
    /// Keeps the bytes of a page of guest memory.
    ///
    /// # Safety
    /// `address` lies in mapped guest RAM.
    pub unsafe fn keep(&mut self, address: *mut u8) {
        let page = (address as u64 & !(PAGE_SIZE - 1)) as *mut u8;
        if !self.0.iter().any(|kept| kept.page == page) {
            self.0.push(Kept { page, bytes: bytes_of(page) });
        }
    }

    /// Whether a page was kept.
    fn has(&self, page: *const u8) -> bool {
        self.0.iter().any(|kept| std::ptr::eq(kept.page, page))
    }

    /// Puts the kept bytes back; afterwards the journal has what was there instead.
    fn exchange(&mut self) {
        for kept in &mut self.0 {
            let now = bytes_of(kept.page);
            if now != kept.bytes {
                // SAFETY: a page of guest RAM, as `keep` was promised.
                unsafe { raw::copy(kept.bytes.as_ptr(), kept.page, PAGE_SIZE as usize) };
            }
            kept.bytes = now;
        }
    }

    /// The host address of the first byte that is not as kept, with what is there and what was kept.
    ///
    /// Accessed and dirty bits that were set when translated code looked a page up are no difference, they are set again: the interpreter found
    /// the translation and did not walk the tables. They are set only if nothing else differs, registers (`is_same`) included: such bits change in other bytes too.
    fn first_change(&self, is_same: bool) -> Option<(u64, u8, u8)> {
        let mut walked = Vec::new();
        for kept in &self.0 {
            let now = bytes_of(kept.page);
            for (at, (&now, &kept_byte)) in now.iter().zip(kept.bytes.iter()).enumerate() {
                // SAFETY: inside the page.
                let place = unsafe { kept.page.add(at) };
                if at % 8 == 0 && kept_byte & !now & WALK_BITS != 0 && (kept_byte ^ now) & !WALK_BITS == 0 {
                    walked.push((place, now | kept_byte));
                } else if now != kept_byte {
                    return Some((place as u64, now, kept_byte));
                }
            }
        }
        for (place, byte) in walked.into_iter().filter(|_| is_same) {
            // SAFETY: a page of guest RAM, as `keep` was promised.
            unsafe { raw::copy(&byte, place, 1) };
        }
        None
    }
}

/// Where the page of code at an address is in the host.
fn code_page(cpu: &mut Cpu, linear: u64) -> Option<*mut u8> {
    let number = block_cache::code_page(cpu, linear).ok()?;
    cpu.services.memory.page(number).map(|page| page.pointer)
}

fn bytes_of(page: *const u8) -> Box<[u8; PAGE_SIZE as usize]> {
    let mut bytes = Box::new([0; PAGE_SIZE as usize]);
    // SAFETY: callers name a page of guest RAM; the buffer is as long.
    unsafe { raw::copy(page, bytes.as_mut_ptr(), PAGE_SIZE as usize) };
    bytes
}

/// The registers that translated code may change.
#[derive(Clone, PartialEq, Debug)]
struct Registers {
    gpr: [u64; 16],
    rip: u64,
    arithmetic: u64,
    system_flags: u64,
    mode: Mode,
    segments: [SegmentState; 6],
    control: [u64; 4],
    efer: u64,
    system_call: SystemCallRegisters,
    ymm: [Ymm; 16],
    mxcsr: u32,
    pointers: Pointers,
    /// As FXSAVE has them, without pointers and MXCSR.
    x87: [u8; 134],
}

/// Registers before a unit runs, and the count of instructions.
pub struct Before(Registers, u64);

impl Registers {
    fn take(cpu: &mut Cpu) -> Registers {
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&cpu.gpr[..16]);
        let mut x87 = [0; 134];
        let image = &cpu.vector.x87_image().0;
        x87[..6].copy_from_slice(&image[..6]);
        for register in 0..8 {
            // Ten bytes of sixteen; the others mean nothing.
            x87[6 + 16 * register..16 + 16 * register].copy_from_slice(&image[32 + 16 * register..42 + 16 * register]);
        }
        Registers {
            gpr,
            rip: cpu.rip,
            arithmetic: cpu.arithmetic.to_rflags(),
            system_flags: cpu.system_flags,
            mode: cpu.mode,
            segments: cpu.segments,
            control: [cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4],
            efer: cpu.efer,
            system_call: cpu.system_call,
            ymm: cpu.vector.ymm,
            mxcsr: cpu.vector.mxcsr(),
            pointers: cpu.vector.pointers,
            x87,
        }
    }

    fn put(&self, cpu: &mut Cpu) {
        let now = Registers::take(cpu);
        cpu.gpr[..16].copy_from_slice(&self.gpr);
        cpu.rip = self.rip;
        cpu.segments = self.segments;
        [cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4] = self.control;
        cpu.efer = self.efer;
        cpu.system_call = self.system_call;
        cpu.vector.ymm = self.ymm;
        if now.mxcsr != self.mxcsr {
            cpu.vector.set_mxcsr(self.mxcsr);
        }
        cpu.vector.pointers = self.pointers;
        if now.x87 != self.x87 {
            let image = &mut cpu.vector.x87_image_mut().0;
            image[..6].copy_from_slice(&self.x87[..6]);
            image[32..160].copy_from_slice(&self.x87[6..134]);
        }
        cpu.set_rflags(self.arithmetic | self.system_flags);
    }

    /// What differs, in words; `live`: the arithmetic flags that count.
    fn differences(&self, interpreted: &Registers, live: u64) -> Vec<String> {
        let mut lines = Vec::new();
        let mut compare = |name: &str, translated: u64, interpreted: u64| {
            if translated != interpreted {
                lines.push(format!("{name}: translated {translated:#x}, interpreted {interpreted:#x}"));
            }
        };
        for (register, (translated, interpreted)) in self.gpr.iter().zip(interpreted.gpr).enumerate() {
            compare(&format!("gpr {register}"), *translated, interpreted);
        }
        compare("flags", self.arithmetic & live, interpreted.arithmetic & live);
        compare("system flags", self.system_flags, interpreted.system_flags);
        for (register, (translated, interpreted)) in self.ymm.iter().zip(interpreted.ymm).enumerate() {
            for (word, (translated, interpreted)) in translated.0.iter().zip(interpreted.0).enumerate() {
                compare(&format!("ymm {register} word {word}"), *translated, interpreted);
            }
        }
        compare("mxcsr", u64::from(self.mxcsr), u64::from(interpreted.mxcsr));
        for (translated, interpreted) in self.control.iter().zip(interpreted.control) {
            compare("a control register", *translated, interpreted);
        }
        compare("efer", self.efer, interpreted.efer);
        let mut compare_all = |name: &str, translated: &dyn std::fmt::Debug, interpreted: &dyn std::fmt::Debug| {
            let (translated, interpreted) = (format!("{translated:x?}"), format!("{interpreted:x?}"));
            if translated != interpreted {
                lines.push(format!("{name}: translated {translated}, interpreted {interpreted}"));
            }
        };
        if self.segments != interpreted.segments {
            compare_all("segments", &self.segments, &interpreted.segments);
        }
        if self.mode != interpreted.mode {
            compare_all("mode", &self.mode, &interpreted.mode);
        }
        if self.system_call != interpreted.system_call {
            compare_all("system-call registers", &self.system_call, &interpreted.system_call);
        }
        if self.x87 != interpreted.x87 {
            compare_all("x87 registers", &self.x87, &interpreted.x87);
        }
        if self.pointers != interpreted.pointers {
            compare_all("x87 pointers", &self.pointers, &interpreted.pointers);
        }
        lines
    }
}

impl Before {
    /// Takes the state before a unit at RIP runs, and begins a journal.
    pub fn take(cpu: &mut Cpu) -> Before {
        let registers = Registers::take(cpu);
        cpu.frame.journal = Some(Box::default());
        Before(registers, cpu.instructions)
    }

    /// The page that the unit lies in, from its start on.
    fn code(&self, cpu: &mut Cpu) -> Vec<u8> {
        let start = self.0.rip;
        code_page(cpu, start).map_or(Vec::new(), |page| bytes_of(page)[(start % PAGE_SIZE) as usize..].to_vec())
    }

    /// The arithmetic flags that count where a unit has led.
    fn live_at(&self, cpu: &mut Cpu, rip: u64) -> u64 {
        let options = cpu.model.decoder_options();
        let (start, code) = (self.0.rip, self.code(cpu));
        let items = guest_code::decode(&code, start, options, ITEMS_MAX);
        let live = match guest_code::item_at(&items, rip) {
            Some(index) => items[index].live_before,
            // An instruction in two pages, of which this sees one.
            None if items.is_empty() => 0,
            None => guest_code::live_at(&code, start, rip, options),
        };
        // What the manual leaves undefined (after DIV, say) is the host's affair in one tier and ours in the other.
        // A jump may have led past any of the instructions that would overwrite it.
        let undefined = items.iter().fold(0, |undefined, item| undefined | item.instruction.rflags_undefined());
        guest_code::rflags(live & !undefined)
    }

    /// Whether the unit reads a flag that the manual leaves undefined: each tier has its own then, and may go its own way.
    fn reads_undefined(&self, cpu: &mut Cpu) -> bool {
        let items = guest_code::decode(&self.code(cpu), self.0.rip, cpu.model.decoder_options(), ITEMS_MAX);
        let mut undefined = 0;
        items.iter().any(|Item { instruction, .. }| {
            let reads = instruction.rflags_read() & undefined != 0;
            undefined = undefined & !instruction.rflags_modified() | instruction.rflags_undefined();
            reads
        })
    }

    /// What the interpreter's state differs in from the translated one.
    fn difference(&self, translated: &Registers, cpu: &mut Cpu, journal: &Journal) -> Option<Vec<String>> {
        let mut interpreted = Registers::take(cpu);
        if cpu.frame.exit == exit::HOST_FAULT {
            // The instruction has left its sticky flags before the interpreter gets to it.
            interpreted.mxcsr |= translated.mxcsr & MXCSR_STICKY;
        }
        let change = journal.first_change(interpreted == *translated);
        if interpreted == *translated && change.is_none() {
            return None;
        }
        let mut live = self.live_at(cpu, translated.rip) & flags::ARITHMETIC;
        if code_page(cpu, translated.rip).is_some_and(|page| journal.has(page)) {
            // The code that was there overwrote flags; what the unit has put there may not.
            live = 0;
        }
        let mut lines = translated.differences(&interpreted, live);
        if let Some((address, interpreted, translated)) = change {
            let physical = cpu.services.memory.address_of(address as *mut u8).map(|address| address.0);
            lines.push(format!("memory {physical:x?}: translated {translated:#x}, interpreted {interpreted:#x}"));
        }
        (!lines.is_empty()).then_some(lines)
    }
}

impl Translator {
    /// Compares the unit that has just come back with the interpreter. `None`: go on.
    pub(super) fn compare(&mut self, cpu: &mut CpuBox, blocks: &mut Blocks, before: &Before) -> Option<Outcome> {
        let mut journal = cpu.frame.journal.take().unwrap_or_default();
        let code = cpu.frame.exit;
        if code == exit::HOST_FAULT {
            let place = self.guest_of(cpu.frame.miss_address)?;
            cpu.stand_at(place);
        }
        let translated = Registers::take(cpu);
        let start = &before.0;
        let is_interpreters = matches!(code, exit::INTERPRET | exit::HOST_FAULT);
        journal.exchange();
        start.put(cpu);
        cpu.instructions = before.1;
        // Only then may nothing have run; all else jumped back to the start.
        let mut found = if is_interpreters && translated.rip == start.rip {
            before.difference(&translated, cpu, &journal)
        } else {
            Some(vec!["the interpreter does not come here".to_string()])
        };
        let mut first = None;
        let mut steps = 0;
        let mut outcome = None;
        while found.is_some() && steps < STEPS_MAX {
            cpu.interrupt_shadow = false;
            if blocks.run_one(cpu) == Outcome::Fault {
                outcome = Some(Outcome::Fault);
                first.get_or_insert_with(|| vec![format!("the interpreter faults: {:x?}", cpu.fault)]);
                break;
            }
            steps += 1;
            if cpu.rip == translated.rip {
                // A jump back into the unit may lead where the interpreter has been on its way already.
                found = before.difference(&translated, cpu, &journal);
                if let Some(lines) = &found {
                    first.get_or_insert_with(|| lines.clone());
                }
            }
            if cpu.halted {
                break;
            }
        }
        let lockstep = self.lockstep.get_or_insert_with(Box::default);
        lockstep.units += 1;
        lockstep.instructions += steps as u64;
        if let Some(lines) = found.filter(|_| !before.reads_undefined(cpu)) {
            lockstep.differences += 1;
            let lines = first.unwrap_or(lines).join("; ");
            let code_bytes = before.code(cpu);
            let bytes = &code_bytes[..code_bytes.len().min(64)];
            let text = format!(
                "unit at {:#x} led to {:#x} (exit {code:#x}): {lines}; code {bytes:x?}, registers {:x?}",
                start.rip, translated.rip, start.gpr
            );
            tracing::error!(target: "polder::lockstep", "{text}");
            if lockstep.told.len() < TOLD_MAX {
                lockstep.told.push(text);
            }
            return outcome.or(Some(Outcome::Leave));
        }
        if is_interpreters {
            cpu.interrupt_shadow = false;
            return Some(self.interpret(cpu, blocks));
        }
        Some(Outcome::Leave)
    }
}
