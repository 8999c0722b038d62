//! Arbitrary bytes as a guest: any state, any mode, any code. What fuzzing and the random smoke test feed; nothing may panic or hang.

use std::sync::atomic::Ordering;

use polder_machine::state::{SegmentState, TableState};

use crate::cpu::{CS, Cpu, SS, cr0, cr4, efer};
use crate::flags;
use crate::run::Outcome;
use crate::system::Delivery;
use crate::testbench::{CODE, DATA, STACK, TABLES, TestBench};

/// Blocks and single instructions that one input may run.
const STEPS_MAX: u32 = 400;
/// Descriptors in the global table.
const DESCRIPTORS: u64 = 24;
const GDT: u64 = 0x9000;
const IDT: u64 = 0xa000;
const TSS: u64 = 0xc000;
/// A page directory of 4 MiB pages, and pointers to the long-mode tables' directory for PAE.
const DIRECTORY: u64 = 0x8000;
const POINTERS: u64 = 0xd000;
/// Code that real and virtual-8086 mode can reach.
const LOW_CODE: u64 = 0x1_0000;
const CODE_BYTES_MAX: usize = 512;
/// Bits of CR4 that no CPU model offers.
const VME: u64 = 1 << 0;
const PVI: u64 = 1 << 1;

/// The input, taken piece by piece; zeros when it is used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&first, rest)) => {
                self.0 = rest;
                first
            }
            None => 0,
        }
    }

    fn number(&mut self, bytes: usize) -> u64 {
        (0..bytes).fold(0, |value, index| value | u64::from(self.byte()) << (8 * index))
    }

    /// A value of the kinds that instructions meet.
    fn value(&mut self) -> u64 {
        match self.byte() & 7 {
            0 => DATA + self.number(2) % 0x2000,
            1 => CODE + self.number(2) % 0x800,
            2 => STACK - self.number(1),
            3 => self.number(1),
            4 => self.number(1).wrapping_neg(),
            5 => self.number(4),
            6 => self.number(2),
            _ => self.number(8),
        }
    }
}

/// Modes that an input can begin in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    Real,
    Virtual8086,
    Protected16,
    Protected32,
    Compatibility16,
    Compatibility32,
    Long,
}

impl TestBench {
    /// Runs what the bytes describe: a start state, tables, then code. Ends after a bounded number of steps.
    pub fn run_arbitrary(&mut self, bytes: &[u8]) {
        let mut input = Input(bytes);
        let start = match input.byte() % 8 {
            0 => Start::Real,
            1 => Start::Virtual8086,
            2 => Start::Protected16,
            3 => Start::Protected32,
            4 => Start::Compatibility16,
            5 => Start::Compatibility32,
            _ => Start::Long,
        };
        let privilege = input.byte();
        self.renew();
        self.write_tables(&mut input);
        self.set_start(start, privilege, &mut input);
        // HLT beyond the end: zeros would be additions to memory that keep changing themselves.
        let mut code = [0xf4; CODE_BYTES_MAX];
        let len = input.0.len().min(CODE_BYTES_MAX);
        code[..len].copy_from_slice(&input.0[..len]);
        for at in [CODE, LOW_CODE] {
            self.write(at, &code);
        }
        self.run_steps(privilege >> 4);
        self.cpu.vector.retire();
    }

    /// Tables that make sense but for some bytes that the input changes.
    fn write_tables(&mut self, input: &mut Input<'_>) {
        // Flat segments of all kinds and privileges, gates, a task, then whatever the input says.
        let fixed: [u64; 16] = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_9b00_0000_ffff,
            0x008f_9b00_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x008f_fb00_0000_ffff,
            0x0000_8b00_c000_2067,
            0,
            0x0000_8200_9000_00ff,
            0,
            0x0010_ec01_0008_0010,
            0x0000_8900_c000_0067,
            0x0000_e500_0070_0000,
        ];
        for (index, descriptor) in (0..DESCRIPTORS).zip(fixed.into_iter().chain(std::iter::repeat(0))) {
            let change = input.byte();
            let descriptor = match change & 15 {
                15 => input.number(8),
                14 => descriptor ^ 1 << (input.byte() & 63),
                _ => descriptor,
            };
            self.write(GDT + 8 * index, &descriptor.to_le_bytes());
        }
        let kinds = input.number(4);
        let dpl = u64::from(input.byte());
        for vector in 0..256u64 {
            let kind = [0x8e, 0x8f, 0x85, 0xee, 0x86, 0x0e, 0x8e, 0xef][(kinds >> (vector % 16 * 2) & 7) as usize & 7];
            let selector = [8u64, 0x18, 0x20, 0x28][(dpl >> (vector & 3) & 3) as usize];
            let offset = CODE + (vector << 2 & 0xff);
            let low = offset & 0xffff | selector << 16 | kind << 40 | (offset >> 16 & 0xffff) << 48;
            // In long mode a gate has 16 bytes; the two ways to read the table overlap.
            self.write(IDT + 16 * vector, &low.to_le_bytes());
            self.write(IDT + 16 * vector + 8, &if kinds & 1 << 31 != 0 { low } else { 0 }.to_le_bytes());
            self.write(4 * vector, &((LOW_CODE as u32) << 12 | vector as u32).to_le_bytes());
        }
        for entry in 0..1024u32 {
            self.write(DIRECTORY + 4 * u64::from(entry), &(((entry % 2) << 22) | 0x87).to_le_bytes());
        }
        self.write(POINTERS, &((TABLES + 0x2000) | 1).to_le_bytes());
        for word in 0..26 {
            self.write(TSS + 4 * word, &(STACK as u32 - 0x100 * word as u32).to_le_bytes());
        }
        for word in 0..8 {
            self.write(DATA + 8 * word, &input.value().to_le_bytes());
            self.write(STACK - 64 + 8 * word, &input.value().to_le_bytes());
        }
    }

    fn set_start(&mut self, start: Start, privilege: u8, input: &mut Input<'_>) {
        let cpu = &mut self.cpu;
        let real = matches!(start, Start::Real | Start::Virtual8086);
        let long = matches!(start, Start::Compatibility16 | Start::Compatibility32 | Start::Long);
        let user = start == Start::Virtual8086 || privilege & 1 != 0 && start != Start::Real;
        for register in &mut cpu.gpr[..16] {
            *register = input.value();
        }
        cpu.gpr[4] = STACK - input.number(1);
        cpu.efer = if long { efer::LME | efer::LMA | efer::NXE | efer::SCE } else { 0 };
        cpu.cr0 = match start {
            Start::Real => 0x10,
            _ if long || privilege & 2 != 0 => cr0::PE | cr0::ET | cr0::NE | cr0::WP | cr0::PG | cr0::AM,
            _ => cr0::PE | cr0::ET,
        };
        cpu.cr4 = if long || privilege & 4 != 0 { cr4::PAE } else { cr4::PSE };
        cpu.cr3 = if long {
            TABLES
        } else if privilege & 4 != 0 {
            POINTERS
        } else {
            DIRECTORY
        };
        let more = input.number(3);
        cpu.cr4 |= cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        cpu.cr4 ^= more & (VME | PVI | cr4::TSD | cr4::DE | cr4::UMIP | cr4::SMEP | cr4::SMAP | cr4::FSGSBASE);
        cpu.cr0 ^= input.number(1) & (cr0::MP | cr0::TS | cr0::EM);
        cpu.xcr0 = 7;
        let size = match start {
            Start::Long => 1 << 13,
            Start::Protected32 | Start::Compatibility32 => 1 << 14,
            _ => 0,
        };
        let dpl = if user { 3u16 } else { 0 };
        for (number, segment) in (0..).zip(&mut cpu.segments) {
            let kind = if number == CS && !real { 0x1b | size } else { 0x13 | (size & 1 << 14) };
            *segment = SegmentState {
                selector: if real {
                    0x1000
                } else {
                    (if number == CS { 0x28 } else { 0x30 }) & if user { 0xff } else { 0x1f } | dpl
                },
                base: if real { LOW_CODE } else { 0 },
                limit: if real { 0xffff } else { 0xffff_ffff },
                attributes: 0x80 | kind | dpl << 5,
            };
        }
        if start == Start::Long {
            cpu.segments[SS as usize].attributes |= 1 << 14;
        }
        cpu.gdtr = TableState { base: GDT, limit: (8 * DESCRIPTORS - 1) as u16 };
        cpu.idtr = if start == Start::Real {
            TableState { base: 0, limit: 0x3ff }
        } else {
            TableState { base: IDT, limit: 0xfff }
        };
        cpu.tr = SegmentState { selector: 0x48, base: TSS, limit: 0x2067, attributes: 0x8b };
        cpu.ldtr = SegmentState { selector: 0x58, base: GDT, limit: 0xff, attributes: 0x82 };
        cpu.rip = if real { 0 } else { CODE };
        let mut rflags = input.number(3) & (flags::ARITHMETIC | flags::SYSTEM) & !flags::VM | 2;
        if start == Start::Virtual8086 {
            rflags |= flags::VM;
        }
        cpu.debug[5] |= if input.byte() == 0xff { input.number(4) & !(1 << 13) } else { 0 };
        cpu.debug[0] = DATA;
        cpu.debug[1] = CODE + 8;
        cpu.vector.set_mxcsr(input.number(2) as u32);
        for register in &mut cpu.vector.ymm[..4] {
            register.0 = [input.value(), input.value(), input.value(), input.value()];
        }
        if cpu.cr0 & cr0::PG != 0 && cpu.cr4 & cr4::PAE != 0 && !long {
            cpu.set_rflags(2);
            cpu.load_pae_pointers();
        }
        cpu.set_rflags(rflags);
        cpu.tlb.flush_all();
    }

    /// Runs and delivers as a vCPU does; now and then an interrupt comes.
    fn run_steps(&mut self, interrupts: u8) {
        let stale = self.stale.clone();
        for step in 0..STEPS_MAX {
            self.drop_stale();
            let cpu: &mut Cpu = &mut self.cpu;
            if cpu.trap_pending() && cpu.deliver_trap() == Delivery::TripleFault {
                return;
            }
            if cpu.halted && interrupts == 0 {
                return;
            }
            let interrupted = cpu.halted || interrupts != 0 && step % (8 + u32::from(interrupts)) == 7;
            if interrupted {
                cpu.halted = false;
                if cpu.system_flags & flags::IF != 0
                    && cpu.deliver_interrupt(0x20 | interrupts) == Delivery::TripleFault
                {
                    return;
                }
            }
            if stale.attention.load(Ordering::SeqCst) {
                // What was delivered was pushed over code.
                continue;
            }
            let outcome = if cpu.interrupt_shadow || cpu.needs_single_step() || step % 3 == 0 {
                match cpu.before_step() {
                    Err(_) => Outcome::Fault,
                    Ok(before) => {
                        cpu.interrupt_shadow = false;
                        let outcome = self.blocks.run_one(&mut self.cpu);
                        if outcome != Outcome::Fault {
                            self.cpu.after_step(before);
                        }
                        outcome
                    }
                }
            } else {
                self.advance(&stale.attention, 4)
            };
            if outcome == Outcome::Fault && self.cpu.deliver_exception() == Delivery::TripleFault {
                return;
            }
        }
    }
}
