//! Random system instructions in random modes over random descriptor tables: nothing panics, and every delivery ends.
//!
//! `POLDER_TEST_SEED` takes a run back; the seed is part of the panic's message. `POLDER_TEST_CASES` says how many are tried.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::test_guest::{GDT, IDT, TSS, TestGuest};
use crate::cpu::{CS, cr0, cr4};
use crate::flags;
use crate::testbench::{DATA, STACK, Tier, on_each_tier};

/// xorshift64*
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// A number as guests like to have them: small, near a limit, an address, or anything.
    fn operand(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(16),
            1 => self.below(0x1000) & !7,
            2 => [GDT, IDT, TSS, DATA, STACK][self.below(5) as usize].wrapping_add(self.below(64)),
            3 => u64::MAX.wrapping_sub(self.below(16)),
            4 => 0x7fff_ffff_ffff_u64.wrapping_add(self.below(3)),
            5 => 0xffff_ffff_u64.wrapping_sub(self.below(16)),
            6 => 1 << self.below(64),
            _ => self.next(),
        }
    }
}

/// First bytes of instructions of this folder; random bytes follow.
const OPENINGS: &[&[u8]] = &[
    &[0xcf],
    &[0x48, 0xcf],
    &[0x66, 0xcf],
    &[0xca],
    &[0xcb],
    &[0x48, 0xcb],
    &[0xcd],
    &[0xcc],
    &[0xce],
    &[0xf1],
    &[0x8e],
    &[0x8c],
    &[0x9a],
    &[0xea],
    &[0xff, 0x18],
    &[0xff, 0x28],
    &[0x48, 0xff, 0x2b],
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x02],
    &[0x0f, 0x03],
    &[0x0f, 0x05],
    &[0x0f, 0x07],
    &[0x48, 0x0f, 0x07],
    &[0x0f, 0x20],
    &[0x0f, 0x22],
    &[0x0f, 0x21],
    &[0x0f, 0x23],
    &[0x0f, 0x30],
    &[0x0f, 0x32],
    &[0x0f, 0x34],
    &[0x0f, 0x35],
    &[0x48, 0x0f, 0x35],
    &[0x0f, 0xa1],
    &[0x0f, 0xa9],
    &[0x0f, 0xb2],
    &[0x0f, 0xb4],
    &[0x1f],
    &[0x17],
    &[0xc4],
    &[0xc5],
    &[0x63],
    &[0x6c],
    &[0xf3, 0x6d],
    &[0xf3, 0x6f],
    &[0x6e],
    &[0xe4],
    &[0xec],
    &[0xed],
    &[0xef],
    &[0xf4],
    &[0xfa],
    &[0xfb],
    &[0x0f, 0x06],
    &[0x0f, 0x08],
    &[0x66, 0x0f, 0x38, 0x82],
    &[0xf3, 0x0f, 0xae],
    &[0x0f, 0x01, 0xd1],
    &[0x0f, 0x01, 0xf8],
    &[0x9d],
];

fn guest(tier: Tier, random: &mut Random) -> TestGuest {
    let mut guest = match random.below(4) {
        0 => TestGuest::real(tier),
        1 => TestGuest::protected(tier, if random.below(2) == 0 { 0 } else { 3 }),
        _ => TestGuest::long(tier, if random.below(2) == 0 { 0 } else { 3 }),
    };
    for table in [GDT, IDT, TSS] {
        for _ in 0..random.below(40) {
            let at = table + random.below(0x200) * 8;
            let value = match random.below(3) {
                // A plausible descriptor or gate of a random type.
                0 => 0x00cf_0000_0000_ffff | random.below(256) << 40 | random.below(16) << 52,
                1 => random.next() & 0xff_ffff | 8 << 16 | random.below(256) << 40,
                _ => random.next(),
            };
            guest.write(at, &value.to_le_bytes());
        }
    }
    let cpu = &mut guest.bench.cpu;
    for register in &mut cpu.gpr[..16] {
        *register = random.operand();
    }
    if random.below(4) != 0 {
        cpu.gpr[crate::cpu::RSP] = if cpu.mode.protected { STACK } else { 0x7000 };
    }
    if random.below(4) == 0 {
        cpu.gdtr.limit = random.next() as u16;
        cpu.idtr.limit = random.next() as u16;
        cpu.tr.limit = random.operand() as u32;
        cpu.tr.base = random.operand();
    }
    if random.below(4) == 0 {
        cpu.debug[..4].fill_with(|| random.operand());
        cpu.debug[5] = random.next() & 0xffff_23ff | 0x400;
    }
    cpu.cr4 |= random.next() & (cr4::DE | cr4::UMIP | cr4::FSGSBASE | cr4::SMAP | cr4::SMEP | cr4::TSD);
    if random.below(8) == 0 {
        cpu.cr0 |= cr0::AM;
    }
    let wild = flags::TF | flags::NT | flags::IOPL | flags::AC | flags::IF | flags::RF;
    let mut rflags = random.next() & random.next() & wild | random.next() & flags::ARITHMETIC | 2;
    if cpu.mode.protected && !cpu.mode.long && random.below(4) == 0 {
        rflags |= flags::VM;
        cpu.segments[usize::from(CS)].base = 0;
    }
    cpu.set_rflags(rflags);
    guest
}

#[test]
fn hostile_tables_and_instructions_neither_panic_nor_hang() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let given = number("POLDER_TEST_SEED");
    let cases = number("POLDER_TEST_CASES").unwrap_or(if given.is_some() { 1 } else { 1500 });
    let first = given.unwrap_or(0x5eed_0000_0001);
    on_each_tier(|tier| {
        for seed in first..first + cases {
            let run = AssertUnwindSafe(|| {
                let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
                let mut guest = guest(tier, &mut random);
                let mut code = Vec::new();
                for _ in 0..6 {
                    code.extend(OPENINGS[random.below(OPENINGS.len() as u64) as usize]);
                    code.extend(&random.next().to_le_bytes()[..random.below(8) as usize]);
                }
                guest.load_code(&code);
                for _ in 0..8 {
                    // A triple fault ends the guest; anything else goes on.
                    if guest.deliver(4) == super::Delivery::TripleFault {
                        break;
                    }
                    guest.cpu.halted = false;
                    if random.below(4) == 0 && guest.cpu.deliver_interrupt(random.next() as u8) != super::Delivery::Done
                    {
                        break;
                    }
                }
            });
            assert!(catch_unwind(run).is_ok(), "POLDER_TEST_SEED={seed} takes this run back");
        }
    });
}
