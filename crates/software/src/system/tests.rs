//! What the processor does at its seams: exceptions, interrupts, returns, gates, tasks, modes, debugging.

use polder_machine::state::SegmentState;

use super::Delivery;
use super::test_guest::{
    FREE, GDT, HANDLERS, IDT, IST_1, KERNEL_CODE, KERNEL_DATA, RING_0_STACK, TASK, TSS, TestGuest, USER_CODE,
    USER_DATA, segment_descriptor,
};
use crate::cpu::{CS, CodeSize, DS, FS, RAX, RBX, RCX, RDX, RSP, SS, cr0, cr4};
use crate::fault::vector;
use crate::flags;
use crate::testbench::{CODE, DATA, STACK, on_each_tier};

#[test]
fn a_fault_in_user_code_pushes_a_frame_on_the_kernel_stack_and_iretq_goes_back() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::long(tier, 3);
        guest.cpu.set_rflags(flags::IF | flags::CF | 2);
        guest.load_code(&[0x90, 0x0f, 0x0b]); // nop; ud2
        guest.write(HANDLERS + 16 * 6, &[0x48, 0x83, 0x04, 0x24, 0x02, 0x48, 0xcf]); // add qword [rsp], 2; iretq
        guest.go(2);
        assert_eq!(guest.cpu.rip, HANDLERS + 16 * 6);
        assert_eq!(guest.cpu.gpr[RSP], RING_0_STACK - 40);
        let expected =
            [CODE + 1, u64::from(USER_CODE), flags::IF | flags::CF | flags::RF | 2, STACK, u64::from(USER_DATA)];
        assert_eq!(guest.stack_64::<5>(), expected);
        assert_eq!((guest.cpu.cpl(), guest.cpu.segments[usize::from(SS)].selector), (0, 0));
        assert_eq!(guest.cpu.system_flags & flags::IF, 0);
        guest.go(2);
        assert_eq!((guest.cpu.rip, guest.cpu.cpl(), guest.cpu.gpr[RSP]), (CODE + 3, 3, STACK));
        assert_eq!(guest.cpu.rflags(), flags::IF | flags::CF | 2);
    });
}

#[test]
fn a_page_fault_sets_cr2_and_its_error_code_and_uses_its_interrupt_stack() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::long(tier, 3);
        guest.set_gate(14, 0x8e, HANDLERS + 16 * 14, KERNEL_CODE, 1);
        guest.load_code(&[0xc6, 0x04, 0x25, 0x10, 0x00, 0x00, 0x40, 0x01]); // mov byte [0x40000010], 1
        guest.go_to_halt(2);
        assert_eq!(guest.halted_in(), Some(14));
        assert_eq!(guest.cpu.cr2, 0x4000_0010);
        assert_eq!(guest.cpu.gpr[RSP], IST_1 - 48);
        assert_eq!(guest.stack_64::<2>(), [6, CODE]);
    });
}

#[test]
fn a_fault_while_a_fault_is_delivered_is_a_double_fault_and_a_third_one_shuts_down() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::long(tier, 0);
        guest.set_gate(13, 0x0e, HANDLERS, KERNEL_CODE, 0); // #GP's gate is absent
        guest.load_code(&[0x0f, 0x01, 0xf8, 0x0f, 0x32]); // swapgs; rdmsr
        guest.cpu.gpr[RCX] = 0xdead_beef;
        guest.go_to_halt(3);
        assert_eq!(guest.halted_in(), Some(8));
        assert_eq!(guest.stack_64::<2>(), [0, CODE + 3]);

        let mut guest = TestGuest::long(tier, 0);
        guest.set_gate(13, 0x0e, HANDLERS, KERNEL_CODE, 0);
        guest.set_gate(8, 0x0e, HANDLERS, KERNEL_CODE, 0);
        guest.load_code(&[0x0f, 0x32]);
        guest.cpu.gpr[RCX] = 0xdead_beef;
        assert_eq!(guest.deliver(3), Delivery::TripleFault);
    });
}

#[test]
fn a_benign_fault_whose_gate_is_absent_becomes_segment_not_present() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::long(tier, 0);
        guest.set_gate(6, 0x0e, HANDLERS, KERNEL_CODE, 0);
        guest.load_code(&[0x0f, 0x0b]);
        guest.go_to_halt(2);
        assert_eq!(guest.halted_in(), Some(11));
        assert_eq!(guest.stack_64::<2>(), [6 * 8 + 3, CODE]);
    });
}

#[test]
fn user_code_may_not_call_a_kernel_gate() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::long(tier, 3);
        guest.load_code(&[0xcd, 0x30]);
        guest.go_to_halt(2);
        assert_eq!(guest.halted_in(), Some(13));
        assert_eq!(guest.stack_64::<2>(), [0x30 * 8 + 2, CODE]);
        let mut guest = TestGuest::long(tier, 3);
        guest.set_gate(0x30, 0xee, HANDLERS + 16 * 0x30, KERNEL_CODE, 0);
        guest.load_code(&[0xcd, 0x30]);
        guest.go_to_halt(2);
        assert_eq!(guest.halted_in(), Some(0x30));
        assert_eq!(guest.stack_64::<1>(), [CODE + 2]);
    });
}

#[test]
fn an_external_interrupt_and_an_nmi_push_the_next_instruction() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::long(tier, 0);
        guest.cpu.gpr[RSP] = STACK + 3;
        assert_eq!(guest.cpu.deliver_interrupt(0x40), Delivery::Done);
        assert_eq!((guest.cpu.rip, guest.cpu.gpr[RSP]), (HANDLERS + 16 * 0x40, STACK - 40));
        assert_eq!(guest.stack_64::<4>(), [CODE, u64::from(KERNEL_CODE), 2, STACK + 3]);
        assert_eq!(guest.cpu.deliver_nmi(), Delivery::Done);
        assert!(guest.cpu.nmi_blocked);
        guest.write(HANDLERS + 16 * 2, &[0x48, 0xcf]);
        guest.go(1);
        assert!(!guest.cpu.nmi_blocked);
        assert_eq!(guest.cpu.rip, HANDLERS + 16 * 0x40);
    });
}

#[test]
fn real_mode_interrupts_go_through_the_vector_table() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::real(tier);
        guest.cpu.set_rflags(flags::IF | 2);
        guest.write(0x21 * 4, &[0x34, 0x12, 0x00, 0x20]); // 2000:1234
        guest.write(0x21234, &[0xcf]); // iret
        guest.load_code(&[0xcd, 0x21, 0xf4]);
        guest.go(1);
        assert_eq!((guest.cpu.segments[usize::from(CS)].base, guest.cpu.rip), (0x20000, 0x1234));
        assert_eq!(guest.cpu.gpr[RSP], 0x7000 - 6);
        assert_eq!(guest.read::<6>(0x7000 - 6), [0x02, 0x80, 0, 0, 0x02, 0x02]);
        assert_eq!(guest.cpu.system_flags & flags::IF, 0);
        guest.go_to_halt(2);
        assert!(guest.cpu.halted);
        assert_eq!((guest.cpu.rip, guest.cpu.gpr[RSP]), (0x8003, 0x7000));
        assert_ne!(guest.cpu.system_flags & flags::IF, 0);
    });
}

#[test]
fn the_way_from_real_mode_to_long_mode_and_its_checks() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::real(tier);
        let tables = TestGuest::long(tier, 0);
        // The other guest's GDT entries and page tables, which lie at the same places in this one's memory.
        for selector in [KERNEL_CODE, KERNEL_DATA] {
            let entry: [u8; 8] = tables.read(GDT + u64::from(selector));
            guest.write(GDT + u64::from(selector), &entry);
        }
        guest.cpu.gdtr.base = GDT;
        guest.cpu.gdtr.limit = 0xff;
        guest.cpu.tr = SegmentState { selector: 0, base: 0, limit: 0xffff, attributes: 0x8b };
        guest.cpu.gpr[RCX] = 0xc000_0080;
        let cr3 = tables.cpu.cr3 as u32;
        let mut code = vec![0x66, 0xb8, 0xa0, 0, 0, 0, 0x0f, 0x22, 0xe0]; // mov eax, PAE|PGE; mov cr4, eax
        code.extend([0x66, 0xb8]);
        code.extend(cr3.to_le_bytes()); // mov eax, cr3
        code.extend([0x0f, 0x22, 0xd8]); // mov cr3, eax
        code.extend([0x66, 0x31, 0xd2, 0x66, 0xb8, 0x00, 0x01, 0, 0, 0x0f, 0x30]); // xor edx,edx; mov eax, LME; wrmsr
        code.extend([0x66, 0xb8, 0x11, 0, 0, 0x80, 0x0f, 0x22, 0xc0]); // mov eax, PG|ET|PE; mov cr0, eax
        code.extend([0xea, 0x00, 0x90, 0x08, 0x00]); // jmp 8:0x9000
        guest.write(0x9000, &[0x48, 0x31, 0xc0, 0xf4]); // xor rax, rax; hlt
        guest.load_code(&code);
        guest.go_to_halt(20);
        assert!(guest.cpu.halted);
        assert_eq!(guest.cpu.rip, 0x9004);
        assert!(guest.cpu.mode.long && guest.cpu.mode.code == CodeSize::Bits64);
        // In 64-bit code neither paging nor PAE can be turned off.
        for (value, code) in [(0x11u64, [0x0f, 0x22, 0xc0]), (0x80, [0x0f, 0x22, 0xe0])] {
            guest.cpu.halted = false;
            guest.write(0x9100, &code);
            guest.cpu.rip = 0x9100;
            guest.cpu.gpr[RAX] = value;
            let bench = &mut guest.bench;
            assert_eq!(bench.run_one(), crate::run::Outcome::Fault);
            assert_eq!(guest.cpu.fault.vector, vector::GENERAL_PROTECTION);
        }
    });
}

#[test]
fn data_segments_stay_big_after_a_visit_to_protected_mode() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::real(tier);
        guest.cpu.segments[usize::from(DS)].limit = 0xffff_ffff;
        guest.cpu.gpr[RAX] = 0x10;
        guest.cpu.gpr[RBX] = DATA;
        guest.write(DATA + 0x100, &[0x5a]);
        guest.load_code(&[0x8e, 0xd8, 0x67, 0x8a, 0x03]); // mov ds, ax; mov al, [ebx]
        guest.go(2);
        assert_eq!(guest.cpu.segments[usize::from(DS)].base, 0x100);
        assert_eq!(guest.cpu.gpr[RAX], 0x5a);
    });
}

#[test]
fn segment_loads_check_presence_privilege_and_type() {
    on_each_tier(|tier| {
        let kernel_data = segment_descriptor(0x12, 0, false, true);
        let cases = [
            // (descriptor, selector's RPL, CPL, into SS, expected (vector, error code) or accessed)
            (kernel_data, 0, 0, false, None),
            (kernel_data, 3, 0, false, Some((13, FREE))),
            (kernel_data, 3, 3, false, Some((13, FREE))),
            (kernel_data & !(0x80 << 40), 0, 0, false, Some((11, FREE))),
            (kernel_data & !(0x80 << 40), 0, 0, true, Some((12, FREE))),
            (segment_descriptor(0x10, 0, false, true), 0, 0, true, Some((13, FREE))), // read-only
            (segment_descriptor(0x18, 0, false, true), 0, 0, false, Some((13, FREE))), // execute-only
            (segment_descriptor(0x1e, 0, false, true), 3, 3, false, None),            // conforming, readable
        ];
        for (descriptor, rpl, cpl, stack, expected) in cases {
            let mut guest = TestGuest::protected(tier, cpl);
            guest.set_descriptor(FREE, descriptor);
            guest.cpu.gpr[RAX] = u64::from(FREE | rpl);
            guest.load_code(&[0x8e, if stack { 0xd0 } else { 0xe0 }]); // mov ss/fs, ax
            guest.go(2);
            match expected {
                Some((vector, code)) => {
                    assert_eq!(guest.halted_in(), Some(vector), "{descriptor:#x}");
                    assert_eq!(guest.stack_32::<1>(), [u32::from(code)]);
                }
                None => {
                    let segment = guest.cpu.segments[usize::from(FS)];
                    assert_eq!(segment.selector, FREE | rpl, "{descriptor:#x}");
                    assert_eq!(segment.attributes & 1, 1);
                    assert_eq!(guest.read::<1>(GDT + u64::from(FREE) + 5)[0] & 1, 1);
                }
            }
        }
        let mut guest = TestGuest::protected(tier, 0);
        guest.load_code(&[0x31, 0xc0, 0x8e, 0xe0, 0x64, 0xa1, 0, 0, 0, 0]); // xor eax,eax; mov fs,ax; mov eax,fs:[0]
        guest.go_to_halt(4);
        assert_eq!(guest.halted_in(), Some(13));
    });
}

#[test]
fn a_call_gate_copies_parameters_to_the_inner_stack_and_far_return_drops_them() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::protected(tier, 3);
        let target = HANDLERS + 16 * 0x80;
        let gate = target & 0xffff | u64::from(KERNEL_CODE) << 16 | 2 << 32 | 0xec << 40 | (target >> 16) << 48;
        guest.set_descriptor(FREE, gate);
        guest.write(target, &[0xca, 0x08, 0x00]); // retf 8
        let selector = FREE as u8;
        // push 0x11; push 0x22; call FREE:0
        guest.load_code(&[0x6a, 0x11, 0x6a, 0x22, 0x9a, 0, 0, 0, 0, selector | 3, 0]);
        guest.go(3);
        assert_eq!((guest.cpu.cpl(), guest.cpu.rip), (0, target));
        assert_eq!(guest.cpu.gpr[RSP], RING_0_STACK - 24);
        let stack = STACK as u32;
        let expected = [CODE as u32 + 11, u32::from(USER_CODE), 0x22, 0x11, stack - 8, u32::from(USER_DATA)];
        assert_eq!(guest.stack_32::<6>(), expected);
        guest.go(1);
        assert_eq!((guest.cpu.cpl(), guest.cpu.rip, guest.cpu.gpr[RSP]), (3, CODE + 11, STACK));
    });
}

#[test]
fn an_interrupt_may_switch_tasks_and_iret_switches_back() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::protected(tier, 0);
        let other = TSS + 0x800;
        let raw = 0x67 | (other & 0xff_ffff) << 16 | 0x89 << 40;
        guest.set_descriptor(FREE, raw);
        let put = |guest: &mut TestGuest, offset: u64, value: u32| guest.write(other + offset, &value.to_le_bytes());
        put(&mut guest, 0x20, HANDLERS as u32 + 16 * 0x90);
        put(&mut guest, 0x24, 2);
        put(&mut guest, 0x28, 0x1111); // eax
        put(&mut guest, 0x38, 0x34_0000); // esp
        for (offset, selector) in [(0x48, KERNEL_DATA), (0x4c, KERNEL_CODE), (0x50, KERNEL_DATA), (0x54, KERNEL_DATA)] {
            put(&mut guest, offset, u32::from(selector));
        }
        guest.write(IDT + 8 * 0x50, &(u64::from(FREE) << 16 | 0x85 << 40).to_le_bytes());
        guest.write(HANDLERS + 16 * 0x90, &[0xcf]);
        guest.cpu.gpr[RAX] = 0x2222;
        guest.load_code(&[0xcd, 0x50, 0xf4]);
        guest.go(1);
        assert_eq!((guest.cpu.rip, guest.cpu.gpr[RAX]), (HANDLERS + 16 * 0x90, 0x1111));
        assert_eq!(guest.cpu.tr.selector, FREE);
        assert_ne!(guest.cpu.system_flags & flags::NT, 0);
        assert_ne!(guest.cpu.cr0 & cr0::TS, 0);
        assert_eq!(guest.read::<2>(other), TASK.to_le_bytes());
        assert_eq!(guest.read::<1>(GDT + u64::from(FREE) + 5), [0x8b]);
        guest.go_to_halt(2);
        assert!(guest.cpu.halted);
        assert_eq!((guest.cpu.rip, guest.cpu.gpr[RAX], guest.cpu.tr.selector), (CODE + 3, 0x2222, TASK));
        assert_eq!(guest.cpu.system_flags & flags::NT, 0);
        assert_eq!(guest.read::<1>(GDT + u64::from(FREE) + 5), [0x89]);
    });
}

#[test]
fn virtual_8086_code_traps_to_the_kernel_and_is_returned_to() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::protected(tier, 0);
        guest.set_gate(0x21, 0xee, HANDLERS + 16 * 0x21, KERNEL_CODE, 0);
        guest.write(HANDLERS + 16 * 0x21, &[0xcf]);
        guest.write(0x9000, &[0xcd, 0x21, 0xf4]); // int 0x21; hlt
        let rsp = STACK - 36;
        let frame: [u32; 9] =
            [0x1000, 0x800, (flags::VM | 3 << 12 | 2) as u32, 0xff0, 0x700, 0x100, 0x200, 0x300, 0x400];
        for (index, value) in (0..).zip(frame) {
            guest.write(rsp + 4 * index, &value.to_le_bytes());
        }
        guest.cpu.gpr[RSP] = rsp;
        guest.load_code(&[0xcf]);
        guest.go(1);
        assert!(guest.cpu.mode.virtual_8086);
        assert_eq!((guest.cpu.cpl(), guest.cpu.rip, guest.cpu.segments[usize::from(FS)].base), (3, 0x1000, 0x3000));
        guest.go(1);
        assert_eq!((guest.cpu.cpl(), guest.cpu.rip), (0, HANDLERS + 16 * 0x21));
        assert_eq!(guest.cpu.gpr[RSP], RING_0_STACK - 36);
        assert_eq!(guest.cpu.segments[usize::from(DS)].attributes, 0);
        let mut expected = frame;
        expected[0] = 0x1002;
        assert_eq!(guest.stack_32::<9>(), expected);
        // HLT is for privilege level 0.
        guest.go_to_halt(3);
        assert_eq!(guest.halted_in(), Some(13));
        assert_eq!(guest.stack_32::<2>(), [0, 0x1002]);
    });
}

#[test]
fn virtual_8086_interrupts_need_iopl_3() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::protected(tier, 0);
        let rsp = STACK - 36;
        for (index, value) in (0..).zip([0x1000u32, 0x800, (flags::VM | 2) as u32, 0xff0, 0x700, 0, 0, 0, 0]) {
            guest.write(rsp + 4 * index, &value.to_le_bytes());
        }
        guest.write(0x9000, &[0xcd, 0x21]);
        guest.cpu.gpr[RSP] = rsp;
        guest.load_code(&[0xcf]);
        guest.go_to_halt(3);
        assert_eq!(guest.halted_in(), Some(13));
        assert_eq!(guest.stack_32::<2>(), [0, 0x1000]);
    });
}

#[test]
fn the_trap_flag_traps_after_each_instruction_but_not_after_mov_ss() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::long(tier, 0);
        guest.cpu.set_rflags(flags::TF | 2);
        guest.load_code(&[0x90, 0x90]);
        guest.go_to_halt(3);
        assert_eq!(guest.halted_in(), Some(1));
        assert_eq!(guest.stack_64::<3>(), [CODE + 1, u64::from(KERNEL_CODE), flags::TF | 2]);
        assert_eq!(guest.cpu.debug[4], 0xffff_4ff0);

        let mut guest = TestGuest::long(tier, 0);
        guest.cpu.gpr[RAX] = u64::from(KERNEL_DATA);
        guest.cpu.set_rflags(flags::TF | 2);
        guest.load_code(&[0x8e, 0xd0, 0x90, 0x90]); // mov ss, ax; nop; nop
        guest.go_to_halt(4);
        assert_eq!(guest.halted_in(), Some(1));
        assert_eq!(guest.stack_64::<1>(), [CODE + 3]);
    });
}

#[test]
fn instruction_and_data_breakpoints_raise_debug_exceptions() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::long(tier, 0);
        guest.cpu.debug[0] = CODE + 1;
        guest.cpu.debug[5] = 0x402;
        guest.cpu.update_mode();
        guest.load_code(&[0x90, 0x90, 0x90]);
        guest.write(HANDLERS + 16, &[0x0f, 0xba, 0x6c, 0x24, 0x10, 0x10, 0x48, 0xcf]); // bts dword [rsp+16], 16; iretq
        guest.go(2);
        assert_eq!(guest.cpu.rip, HANDLERS + 16);
        assert_eq!(guest.stack_64::<1>(), [CODE + 1]);
        assert_eq!(guest.cpu.debug[4] & 0xf, 1);
        guest.go(3); // The resume flag lets the instruction run.
        assert_eq!(guest.cpu.rip, CODE + 2);

        let mut guest = TestGuest::long(tier, 0);
        guest.cpu.debug[1] = DATA + 4;
        guest.cpu.debug[5] = 0x400 | 2 << 2 | 0xd << 20; // DR1: writes of four bytes
        guest.cpu.update_mode();
        guest.cpu.gpr[RBX] = DATA;
        guest.load_code(&[0x8b, 0x43, 0x04, 0x48, 0x89, 0x03, 0x90]); // mov eax, [rbx+4]; mov [rbx], rax; nop
        guest.go_to_halt(4);
        assert_eq!(guest.halted_in(), Some(1));
        assert_eq!(guest.stack_64::<1>(), [CODE + 6]);
        assert_eq!(guest.cpu.debug[4] & 0xf, 2);
    });
}

#[test]
fn general_detect_guards_the_debug_registers() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::long(tier, 0);
        guest.cpu.debug[5] = 0x2400;
        guest.load_code(&[0x0f, 0x21, 0xc0]); // mov rax, dr0
        guest.go_to_halt(2);
        assert_eq!(guest.halted_in(), Some(1));
        assert_eq!((guest.cpu.debug[4] & 0xe00f, guest.cpu.debug[5]), (0x2000, 0x400));
        let mut guest = TestGuest::long(tier, 0);
        guest.cpu.cr4 |= cr4::DE;
        guest.load_code(&[0x0f, 0x21, 0xe0]); // mov rax, dr4
        guest.go_to_halt(2);
        assert_eq!(guest.halted_in(), Some(6));
    });
}

#[test]
fn ports_follow_iopl_and_the_permission_map() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::long(tier, 3);
        guest.write(TSS + 0x68, &[0xff; 64]);
        guest.cpu.tr.limit = 0x68 + 63;
        guest.write(TSS + 0x68 + 0x80 / 8, &[0xfe]); // port 0x80 is free
        guest.load_code(&[0xe4, 0x80, 0xe5, 0x80]); // in al, 0x80; in eax, 0x80
        guest.go_to_halt(3);
        assert_eq!(guest.halted_in(), Some(13));
        assert_eq!(guest.stack_64::<2>(), [0, CODE + 2]);
        assert_eq!(guest.cpu.gpr[RAX] & 0xff, 0xff);
        let mut guest = TestGuest::long(tier, 3);
        guest.cpu.set_rflags(3 << 12 | 2);
        guest.load_code(&[0xe5, 0x80, 0x90]);
        guest.go(1);
        assert_eq!(guest.cpu.gpr[RAX], 0xffff_ffff);
    });
}

#[test]
fn syscall_enters_the_kernel_and_sysret_leaves_it() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::long(tier, 3);
        guest.cpu.system_call.star = 0x10 << 48 | 0x08 << 32;
        guest.cpu.system_call.lstar = HANDLERS + 16 * 0xa0;
        guest.cpu.system_call.mask = flags::IF;
        guest.cpu.set_rflags(flags::IF | flags::CF | 2);
        guest.write(HANDLERS + 16 * 0xa0, &[0x48, 0x0f, 0x07]); // sysretq
        guest.load_code(&[0x0f, 0x05, 0x90]);
        guest.go(1);
        assert_eq!((guest.cpu.rip, guest.cpu.cpl()), (HANDLERS + 16 * 0xa0, 0));
        assert_eq!((guest.cpu.gpr[RCX], guest.cpu.gpr[11]), (CODE + 2, flags::IF | flags::CF | 2));
        assert_eq!(guest.cpu.rflags(), flags::CF | 2);
        guest.go(1);
        assert_eq!((guest.cpu.rip, guest.cpu.cpl()), (CODE + 2, 3));
        assert_eq!(guest.cpu.segments[usize::from(CS)].selector, 0x23);
        assert_eq!(guest.cpu.segments[usize::from(SS)].selector, 0x1b);
        assert_eq!(guest.cpu.rflags(), flags::IF | flags::CF | 2);
    });
}

#[test]
fn privileged_instructions_fault_in_user_code() {
    on_each_tier(|tier| {
        let cases: &[(&[u8], u64)] = &[
            (&[0xf4], 13),                        // hlt
            (&[0xfa], 13),                        // cli
            (&[0x0f, 0x20, 0xc0], 13),            // mov rax, cr0
            (&[0x0f, 0x22, 0xc8], 6),             // mov cr1, rax
            (&[0x0f, 0x01, 0x38], 13),            // invlpg [rax]
            (&[0x0f, 0x30], 13),                  // wrmsr
            (&[0x0f, 0x06], 13),                  // clts
            (&[0x0f, 0x09], 13),                  // wbinvd
            (&[0x0f, 0x01, 0xf8], 13),            // swapgs
            (&[0x0f, 0x00, 0xd8], 13),            // ltr ax
            (&[0x0f, 0x01, 0xca], 6),             // clac
            (&[0x0f, 0x01, 0xc8], 6),             // monitor
            (&[0x0f, 0xaa], 6),                   // rsm
            (&[0x0f, 0x37], 6),                   // getsec
            (&[0xf3, 0x48, 0x0f, 0xae, 0xc0], 6), // rdfsbase rax without CR4.FSGSBASE
            (&[0x0f, 0x01, 0xd0], 6),             // xgetbv without CR4.OSXSAVE
            (&[0x48, 0x0f, 0x07], 13),            // sysretq
        ];
        for (code, expected) in cases {
            let mut guest = TestGuest::long(tier, 3);
            guest.cpu.cr4 &= !cr4::OSXSAVE;
            guest.load_code(code);
            guest.go_to_halt(2);
            assert_eq!(guest.halted_in(), Some(*expected), "{code:x?}");
        }
    });
}

#[test]
fn umip_keeps_the_tables_addresses_from_user_code() {
    on_each_tier(|tier| {
        for (umip, expected) in [(0, None), (cr4::UMIP, Some(13))] {
            let mut guest = TestGuest::long(tier, 3);
            guest.cpu.cr4 |= umip;
            guest.cpu.gpr[RBX] = DATA;
            guest.load_code(&[0x0f, 0x01, 0x03, 0x90]); // sgdt [rbx]
            guest.go(2);
            assert_eq!(guest.halted_in(), expected);
            if umip == 0 {
                assert_eq!(guest.read_u64(DATA + 2), GDT);
            }
        }
    });
}

#[test]
fn questions_about_selectors_answer_in_the_zero_flag() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::long(tier, 0);
        guest.cpu.gpr[RAX] = u64::from(USER_DATA);
        guest.load_code(&[0x0f, 0x02, 0xd8, 0x0f, 0x03, 0xd0, 0x31, 0xc0, 0x0f, 0x00, 0xe0]); // lar; lsl; xor eax,eax; verr ax
        guest.go(2);
        assert!(guest.cpu.arithmetic.zero());
        assert_eq!((guest.cpu.gpr[RBX], guest.cpu.gpr[RDX]), (0x00cf_f300, 0xffff_ffff));
        guest.go(2);
        assert!(!guest.cpu.arithmetic.zero());
    });
}

#[test]
fn interrupts_wait_one_instruction_after_sti() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::long(tier, 0);
        guest.load_code(&[0xfb, 0xfb, 0x90]);
        guest.go(1);
        assert!(guest.cpu.interrupt_shadow);
        guest.cpu.interrupt_shadow = false;
        guest.go(1);
        assert!(!guest.cpu.interrupt_shadow, "interrupts were on already");
    });
}

#[test]
fn a_protection_key_that_denies_is_reported_beside_other_reasons() {
    on_each_tier(|tier| {
        for (entry_rights, expected) in [(7, 0x27), (5, 0x27)] {
            let mut guest = TestGuest::long(tier, 3);
            let table = guest.cpu.cr3 + 0x3000 + (DATA >> 21) * 0x1000;
            guest.write(table + (DATA >> 12 & 511) * 8, &(DATA | entry_rights | 1 << 59).to_le_bytes());
            guest.cpu.cr4 |= cr4::PKE;
            guest.cpu.pkru = 1 << 2;
            guest.cpu.tlb.flush_all();
            guest.cpu.gpr[RBX] = DATA;
            guest.load_code(&[0x88, 0x03]); // mov [rbx], al
            guest.go_to_halt(2);
            assert_eq!(guest.halted_in(), Some(14));
            assert_eq!((guest.stack_64::<1>(), guest.cpu.cr2), ([expected], DATA));
        }
    });
}

#[test]
fn pushf_shows_what_sti_and_cli_did() {
    on_each_tier(|tier| {
        let mut guest = TestGuest::long(tier, 0);
        guest.load_code(&[0xfb, 0x9c, 0x58, 0xfa, 0x9c, 0x5b, 0xf4]); // sti; pushfq; pop rax; cli; pushfq; pop rbx; hlt
        guest.go_to_halt(5);
        assert_eq!((guest.cpu.gpr[RAX], guest.cpu.gpr[RBX]), (flags::IF | 2, 2));
    });
}
