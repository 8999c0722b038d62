//! Look-ups ahead of an instruction that sets flags.
//!
//! A look-up while flags are live is half as long again as one that may clobber them, and compilers put loads between a comparison and its jump, pops between the last addition to RSP and the return.
//! What such an access needs is looked up before the instruction that sets the flags, if the instructions between leave the scratch registers alone and the address can be told there.
//! They surely lead to the access: no exception, no jump, nobody comes in between. So a bit that the look-up sets in a page table is one that the access would have set.

use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::forms::{has_wide_address, is_implied_count, may_raise};
use super::generate::Generator;
use super::guest_code::{Item, general_register};
use super::registers::home;
use super::values::{Numbers, Reached, Values};

/// Instructions between the look-up and the access at most.
const DISTANCE_MAX: usize = 4;

/// Whether an instruction is emitted without scratch registers, changes no memory and raises nothing.
fn is_quiet(item: &Item) -> bool {
    let Item { instruction, facts, .. } = item;
    let is_address_only = instruction.mnemonic() == Mnemonic::Lea;
    let is_plain = |operand: u32| match instruction.op_kind(operand) {
        OpKind::Memory => is_address_only,
        OpKind::Register => {
            let register = instruction.op_register(operand);
            let is_count = register == Register::CL && is_implied_count(instruction, operand);
            !is_count && general_register(register).is_some_and(|(number, high)| !high && home(number).is_some())
        }
        _ => true,
    };
    let lives = |register: Register| {
        register == Register::None
            || register == Register::RIP
            || general_register(register).is_some_and(|(number, _)| home(number).is_some())
    };
    let has_address = !is_address_only
        || has_wide_address(instruction)
            && instruction.op0_register().size() == 8
            && lives(instruction.memory_base())
            && lives(instruction.memory_index());
    instruction.flow_control() == FlowControl::Next
        && (facts.has_same_form || is_address_only)
        && facts.memory.is_none()
        && !facts.uses_vectors
        && !facts.uses_mmx
        && !may_raise(instruction)
        && has_address
        && (0..instruction.op_count()).all(is_plain)
}

/// Whether the first that an instruction does, if it has a form here, is [`Generator::reach`].
fn reaches(instruction: &Instruction) -> bool {
    let looks_at_its_target = instruction.code() == Code::Call_rm64 && instruction.op0_kind() == OpKind::Register;
    !looks_at_its_target
        && !matches!(instruction.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && !instruction.is_string_instruction()
}

impl Generator<'_> {
    /// Looks up, before the instruction at `index`, what one behind it accesses while flags are live that are not here.
    pub fn look_ahead(&mut self, index: usize) {
        let is_live = |index: usize| self.items.get(index).is_some_and(|item| item.live_before != 0);
        if is_live(index) || !is_live(index + 1) {
            return;
        }
        let mut numbers = Numbers::default();
        let first = Values::unknown(&mut numbers);
        let mut values = first;
        for at in index..self.items.len().min(index + DISTANCE_MAX) {
            let item = &self.items[at];
            if at != index && is_live(at) {
                let reached = values.accesses(&item.instruction, &item.facts);
                if let Some(reached) = reached.into_iter().flatten().next() {
                    self.prepare(index, at, reached, &first);
                    return;
                }
            }
            let is_joined = self.is_target.get(at + 1).is_none_or(|&is_target| is_target);
            if !is_quiet(item) || is_joined {
                return;
            }
            values.follow(&item.instruction, &item.facts, &mut numbers);
        }
    }

    /// Looks up, before the instruction at `index`, an access of the one at `at`; `first`: the registers' values here.
    fn prepare(&mut self, index: usize, at: usize, reached: Reached, first: &Values) {
        let Reached { access, key, offset, bytes, usage } = reached;
        let item = &self.items[at];
        let needs_vectors = item.facts.uses_mmx || item.facts.uses_vectors && !self.vectors_loaded;
        if needs_vectors || !reaches(&item.instruction) {
            return;
        }
        let share = self.plan.share(at, access);
        let head = match share {
            Some(share) if !share.is_head && self.plan.groups[share.group].is_ready => return,
            Some(share) if share.is_head => Some(share.group),
            _ => None,
        };
        let (lead, len) = head.map_or((0, bytes), |head| (self.plan.groups[head].lead, self.plan.groups[head].len));
        let Ok(start) = i32::try_from(offset + i64::from(lead)) else { return };
        let Some(address) = key.address(first) else { return };
        self.key_address(&address, start);
        let here = self.items[index];
        self.look_up_stretch(&here, len, usage, false, head.is_some() && len > bytes);
        match head {
            Some(head) => self.keep_stretch(head, usage),
            None => self.ahead = Some((at, access)),
        }
    }
}

#[cfg(test)]
mod tests;
