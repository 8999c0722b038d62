//! Chooses handlers for system instructions.
//!
//! Operand conventions are those of `system::operand`.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::{OpBuilder, register_number, segment_number};
use crate::cpu::{Cpu, FS, GS};
use crate::op::{Flow, Handler, Op};
use crate::system::descriptor_tables::GDT;
use crate::system::operand::MEMORY;
use crate::system::port_io::REPEAT;

/// A handler from a method that may fault.
macro_rules! handler {
    ($method:ident) => {{
        extern "sysv64" fn run(cpu: &mut Cpu, op: &Op) -> Flow {
            cpu.$method(op).unwrap_or(Flow::Fault)
        }
        run as Handler
    }};
}

/// The handler of a system instruction.
pub fn select(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let handler = moves(instruction, builder)
        .or_else(|| tables(instruction, builder))
        .or_else(|| transfers(instruction, builder))
        .or_else(|| ports(instruction, builder))
        .or_else(|| processor(instruction, builder))?;
    // All of these may end the block; only those that always do are marked, so that the block builder stops there.
    builder.ends_block |= always_ends(instruction);
    Some(handler)
}

fn always_ends(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Jmp
            | Mnemonic::Call
            | Mnemonic::Retf
            | Mnemonic::Iret
            | Mnemonic::Iretd
            | Mnemonic::Iretq
            | Mnemonic::Int
            | Mnemonic::Int1
            | Mnemonic::Int3
            | Mnemonic::Syscall
            | Mnemonic::Sysret
            | Mnemonic::Sysretq
            | Mnemonic::Sysenter
            | Mnemonic::Sysexit
            | Mnemonic::Sysexitq
            | Mnemonic::Hlt
            | Mnemonic::Sti
            | Mnemonic::Wrmsr
            | Mnemonic::Lmsw
            | Mnemonic::Clts
            | Mnemonic::Xsetbv
            | Mnemonic::Wrpkru
            | Mnemonic::Vmcall
            | Mnemonic::Vmmcall
            | Mnemonic::Invlpg
            | Mnemonic::Invpcid
            | Mnemonic::Out
            | Mnemonic::Insb
            | Mnemonic::Insw
            | Mnemonic::Insd
            | Mnemonic::Outsb
            | Mnemonic::Outsw
            | Mnemonic::Outsd
    )
}

fn segment_register(register: Register) -> Option<u8> {
    register.is_segment_register().then(|| segment_number(register))
}

/// The general register of an operand that may be in memory instead.
fn register_or_memory(instruction: &Instruction, operand: u32, builder: &mut OpBuilder) {
    if instruction.op_kind(operand) == OpKind::Memory {
        builder.op.extra = MEMORY;
    } else if let Some(number) = register_number(instruction.op_register(operand)) {
        builder.op.extra = 0;
        builder.op.second = number;
        builder.op.extra2 = instruction.op_register(operand).size() as u8;
    }
}

/// Segment, control and debug registers.
fn moves(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let first = instruction.op0_register();
    let second = instruction.op1_register();
    match instruction.mnemonic() {
        Mnemonic::Mov if first.is_segment_register() => {
            register_or_memory(instruction, 1, builder);
            builder.op.first = segment_number(first);
            // CS or a register that does not exist.
            if first == Register::CS {
                return None;
            }
            builder.ends_block |= first == Register::SS;
            Some(handler!(op_mov_to_segment))
        }
        Mnemonic::Mov if second.is_segment_register() => {
            register_or_memory(instruction, 0, builder);
            builder.op.first = segment_number(second);
            Some(handler!(op_mov_from_segment))
        }
        Mnemonic::Mov if first.is_cr() || first.is_dr() => {
            builder.op.first = first.number() as u8;
            builder.op.second = register_number(second)?;
            builder.op.extra2 = second.size() as u8;
            builder.ends_block = true;
            Some(if first.is_cr() { handler!(op_mov_to_control) } else { handler!(op_mov_to_debug) })
        }
        Mnemonic::Mov if second.is_cr() || second.is_dr() => {
            builder.op.first = second.number() as u8;
            builder.op.second = register_number(first)?;
            builder.op.extra2 = first.size() as u8;
            Some(if second.is_cr() { handler!(op_mov_from_control) } else { handler!(op_mov_from_debug) })
        }
        Mnemonic::Push => {
            builder.op.first = segment_register(first)?;
            builder.op.extra2 = (-instruction.stack_pointer_increment()) as u8;
            Some(handler!(op_push_segment))
        }
        Mnemonic::Pop => {
            builder.op.first = segment_register(first)?;
            builder.op.extra2 = instruction.stack_pointer_increment() as u8;
            builder.ends_block |= first == Register::SS;
            Some(handler!(op_pop_segment))
        }
        Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lss | Mnemonic::Lfs | Mnemonic::Lgs => {
            builder.op.second = match instruction.mnemonic() {
                Mnemonic::Lds => crate::cpu::DS,
                Mnemonic::Les => crate::cpu::ES,
                Mnemonic::Lss => crate::cpu::SS,
                Mnemonic::Lfs => FS,
                _ => GS,
            };
            builder.op.first = register_number(first)?;
            builder.op.extra2 = first.size() as u8;
            builder.ends_block |= instruction.mnemonic() == Mnemonic::Lss;
            Some(handler!(op_load_far_pointer))
        }
        _ => None,
    }
}

/// Descriptor tables and descriptors.
fn tables(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let narrow = matches!(instruction.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16);
    Some(match instruction.mnemonic() {
        Mnemonic::Lgdt | Mnemonic::Lidt => {
            builder.op.extra2 = if narrow { 2 } else { 4 };
            builder.op.immediate = if instruction.mnemonic() == Mnemonic::Lgdt { GDT } else { 1 };
            handler!(op_load_table)
        }
        Mnemonic::Sgdt | Mnemonic::Sidt => {
            builder.op.immediate = if instruction.mnemonic() == Mnemonic::Sgdt { GDT } else { 1 };
            handler!(op_store_table)
        }
        Mnemonic::Lldt => {
            register_or_memory(instruction, 0, builder);
            handler!(op_load_ldt)
        }
        Mnemonic::Ltr => {
            register_or_memory(instruction, 0, builder);
            handler!(op_load_task_register)
        }
        Mnemonic::Sldt => {
            register_or_memory(instruction, 0, builder);
            handler!(op_store_ldt)
        }
        Mnemonic::Str => {
            register_or_memory(instruction, 0, builder);
            handler!(op_store_task_register)
        }
        Mnemonic::Lmsw => {
            register_or_memory(instruction, 0, builder);
            handler!(op_load_machine_status)
        }
        Mnemonic::Smsw => {
            register_or_memory(instruction, 0, builder);
            handler!(op_store_machine_status)
        }
        Mnemonic::Verr | Mnemonic::Verw => {
            register_or_memory(instruction, 0, builder);
            builder.op.immediate = u64::from(instruction.mnemonic() == Mnemonic::Verw);
            handler!(op_verify)
        }
        Mnemonic::Lar | Mnemonic::Lsl => {
            register_or_memory(instruction, 1, builder);
            builder.op.first = register_number(instruction.op0_register())?;
            builder.op.extra2 = instruction.op0_register().size() as u8;
            builder.op.immediate = u64::from(instruction.mnemonic() == Mnemonic::Lsl);
            handler!(op_load_rights_or_limit)
        }
        Mnemonic::Arpl => {
            register_or_memory(instruction, 0, builder);
            builder.op.first = register_number(instruction.op1_register())?;
            handler!(op_adjust_rpl)
        }
        _ => return None,
    })
}

/// Operand size of a far transfer by its code.
fn far_size(instruction: &Instruction) -> Option<u8> {
    Some(match instruction.code() {
        Code::Jmp_ptr1616
        | Code::Call_ptr1616
        | Code::Jmp_m1616
        | Code::Call_m1616
        | Code::Retfw
        | Code::Retfw_imm16
        | Code::Iretw => 2,
        Code::Jmp_ptr1632
        | Code::Call_ptr1632
        | Code::Jmp_m1632
        | Code::Call_m1632
        | Code::Retfd
        | Code::Retfd_imm16
        | Code::Iretd
        | Code::Sysretd
        | Code::Sysexitd => 4,
        Code::Jmp_m1664
        | Code::Call_m1664
        | Code::Retfq
        | Code::Retfq_imm16
        | Code::Iretq
        | Code::Sysretq
        | Code::Sysexitq => 8,
        _ => return None,
    })
}

/// Far transfers, interrupts, system calls.
fn transfers(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let mnemonic = instruction.mnemonic();
    match mnemonic {
        Mnemonic::Int => {
            builder.op.immediate = u64::from(instruction.immediate8());
            return Some(handler!(op_interrupt));
        }
        Mnemonic::Int3 => return Some(handler!(op_breakpoint)),
        Mnemonic::Into => return Some(handler!(op_overflow)),
        Mnemonic::Int1 => return Some(handler!(op_debug_trap)),
        Mnemonic::Syscall => return Some(handler!(op_system_call)),
        Mnemonic::Sysenter => return Some(handler!(op_system_enter)),
        Mnemonic::Jmp
        | Mnemonic::Call
        | Mnemonic::Retf
        | Mnemonic::Iret
        | Mnemonic::Iretd
        | Mnemonic::Iretq
        | Mnemonic::Sysret
        | Mnemonic::Sysretq
        | Mnemonic::Sysexit
        | Mnemonic::Sysexitq => {}
        _ => return None,
    }
    builder.op.extra2 = far_size(instruction)?;
    Some(match mnemonic {
        Mnemonic::Jmp | Mnemonic::Call => {
            match instruction.op0_kind() {
                OpKind::Memory => builder.op.extra = MEMORY,
                OpKind::FarBranch16 => {
                    let selector = u64::from(instruction.far_branch_selector());
                    builder.op.immediate = u64::from(instruction.far_branch16()) | selector << 32;
                }
                _ => {
                    let selector = u64::from(instruction.far_branch_selector());
                    builder.op.immediate = u64::from(instruction.far_branch32()) | selector << 32;
                }
            }
            if mnemonic == Mnemonic::Jmp { handler!(op_far_jump) } else { handler!(op_far_call) }
        }
        Mnemonic::Retf => {
            if instruction.op_count() != 0 {
                builder.op.immediate = u64::from(instruction.immediate16());
            }
            handler!(op_far_return)
        }
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => handler!(op_interrupt_return),
        Mnemonic::Sysret | Mnemonic::Sysretq => handler!(op_system_return),
        _ => handler!(op_system_exit),
    })
}

/// Ports.
fn ports(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let size = |register: Register| register.size() as u8;
    match instruction.mnemonic() {
        Mnemonic::In => {
            builder.op.extra2 = size(instruction.op0_register());
            builder.op.extra = u8::from(instruction.op1_register() == Register::DX);
            builder.op.immediate = if builder.op.extra == 0 { u64::from(instruction.immediate8()) } else { 0 };
            return Some(handler!(op_in));
        }
        Mnemonic::Out => {
            builder.op.extra2 = size(instruction.op1_register());
            builder.op.extra = u8::from(instruction.op0_register() == Register::DX);
            builder.op.immediate = if builder.op.extra == 0 { u64::from(instruction.immediate8()) } else { 0 };
            return Some(handler!(op_out));
        }
        _ => {}
    }
    let (bytes, is_input) = match instruction.mnemonic() {
        Mnemonic::Insb => (1, true),
        Mnemonic::Insw => (2, true),
        Mnemonic::Insd if instruction.op1_register() == Register::DX => (4, true),
        Mnemonic::Outsb => (1, false),
        Mnemonic::Outsw => (2, false),
        Mnemonic::Outsd => (4, false),
        _ => return None,
    };
    let memory_operand = if is_input { instruction.op0_kind() } else { instruction.op1_kind() };
    builder.op.extra = match memory_operand {
        OpKind::MemoryESDI | OpKind::MemorySegSI => 2,
        OpKind::MemoryESEDI | OpKind::MemorySegESI => 4,
        OpKind::MemoryESRDI | OpKind::MemorySegRSI => 8,
        _ => return None,
    };
    builder.op.extra2 = bytes;
    builder.op.immediate = if instruction.has_rep_prefix() || instruction.has_repne_prefix() { REPEAT } else { 0 };
    builder.op.segment = if is_input { crate::cpu::ES } else { segment_number(instruction.memory_segment()) };
    Some(if is_input { handler!(op_in_string) } else { handler!(op_out_string) })
}

/// The processor itself.
fn processor(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Hlt => handler!(op_halt),
        Mnemonic::Cli => handler!(op_clear_interrupts),
        Mnemonic::Sti => handler!(op_set_interrupts),
        Mnemonic::Clac | Mnemonic::Stac => {
            builder.op.immediate = u64::from(instruction.mnemonic() == Mnemonic::Stac);
            handler!(op_access_check)
        }
        Mnemonic::Clts => handler!(op_clear_task_switched),
        Mnemonic::Rdtsc => handler!(op_time_stamp),
        Mnemonic::Rdtscp => handler!(op_time_stamp_and_id),
        Mnemonic::Rdpid => {
            builder.op.second = register_number(instruction.op0_register())?;
            handler!(op_processor_id)
        }
        Mnemonic::Rdpmc => handler!(op_performance_counter),
        Mnemonic::Cpuid => handler!(op_cpuid),
        Mnemonic::Rdmsr => handler!(op_read_msr),
        Mnemonic::Wrmsr => handler!(op_write_msr),
        Mnemonic::Xgetbv => handler!(op_get_extended_control),
        Mnemonic::Xsetbv => handler!(op_set_extended_control),
        Mnemonic::Rdpkru => handler!(op_read_keys),
        Mnemonic::Wrpkru => handler!(op_write_keys),
        Mnemonic::Vmcall | Mnemonic::Vmmcall => handler!(op_hypercall),
        Mnemonic::Invlpg => handler!(op_invalidate_page),
        Mnemonic::Invpcid => {
            builder.op.first = register_number(instruction.op0_register())?;
            handler!(op_invalidate_context)
        }
        Mnemonic::Invd | Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => handler!(op_cache),
        Mnemonic::Swapgs => handler!(op_swap_gs),
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            register_or_memory(instruction, 0, builder);
            let mnemonic = instruction.mnemonic();
            let is_fs = matches!(mnemonic, Mnemonic::Rdfsbase | Mnemonic::Wrfsbase);
            builder.op.immediate = u64::from(if is_fs { FS } else { GS });
            if matches!(mnemonic, Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) {
                handler!(op_read_base)
            } else {
                handler!(op_write_base)
            }
        }
        _ => return None,
    })
}
