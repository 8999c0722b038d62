//! A little guest for the tests of this folder: descriptor tables, handlers that halt, and a stepper that follows the outer loop's protocol.

use polder_machine::state::{SegmentState, TableState};

use super::Delivery;
use crate::cpu::{CS, CodeSize, SS, cr0};
use crate::run::Outcome;
use crate::testbench::{CODE, Stop, TestBench, Tier};

pub const GDT: u64 = 0x30_0000;
pub const IDT: u64 = 0x30_1000;
pub const TSS: u64 = 0x30_2000;
/// Handler of vector n: HLT at `HANDLERS + 16 * n`.
pub const HANDLERS: u64 = 0x31_0000;
/// Stack of privilege level 0 in the TSS.
pub const RING_0_STACK: u64 = 0x32_0000;
/// First interrupt stack (IST 1).
pub const IST_1: u64 = 0x33_0000;

pub const KERNEL_CODE: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_CODE: u16 = 0x1b;
pub const USER_DATA: u16 = 0x23;
pub const TASK: u16 = 0x28;
/// Free for tests: 0x38 and up (the TSS takes two entries).
pub const FREE: u16 = 0x38;

const FLAT: u64 = 0x000f_0000_0000_ffff | 1 << 55;

pub struct TestGuest {
    pub bench: TestBench,
}

impl std::ops::Deref for TestGuest {
    type Target = TestBench;
    fn deref(&self) -> &TestBench {
        &self.bench
    }
}

impl std::ops::DerefMut for TestGuest {
    fn deref_mut(&mut self) -> &mut TestBench {
        &mut self.bench
    }
}

/// Attributes of a present segment for a GDT entry: type with S, DPL, L, D.
pub fn segment_descriptor(kind: u64, dpl: u64, long: bool, big: bool) -> u64 {
    FLAT | (kind | dpl << 5 | 0x80) << 40 | u64::from(long) << 53 | u64::from(big) << 54
}

impl TestGuest {
    /// IA-32e mode at a privilege level.
    pub fn long(tier: Tier, cpl: u16) -> Self {
        let mut bench = TestBench::on(tier);
        bench.set_mode(CodeSize::Bits64, cpl);
        let mut guest = TestGuest { bench };
        guest.set_tables(true);
        guest.enter(cpl);
        guest
    }

    /// 32-bit protected mode without paging.
    pub fn protected(tier: Tier, cpl: u16) -> Self {
        let mut bench = TestBench::on(tier);
        bench.set_mode(CodeSize::Bits32, cpl);
        bench.cpu.cr0 = cr0::PE | cr0::ET | cr0::NE;
        bench.cpu.cr4 = 0;
        bench.cpu.efer = 0;
        bench.cpu.tlb.flush_all();
        let mut guest = TestGuest { bench };
        guest.set_tables(false);
        guest.enter(cpl);
        guest
    }

    /// Real mode with CS, DS, ES and SS at 0 and the code at 0x8000.
    pub fn real(tier: Tier) -> Self {
        let mut bench = TestBench::on(tier);
        bench.cpu.cr0 = cr0::ET;
        bench.cpu.cr4 = 0;
        bench.cpu.efer = 0;
        for segment in &mut bench.cpu.segments {
            *segment = SegmentState { selector: 0, base: 0, limit: 0xffff, attributes: 0x93 };
        }
        bench.cpu.idtr = TableState { base: 0, limit: 0x3ff };
        bench.cpu.gpr[crate::cpu::RSP] = 0x7000;
        bench.cpu.rip = 0x8000;
        bench.cpu.tlb.flush_all();
        bench.cpu.update_mode();
        TestGuest { bench }
    }

    fn set_tables(&mut self, long: bool) {
        self.set_descriptor(KERNEL_CODE, segment_descriptor(0x1b, 0, long, !long));
        self.set_descriptor(KERNEL_DATA, segment_descriptor(0x13, 0, false, true));
        self.set_descriptor(USER_CODE, segment_descriptor(0x1b, 3, long, !long));
        self.set_descriptor(USER_DATA, segment_descriptor(0x13, 3, false, true));
        let tss = 0x67 | (TSS & 0xff_ffff) << 16 | 0x8b << 40 | (TSS >> 24 & 0xff) << 56;
        self.set_descriptor(TASK, tss);
        self.set_descriptor(TASK + 8, 0);
        if long {
            self.write(TSS + 4, &RING_0_STACK.to_le_bytes());
            self.write(TSS + 36, &IST_1.to_le_bytes());
        } else {
            self.write(TSS + 4, &(RING_0_STACK as u32).to_le_bytes());
            self.write(TSS + 8, &KERNEL_DATA.to_le_bytes());
        }
        self.write(TSS + 102, &0x68u16.to_le_bytes());
        for vector in 0..=255u8 {
            let handler = HANDLERS + 16 * u64::from(vector);
            self.write(handler, &[0xf4]);
            self.set_gate(vector, 0x8e, handler, KERNEL_CODE, 0);
        }
        let cpu = &mut self.bench.cpu;
        cpu.gdtr = TableState { base: GDT, limit: 0xfff };
        cpu.idtr = TableState { base: IDT, limit: 0xfff };
        cpu.tr = SegmentState { selector: TASK, base: TSS, limit: 0x67, attributes: 0x8b };
        cpu.ldtr = SegmentState::default();
    }

    /// CS, SS and data segments of a privilege level.
    pub fn enter(&mut self, cpl: u16) {
        let (code, data) = if cpl == 0 { (KERNEL_CODE, KERNEL_DATA) } else { (USER_CODE, USER_DATA) };
        let cpu = &mut self.bench.cpu;
        let state = |selector: u16, raw: u64| SegmentState {
            selector,
            base: 0,
            limit: 0xffff_ffff,
            attributes: (raw >> 40) as u16 & 0xf0ff,
        };
        let long = cpu.efer != 0;
        let dpl = u64::from(cpl);
        cpu.segments = [state(data, segment_descriptor(0x13, dpl, false, true)); 6];
        cpu.segments[usize::from(CS)] = state(code, segment_descriptor(0x1b, dpl, long, !long));
        cpu.segments[usize::from(SS)].selector = data;
        cpu.update_mode();
    }

    pub fn set_descriptor(&mut self, selector: u16, raw: u64) {
        self.write(GDT + u64::from(selector & !7), &raw.to_le_bytes());
    }

    /// An IDT gate with its access byte (0x8e: interrupt gate, DPL 0).
    pub fn set_gate(&mut self, vector: u8, access: u64, offset: u64, selector: u16, ist: u64) {
        let low =
            offset & 0xffff | u64::from(selector) << 16 | ist << 32 | access << 40 | (offset >> 16 & 0xffff) << 48;
        if self.cpu.efer != 0 {
            self.write(IDT + 16 * u64::from(vector), &low.to_le_bytes());
            self.write(IDT + 16 * u64::from(vector) + 8, &(offset >> 32).to_le_bytes());
        } else {
            self.write(IDT + 8 * u64::from(vector), &low.to_le_bytes());
        }
    }

    /// Puts code at `CODE` (real mode: 0x8000) and makes it next.
    pub fn load_code(&mut self, code: &[u8]) {
        let at = if self.cpu.mode.protected { CODE } else { 0x8000 };
        self.write(at, code);
        self.cpu.rip = at;
    }

    /// Runs instructions one by one, delivering what comes up, until HLT, a triple fault or `steps`.
    pub fn deliver(&mut self, steps: usize) -> Delivery {
        let mut delivery = Delivery::Done;
        for _ in 0..steps {
            let bench = &mut self.bench;
            bench.drop_stale();
            if bench.cpu.trap_pending() {
                delivery = bench.cpu.deliver_trap();
            } else {
                match bench.cpu.before_step() {
                    Err(_) => delivery = bench.cpu.deliver_exception(),
                    Ok(step) => match bench.run_one() {
                        Outcome::Fault => delivery = bench.cpu.deliver_exception(),
                        _ => bench.cpu.after_step(step),
                    },
                }
            }
            if self.bench.cpu.halted || delivery == Delivery::TripleFault {
                break;
            }
        }
        delivery
    }

    /// As `deliver`, for guests that do not shut down.
    pub fn go(&mut self, steps: usize) {
        assert_eq!(self.deliver(steps), Delivery::Done);
    }

    /// Runs on, not one by one where nothing asks for that, until HLT; no more than `turns` exceptions and single instructions on the way.
    pub fn go_to_halt(&mut self, turns: usize) {
        for _ in 0..turns {
            let bench = &mut self.bench;
            let one_by_one = bench.cpu.interrupt_shadow || bench.cpu.needs_single_step();
            if one_by_one || bench.cpu.trap_pending() {
                self.go(1);
                self.bench.cpu.interrupt_shadow = false;
            } else if let Stop::Fault(_) = bench.run(1000) {
                assert_eq!(bench.cpu.deliver_exception(), Delivery::Done);
            }
            if self.bench.cpu.halted {
                return;
            }
        }
        panic!("no HLT; RIP is {:#x}", self.cpu.rip);
    }

    /// The vector whose handler has halted.
    pub fn halted_in(&self) -> Option<u64> {
        let offset = self.cpu.rip.wrapping_sub(HANDLERS + 1);
        (self.cpu.halted && offset < 256 * 16 && offset.is_multiple_of(16)).then_some(offset / 16)
    }

    /// 64-bit values on the stack.
    pub fn stack_64<const N: usize>(&self) -> [u64; N] {
        std::array::from_fn(|index| self.read_u64(self.cpu.gpr[crate::cpu::RSP] + 8 * index as u64))
    }

    /// 32-bit values on the stack.
    pub fn stack_32<const N: usize>(&self) -> [u32; N] {
        std::array::from_fn(|index| u32::from_le_bytes(self.read(self.cpu.gpr[crate::cpu::RSP] + 4 * index as u64)))
    }
}
