//! The guest's instructions that become one unit, and which flags they need.

use iced_x86::{Decoder, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register, RflagsBits};

use polder_memory::{GuestMemory, PAGE_SIZE};

use super::facts::Facts;
use crate::cpu_model::CpuModel;
use crate::flags;

/// Instructions of a unit.
pub const ITEMS_MAX: usize = 96;
/// The longest instruction (SDM vol. 2, 2.3.11).
pub const INSTRUCTION_BYTES_MAX: usize = 15;
/// Bytes that a jump inside a unit leaves out.
const LEAP_MAX: u64 = 512;
/// Instructions looked at to find out whether code behind a jump needs the flags.
const LOOK_AHEAD: usize = 8;
/// The arithmetic flags.
const ARITHMETIC: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// One instruction of a unit.
#[derive(Debug, Clone, Copy)]
pub struct Item {
    pub instruction: Instruction,
    pub facts: Facts,
    /// Arithmetic flags that this instruction or what follows it may read, as they are before it.
    pub live_before: u32,
    pub live_after: u32,
}

/// What an instruction reads of the flags, and what it surely overwrites.
pub fn flag_use(instruction: &Instruction) -> (u32, u32) {
    let reads = instruction.rflags_read() & ARITHMETIC;
    let kills = instruction.rflags_modified() & ARITHMETIC;
    match instruction.mnemonic() {
        // A count of zero leaves the flags alone.
        Mnemonic::Shl
        | Mnemonic::Shr
        | Mnemonic::Sar
        | Mnemonic::Sal
        | Mnemonic::Rol
        | Mnemonic::Ror
        | Mnemonic::Rcl
        | Mnemonic::Rcr
        | Mnemonic::Shld
        | Mnemonic::Shrd
            if !has_nonzero_count(instruction) =>
        {
            (reads, 0)
        }
        // Left as they are on some processors where the manual calls them undefined.
        Mnemonic::Bsf | Mnemonic::Bsr => (reads, RflagsBits::ZF),
        Mnemonic::Pushf
        | Mnemonic::Pushfq
        | Mnemonic::Lahf
        | Mnemonic::Syscall
        | Mnemonic::Int
        | Mnemonic::Int1
        | Mnemonic::Int3 => (ARITHMETIC, 0),
        _ if instruction.has_rep_prefix() || instruction.has_repne_prefix() => (reads, 0),
        _ => (reads, kills),
    }
}

fn has_nonzero_count(instruction: &Instruction) -> bool {
    let last = instruction.op_count() - 1;
    instruction.op_kind(last) == OpKind::Immediate8 && instruction.immediate8() & 0x1f != 0
}

/// Whether the host may be given this instruction as the guest has it, as far as the model is concerned.
pub fn is_of_model(model: &CpuModel, instruction: &Instruction) -> bool {
    !instruction.is_invalid() && instruction.cpuid_features().iter().all(|&kind| model.supports(kind))
}

/// Decodes a unit of at most `most` instructions. It goes on behind a jump to an address a little further on: what is between belongs to the
/// unit's bytes, but not to the unit. Any other unconditional transfer ends it.
pub fn decode(bytes: &[u8], linear: u64, options: u32, most: usize) -> Vec<Item> {
    let mut items = Vec::new();
    decode_into(&mut items, &mut InstructionInfoFactory::new(), bytes, linear, options, most);
    items
}

/// As [`decode`], in place of what `items` has; gives the 64-byte granules of the page, behind the unit and at its jumps' targets, that were looked at to find out which flags are live.
pub fn decode_into(
    items: &mut Vec<Item>,
    info: &mut InstructionInfoFactory,
    bytes: &[u8],
    linear: u64,
    options: u32,
    most: usize,
) -> u64 {
    items.clear();
    let most = most.min(ITEMS_MAX);
    let mut decoder = Decoder::with_ip(64, bytes, linear, options);
    while items.len() < most && decoder.can_decode() {
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            break;
        }
        let facts = Facts::of(&instruction, info);
        items.push(Item { instruction, facts, live_before: 0, live_after: 0 });
        match instruction.flow_control() {
            FlowControl::Next | FlowControl::ConditionalBranch => {}
            FlowControl::UnconditionalBranch => {
                let Some(target) = branch_target(&instruction) else { break };
                let offset = target.wrapping_sub(linear) as usize;
                let leap = target.wrapping_sub(instruction.next_ip());
                if leap > LEAP_MAX || bytes.get(offset..).is_none_or(|rest| rest.len() < INSTRUCTION_BYTES_MAX) {
                    break;
                }
                if decoder.set_position(offset).is_err() {
                    break;
                }
                decoder.set_ip(target);
            }
            _ => break,
        }
    }
    find_live_flags(items, &mut decoder, bytes.len(), linear)
}

/// Where in the unit an address is, if it is the start of an instruction.
pub fn item_at(items: &[Item], linear: u64) -> Option<usize> {
    items.binary_search_by(|item| item.instruction.ip().cmp(&linear)).ok()
}

/// `decoder` is that of all `len` bytes from `linear` on.
fn find_live_flags(items: &mut [Item], decoder: &mut Decoder<'_>, len: usize, linear: u64) -> u64 {
    let mut looked = 0;
    let mut look = |target: u64| {
        let (live, len) = look_ahead(decoder, len, linear, target);
        if len != 0 {
            looked |= GuestMemory::granules(target % PAGE_SIZE, len);
        }
        live
    };
    let mut outside = [ARITHMETIC; ITEMS_MAX];
    for (live, item) in outside.iter_mut().zip(items.iter()) {
        *live = branch_target(&item.instruction).map_or(ARITHMETIC, &mut look);
    }
    let end = items.last().map_or(linear, |item| item.instruction.next_ip());
    let behind = look(end);
    loop {
        let mut changed = false;
        for index in (0..items.len()).rev() {
            let instruction = items[index].instruction;
            let next = items.get(index + 1).map_or(behind, |next| next.live_before);
            let to = || match branch_target(&instruction).and_then(|target| item_at(items, target)) {
                Some(inside) => items[inside].live_before,
                None => outside[index],
            };
            let live_after = match instruction.flow_control() {
                FlowControl::Next => next,
                FlowControl::ConditionalBranch => next | to(),
                FlowControl::UnconditionalBranch | FlowControl::Call => to(),
                _ => ARITHMETIC,
            };
            let item = &mut items[index];
            let live_before = item.facts.reads | live_after & !item.facts.kills;
            changed |= item.live_before != live_before || item.live_after != live_after;
            (item.live_before, item.live_after) = (live_before, live_after);
        }
        if !changed {
            return looked;
        }
    }
}

/// The item that the jump at `index` leads to, if it leads to one.
pub fn target_inside(items: &[Item], index: usize) -> Option<usize> {
    item_at(items, branch_target(&items[index].instruction)?)
}

/// The target of a relative branch.
pub fn branch_target(instruction: &Instruction) -> Option<u64> {
    (instruction.op_count() > 0 && instruction.op0_kind() == OpKind::NearBranch64)
        .then(|| instruction.near_branch_target())
}

/// Which flags the code at `target` may read before it overwrites them.
pub fn live_at(bytes: &[u8], linear: u64, target: u64, options: u32) -> u32 {
    look_ahead(&mut Decoder::with_ip(64, bytes, linear, options), bytes.len(), linear, target).0
}

/// As [`live_at`], with the number of bytes that the answer depends on.
fn look_ahead(decoder: &mut Decoder<'_>, len: usize, linear: u64, target: u64) -> (u32, u64) {
    let offset = target.wrapping_sub(linear);
    if offset > len as u64 || decoder.set_position(offset as usize).is_err() {
        return (ARITHMETIC, 0);
    }
    decoder.set_ip(target);
    let mut unknown = ARITHMETIC;
    for _ in 0..LOOK_AHEAD {
        if !decoder.can_decode() {
            break;
        }
        let instruction = decoder.decode();
        let (reads, kills) = flag_use(&instruction);
        if instruction.is_invalid() || reads & unknown != 0 {
            break;
        }
        unknown &= !kills;
        if unknown == 0 {
            return (0, decoder.ip().wrapping_sub(target));
        }
        if instruction.flow_control() != FlowControl::Next {
            break;
        }
    }
    // All of them, whatever is there.
    (ARITHMETIC, 0)
}

/// Flags as RFLAGS has them.
pub fn rflags(live: u32) -> u64 {
    let places = [
        (RflagsBits::CF, flags::CF),
        (RflagsBits::PF, flags::PF),
        (RflagsBits::AF, flags::AF),
        (RflagsBits::ZF, flags::ZF),
        (RflagsBits::SF, flags::SF),
        (RflagsBits::OF, flags::OF),
    ];
    places.into_iter().filter(|(bit, _)| live & bit != 0).fold(0, |flags, (_, place)| flags | place)
}

/// The number of a general-purpose register of any width, and whether it is one of AH, CH, DH, BH.
pub fn general_register(register: Register) -> Option<(u8, bool)> {
    let high = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
    register.is_gpr().then(|| (register.full_register().number() as u8, high))
}
