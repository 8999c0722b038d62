//! Bit tests, scans and counts, BMI, ADX, CRC32.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::form::{Form, any_register, operand_bytes, width_index, widths, widths_from_16, widths_from_32};
use crate::lower::OpBuilder;
use crate::op::Handler;
use crate::ops::bits::{
    self, Andn, Bextr, BitChange, Blsi, Blsmsk, Blsr, Bmi, Bzhi, Complement, CountOnes, ForwardScan, LeadingZeros,
    Pdep, Pext, Reset, ReverseScan, Sarx, Scan, Set, Shlx, Shrx, Test, TrailingZeros,
};
use crate::ops::multiply;
use crate::ops::operand::{Immediate, Memory, Second, Third};

pub fn select(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    match instruction.mnemonic() {
        Mnemonic::Bt => bit::<Test>(instruction, builder),
        Mnemonic::Bts => bit::<Set>(instruction, builder),
        Mnemonic::Btr => bit::<Reset>(instruction, builder),
        Mnemonic::Btc => bit::<Complement>(instruction, builder),
        Mnemonic::Bsf => scan::<ForwardScan>(instruction, builder),
        Mnemonic::Bsr => scan::<ReverseScan>(instruction, builder),
        Mnemonic::Popcnt => scan::<CountOnes>(instruction, builder),
        Mnemonic::Lzcnt => scan::<LeadingZeros>(instruction, builder),
        Mnemonic::Tzcnt => scan::<TrailingZeros>(instruction, builder),
        // Two sources, of which the second may be memory.
        Mnemonic::Andn => bmi_memory_second::<Andn>(instruction, builder),
        Mnemonic::Pdep => bmi_memory_second::<Pdep>(instruction, builder),
        Mnemonic::Pext => bmi_memory_second::<Pext>(instruction, builder),
        // Two sources, of which the first may be memory.
        Mnemonic::Bextr => bmi_memory_first::<Bextr>(instruction, builder),
        Mnemonic::Bzhi => bmi_memory_first::<Bzhi>(instruction, builder),
        Mnemonic::Sarx => bmi_memory_first::<Sarx>(instruction, builder),
        Mnemonic::Shlx => bmi_memory_first::<Shlx>(instruction, builder),
        Mnemonic::Shrx => bmi_memory_first::<Shrx>(instruction, builder),
        // One source.
        Mnemonic::Blsi => bmi_one::<Blsi>(instruction, builder),
        Mnemonic::Blsr => bmi_one::<Blsr>(instruction, builder),
        Mnemonic::Blsmsk => bmi_one::<Blsmsk>(instruction, builder),
        Mnemonic::Rorx => {
            let width = width_index(operand_bytes(instruction, 0))?;
            let form = builder.set_two_operands(instruction)?;
            builder.op.immediate = instruction.immediate(2);
            match form {
                Form::RegisterRegister => widths_from_32!(bits::rotate_right, [], [Second])[width],
                _ => widths_from_32!(bits::rotate_right, [], [Memory])[width],
            }
        }
        Mnemonic::Mulx => {
            let width = width_index(operand_bytes(instruction, 0))?;
            builder.op.first = any_register(instruction.op0_register())?;
            builder.op.extra = any_register(instruction.op1_register())?;
            if instruction.op2_kind() == OpKind::Memory {
                return widths_from_32!(multiply::multiply_without_flags, [], [Memory])[width];
            }
            builder.op.second = any_register(instruction.op2_register())?;
            widths_from_32!(multiply::multiply_without_flags, [], [Second])[width]
        }
        Mnemonic::Adcx => add_with_one_flag::<false>(instruction, builder),
        Mnemonic::Adox => add_with_one_flag::<true>(instruction, builder),
        Mnemonic::Crc32 => {
            let width = width_index(operand_bytes(instruction, 1))?;
            let table = match builder.set_two_operands(instruction)? {
                Form::RegisterRegister => widths!(bits::crc32, [], [Second]),
                _ => widths!(bits::crc32, [], [Memory]),
            };
            Some(table[width])
        }
        _ => None,
    }
}

fn bit<O: BitChange + 'static>(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let width = width_index(operand_bytes(instruction, 0))?;
    let form = builder.set_two_operands(instruction)?;
    builder.op.extra = u8::from(form == Form::MemoryRegister);
    let table = match form {
        Form::RegisterRegister => widths_from_16!(bits::bit_of_register, [O], [Second]),
        Form::RegisterImmediate => widths_from_16!(bits::bit_of_register, [O], [Immediate]),
        Form::MemoryRegister => widths_from_16!(bits::bit_of_memory, [O], [Second]),
        _ => widths_from_16!(bits::bit_of_memory, [O], [Immediate]),
    };
    table[width]
}

fn scan<O: Scan + 'static>(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let width = width_index(operand_bytes(instruction, 0))?;
    let table = match builder.set_two_operands(instruction)? {
        Form::RegisterRegister => widths_from_16!(bits::scan, [O], [Second]),
        _ => widths_from_16!(bits::scan, [O], [Memory]),
    };
    table[width]
}

fn bmi_memory_second<O: Bmi + 'static>(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let width = width_index(operand_bytes(instruction, 0))?;
    builder.op.first = any_register(instruction.op0_register())?;
    builder.op.second = any_register(instruction.op1_register())?;
    if instruction.op2_kind() == OpKind::Memory {
        return widths_from_32!(bits::bmi, [O], [Second, Memory])[width];
    }
    builder.op.extra = any_register(instruction.op2_register())?;
    widths_from_32!(bits::bmi, [O], [Second, Third])[width]
}

fn bmi_memory_first<O: Bmi + 'static>(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let width = width_index(operand_bytes(instruction, 0))?;
    builder.op.first = any_register(instruction.op0_register())?;
    builder.op.extra = any_register(instruction.op2_register())?;
    if instruction.op1_kind() == OpKind::Memory {
        return widths_from_32!(bits::bmi, [O], [Memory, Third])[width];
    }
    builder.op.second = any_register(instruction.op1_register())?;
    widths_from_32!(bits::bmi, [O], [Second, Third])[width]
}

fn bmi_one<O: Bmi + 'static>(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let width = width_index(operand_bytes(instruction, 0))?;
    let table = match builder.set_two_operands(instruction)? {
        Form::RegisterRegister => widths_from_32!(bits::bmi, [O], [Second, Second]),
        _ => widths_from_32!(bits::bmi, [O], [Memory, Immediate]),
    };
    table[width]
}

fn add_with_one_flag<const OVERFLOW: bool>(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let bytes = operand_bytes(instruction, 0);
    let is_memory = builder.set_two_operands(instruction)? == Form::RegisterMemory;
    Some(match (bytes, is_memory) {
        (4, false) => bits::add_with_one_flag::<OVERFLOW, u32, Second>,
        (4, true) => bits::add_with_one_flag::<OVERFLOW, u32, Memory>,
        (_, false) => bits::add_with_one_flag::<OVERFLOW, u64, Second>,
        (_, true) => bits::add_with_one_flag::<OVERFLOW, u64, Memory>,
    })
}
