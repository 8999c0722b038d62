//! Operand forms and widths of instructions, and the tables of handlers they choose from.

use iced_x86::{Code, ConditionCode, Instruction, OpKind, Register};

use super::super::{OpBuilder, byte_register, register_number};

/// Operand forms of an instruction with two operands, target first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    RegisterRegister,
    RegisterImmediate,
    RegisterMemory,
    MemoryRegister,
    MemoryImmediate,
}

/// MOV between RAX and an address of 64 bits in the instruction.
pub fn has_offset_operand(instruction: &Instruction) -> bool {
    matches!(
        instruction.code(),
        Code::Mov_AL_moffs8
            | Code::Mov_AX_moffs16
            | Code::Mov_EAX_moffs32
            | Code::Mov_RAX_moffs64
            | Code::Mov_moffs8_AL
            | Code::Mov_moffs16_AX
            | Code::Mov_moffs32_EAX
            | Code::Mov_moffs64_RAX
    )
}

/// Whether an operand is an immediate.
pub fn is_immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

/// A general-purpose register as ops name it: by index, or bytes by offset.
pub fn any_register(register: Register) -> Option<u8> {
    register_number(register).or_else(|| byte_register(register))
}

/// The size in bytes of an operand: a register's own, or what the memory operand has.
pub fn operand_bytes(instruction: &Instruction, operand: u32) -> usize {
    match instruction.op_kind(operand) {
        OpKind::Register => instruction.op_register(operand).size(),
        _ => instruction.memory_size().size(),
    }
}

/// The index of a width of so many bytes in a table of handlers for 8, 16, 32 and 64 bits.
pub fn width_index(bytes: usize) -> Option<usize> {
    match bytes {
        1 => Some(0),
        2 => Some(1),
        4 => Some(2),
        8 => Some(3),
        _ => None,
    }
}

impl OpBuilder {
    /// Fills `first`, `second` and `immediate` from the first two operands and tells their form; `None` if they are no
    /// general-purpose registers, memory or immediates.
    pub fn set_two_operands(&mut self, instruction: &Instruction) -> Option<Form> {
        let (target, source) = (instruction.op0_kind(), instruction.op1_kind());
        if target == OpKind::Register {
            self.op.first = any_register(instruction.op0_register())?;
        }
        if source == OpKind::Register {
            self.op.second = any_register(instruction.op1_register())?;
        }
        if is_immediate(source) {
            self.op.immediate = instruction.immediate(1);
        }
        match (target, source) {
            (OpKind::Register, OpKind::Register) => Some(Form::RegisterRegister),
            (OpKind::Register, OpKind::Memory) => Some(Form::RegisterMemory),
            (OpKind::Register, _) if is_immediate(source) => Some(Form::RegisterImmediate),
            (OpKind::Memory, OpKind::Register) => Some(Form::MemoryRegister),
            (OpKind::Memory, _) if is_immediate(source) => Some(Form::MemoryImmediate),
            _ => None,
        }
    }

    /// Fills `first` from the first operand if it is a register; tells whether it is memory. `None` for anything else.
    pub fn set_one_operand(&mut self, instruction: &Instruction) -> Option<bool> {
        match instruction.op0_kind() {
            OpKind::Register => {
                self.op.first = any_register(instruction.op0_register())?;
                Some(false)
            }
            OpKind::Memory => Some(true),
            _ => None,
        }
    }
}

/// A table of handlers: the function with each width in turn in the place of its type parameter `W`.
macro_rules! widths {
    ($function:path, [$($before:ty),*], [$($after:ty),*]) => {{
        use $function as function;
        [
            function::<$($before,)* u8, $($after),*> as $crate::op::Handler,
            function::<$($before,)* u16, $($after),*>,
            function::<$($before,)* u32, $($after),*>,
            function::<$($before,)* u64, $($after),*>,
        ]
    }};
}
pub(super) use widths;

/// As `widths!`, for instructions without a form for bytes.
macro_rules! widths_from_16 {
    ($function:path, [$($before:ty),*], [$($after:ty),*]) => {{
        use $function as function;
        [
            None,
            Some(function::<$($before,)* u16, $($after),*> as $crate::op::Handler),
            Some(function::<$($before,)* u32, $($after),*>),
            Some(function::<$($before,)* u64, $($after),*>),
        ]
    }};
}
pub(super) use widths_from_16;

/// As `widths!`, for instructions with 32- and 64-bit forms only.
macro_rules! widths_from_32 {
    ($function:path, [$($before:ty),*], [$($after:ty),*]) => {{
        use $function as function;
        [
            None,
            None,
            Some(function::<$($before,)* u32, $($after),*> as $crate::op::Handler),
            Some(function::<$($before,)* u64, $($after),*>),
        ]
    }};
}
pub(super) use widths_from_32;

/// A handler for each condition code; further type parameters come after it.
macro_rules! conditions {
    ($function:path $(, $after:ty)*) => {{
        use $function as function;
        [
            function::<0 $(, $after)*> as $crate::op::Handler,
            function::<1 $(, $after)*>,
            function::<2 $(, $after)*>,
            function::<3 $(, $after)*>,
            function::<4 $(, $after)*>,
            function::<5 $(, $after)*>,
            function::<6 $(, $after)*>,
            function::<7 $(, $after)*>,
            function::<8 $(, $after)*>,
            function::<9 $(, $after)*>,
            function::<10 $(, $after)*>,
            function::<11 $(, $after)*>,
            function::<12 $(, $after)*>,
            function::<13 $(, $after)*>,
            function::<14 $(, $after)*>,
            function::<15 $(, $after)*>,
        ]
    }};
}
pub(super) use conditions;

/// The condition code of a Jcc, SETcc or CMOVcc.
pub fn condition(instruction: &Instruction) -> Option<usize> {
    Some(match instruction.condition_code() {
        ConditionCode::o => 0,
        ConditionCode::no => 1,
        ConditionCode::b => 2,
        ConditionCode::ae => 3,
        ConditionCode::e => 4,
        ConditionCode::ne => 5,
        ConditionCode::be => 6,
        ConditionCode::a => 7,
        ConditionCode::s => 8,
        ConditionCode::ns => 9,
        ConditionCode::p => 10,
        ConditionCode::np => 11,
        ConditionCode::l => 12,
        ConditionCode::ge => 13,
        ConditionCode::le => 14,
        ConditionCode::g => 15,
        ConditionCode::None => return None,
    })
}
