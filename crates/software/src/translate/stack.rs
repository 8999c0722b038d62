//! PUSH, POP and LEAVE.

use iced_x86::{Code, OpKind};

use super::assembler::{Mem, R15, Relocation};
use super::frame::{register_slot, temporary};
use super::generate::{Generator, GiveUp, Result, Use};
use super::guest_code::{Item, general_register};
use super::registers::{ADDEND, ADDRESS, home};

const RSP_NUMBER: u8 = 4;
const RBP_NUMBER: u8 = 5;

impl Generator<'_> {
    /// Pushes a constant (`linear`: a guest address near the unit's own). `next`: where the guest goes on, if that is known; else a watched page is noticed at the jump that follows.
    pub fn push_constant(&mut self, item: &Item, value: u64, linear: bool, next: Option<u64>) -> Result<()> {
        // Live before: the instruction itself changes no flag.
        self.asm.lea(ADDRESS, Mem::base(R15, -8));
        self.look_up(item, 8, Use::Write, item.live_before != 0);
        let host = Mem::indexed(ADDRESS, ADDEND, 0, 0);
        match i32::try_from(value as i64) {
            Ok(short) => {
                self.asm.store_imm(host, short);
                if linear {
                    self.asm.relocate(4, Relocation::LinearSigned);
                }
            }
            Err(_) => {
                self.asm.lea(ADDRESS, host);
                self.asm.linear_constant(ADDEND, value);
                self.asm.store(Mem::base(ADDRESS, 0), ADDEND);
                self.asm.lea(R15, Mem::base(R15, -8));
                self.check_note(item, 8, true, next);
                return Ok(());
            }
        }
        self.asm.lea(R15, Mem::base(R15, -8));
        self.check_note(item, 8, false, next);
        Ok(())
    }

    pub fn push(&mut self, item: &Item) -> Result<()> {
        let instruction = &item.instruction;
        let live = item.live_before != 0;
        match instruction.code() {
            Code::Push_r64 | Code::Push_rm64 if instruction.op0_kind() == OpKind::Register => {
                let Some((number, _)) = general_register(instruction.op0_register()) else {
                    return Err(GiveUp);
                };
                self.asm.lea(ADDRESS, Mem::base(R15, -8));
                self.look_up(item, 8, Use::Write, live);
                let mut collapsed = false;
                match home(number) {
                    Some(host) => self.asm.store(Mem::indexed(ADDRESS, ADDEND, 0, 0), host),
                    None => {
                        self.asm.lea(ADDRESS, Mem::indexed(ADDRESS, ADDEND, 0, 0));
                        self.asm.load(ADDEND, register_slot(number));
                        self.asm.store(Mem::base(ADDRESS, 0), ADDEND);
                        collapsed = true;
                    }
                }
                self.asm.lea(R15, Mem::base(R15, -8));
                self.check_note(item, 8, collapsed, Some(instruction.next_ip()));
                Ok(())
            }
            Code::Pushq_imm8 => {
                self.push_constant(item, instruction.immediate8to64() as u64, false, Some(instruction.next_ip()))
            }
            Code::Pushq_imm32 => {
                self.push_constant(item, instruction.immediate32to64() as u64, false, Some(instruction.next_ip()))
            }
            Code::Push_rm64 => {
                self.memory_address(item, ADDRESS)?;
                self.look_up(item, 8, Use::Read, live);
                self.asm.load(ADDEND, Mem::indexed(ADDRESS, ADDEND, 0, 0));
                let kept = temporary(1);
                self.asm.store(kept, ADDEND);
                self.asm.lea(ADDRESS, Mem::base(R15, -8));
                self.look_up(item, 8, Use::Write, live);
                self.asm.lea(ADDRESS, Mem::indexed(ADDRESS, ADDEND, 0, 0));
                self.asm.load(ADDEND, kept);
                self.asm.store(Mem::base(ADDRESS, 0), ADDEND);
                self.asm.lea(R15, Mem::base(R15, -8));
                self.check_note(item, 8, true, Some(instruction.next_ip()));
                Ok(())
            }
            _ => {
                self.callout(item);
                Ok(())
            }
        }
    }

    pub fn pop(&mut self, item: &Item) -> Result<()> {
        let instruction = &item.instruction;
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
        self.asm.mov(ADDRESS, R15);
        self.look_up(item, 8, Use::Read, item.live_before != 0);
        let to = home(number).unwrap_or(ADDEND);
        self.asm.load(to, Mem::indexed(ADDRESS, ADDEND, 0, 0));
        self.set_register(number, to);
        if number != RSP_NUMBER {
            self.asm.lea(R15, Mem::base(R15, 8));
        }
        Ok(())
    }

    /// LEAVE
    pub fn leave_frame(&mut self, item: &Item) -> Result<()> {
        let base = self.register(RBP_NUMBER, ADDRESS);
        self.asm.mov(ADDRESS, base);
        self.look_up(item, 8, Use::Read, item.live_before != 0);
        self.asm.lea(R15, Mem::base(base, 8));
        self.asm.load(base, Mem::indexed(ADDRESS, ADDEND, 0, 0));
        Ok(())
    }
}
