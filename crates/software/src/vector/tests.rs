//! Facts about vector and x87 instructions that do not need the host as an oracle.

use crate::cpu::{RAX, RBX, RDX, cr0, cr4};
use crate::fault::vector;
use crate::testbench::{CODE, CodeSize, DATA, Stop, TestBench, Tier, on_each_tier};

fn bench(tier: Tier) -> TestBench {
    let mut bench = TestBench::on(tier);
    bench.cpu.cr4 |= cr4::OSXSAVE;
    bench.cpu.xcr0 = 7;
    bench.cpu.update_mode();
    bench.cpu.gpr[RBX] = DATA;
    bench
}

fn step(bench: &mut TestBench, code: &[u8], instructions: u64) -> Stop {
    bench.write(CODE, code);
    bench.cpu.rip = CODE;
    bench.step(instructions)
}

fn vector_of(stop: Stop) -> Option<u8> {
    if let Stop::Fault(exception) = stop { Some(exception.vector) } else { None }
}

#[test]
fn addsd_adds_and_sets_the_sticky_flag() {
    on_each_tier(|tier| {
        let mut bench = bench(tier);
        bench.cpu.vector.ymm[1].0 = [1.0f64.to_bits(), 7, 8, 9];
        bench.write(DATA, &0.1f64.to_le_bytes());
        // addsd xmm1, [rbx]
        assert_eq!(step(&mut bench, &[0xf2, 0x0f, 0x58, 0x0b], 1), Stop::Limit);
        assert_eq!(bench.cpu.vector.ymm[1].0, [1.1f64.to_bits(), 7, 8, 9]);
        assert_eq!(bench.cpu.vector.mxcsr(), 0x1fa0);
    });
}

#[test]
fn an_unmasked_simd_exception_faults_and_keeps_the_target() {
    on_each_tier(|tier| {
        let mut bench = bench(tier);
        bench.cpu.vector.ymm[1].0 = [1.0f64.to_bits(), 0, 0, 0];
        bench.cpu.vector.set_mxcsr(0x1f80 & !(1 << 9));
        // divsd xmm1, xmm2
        assert_eq!(vector_of(step(&mut bench, &[0xf2, 0x0f, 0x5e, 0xca], 1)), Some(vector::SIMD));
        assert_eq!(bench.cpu.vector.ymm[1].0[0], 1.0f64.to_bits());
        assert_eq!(bench.cpu.vector.mxcsr() & 0x3f, 4);
        bench.cpu.cr4 &= !cr4::OSXMMEXCPT;
        assert_eq!(vector_of(step(&mut bench, &[0xf2, 0x0f, 0x5e, 0xca], 1)), Some(vector::INVALID_OPCODE));
    });
}

#[test]
fn a_pending_x87_exception_faults_the_next_waiting_instruction_only() {
    on_each_tier(|tier| {
        let mut bench = bench(tier);
        bench.write(DATA, &[0x7b, 0x03]);
        // fninit; fldcw [rbx]; fld1; fldz; fdivp; fnstsw ax; fld1
        let code = [0xdb, 0xe3, 0xd9, 0x2b, 0xd9, 0xe8, 0xd9, 0xee, 0xde, 0xf9, 0xdf, 0xe0, 0xd9, 0xe8];
        assert_eq!(vector_of(step(&mut bench, &code, 10)), Some(vector::X87));
        assert_eq!(bench.cpu.gpr[RAX] & 0x84, 0x84);
        assert_eq!(bench.cpu.rip, CODE + 12);
        assert_eq!(bench.cpu.vector.pointers.instruction, CODE + 8);
        bench.cpu.cr0 &= !cr0::NE;
        assert_eq!(step(&mut bench, &[0xd9, 0xe8, 0xdf, 0xe0], 2), Stop::Limit);
        assert_eq!(bench.cpu.gpr[RAX] & 0x84, 0x84);
    });
}

#[test]
fn task_switched_and_disabled_units_raise_what_the_manual_says() {
    on_each_tier(|tier| {
        let run = |cr0_bits: u64, cr4_clear: u64, code: &[u8]| {
            let mut bench = bench(tier);
            bench.cpu.cr0 |= cr0_bits;
            bench.cpu.cr4 &= !cr4_clear;
            bench.cpu.update_mode();
            vector_of(step(&mut bench, code, 1))
        };
        let (x87, mmx, sse, avx): (&[u8], &[u8], &[u8], &[u8]) =
            (&[0xd9, 0xe8], &[0x0f, 0xfc, 0xc1], &[0x0f, 0x58, 0xc1], &[0xc5, 0xf8, 0x58, 0xc1]);
        for code in [x87, mmx, sse, avx] {
            assert_eq!(run(0, 0, code), None);
            assert_eq!(run(cr0::TS, 0, code), Some(vector::DEVICE_NOT_AVAILABLE));
        }
        assert_eq!(run(cr0::EM, 0, x87), Some(vector::DEVICE_NOT_AVAILABLE));
        assert_eq!(run(cr0::EM, 0, mmx), Some(vector::INVALID_OPCODE));
        assert_eq!(run(cr0::EM | cr0::TS, 0, sse), Some(vector::INVALID_OPCODE));
        assert_eq!(run(cr0::EM, 0, avx), None);
        assert_eq!(run(cr0::TS, cr4::OSFXSR, sse), Some(vector::INVALID_OPCODE));
        assert_eq!(run(0, cr4::OSXSAVE, avx), Some(vector::INVALID_OPCODE));
    });
}

#[test]
fn clts_lets_vector_instructions_run_again() {
    on_each_tier(|tier| {
        let mut bench = bench(tier);
        bench.cpu.cr0 |= cr0::TS;
        bench.cpu.update_mode();
        // clts; addps xmm0, xmm1
        assert_eq!(step(&mut bench, &[0x0f, 0x06, 0x0f, 0x58, 0xc1], 2), Stop::Limit);
    });
}

#[test]
fn vex_encodings_do_not_exist_in_real_mode() {
    on_each_tier(|tier| {
        // andn eax, ecx, edx; rorx eax, ecx, 1; mulx eax, ecx, edx; vaddps xmm0, xmm0, xmm1
        let codes: [&[u8]; 4] = [
            &[0xc4, 0xe2, 0x70, 0xf2, 0xc2],
            &[0xc4, 0xe3, 0x7b, 0xf0, 0xc1, 1],
            &[0xc4, 0xe2, 0x73, 0xf6, 0xc2],
            &[0xc5, 0xf8, 0x58, 0xc1],
        ];
        for code in codes {
            let mut bench = bench(tier);
            bench.set_mode(CodeSize::Bits16, 0);
            bench.cpu.xcr0 = 7;
            bench.cpu.update_mode();
            assert_eq!(step(&mut bench, code, 1), Stop::Limit);
            bench.cpu.cr0 = cr0::ET;
            bench.cpu.efer = 0;
            bench.cpu.tlb.flush_all();
            bench.cpu.update_mode();
            // With the flat segments of before: unreal mode.
            assert_eq!(vector_of(step(&mut bench, code, 1)), Some(vector::INVALID_OPCODE));
        }
    });
}

#[test]
fn aligned_forms_fault_on_misaligned_operands_and_others_do_not() {
    on_each_tier(|tier| {
        let mut bench = bench(tier);
        bench.cpu.gpr[RBX] = DATA + 1;
        assert_eq!(vector_of(step(&mut bench, &[0x0f, 0x28, 0x03], 1)), Some(vector::GENERAL_PROTECTION));
        assert_eq!(vector_of(step(&mut bench, &[0x0f, 0x58, 0x03], 1)), Some(vector::GENERAL_PROTECTION));
        assert_eq!(step(&mut bench, &[0x0f, 0x10, 0x03], 1), Stop::Limit);
        assert_eq!(step(&mut bench, &[0xc5, 0xf8, 0x58, 0x03], 1), Stop::Limit);
    });
}

#[test]
fn a_saved_state_comes_back_from_every_area_format() {
    on_each_tier(|tier| {
        // (save, restore) with [rbx]: fxsave64, xsave64, xsaveopt64, xsavec64 with fxrstor64 or xrstor64
        let pairs: [(&[u8], &[u8]); 4] = [
            (&[0x48, 0x0f, 0xae, 0x03], &[0x48, 0x0f, 0xae, 0x0b]),
            (&[0x48, 0x0f, 0xae, 0x23], &[0x48, 0x0f, 0xae, 0x2b]),
            (&[0x48, 0x0f, 0xae, 0x33], &[0x48, 0x0f, 0xae, 0x2b]),
            (&[0x48, 0x0f, 0xc7, 0x23], &[0x48, 0x0f, 0xae, 0x2b]),
        ];
        // At a page boundary, and inside a page.
        for at in [DATA, DATA + 0x1000 - 192] {
            for (number, (save, restore)) in pairs.into_iter().enumerate() {
                let mut bench = bench(tier);
                bench.cpu.gpr[RBX] = at;
                bench.cpu.gpr[RAX] = 7;
                bench.cpu.gpr[RDX] = 0;
                for (index, register) in (1..).zip(&mut bench.cpu.vector.ymm) {
                    register.0 = [index, index << 8, index << 16, index << 24];
                }
                bench.cpu.vector.set_mxcsr(0x1f81);
                // fninit; fldpi; save; fninit; vzeroall; restore
                let code = [&[0xdb, 0xe3, 0xd9, 0xeb][..], save, &[0xdb, 0xe3, 0xc5, 0xfc, 0x77][..], restore].concat();
                assert_eq!(step(&mut bench, &code, 6), Stop::Limit);
                let avx = number != 0;
                for (index, register) in (1..).zip(&bench.cpu.vector.ymm) {
                    let (third, fourth) = if avx { (index << 16, index << 24) } else { (0, 0) };
                    assert_eq!(register.0, [index, index << 8, third, fourth]);
                }
                assert_eq!(bench.cpu.vector.mxcsr(), 0x1f81);
                assert_eq!(bench.cpu.vector.pointers.instruction, CODE + 2);
                let image = bench.cpu.vector.x87_image().0;
                assert_eq!(image[32..42], [0x35, 0xc2, 0x68, 0x21, 0xa2, 0xda, 0x0f, 0xc9, 0x00, 0x40]);
            }
        }
    });
}

#[test]
fn an_xrstor_of_a_bad_header_faults_and_loads_nothing() {
    on_each_tier(|tier| {
        for (at, value) in [(512, 8u64), (520, 1), (520, 1 << 63 | 8), (528, 1)] {
            let mut bench = bench(tier);
            bench.cpu.gpr[RAX] = 7;
            bench.cpu.vector.ymm[0].0 = [1, 2, 3, 4];
            bench.write(DATA + at, &value.to_le_bytes());
            assert_eq!(vector_of(step(&mut bench, &[0x0f, 0xae, 0x2b], 1)), Some(vector::GENERAL_PROTECTION));
            assert_eq!(bench.cpu.vector.ymm[0].0, [1, 2, 3, 4]);
        }
    });
}

#[test]
fn a_gather_that_faults_keeps_what_it_has() {
    on_each_tier(|tier| {
        let mut bench = bench(tier);
        bench.write(DATA + 4, &0x1234u32.to_le_bytes());
        // Index 1 reads DATA + 4; the next one is outside the tables.
        bench.cpu.vector.ymm[1].0 = [0x7fff_ffff_0000_0001, 0, 0, 0];
        bench.cpu.vector.ymm[2].0 = [u64::MAX, 0, 0, 0];
        // vpgatherdd xmm0, [rbx + xmm1 * 4], xmm2
        let stop = step(&mut bench, &[0xc4, 0xe2, 0x69, 0x90, 0x04, 0x8b], 1);
        assert_eq!(vector_of(stop), Some(vector::PAGE_FAULT));
        assert_eq!(bench.cpu.vector.ymm[0].0[0], 0x1234);
        assert_eq!(bench.cpu.vector.ymm[2].0, [0xffff_ffff_0000_0000, 0, 0, 0]);
    });
}

#[test]
fn sticky_flags_survive_the_loading_of_the_x87_registers() {
    on_each_tier(|tier| {
        let mut bench = bench(tier);
        bench.cpu.vector.ymm[1].0[0] = 1.0f64.to_bits();
        bench.cpu.vector.ymm[2].0[0] = 0.1f64.to_bits();
        // addsd xmm1, xmm2 (inexact); fninit; stmxcsr [rbx]
        let code = [0xf2, 0x0f, 0x58, 0xca, 0xdb, 0xe3, 0x0f, 0xae, 0x1b];
        assert_eq!(step(&mut bench, &code, 3), Stop::Limit);
        assert_eq!(bench.read_u64(DATA) as u32, 0x1fa0);
    });
}
