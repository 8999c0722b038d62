//! A small assembler for the host: what translated code needs around the guest's own instructions.
//!
//! Code is position-independent but for relative jumps out of it, which know the address at which the code will run. Encodings as in SDM vol. 2.

/// A host register by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reg(pub u8);

pub const RAX: Reg = Reg(0);
pub const RCX: Reg = Reg(1);
pub const RDX: Reg = Reg(2);
pub const RBX: Reg = Reg(3);
pub const RSP: Reg = Reg(4);
pub const RBP: Reg = Reg(5);
pub const RSI: Reg = Reg(6);
pub const RDI: Reg = Reg(7);
pub const R9: Reg = Reg(9);
pub const R10: Reg = Reg(10);
pub const R11: Reg = Reg(11);
pub const R15: Reg = Reg(15);

/// A memory operand of the host.
#[derive(Debug, Clone, Copy)]
pub struct Mem {
    pub base: Option<Reg>,
    /// Register and left shift (0 to 3).
    pub index: Option<(Reg, u8)>,
    pub displacement: i32,
}

impl Mem {
    pub const fn base(base: Reg, displacement: i32) -> Mem {
        Mem { base: Some(base), index: None, displacement }
    }

    pub const fn indexed(base: Reg, index: Reg, shift: u8, displacement: i32) -> Mem {
        Mem { base: Some(base), index: Some((index, shift)), displacement }
    }

    /// Whether a register is part of the address.
    pub fn names(self, register: Reg) -> bool {
        self.base == Some(register) || self.index.is_some_and(|(index, _)| index == register)
    }
}

/// A place in the code that jumps lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label(usize);

const UNBOUND: usize = usize::MAX;

/// VEX.L: vectors of 256 bits.
const LONG: u8 = 4;

/// Condition codes, as in Jcc's opcode.
pub mod condition {
    pub const BELOW: u8 = 2;
    pub const ABOVE: u8 = 7;
    pub const OVERFLOW: u8 = 0;
    pub const LESS: u8 = 12;
    pub const GREATER_OR_EQUAL: u8 = 13;
    pub const LESS_OR_EQUAL: u8 = 14;
    pub const GREATER: u8 = 15;
    pub const EQUAL: u8 = 4;
    pub const NOT_EQUAL: u8 = 5;
}

/// Operations of the two-operand group (their number in the opcode).
#[derive(Debug, Clone, Copy)]
pub enum Binary {
    Add = 0,
    Or = 1,
    And = 4,
    Sub = 5,
    Cmp = 7,
}

/// What a number in the code depends on beside the instructions: it changes when the code is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relocation {
    /// 64 bits: a guest address.
    Linear,
    /// 32 bits, zero-extended: a guest address.
    LinearLow,
    /// 32 bits, sign-extended: a guest address.
    LinearSigned,
    /// 32 bits: the distance to a place outside the code.
    Distance,
    /// 32 bits: the number of a link.
    Link,
}

/// Code in the making.
#[derive(Default)]
pub struct Assembler {
    pub bytes: Vec<u8>,
    pub relocations: Vec<(u32, Relocation)>,
    labels: Vec<usize>,
    /// (place of a 32-bit distance, label)
    fixups: Vec<(usize, Label)>,
    /// (place of an 8-bit distance, label)
    short_fixups: Vec<(usize, Label)>,
}

impl Assembler {
    /// Begins anew with the same memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.relocations.clear();
        self.labels.clear();
        self.fixups.clear();
        self.short_fixups.clear();
    }

    pub fn position(&self) -> usize {
        self.bytes.len()
    }

    pub fn label(&mut self) -> Label {
        self.labels.push(UNBOUND);
        Label(self.labels.len() - 1)
    }

    pub fn bind(&mut self, label: Label) {
        self.labels[label.0] = self.bytes.len();
    }

    pub fn is_bound(&self, label: Label) -> bool {
        self.labels[label.0] != UNBOUND
    }

    /// Where a bound label is.
    pub fn place(&self, label: Label) -> usize {
        self.labels[label.0]
    }

    /// Fills in the distances to labels; `false` if one is not bound or a short one does not reach.
    #[must_use]
    pub fn resolve(&mut self) -> bool {
        for &(at, label) in &self.fixups {
            let target = self.labels[label.0];
            if target == UNBOUND {
                return false;
            }
            let distance = (target as i64 - (at as i64 + 4)) as i32;
            self.bytes[at..at + 4].copy_from_slice(&distance.to_le_bytes());
        }
        for &(at, label) in &self.short_fixups {
            let target = self.labels[label.0];
            let distance = target as i64 - (at as i64 + 1);
            let Ok(distance) = i8::try_from(distance) else { return false };
            self.bytes[at] = distance as u8;
        }
        true
    }

    pub fn byte(&mut self, byte: u8) {
        self.bytes.push(byte);
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub fn imm32(&mut self, value: i32) {
        self.raw(&value.to_le_bytes());
    }

    fn rex(&mut self, wide: bool, reg: u8, index: u8, base: u8, force: bool) {
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3;
        if rex != 0x40 || force {
            self.byte(rex);
        }
    }

    /// ModRM, SIB and displacement.
    fn operand(&mut self, reg: u8, mem: Mem) {
        let reg = (reg & 7) << 3;
        let Some(base) = mem.base else {
            // [disp32] or [index * scale + disp32]
            let (index, shift) = mem.index.map_or((4, 0), |(index, shift)| (index.0 & 7, shift));
            self.raw(&[reg | 4, shift << 6 | index << 3 | 5]);
            self.imm32(mem.displacement);
            return;
        };
        let short = i8::try_from(mem.displacement).ok();
        let mode = match short {
            Some(0) if base.0 & 7 != 5 => 0,
            Some(_) => 0x40,
            None => 0x80,
        };
        match mem.index {
            None if base.0 & 7 != 4 => self.byte(mode | reg | base.0 & 7),
            None => self.raw(&[mode | reg | 4, 0x24]),
            Some((index, shift)) => self.raw(&[mode | reg | 4, shift << 6 | (index.0 & 7) << 3 | base.0 & 7]),
        }
        match mode {
            0x40 => self.byte(mem.displacement as u8),
            0x80 => self.imm32(mem.displacement),
            _ => {}
        }
    }

    fn with_mem(&mut self, wide: bool, opcode: &[u8], reg: u8, mem: Mem) {
        let index = mem.index.map_or(0, |(index, _)| index.0);
        let base = mem.base.map_or(0, |base| base.0);
        self.rex(wide, reg, index, base, false);
        self.raw(opcode);
        self.operand(reg, mem);
    }

    fn with_reg(&mut self, wide: bool, opcode: &[u8], reg: u8, rm: u8) {
        self.rex(wide, reg, 0, rm, false);
        self.raw(opcode);
        self.byte(0xc0 | (reg & 7) << 3 | rm & 7);
    }

    pub fn mov(&mut self, to: Reg, from: Reg) {
        if to != from {
            self.with_reg(true, &[0x8b], to.0, from.0);
        }
    }

    pub fn load(&mut self, to: Reg, from: Mem) {
        self.with_mem(true, &[0x8b], to.0, from);
    }

    pub fn load32(&mut self, to: Reg, from: Mem) {
        self.with_mem(false, &[0x8b], to.0, from);
    }

    pub fn load_u8(&mut self, to: Reg, from: Mem) {
        self.with_mem(false, &[0x0f, 0xb6], to.0, from);
    }

    pub fn load_u16(&mut self, to: Reg, from: Mem) {
        self.with_mem(false, &[0x0f, 0xb7], to.0, from);
    }

    pub fn store(&mut self, to: Mem, from: Reg) {
        self.with_mem(true, &[0x89], from.0, to);
    }

    pub fn store32(&mut self, to: Mem, from: Reg) {
        self.with_mem(false, &[0x89], from.0, to);
    }

    pub fn store16(&mut self, to: Mem, from: Reg) {
        self.byte(0x66);
        self.with_mem(false, &[0x89], from.0, to);
    }

    /// LEA of the host address of a label.
    pub fn address_of(&mut self, to: Reg, label: Label) {
        self.rex(true, to.0, 0, 0, false);
        self.raw(&[0x8d, (to.0 & 7) << 3 | 5]);
        self.fixups.push((self.bytes.len(), label));
        self.imm32(0);
    }

    /// MOV r/m64, imm32 sign-extended.
    pub fn store_imm(&mut self, to: Mem, value: i32) {
        self.with_mem(true, &[0xc7], 0, to);
        self.imm32(value);
    }

    pub fn store32_imm(&mut self, to: Mem, value: u32) {
        self.with_mem(false, &[0xc7], 0, to);
        self.imm32(value as i32);
    }

    /// MOV r/m16, imm16
    pub fn store16_imm(&mut self, to: Mem, value: u16) {
        self.byte(0x66);
        self.with_mem(false, &[0xc7], 0, to);
        self.raw(&value.to_le_bytes());
    }

    pub fn lea(&mut self, to: Reg, from: Mem) {
        self.with_mem(true, &[0x8d], to.0, from);
    }

    pub fn lea32(&mut self, to: Reg, from: Mem) {
        self.with_mem(false, &[0x8d], to.0, from);
    }

    /// The shortest MOV of a constant. Changes no flag.
    pub fn constant(&mut self, to: Reg, value: u64) {
        if let Ok(value) = u32::try_from(value) {
            self.rex(false, 0, 0, to.0, false);
            self.byte(0xb8 | to.0 & 7);
            self.imm32(value as i32);
        } else if let Ok(value) = i32::try_from(value as i64) {
            self.with_reg(true, &[0xc7], 0, to.0);
            self.imm32(value);
        } else {
            self.rex(true, 0, 0, to.0, false);
            self.byte(0xb8 | to.0 & 7);
            self.raw(&value.to_le_bytes());
        }
    }

    /// As [`Assembler::constant`], for a guest address near the code's own.
    pub fn linear_constant(&mut self, to: Reg, value: u64) {
        self.constant(to, value);
        if u32::try_from(value).is_ok() {
            self.relocate(4, Relocation::LinearLow);
        } else if i32::try_from(value as i64).is_ok() {
            self.relocate(4, Relocation::LinearSigned);
        } else {
            self.relocate(8, Relocation::Linear);
        }
    }

    /// Notes that the last `bytes` bytes are such a number.
    pub fn relocate(&mut self, bytes: usize, relocation: Relocation) {
        self.relocations.push(((self.bytes.len() - bytes) as u32, relocation));
    }

    pub fn binary(&mut self, operation: Binary, to: Reg, from: Reg) {
        self.with_reg(true, &[(operation as u8) << 3 | 3], to.0, from.0);
    }

    pub fn binary_mem(&mut self, operation: Binary, to: Reg, from: Mem) {
        self.with_mem(true, &[(operation as u8) << 3 | 3], to.0, from);
    }

    pub fn binary_imm(&mut self, operation: Binary, to: Reg, value: i32) {
        if let Ok(short) = i8::try_from(value) {
            self.with_reg(true, &[0x83], operation as u8, to.0);
            self.byte(short as u8);
        } else {
            self.with_reg(true, &[0x81], operation as u8, to.0);
            self.imm32(value);
        }
    }

    pub fn binary32_imm(&mut self, operation: Binary, to: Reg, value: i32) {
        self.with_reg(false, &[0x81], operation as u8, to.0);
        self.imm32(value);
    }

    /// A 32-bit operation on memory with an immediate.
    pub fn binary32_mem_imm(&mut self, operation: Binary, to: Mem, value: i32) {
        if let Ok(short) = i8::try_from(value) {
            self.with_mem(false, &[0x83], operation as u8, to);
            self.byte(short as u8);
        } else {
            self.with_mem(false, &[0x81], operation as u8, to);
            self.imm32(value);
        }
    }

    /// A 64-bit operation on memory with an immediate.
    pub fn binary_mem_imm(&mut self, operation: Binary, to: Mem, value: i32) {
        if let Ok(short) = i8::try_from(value) {
            self.with_mem(true, &[0x83], operation as u8, to);
            self.byte(short as u8);
        } else {
            self.with_mem(true, &[0x81], operation as u8, to);
            self.imm32(value);
        }
    }

    /// CMP byte [mem], imm8
    pub fn compare8_imm(&mut self, mem: Mem, value: u8) {
        self.with_mem(false, &[0x80], 7, mem);
        self.byte(value);
    }

    /// IMUL r64, r/m64
    pub fn multiply(&mut self, to: Reg, by: Reg) {
        self.with_reg(true, &[0x0f, 0xaf], to.0, by.0);
    }

    pub fn shift_left(&mut self, to: Reg, count: u8) {
        if count != 0 {
            self.with_reg(true, &[0xc1], 4, to.0);
            self.byte(count);
        }
    }

    pub fn shift_right(&mut self, to: Reg, count: u8) {
        self.with_reg(true, &[0xc1], 5, to.0);
        self.byte(count);
    }

    /// Inverts all bits; changes no flag.
    pub fn not(&mut self, to: Reg) {
        self.with_reg(true, &[0xf7], 2, to.0);
    }

    /// PEXT to, from, [mask] (BMI2): gathers the mask's bits; changes no flag.
    pub fn extract(&mut self, to: Reg, from: Reg, mask: Mem) {
        self.vex_mem(to.0, from.0, mask, 2, 2, 0xf5);
    }

    /// PDEP to, from, [mask] (BMI2): spreads bits to the mask's places; changes no flag.
    pub fn deposit(&mut self, to: Reg, from: Reg, mask: Mem) {
        self.vex_mem(to.0, from.0, mask, 2, 3, 0xf5);
    }

    /// From AH and AL as [`Assembler::flags_to_ax`] leaves them, and the other flags in memory, to RFLAGS as PUSHF has it, in RCX. Changes flags.
    pub fn compose_flags(&mut self, to: Reg, scratch: Reg, others: Mem) {
        // MOVZX ECX, AH; MOVZX scratch, AL; SHL scratch, 11; OR ECX, scratch; AND ECX, 0x8d5
        debug_assert_eq!(to, RCX);
        self.raw(&[0x0f, 0xb6, 0xcc]);
        self.with_reg(false, &[0x0f, 0xb6], scratch.0, 0);
        self.with_reg(false, &[0xc1], 4, scratch.0);
        self.byte(11);
        self.binary(Binary::Or, to, scratch);
        self.binary32_imm(Binary::And, to, 0x8d5);
        self.binary_mem(Binary::Or, to, others);
        // RF and VM read as 0, bit 1 as 1.
        self.binary_imm(Binary::And, to, !0x3_0000);
        self.binary_imm(Binary::Or, to, 2);
    }

    /// SARX to, from, count (BMI2); changes no flag.
    pub fn shift_right_signed(&mut self, to: Reg, from: Reg, count: Reg, wide: bool) {
        let second = (!to.0 >> 3 & 1) << 7 | 0x40 | (!from.0 >> 3 & 1) << 5 | 2;
        self.raw(&[0xc4, second, u8::from(wide) << 7 | (!count.0 & 15) << 3 | 2, 0xf7]);
        self.byte(0xc0 | (to.0 & 7) << 3 | from.0 & 7);
    }

    /// MOVSXD
    pub fn extend_signed(&mut self, to: Reg, from: Reg) {
        self.with_reg(true, &[0x63], to.0, from.0);
    }

    /// BT of a register by a register
    pub fn test_bit(&mut self, value: Reg, bit: Reg, wide: bool) {
        self.with_reg(wide, &[0x0f, 0xa3], bit.0, value.0);
    }

    /// CMOVcc
    pub fn move_if(&mut self, condition: u8, to: Reg, from: Reg) {
        self.with_reg(true, &[0x0f, 0x40 | condition], to.0, from.0);
    }

    /// NEG
    pub fn negate(&mut self, to: Reg) {
        self.with_reg(true, &[0xf7], 3, to.0);
    }

    /// RORX to, from, count (BMI2); changes no flag.
    pub fn rotate_right(&mut self, to: Reg, from: Reg, count: u8) {
        self.raw(&[0xc4, (!to.0 >> 3 & 1) << 7 | 0x40 | (!from.0 >> 3 & 1) << 5 | 3, 0xfb, 0xf0]);
        self.raw(&[0xc0 | (to.0 & 7) << 3 | from.0 & 7, count]);
    }

    /// A 64-bit VEX instruction reg, vvvv, [mem]; `map` as in VEX.mmmmm, `prefix` as in VEX.pp.
    fn vex_mem(&mut self, reg: u8, vvvv: u8, mem: Mem, map: u8, prefix: u8, opcode: u8) {
        let index = mem.index.map_or(0, |(index, _)| index.0);
        let base = mem.base.map_or(0, |base| base.0);
        let second = (!reg >> 3 & 1) << 7 | (!index >> 3 & 1) << 6 | (!base >> 3 & 1) << 5 | map;
        self.raw(&[0xc4, second, 0x80 | (!vvvv & 15) << 3 | prefix, opcode]);
        self.operand(reg, mem);
    }

    /// VMOVUPS ymm, [mem]
    pub fn load_ymm(&mut self, register: u8, mem: Mem) {
        self.vex_vector(register, mem, LONG, 0x10);
    }

    /// VMOVUPS [mem], ymm
    pub fn store_ymm(&mut self, mem: Mem, register: u8) {
        self.vex_vector(register, mem, LONG, 0x11);
    }

    /// VMOVUPS xmm, [mem]
    pub fn load_xmm(&mut self, register: u8, mem: Mem) {
        self.vex_vector(register, mem, 0, 0x10);
    }

    /// VORPS xmm0, xmm0, [mem]
    pub fn or_xmm0(&mut self, mem: Mem) {
        self.vex_vector(0, mem, 0, 0x56);
    }

    /// VPTEST xmm0, xmm0
    pub fn test_xmm0(&mut self) {
        self.raw(&[0xc4, 0xe2, 0x79, 0x17, 0xc0]);
    }

    /// VZEROUPPER
    pub fn zero_upper(&mut self) {
        self.raw(&[0xc5, 0xf8, 0x77]);
    }

    fn vex_vector(&mut self, register: u8, mem: Mem, length: u8, opcode: u8) {
        let index = mem.index.map_or(0, |(index, _)| index.0);
        let base = mem.base.map_or(0, |base| base.0);
        let second = (!register >> 3 & 1) << 7 | (!index >> 3 & 1) << 6 | (!base >> 3 & 1) << 5 | 1;
        self.raw(&[0xc4, second, 0x78 | length, opcode]);
        self.operand(register, mem);
    }

    pub fn load_mxcsr(&mut self, mem: Mem) {
        self.with_mem(false, &[0x0f, 0xae], 2, mem);
    }

    pub fn store_mxcsr(&mut self, mem: Mem) {
        self.with_mem(false, &[0x0f, 0xae], 3, mem);
    }

    /// LAHF; SETO AL
    pub fn flags_to_ax(&mut self) {
        self.raw(&[0x9f, 0x0f, 0x90, 0xc0]);
    }

    /// ADD AL, 0x7f; SAHF: the reverse of [`Assembler::flags_to_ax`].
    pub fn flags_from_ax(&mut self) {
        self.raw(&[0x04, 0x7f, 0x9e]);
    }

    pub fn push(&mut self, register: Reg) {
        self.rex(false, 0, 0, register.0, false);
        self.byte(0x50 | register.0 & 7);
    }

    pub fn pop(&mut self, register: Reg) {
        self.rex(false, 0, 0, register.0, false);
        self.byte(0x58 | register.0 & 7);
    }

    /// POP [mem]; a displacement from RSP counts from where RSP is after it.
    pub fn pop_mem(&mut self, mem: Mem) {
        self.with_mem(false, &[0x8f], 0, mem);
    }

    pub fn ret(&mut self) {
        self.byte(0xc3);
    }

    pub fn jump(&mut self, label: Label) {
        self.byte(0xe9);
        self.fixups.push((self.bytes.len(), label));
        self.imm32(0);
    }

    pub fn jump_if(&mut self, condition: u8, label: Label) {
        self.raw(&[0x0f, 0x80 | condition]);
        self.fixups.push((self.bytes.len(), label));
        self.imm32(0);
    }

    /// JRCXZ: jumps if RCX is zero, without looking at flags.
    pub fn jump_if_rcx_zero(&mut self, label: Label) {
        self.byte(0xe3);
        self.short_fixups.push((self.bytes.len(), label));
        self.byte(0);
    }

    /// Jumps unless RCX is zero, without looking at flags.
    pub fn jump_unless_rcx_zero(&mut self, label: Label) {
        let zero = self.label();
        self.jump_if_rcx_zero(zero);
        self.jump(label);
        self.bind(zero);
    }

    pub fn jump_mem(&mut self, mem: Mem) {
        self.with_mem(false, &[0xff], 4, mem);
    }

    pub fn call_reg(&mut self, register: Reg) {
        self.with_reg(false, &[0xff], 2, register.0);
    }
}
