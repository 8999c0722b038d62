//! The processor's state at a kernel's first instruction: flat segments, and for the 64-bit entry identity-mapped memory.

use polder_memory::{GuestAddress, GuestMemory, MemoryError};

use crate::VcpuState;
use crate::layout;
use crate::state::{RunState, SegmentState, TableState};

/// Selectors that the Linux boot protocol asks for (`__BOOT_CS`, `__BOOT_DS`) and a task state segment.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Attributes as [`SegmentState`] has them: accessed code or data, present, 4 KiB granular.
const CODE32: u16 = 0xc09b;
const CODE64: u16 = 0xa09b;
const DATA32: u16 = 0xc093;
const BUSY_TASK: u16 = 0x008b;

/// The stack that a kernel may use until it sets its own: below the page tables.
const STACK_TOP: u64 = layout::BOOT_PAGE_TABLES_START - 16;

fn flat(selector: u16, attributes: u16) -> SegmentState {
    SegmentState { selector, base: 0, limit: u32::MAX, attributes }
}

/// The descriptor of a flat segment (SDM vol. 3, 3.4.5).
fn descriptor(attributes: u16) -> u64 {
    0x000f_0000_0000_ffff | (attributes as u64) << 40
}

/// Writes the GDT and gives the state common to all entries.
fn flat_state(memory: &GuestMemory, code: u16, rip: u64) -> Result<VcpuState, MemoryError> {
    let task = 0x0000_0000_0000_0067 | (BUSY_TASK as u64) << 40;
    let table = [0, 0, descriptor(code), descriptor(DATA32), task, 0];
    for (index, entry) in table.iter().enumerate() {
        memory.write(GuestAddress(layout::BOOT_GDT_START + 8 * index as u64), &u64::to_le_bytes(*entry))?;
    }
    let data = flat(DATA, DATA32);
    let mut state = VcpuState::power_on(true);
    state.gpr = [0; 16];
    state.rip = rip;
    state.segments = [data, flat(CODE, code), data, data, data, data];
    state.tr = SegmentState { selector: TASK, base: 0, limit: 0x67, attributes: BUSY_TASK };
    state.gdtr = TableState { base: layout::BOOT_GDT_START, limit: 8 * table.len() as u16 - 1 };
    state.idtr = TableState::default();
    state.run_state = RunState::Runnable;
    Ok(state)
}

/// 32-bit protected mode without paging, `eax` and `ebx` as the protocol says.
pub(super) fn protected_mode(memory: &GuestMemory, rip: u32, eax: u32, ebx: u32) -> Result<VcpuState, MemoryError> {
    let mut state = flat_state(memory, CODE32, rip.into())?;
    state.cr0 = CR0_PE | CR0_ET;
    state.gpr[0] = eax.into();
    state.gpr[3] = ebx.into();
    Ok(state)
}

/// 64-bit mode with the first 4 GiB identity-mapped by 2 MiB pages, `rsi` as the protocol says.
pub(super) fn long_mode(memory: &GuestMemory, rip: u64, rsi: u64) -> Result<VcpuState, MemoryError> {
    const TABLE_LEN: u64 = 4096;
    const GIBIBYTES: u64 = 4;
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let root = layout::BOOT_PAGE_TABLES_START;
    let pointers = root + TABLE_LEN;
    let directories = pointers + TABLE_LEN;
    memory.fill(GuestAddress(root), 0, 2 * TABLE_LEN)?;
    memory.write(GuestAddress(root), &(pointers | PRESENT_WRITABLE).to_le_bytes())?;
    for gibibyte in 0..GIBIBYTES {
        let directory = directories + gibibyte * TABLE_LEN;
        memory.write(GuestAddress(pointers + 8 * gibibyte), &(directory | PRESENT_WRITABLE).to_le_bytes())?;
        let entries: Vec<u8> = (0..512u64)
            .flat_map(|page| (gibibyte << 30 | page << 21 | LARGE | PRESENT_WRITABLE).to_le_bytes())
            .collect();
        memory.write(GuestAddress(directory), &entries)?;
    }
    let mut state = flat_state(memory, CODE64, rip)?;
    state.cr0 = CR0_PE | CR0_ET | CR0_PG;
    state.cr3 = root;
    state.cr4 = CR4_PAE;
    state.efer = EFER_LME | EFER_LMA;
    state.gpr[4] = STACK_TOP;
    state.gpr[6] = rsi;
    Ok(state)
}
