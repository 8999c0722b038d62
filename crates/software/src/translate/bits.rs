//! Bit tests of memory whose bit number is in a register: the number may lead far away from the operand (SDM vol. 2, BT).

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::assembler::Mem;
use super::forms::{has_wide_address, renamed, set_memory};
use super::frame::{BITS_31, BITS_63};
use super::generate::{Generator, Result, Use};
use super::guest_code::{Item, general_register};
use super::memory::{COLLAPSED, LOOKED_UP};
use super::registers::{ADDEND, ADDRESS, SPARE};

impl Generator<'_> {
    /// Emits BT, BTS, BTR or BTC of memory by a register. `false`: it has no such form here.
    pub fn bit_form(&mut self, item: &Item) -> Result<bool> {
        let guest = &item.instruction;
        let is_test = guest.mnemonic() == Mnemonic::Bt;
        let known = is_test || matches!(guest.mnemonic(), Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
        if !known
            || guest.op0_kind() != OpKind::Memory
            || guest.op1_kind() != OpKind::Register
            || !has_wide_address(guest)
        {
            return Ok(false);
        }
        let Some((number, _)) = general_register(guest.op1_register()) else { return Ok(false) };
        let bytes = guest.op1_register().size() as u32;
        if bytes == 2 {
            return Ok(false);
        }
        let wide = bytes == 8;
        self.memory_address(item)?;
        // The word that holds the bit: the number's quotient, rounded down.
        let bit = self.register(number, SPARE);
        self.asm.constant(ADDEND, if wide { 6 } else { 5 });
        self.asm.shift_right_signed(SPARE, bit, ADDEND, wide);
        if !wide {
            self.asm.extend_signed(SPARE, SPARE);
        }
        self.asm.lea(ADDRESS, Mem::indexed(ADDRESS, SPARE, if wide { 3 } else { 2 }, 0));
        let usage = if is_test { Use::Read } else { Use::Write };
        self.look_up(item, bytes, usage, item.live_before != 0);
        let host_word = LOOKED_UP.mem;
        if is_test {
            if wide {
                self.asm.load(ADDRESS, host_word);
            } else {
                self.asm.load32(ADDRESS, host_word);
            }
            let bit = self.register(number, SPARE);
            self.asm.test_bit(ADDRESS, bit, wide);
            return Ok(true);
        }
        self.asm.lea(ADDRESS, host_word);
        let bit = self.register(number, ADDEND);
        self.asm.extract(ADDEND, bit, if wide { BITS_63 } else { BITS_31 });
        self.encode(&on_word(guest))?;
        self.check_note(item, bytes, COLLAPSED, Some(guest.next_ip()));
        Ok(true)
    }
}

/// The same instruction on [ADDRESS] with the bit's number in ADDEND.
fn on_word(guest: &Instruction) -> Instruction {
    let mut host = *guest;
    set_memory(&mut host, COLLAPSED.mem);
    host.set_op1_register(renamed(guest.op1_register(), ADDEND));
    host
}
