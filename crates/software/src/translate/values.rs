//! What is known of the addresses in a unit: values are numbered. A register holds a numbered value plus a constant, and keeps the value's number through moves and additions of
//! constants. Where ways meet, only what is the same on all of them counts.

use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind, Register};
use polder_memory::PAGE_SIZE;

use super::facts::Facts;
use super::forms::has_wide_address;
use super::generate::Use;
use super::guest_code::general_register;

pub const RSP: usize = 4;
pub const RBP: usize = 5;

/// Which access of an instruction is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Its memory operand.
    Operand,
    /// What it pushes, below RSP.
    Push,
    /// What it pops, at RSP.
    Pop,
    /// What LEAVE pops, at RBP.
    Frame,
}

/// A value that is not known, plus a constant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Value {
    pub number: u32,
    pub offset: i64,
}

/// Accesses with equal keys are at addresses that differ by a known number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    pub segment: Register,
    pub base: Option<u32>,
    /// Value and scale.
    pub index: Option<(u32, u32)>,
    /// Of an address that is known as a distance from the code, the page.
    pub page: Option<u64>,
}

/// Registers that make an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    pub page: Option<u64>,
    pub segment: Register,
    pub base: Option<u8>,
    /// And the left shift.
    pub index: Option<(u8, u8)>,
}

impl Key {
    /// The registers that make its addresses, if some of those with `values` have nothing added to the key's.
    pub fn address(&self, values: &Values) -> Option<Address> {
        let Key { segment, page, .. } = *self;
        let base = match self.base {
            Some(number) => Some(values.holder(number)?),
            None => None,
        };
        let index = match self.index {
            Some((number, scale)) => Some((values.holder(number)?, scale.trailing_zeros() as u8)),
            None => None,
        };
        let is_known = page.is_some() || base.is_some() || index.is_some();
        is_known.then_some(Address { page, segment, base, index })
    }
}

/// An access of an instruction.
#[derive(Debug, Clone, Copy)]
pub struct Reached {
    pub access: Access,
    pub key: Key,
    /// What it adds to the key's values.
    pub offset: i64,
    pub bytes: u32,
    pub usage: Use,
}

/// The number of RIP's value.
const INSTRUCTION_POINTER: u32 = 0;

/// The last number that was given.
#[derive(Debug, Default)]
pub struct Numbers(u32);

impl Numbers {
    fn fresh(&mut self) -> Value {
        self.0 += 1;
        Value { number: self.0, offset: 0 }
    }
}

/// The values of the general-purpose registers at some place.
#[derive(Debug, Clone, Copy)]
pub struct Values([Value; 16]);

impl Values {
    /// Nothing is known about any register.
    pub fn unknown(numbers: &mut Numbers) -> Values {
        Values(std::array::from_fn(|_| numbers.fresh()))
    }

    pub fn at(&self, register: usize) -> Value {
        self.0[register]
    }

    /// A register that has nothing added to a value.
    pub fn holder(&self, number: u32) -> Option<u8> {
        (0..16).find(|&register| self.0[usize::from(register)] == Value { number, offset: 0 })
    }

    pub fn value(&self, register: Register) -> Option<Value> {
        let (number, _) = general_register(register)?;
        Some(self.0[usize::from(number)])
    }

    /// Keeps what another way to the same place knows as well.
    pub fn meet(&mut self, other: &Values, numbers: &mut Numbers) {
        for (here, there) in self.0.iter_mut().zip(&other.0) {
            if here != there {
                *here = numbers.fresh();
            }
        }
    }

    /// The accesses of an instruction whose addresses have keys: its operand's and the stack's.
    pub fn accesses(&self, instruction: &Instruction, facts: &Facts) -> [Option<Reached>; 2] {
        let operand = || {
            let (usage, bytes) = facts.memory.filter(|_| !facts.is_x87)?;
            let (key, offset) = self.address(instruction, bytes)?;
            Some(Reached { access: Access::Operand, key, offset, bytes, usage })
        };
        let stack = || {
            let access = stack_access(instruction)?;
            let (register, offset, usage) = match access {
                Access::Push => (RSP, -8, Use::Write),
                Access::Frame => (RBP, 0, Use::Read),
                _ => (RSP, 0, Use::Read),
            };
            let value = self.0[register];
            let key = Key { segment: Register::None, base: Some(value.number), index: None, page: None };
            Some(Reached { access, key, offset: value.offset.wrapping_add(offset), bytes: 8, usage })
        };
        [operand(), stack()]
    }

    /// The key of a memory operand and what it adds to the key's values.
    fn address(&self, instruction: &Instruction, bytes: u32) -> Option<(Key, i64)> {
        if !has_wide_address(instruction) {
            return None;
        }
        let segment = match instruction.memory_segment() {
            segment @ (Register::FS | Register::GS) => segment,
            _ => Register::None,
        };
        let displacement = instruction.memory_displacement64();
        if matches!(instruction.memory_base(), Register::RIP | Register::None)
            && instruction.memory_index() == Register::None
        {
            let offset = displacement as i64;
            // A copy of the unit at another address has the same absolute addresses and other relative ones.
            let is_relative = instruction.memory_base() == Register::RIP;
            if segment != Register::None {
                let base = is_relative.then_some(INSTRUCTION_POINTER);
                return Some((Key { segment, base, index: None, page: None }, offset));
            }
            if !is_relative {
                return None;
            }
            let in_page = offset & (PAGE_SIZE as i64 - 1);
            let key = Key { segment, base: None, index: None, page: Some(displacement >> 12) };
            return (in_page + i64::from(bytes) <= PAGE_SIZE as i64).then_some((key, in_page));
        }
        let mut offset = displacement as i64;
        let mut base = None;
        if instruction.memory_base() != Register::None {
            let value = self.value(instruction.memory_base())?;
            offset = offset.wrapping_add(value.offset);
            base = Some(value.number);
        }
        let mut index = None;
        if instruction.memory_index() != Register::None {
            let value = self.value(instruction.memory_index())?;
            let scale = instruction.memory_index_scale();
            offset = offset.wrapping_add(value.offset.wrapping_mul(i64::from(scale)));
            index = Some((value.number, scale));
        }
        Some((Key { segment, base, index, page: None }, offset))
    }

    /// What an instruction does to registers.
    pub fn follow(&mut self, instruction: &Instruction, facts: &Facts, numbers: &mut Numbers) {
        let moved = |value: Value, by: i64| Value { offset: value.offset.wrapping_add(by), ..value };
        match stack_access(instruction) {
            Some(Access::Push) => {
                self.0[RSP] = moved(self.0[RSP], -8);
                return;
            }
            Some(Access::Pop) if instruction.flow_control() == FlowControl::Next => {
                self.0[RSP] = moved(self.0[RSP], 8);
                let fresh = numbers.fresh();
                if let Some((number, _)) = general_register(instruction.op0_register()) {
                    self.0[usize::from(number)] = fresh;
                }
                return;
            }
            Some(Access::Frame) => {
                self.0[RSP] = moved(self.0[RBP], 8);
                self.0[RBP] = numbers.fresh();
                return;
            }
            _ => {}
        }
        if let Some((to, value)) = self.sum(instruction) {
            self.0[to] = value;
            return;
        }
        for register in (0..16).filter(|register| facts.written >> register & 1 != 0) {
            self.0[register] = numbers.fresh();
        }
    }

    /// The register that an instruction sets to another one, or itself, plus a constant.
    fn sum(&self, instruction: &Instruction) -> Option<(usize, Value)> {
        let is_wide = |operand: u32| {
            instruction.op_kind(operand) == OpKind::Register && instruction.op_register(operand).is_gpr64()
        };
        if instruction.op_count() == 0 || !is_wide(0) {
            return None;
        }
        let (to, _) = general_register(instruction.op0_register())?;
        let old = self.0[usize::from(to)];
        let constant = || (instruction.op1_kind() != OpKind::Register).then(|| instruction.try_immediate(1).ok());
        let (value, by) = match instruction.mnemonic() {
            Mnemonic::Mov if is_wide(1) => (self.value(instruction.op1_register())?, 0),
            Mnemonic::Add => (old, constant()?? as i64),
            Mnemonic::Sub => (old, (constant()?? as i64).wrapping_neg()),
            Mnemonic::Inc => (old, 1),
            Mnemonic::Dec => (old, -1),
            Mnemonic::Lea if instruction.memory_base().is_gpr64() && instruction.memory_index() == Register::None => {
                (self.value(instruction.memory_base())?, instruction.memory_displacement64() as i64)
            }
            _ => return None,
        };
        Some((usize::from(to), Value { offset: value.offset.wrapping_add(by), ..value }))
    }
}

/// The access to the stack of an instruction that the generator has a form for.
fn stack_access(instruction: &Instruction) -> Option<Access> {
    match instruction.code() {
        Code::Push_r64 | Code::Push_rm64 | Code::Pushq_imm8 | Code::Pushq_imm32 => Some(Access::Push),
        Code::Call_rel32_64 | Code::Call_rm64 => Some(Access::Push),
        Code::Pop_r64 => Some(Access::Pop),
        Code::Pop_rm64 if instruction.op0_kind() == OpKind::Register => Some(Access::Pop),
        Code::Retnq | Code::Retnq_imm16 => Some(Access::Pop),
        Code::Leaveq => Some(Access::Frame),
        _ => None,
    }
}
