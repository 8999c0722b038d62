//! PUSH, POP and LEAVE.

use iced_x86::{Code, OpKind, Register};

use super::assembler::{Mem, R15, RBP, Reg, Relocation};
use super::frame::{register_slot, temporary};
use super::generate::{Generator, GiveUp, Result, Use};
use super::guest_code::{Item, general_register};
use super::memory::{COLLAPSED, Place};
use super::registers::{ADDEND, ADDRESS, home};
use super::values::Access;

const RSP_NUMBER: u8 = 4;

impl Generator<'_> {
    /// Pushes a constant (`linear`: a guest address near the unit's own). `next`: where the guest goes on, if that is known; else a watched page is noticed at the jump that follows.
    pub fn push_constant(&mut self, item: &Item, value: u64, linear: bool, next: Option<u64>) -> Result<()> {
        self.push_with(item, next, |generator, place| match i32::try_from(value as i64) {
            Ok(short) => {
                generator.asm.store_imm(place.mem, short);
                if linear {
                    generator.asm.relocate(4, Relocation::LinearSigned);
                }
                place
            }
            Err(_) => {
                let (place, scratch) = generator.with_scratch(place);
                if linear {
                    generator.asm.linear_constant(scratch, value);
                } else {
                    generator.asm.constant(scratch, value);
                }
                generator.asm.store(place.mem, scratch);
                place
            }
        })
    }

    /// Pushes what is in a field of the processor.
    pub fn push_field(&mut self, item: &Item, field: Mem, next: Option<u64>) -> Result<()> {
        self.push_with(item, next, |generator, place| {
            let (place, scratch) = generator.with_scratch(place);
            generator.asm.load(scratch, field);
            generator.asm.store(place.mem, scratch);
            place
        })
    }

    /// Reaches the place below the stack, lets `store` fill it, and moves RSP.
    fn push_with(
        &mut self,
        item: &Item,
        next: Option<u64>,
        store: impl FnOnce(&mut Self, Place) -> Place,
    ) -> Result<()> {
        let place = self.reach(item, Access::Push, 8, Use::Write)?;
        let place = store(self, place);
        self.asm.lea(R15, Mem::base(R15, -8));
        self.check_note(item, 8, place, next);
        Ok(())
    }

    /// A scratch register beside a place that was reached for writing; the place may have to become another form of itself.
    fn with_scratch(&mut self, place: Place) -> (Place, Reg) {
        if place.mem.index.is_none() {
            return (place, ADDRESS);
        }
        self.asm.lea(ADDRESS, place.mem);
        self.held = None;
        (Place { mem: COLLAPSED.mem, ..place }, ADDEND)
    }

    pub fn push(&mut self, item: &Item) -> Result<()> {
        let instruction = &item.instruction;
        let next = Some(instruction.next_ip());
        match instruction.code() {
            Code::Push_r64 | Code::Push_rm64 if instruction.op0_kind() == OpKind::Register => {
                let (number, _) = general_register(instruction.op0_register()).ok_or(GiveUp)?;
                match home(number) {
                    Some(host) => self.push_with(item, next, |generator, place| {
                        generator.asm.store(place.mem, host);
                        place
                    }),
                    None => self.push_field(item, register_slot(number), next),
                }
            }
            Code::Pushq_imm8 => self.push_constant(item, instruction.immediate8to64() as u64, false, next),
            Code::Pushq_imm32 => self.push_constant(item, instruction.immediate32to64() as u64, false, next),
            Code::Push_rm64 => {
                let place = self.reach(item, Access::Operand, 8, Use::Read)?;
                self.asm.load(ADDRESS, place.mem);
                self.asm.store(temporary(1), ADDRESS);
                self.push_field(item, temporary(1), next)
            }
            _ => {
                self.callout(item);
                Ok(())
            }
        }
    }

    pub fn pop(&mut self, item: &Item) -> Result<()> {
        let instruction = &item.instruction;
        // With RSP in its address the operand lies where that points afterwards.
        let is_memory = instruction.op0_kind() == OpKind::Memory && instruction.memory_base() != Register::RSP;
        if instruction.code() == Code::Pop_rm64 && is_memory {
            return self.pop_to_memory(item);
        }
        let number = match instruction.code() {
            Code::Pop_r64 | Code::Pop_rm64 if instruction.op0_kind() == OpKind::Register => {
                general_register(instruction.op0_register()).map(|(number, _)| number)
            }
            _ => None,
        };
        let Some(number) = number else {
            self.callout(item);
            return Ok(());
        };
        let place = self.reach(item, Access::Pop, 8, Use::Read)?;
        let to = home(number).unwrap_or(ADDRESS);
        self.asm.load(to, place.mem);
        self.set_register(number, to);
        if number != RSP_NUMBER {
            self.asm.lea(R15, Mem::base(R15, 8));
        }
        Ok(())
    }

    /// Compilers of Lisp begin their functions with it: the caller's return address goes into the frame.
    fn pop_to_memory(&mut self, item: &Item) -> Result<()> {
        let place = self.reach(item, Access::Pop, 8, Use::Read)?;
        self.asm.load(ADDRESS, place.mem);
        self.asm.store(temporary(1), ADDRESS);
        let place = self.reach(item, Access::Operand, 8, Use::Write)?;
        let (place, scratch) = self.with_scratch(place);
        self.asm.load(scratch, temporary(1));
        self.asm.store(place.mem, scratch);
        // Both accesses are done: no fault comes after this.
        self.asm.lea(R15, Mem::base(R15, 8));
        self.check_note(item, 8, place, Some(item.instruction.next_ip()));
        Ok(())
    }

    /// LEAVE
    pub fn leave_frame(&mut self, item: &Item) -> Result<()> {
        let place = self.reach(item, Access::Frame, 8, Use::Read)?;
        self.asm.lea(R15, Mem::base(RBP, 8));
        self.asm.load(RBP, place.mem);
        Ok(())
    }
}
