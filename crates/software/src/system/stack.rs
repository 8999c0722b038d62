//! Frames on stacks: pushes and pops that change no register until the whole transfer is sure.

use polder_machine::state::SegmentState;

use crate::cpu::{CodeSize, Cpu, RSP, SS, is_canonical};
use crate::fault::Fault;
use crate::page_walk::{Access, Privilege};

/// A stack that is being pushed to or popped from before it becomes, or while it is, the current one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stack {
    pub segment: SegmentState,
    /// Cut to `size`.
    pub pointer: u64,
    pub size: CodeSize,
    /// Privilege of the accesses.
    pub cpl: u8,
    /// For #SS: the selector of a stack that is being switched to.
    pub error_selector: u16,
    /// For #SS: the EXT bit.
    pub external: u32,
}

impl Stack {
    fn cut(&self, pointer: u64) -> u64 {
        match self.size {
            CodeSize::Bits16 => pointer & 0xffff,
            CodeSize::Bits32 => pointer & 0xffff_ffff,
            CodeSize::Bits64 => pointer,
        }
    }

    /// Moves the pointer down by `bytes` bytes and gives it.
    pub fn reserve(&mut self, bytes: u64) -> u64 {
        self.pointer = self.cut(self.pointer.wrapping_sub(bytes));
        self.pointer
    }

    /// Moves the pointer up over `bytes` bytes.
    pub fn skip(&mut self, bytes: u64) {
        self.pointer = self.cut(self.pointer.wrapping_add(bytes));
    }
}

impl Cpu {
    /// The stack in use.
    pub(crate) fn current_stack(&self) -> Stack {
        let mut stack = Stack {
            segment: self.segments[usize::from(SS)],
            pointer: self.gpr[RSP],
            size: self.mode.stack,
            cpl: self.cpl(),
            error_selector: 0,
            external: 0,
        };
        stack.pointer = stack.cut(stack.pointer);
        stack
    }

    /// Sets RSP, ESP or SP, by the size of the stack; the other bits stay, as the architecture has it for SP.
    #[inline(always)]
    pub(crate) fn set_stack_pointer(&mut self, pointer: u64) {
        self.gpr[RSP] = match self.mode.stack {
            CodeSize::Bits16 => self.gpr[RSP] & !0xffff | pointer & 0xffff,
            CodeSize::Bits32 => pointer & 0xffff_ffff,
            CodeSize::Bits64 => pointer,
        };
    }

    /// Stores `bytes` (2, 4 or 8) below the stack's pointer and moves it.
    pub(crate) fn push(&mut self, stack: &mut Stack, value: u64, bytes: u64) -> Result<(), Fault> {
        let mut moved = *stack;
        let slot = moved.reserve(bytes);
        self.store_on_stack(stack, slot, value, bytes)?;
        *stack = moved;
        Ok(())
    }

    /// Stores `bytes` at an offset in a stack.
    pub(crate) fn store_on_stack(&mut self, stack: &Stack, offset: u64, value: u64, bytes: u64) -> Result<(), Fault> {
        let linear = self.stack_linear(stack, offset, bytes)?;
        let privilege = self.stack_privilege(stack);
        let checked = self.check_access(linear, bytes, Access::Write, SS, privilege)?;
        self.perform_store(checked, value, bytes);
        Ok(())
    }

    /// Loads `bytes` at the stack's pointer without moving it.
    pub(crate) fn load_from_stack(&mut self, stack: &Stack, bytes: u64) -> Result<u64, Fault> {
        let linear = self.stack_linear(stack, stack.pointer, bytes)?;
        let privilege = self.stack_privilege(stack);
        let checked = self.check_access(linear, bytes, Access::Read, SS, privilege)?;
        Ok(self.perform_load(checked, bytes))
    }

    /// Loads `bytes` (2, 4 or 8) at the stack's pointer and moves it.
    pub(crate) fn pop(&mut self, stack: &mut Stack, bytes: u64) -> Result<u64, Fault> {
        let value = self.load_from_stack(stack, bytes)?;
        stack.skip(bytes);
        Ok(value)
    }

    fn stack_privilege(&self, stack: &Stack) -> Privilege {
        if stack.cpl == self.cpl() {
            Privilege::Current
        } else if stack.cpl == 3 {
            Privilege::User
        } else {
            Privilege::Implicit
        }
    }

    fn stack_linear(&mut self, stack: &Stack, offset: u64, bytes: u64) -> Result<u64, Fault> {
        let last = offset.wrapping_add(bytes - 1);
        if stack.size == CodeSize::Bits64 {
            let bits = self.linear_bits();
            if !is_canonical(offset, bits) || !is_canonical(last, bits) {
                return Err(self.raise_ss(u32::from(stack.error_selector) | stack.external));
            }
            return Ok(offset);
        }
        let attributes = stack.segment.attributes;
        let limit = u64::from(stack.segment.limit);
        let protected = self.mode.protected || stack.cpl != self.cpl();
        let inside = if protected && attributes & 0xc == 4 {
            let top = if attributes & 1 << 14 != 0 { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top
        } else {
            last <= limit
        };
        let usable = !protected || attributes & 0x82 == 0x82;
        if !inside || !usable {
            return Err(self.raise_ss(u32::from(stack.error_selector) | stack.external));
        }
        Ok(stack.segment.base.wrapping_add(offset) & 0xffff_ffff)
    }
}
