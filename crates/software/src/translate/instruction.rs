//! Which host code an instruction becomes.

use std::mem::offset_of;

use iced_x86::{Code, EncodingKind, FlowControl, Instruction, Mnemonic, OpAccess, OpKind, Register};

use super::assembler::{Mem, R9, R15, RCX, Reg, Relocation};
use super::frame::{TEMPORARY, register_slot};
use super::generate::{Generator, Result, Use};
use super::guest_code::{Item, branch_target, general_register, is_of_model};
use super::registers::{ADDEND, ADDRESS, SPARE, home};

const RSP_NUMBER: u8 = 4;
const RBP_NUMBER: u8 = 5;

impl Generator<'_> {
    /// Generates one instruction; tells whether control never goes on behind it.
    pub fn instruction(&mut self, item: &Item) -> Result<bool> {
        let instruction = &item.instruction;
        if !is_of_model(self.context.model, instruction) {
            self.interpret(instruction.ip());
            return Ok(true);
        }
        match instruction.flow_control() {
            FlowControl::Next => {
                self.straight(item)?;
                Ok(false)
            }
            _ => self.transfer(item),
        }
    }

    /// Jumps, calls, returns, and what leaves for the system.
    fn transfer(&mut self, item: &Item) -> Result<bool> {
        let instruction = &item.instruction;
        let live = item.live_after != 0;
        let target = branch_target(instruction);
        match (instruction.flow_control(), target) {
            (FlowControl::ConditionalBranch, Some(target)) if instruction.is_jcc_short_or_near() => {
                let code = condition_number(instruction);
                self.link_if(code, target, live);
                return Ok(false);
            }
            (FlowControl::UnconditionalBranch, Some(target)) => {
                self.link(target, live);
            }
            (FlowControl::Call, Some(target)) => {
                self.push_constant(item, instruction.next_ip(), true, Some(target))?;
                self.link(target, live);
            }
            (FlowControl::Return, _) if matches!(instruction.code(), Code::Retnq | Code::Retnq_imm16) => {
                self.asm.mov(ADDRESS, R15);
                self.look_up(item, 8, Use::Read, item.live_before != 0);
                self.asm.load(ADDRESS, Mem::indexed(ADDRESS, ADDEND, 0, 0));
                let extra = if instruction.op_count() == 1 { i32::from(instruction.immediate16()) } else { 0 };
                self.asm.lea(R15, Mem::base(R15, 8 + extra));
                self.jump_indirect(instruction.ip(), 8 + extra);
            }
            (FlowControl::IndirectBranch | FlowControl::IndirectCall, _)
                if matches!(instruction.code(), Code::Jmp_rm64 | Code::Call_rm64) =>
            {
                self.indirect(item)?;
            }
            (FlowControl::ConditionalBranch, Some(target)) if self.count_branch(instruction, target, live) => {
                return Ok(false);
            }
            _ => {
                let goes_on = instruction.flow_control() == FlowControl::ConditionalBranch;
                if !goes_on {
                    // It comes back here only if it did nothing.
                    self.callout(item);
                }
                self.interpret(instruction.ip());
                return Ok(!goes_on);
            }
        }
        Ok(true)
    }

    /// JRCXZ, JECXZ and LOOP. `false`: another branch.
    fn count_branch(&mut self, instruction: &Instruction, target: u64, live: bool) -> bool {
        match instruction.code() {
            Code::Jrcxz_rel8_64 => self.asm.mov(SPARE, R9),
            Code::Jecxz_rel8_64 => self.asm.lea32(SPARE, Mem::base(R9, 0)),
            Code::Loop_rel8_64_RCX => {
                self.asm.lea(R9, Mem::base(R9, -1));
                self.asm.mov(SPARE, R9);
            }
            _ => return false,
        }
        let (zero, end) = (self.asm.label(), self.asm.label());
        self.asm.jump_if_rcx_zero(zero);
        if instruction.code() == Code::Loop_rel8_64_RCX {
            self.link(target, live);
            self.asm.bind(zero);
        } else {
            self.asm.jump(end);
            self.asm.bind(zero);
            self.link(target, live);
        }
        self.asm.bind(end);
        true
    }

    /// JMP and CALL through a register or memory.
    fn indirect(&mut self, item: &Item) -> Result<()> {
        let instruction = &item.instruction;
        let live = item.live_before != 0;
        let is_call = instruction.flow_control() == FlowControl::IndirectCall;
        if instruction.op0_kind() == OpKind::Memory {
            self.memory_address(item, ADDRESS)?;
            self.look_up(item, 8, Use::Read, live);
            self.asm.load(ADDRESS, Mem::indexed(ADDRESS, ADDEND, 0, 0));
        } else {
            let (number, _) = general_register(instruction.op0_register()).ok_or(super::generate::GiveUp)?;
            let from = self.register(number, ADDRESS);
            self.asm.mov(ADDRESS, from);
        }
        if is_call {
            self.check_canonical(instruction.ip());
            self.asm.store(Mem { displacement: TEMPORARY.displacement + 8, ..TEMPORARY }, ADDRESS);
            self.push_constant(item, instruction.next_ip(), true, None)?;
            self.asm.load(ADDRESS, Mem { displacement: TEMPORARY.displacement + 8, ..TEMPORARY });
        }
        self.jump_indirect(instruction.ip(), 0);
        Ok(())
    }

    /// Pushes a constant (`linear`: a guest address near the unit's own). `next`: where the guest goes on, if that is known; else a watched page is noticed at the jump that follows.
    fn push_constant(&mut self, item: &Item, value: u64, linear: bool, next: Option<u64>) -> Result<()> {
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

    /// The linear address of the instruction's memory operand, in `to` (ADDRESS).
    pub(super) fn memory_address(&mut self, item: &Item, to: Reg) -> Result<()> {
        self.effective_address(&item.instruction, to)?;
        self.add_segment_base(&item.instruction);
        Ok(())
    }

    /// An instruction that goes on to the next.
    fn straight(&mut self, item: &Item) -> Result<()> {
        let instruction = &item.instruction;
        match instruction.mnemonic() {
            Mnemonic::Nop
            | Mnemonic::Endbr64
            | Mnemonic::Endbr32
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Prefetchw => return Ok(()),
            Mnemonic::Lea if instruction.memory_base() == Register::RIP || has_wide_address(instruction) => {
                return self.load_address(item);
            }
            Mnemonic::Push => return self.push(item),
            Mnemonic::Pop => return self.pop(item),
            Mnemonic::Leave if instruction.code() == Code::Leaveq => return self.leave_frame(item),
            _ => {}
        }
        // The clock goes on between the two runs of a comparison, and strings stop wherever attention finds them.
        let is_incomparable =
            instruction.is_string_instruction() || matches!(instruction.mnemonic(), Mnemonic::Rdtsc | Mnemonic::Rdtscp);
        if self.context.keeps_journal && is_incomparable {
            self.callout(item);
            return Ok(());
        }
        if self.system(item)?
            || self.x87_form(item)?
            || self.string_form(item)
            || self.bit_form(item)?
            || self.state_form(item)?
            || self.same_form(item)?
        {
            return Ok(());
        }
        self.callout(item);
        Ok(())
    }

    /// LEA with 64-bit addresses.
    fn load_address(&mut self, item: &Item) -> Result<()> {
        let instruction = &item.instruction;
        let Some((to, _)) = general_register(instruction.op0_register()) else { return Err(super::generate::GiveUp) };
        let host = home(to).unwrap_or(SPARE);
        match instruction.op0_register().size() {
            8 => {
                self.effective_address(instruction, host)?;
            }
            4 => {
                self.effective_address(instruction, SPARE)?;
                self.asm.lea32(host, Mem::base(SPARE, 0));
            }
            _ => {
                self.callout(item);
                return Ok(());
            }
        }
        self.set_register(to, host);
        Ok(())
    }

    fn push(&mut self, item: &Item) -> Result<()> {
        let instruction = &item.instruction;
        let live = item.live_before != 0;
        match instruction.code() {
            Code::Push_r64 | Code::Push_rm64 if instruction.op0_kind() == OpKind::Register => {
                let Some((number, _)) = general_register(instruction.op0_register()) else {
                    return Err(super::generate::GiveUp);
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
                let kept = Mem { displacement: TEMPORARY.displacement + 8, ..TEMPORARY };
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

    fn pop(&mut self, item: &Item) -> Result<()> {
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
    fn leave_frame(&mut self, item: &Item) -> Result<()> {
        let base = self.register(RBP_NUMBER, ADDRESS);
        self.asm.mov(ADDRESS, base);
        self.look_up(item, 8, Use::Read, item.live_before != 0);
        self.asm.lea(R15, Mem::base(base, 8));
        self.asm.load(base, Mem::indexed(ADDRESS, ADDEND, 0, 0));
        Ok(())
    }

    /// Emits the instruction as itself, registers renamed and memory looked up. `false`: it has no such form here.
    fn same_form(&mut self, item: &Item) -> Result<bool> {
        let guest = &item.instruction;
        if !is_plain(guest) {
            return Ok(false);
        }
        let vector = uses_vectors(guest);
        let mmx = super::x87::uses_mmx(guest);
        if guest.encoding() == EncodingKind::Legacy && !vector && !mmx && !is_known_integer(guest) {
            return Ok(false);
        }
        let memory = (0..guest.op_count()).find(|&operand| guest.op_kind(operand) == OpKind::Memory);
        if memory.is_some() && !has_wide_address(guest) {
            return Ok(false);
        }
        let accesses = self.info.info(guest);
        let access = |operand: u32| accesses.op_access(operand);
        let mut usage = None;
        let is_address_only = guest.mnemonic() == Mnemonic::Lea;
        if let Some(operand) = memory {
            usage = match access(operand) {
                _ if is_address_only => None,
                OpAccess::Read | OpAccess::CondRead => Some(Use::Read),
                OpAccess::Write | OpAccess::ReadWrite | OpAccess::CondWrite | OpAccess::ReadCondWrite => {
                    Some(Use::Write)
                }
                _ => return Ok(false),
            };
        }
        let bytes = if memory.is_some() { guest.memory_size().size() as u32 } else { 0 };
        if memory.is_some() && (bytes == 0 || bytes > 64) {
            return Ok(false);
        }
        // Which registers are operands, and which of them live in memory.
        let mut slots: Vec<(u32, u8, OpAccess)> = Vec::new();
        let mut has_high_byte = false;
        let mut needs_prefix = memory.is_some();
        let shifts_by_rcx = (0..guest.op_count())
            .any(|operand| guest.op_register(operand) == Register::CL && is_implied_count(guest, operand));
        for operand in 0..guest.op_count() {
            if guest.op_kind(operand) != OpKind::Register {
                continue;
            }
            let register = guest.op_register(operand);
            let Some((number, high)) = general_register(register) else { continue };
            if shifts_by_rcx && is_implied_count(guest, operand) {
                continue;
            }
            has_high_byte |= high;
            needs_prefix |= home(number) != Some(Reg(number)) || number >= 4;
            if home(number).is_none() {
                slots.push((operand, number, access(operand)));
            }
        }
        let turned = match (has_high_byte && needs_prefix).then(|| turned_homes(guest)) {
            Some(None) => return Ok(false),
            Some(Some(homes)) => homes,
            None => Vec::new(),
        };
        let is_exchange_16 = matches!(guest.mnemonic(), Mnemonic::Cmpxchg16b | Mnemonic::Cmpxchg8b);
        let wants_rcx = shifts_by_rcx || is_exchange_16;
        if wants_rcx && memory.is_some() && !is_exchange_16 {
            return Ok(false);
        }
        let live = item.live_before != 0;
        if mmx {
            self.need_x87(live);
        }
        let mut host = *guest;
        // Scratch registers that operands may be put into.
        let mut free: Vec<Reg> = Vec::new();
        let mut collapsed = false;
        match (memory, usage) {
            (Some(_), Some(usage)) => {
                self.memory_address(item, ADDRESS)?;
                if vector {
                    self.need_vectors(live);
                }
                self.look_up(item, bytes, usage, live);
                let spares = usize::from(usage == Use::Read && !wants_rcx);
                if slots.len() > spares {
                    self.asm.lea(ADDRESS, Mem::indexed(ADDRESS, ADDEND, 0, 0));
                    collapsed = true;
                    free.push(ADDEND);
                }
                if usage == Use::Read && !wants_rcx {
                    free.push(SPARE);
                }
                host.set_memory_base(Register::R10);
                host.set_memory_index(if collapsed { Register::None } else { Register::R11 });
                host.set_memory_index_scale(1);
                host.set_memory_displacement64(0);
                host.set_memory_displ_size(0);
                host.set_segment_prefix(Register::None);
            }
            _ => {
                if vector {
                    self.need_vectors(live);
                }
                free.extend([ADDRESS, ADDEND]);
                if !wants_rcx {
                    free.push(SPARE);
                }
            }
        }
        // One scratch register for each guest register in memory, however often it is named.
        let mut placed: Vec<(u8, Reg, bool)> = Vec::new();
        for &(_, number, access) in &slots {
            let writes =
                !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess);
            match placed.iter_mut().find(|placed| placed.0 == number) {
                Some(placed) => placed.2 |= writes,
                None => {
                    let Some(scratch) = free.pop() else { return Err(super::generate::GiveUp) };
                    self.asm.load(scratch, register_slot(number));
                    placed.push((number, scratch, writes));
                }
            }
        }
        for operand in 0..guest.op_count() {
            if guest.op_kind(operand) != OpKind::Register || shifts_by_rcx && is_implied_count(guest, operand) {
                continue;
            }
            let register = guest.op_register(operand);
            let Some((number, _)) = general_register(register) else { continue };
            let to = home(number)
                .or_else(|| placed.iter().find(|placed| placed.0 == number).map(|placed| placed.1))
                .ok_or(super::generate::GiveUp)?;
            if to != Reg(number) || !turned.is_empty() {
                set_operand_register(&mut host, operand, renamed(register, to));
            }
        }
        if wants_rcx {
            if is_exchange_16 {
                self.asm.store(TEMPORARY, SPARE);
            }
            self.asm.mov(RCX, R9);
        }
        for &home in &turned {
            self.asm.rotate_right(home, home, 8);
        }
        if may_raise(guest) || mmx || memory.is_some() && vector {
            self.may_fault(guest.ip());
        }
        self.encode(&host)?;
        for &home in &turned {
            self.asm.rotate_right(home, home, 56);
        }
        if is_exchange_16 {
            self.asm.load(SPARE, TEMPORARY);
        }
        if writes_rcx(guest) {
            self.asm.mov(R9, RCX);
        }
        for &(number, scratch, writes) in &placed {
            if writes {
                self.asm.store(register_slot(number), scratch);
            }
        }
        if usage == Some(Use::Write) {
            // After the instruction: its own flags may be live.
            if collapsed && placed.iter().any(|&(_, scratch, _)| scratch == ADDRESS) {
                return Err(super::generate::GiveUp);
            }
            self.check_note(item, bytes, collapsed, Some(guest.next_ip()));
        }
        Ok(true)
    }
}

/// The condition's number in the opcode of a Jcc.
fn condition_number(instruction: &Instruction) -> u8 {
    use iced_x86::ConditionCode as C;
    match instruction.condition_code() {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        _ => 15,
    }
}

/// Whether a memory operand has 64-bit address registers, or none.
pub(super) fn has_wide_address(instruction: &Instruction) -> bool {
    let wide = |register: Register| register == Register::None || register.is_gpr64() || register == Register::RIP;
    wide(instruction.memory_base())
        && wide(instruction.memory_index())
        && !(instruction.memory_base() == Register::None
            && instruction.memory_index() == Register::None
            && instruction.memory_displ_size() == 4
            && instruction.memory_displacement64() > i32::MAX as u64
            && instruction.memory_displacement64() < 0xffff_ffff_8000_0000)
}

/// Operand kinds that can be renamed, and no prefix that means more.
fn is_plain(instruction: &Instruction) -> bool {
    let known = |kind| {
        matches!(
            kind,
            OpKind::Register
                | OpKind::Memory
                | OpKind::Immediate8
                | OpKind::Immediate8_2nd
                | OpKind::Immediate16
                | OpKind::Immediate32
                | OpKind::Immediate64
                | OpKind::Immediate8to16
                | OpKind::Immediate8to32
                | OpKind::Immediate8to64
                | OpKind::Immediate32to64
        )
    };
    let operands_known = (0..instruction.op_count()).all(|operand| {
        known(instruction.op_kind(operand))
            && (instruction.op_kind(operand) != OpKind::Register || {
                let register = instruction.op_register(operand);
                register.is_gpr() || register.is_xmm() || register.is_ymm() || register.is_mm()
            })
    });
    operands_known
        && !instruction.has_rep_prefix()
        && !instruction.has_repne_prefix()
        && !instruction.is_privileged()
        && !instruction.is_stack_instruction()
        && !instruction.is_save_restore_instruction()
        && !instruction.is_vsib()
        && instruction.encoding() != EncodingKind::EVEX
        && !is_excluded(instruction.mnemonic())
}

/// Instructions with effects beside their operands, or that the host must not run for the guest.
fn is_excluded(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Pause
            | Mnemonic::Ldmxcsr
            | Mnemonic::Stmxcsr
            | Mnemonic::Vldmxcsr
            | Mnemonic::Vstmxcsr
            | Mnemonic::Maskmovdqu
            | Mnemonic::Maskmovq
            | Mnemonic::Vmaskmovdqu
            | Mnemonic::Vmaskmovps
            | Mnemonic::Vmaskmovpd
            | Mnemonic::Vpmaskmovd
            | Mnemonic::Vpmaskmovq
            | Mnemonic::Rdrand
            | Mnemonic::Rdseed
            | Mnemonic::Rdpid
            | Mnemonic::Rdtsc
            | Mnemonic::Rdtscp
            | Mnemonic::Cpuid
            | Mnemonic::Xgetbv
            | Mnemonic::Rdfsbase
            | Mnemonic::Rdgsbase
            | Mnemonic::Wrfsbase
            | Mnemonic::Wrgsbase
            | Mnemonic::Rdpkru
            | Mnemonic::Wrpkru
    )
}

/// Whether XMM or YMM registers are involved.
fn uses_vectors(instruction: &Instruction) -> bool {
    let is_integer = matches!(
        instruction.mnemonic(),
        Mnemonic::Andn
            | Mnemonic::Bextr
            | Mnemonic::Blsi
            | Mnemonic::Blsmsk
            | Mnemonic::Blsr
            | Mnemonic::Bzhi
            | Mnemonic::Mulx
            | Mnemonic::Pdep
            | Mnemonic::Pext
            | Mnemonic::Rorx
            | Mnemonic::Sarx
            | Mnemonic::Shlx
            | Mnemonic::Shrx
    );
    let from_memory = matches!(
        instruction.mnemonic(),
        Mnemonic::Cvttsd2si
            | Mnemonic::Cvtsd2si
            | Mnemonic::Cvttss2si
            | Mnemonic::Cvtss2si
            | Mnemonic::Cvttps2pi
            | Mnemonic::Cvtps2pi
            | Mnemonic::Cvttpd2pi
            | Mnemonic::Cvtpd2pi
    );
    from_memory
        || instruction.encoding() == EncodingKind::VEX && !is_integer
        || (0..instruction.op_count()).any(|operand| {
            instruction.op_kind(operand) == OpKind::Register && {
                let register = instruction.op_register(operand);
                register.is_xmm() || register.is_ymm()
            }
        })
}

/// General-purpose instructions that mean the same on the host; others with legacy encoding go to the interpreter.
fn is_known_integer(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    match instruction.mnemonic() {
        // A bit offset in a register reaches beyond the operand.
        M::Bt | M::Bts | M::Btr | M::Btc => {
            instruction.op0_kind() == OpKind::Register || instruction.op1_kind() != OpKind::Register
        }
        M::Mov => {
            let is_special = |operand: u32| {
                let register = instruction.op_register(operand);
                instruction.op_kind(operand) == OpKind::Register && !register.is_gpr()
            };
            !is_special(0) && !is_special(1) && !has_offset_operand(instruction)
        }
        M::Movzx
        | M::Movsx
        | M::Movsxd
        | M::Add
        | M::Adc
        | M::Sub
        | M::Sbb
        | M::And
        | M::Or
        | M::Xor
        | M::Cmp
        | M::Test
        | M::Inc
        | M::Dec
        | M::Neg
        | M::Not
        | M::Shl
        | M::Sal
        | M::Shr
        | M::Sar
        | M::Rol
        | M::Ror
        | M::Rcl
        | M::Rcr
        | M::Shld
        | M::Shrd
        | M::Imul
        | M::Mul
        | M::Div
        | M::Idiv
        | M::Cbw
        | M::Cwde
        | M::Cdqe
        | M::Cwd
        | M::Cdq
        | M::Cqo
        | M::Xchg
        | M::Xadd
        | M::Cmpxchg
        | M::Cmpxchg8b
        | M::Cmpxchg16b
        | M::Bswap
        | M::Bsf
        | M::Bsr
        | M::Tzcnt
        | M::Lzcnt
        | M::Popcnt
        | M::Seta
        | M::Setae
        | M::Setb
        | M::Setbe
        | M::Sete
        | M::Setg
        | M::Setge
        | M::Setl
        | M::Setle
        | M::Setne
        | M::Setno
        | M::Setnp
        | M::Setns
        | M::Seto
        | M::Setp
        | M::Sets
        | M::Cmova
        | M::Cmovae
        | M::Cmovb
        | M::Cmovbe
        | M::Cmove
        | M::Cmovg
        | M::Cmovge
        | M::Cmovl
        | M::Cmovle
        | M::Cmovne
        | M::Cmovno
        | M::Cmovnp
        | M::Cmovns
        | M::Cmovo
        | M::Cmovp
        | M::Cmovs
        | M::Movbe
        | M::Crc32
        | M::Adcx
        | M::Adox
        | M::Lahf
        | M::Sahf
        | M::Clc
        | M::Stc
        | M::Cmc
        | M::Lfence
        | M::Sfence
        | M::Mfence
        | M::Movnti => true,
        _ => false,
    }
}

/// MOV between RAX and an address of 64 bits in the instruction.
fn has_offset_operand(instruction: &Instruction) -> bool {
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

/// Whether it puts an index into ECX.
fn writes_rcx(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Pcmpestri
            | Mnemonic::Pcmpestri64
            | Mnemonic::Pcmpistri
            | Mnemonic::Vpcmpestri
            | Mnemonic::Vpcmpestri64
            | Mnemonic::Vpcmpistri
    )
}

/// Whether the operand is CL because the opcode says so.
fn is_implied_count(instruction: &Instruction, operand: u32) -> bool {
    let is_shift = matches!(
        instruction.mnemonic(),
        Mnemonic::Shl
            | Mnemonic::Sal
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Rcl
            | Mnemonic::Rcr
            | Mnemonic::Shld
            | Mnemonic::Shrd
    );
    is_shift
        && operand == instruction.op_count() - 1
        && instruction.op_kind(operand) == OpKind::Register
        && instruction.op_register(operand) == Register::CL
}

/// Whether the host may fault in it although its operands are there.
fn may_raise(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Div | Mnemonic::Idiv | Mnemonic::Cmpxchg16b) || uses_vectors(instruction)
}

fn set_operand_register(instruction: &mut Instruction, operand: u32, register: Register) {
    match operand {
        0 => instruction.set_op0_register(register),
        1 => instruction.set_op1_register(register),
        2 => instruction.set_op2_register(register),
        _ => instruction.set_op3_register(register),
    }
}

/// Host registers to turn by 8 bits around an instruction whose operands are AH, CH, DH or BH but that needs a REX prefix on the host, which
/// has no names for those. `None`: it does not work.
fn turned_homes(instruction: &Instruction) -> Option<Vec<Reg>> {
    if may_raise(instruction) || matches!(instruction.mnemonic(), Mnemonic::Cmpxchg | Mnemonic::Mul | Mnemonic::Imul) {
        return None;
    }
    let operands = (0..instruction.op_count()).filter(|&operand| instruction.op_kind(operand) == OpKind::Register);
    let registers: Vec<(u8, bool)> =
        operands.filter_map(|operand| general_register(instruction.op_register(operand))).collect();
    let mut homes = Vec::new();
    for (index, &(number, high)) in registers.iter().enumerate() {
        if registers[..index].iter().any(|&(other, _)| other == number) {
            return None;
        }
        if high {
            homes.push(home(number)?);
        }
    }
    Some(homes)
}

/// A host register in the width of a guest register.
pub(super) fn renamed(register: Register, host: Reg) -> Register {
    let first = match register.size() {
        8 => Register::RAX,
        4 => Register::EAX,
        2 => Register::AX,
        _ => return byte_register(host),
    };
    first + u32::from(host.0)
}

/// The low byte of a host register.
fn byte_register(host: Reg) -> Register {
    match host.0 {
        number @ 0..=3 => Register::AL + u32::from(number),
        number @ 4..=7 => Register::SPL + u32::from(number - 4),
        number => Register::R8L + u32::from(number - 8),
    }
}

const _: () = assert!(offset_of!(crate::cpu::Cpu, gpr) == 0);
