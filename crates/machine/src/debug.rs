//! What a debugger needs of a vCPU, whichever engine runs it.
//!
//! A debugger works on vCPUs that do not run: it reads and sets registers, reads memory through [`translate`], and leaves
//! [`DebugOrders`] before it lets a vCPU run on. A vCPU that meets what it was told to look out for comes back from
//! [`crate::Vcpu::run`] with [`crate::VcpuExit::Debug`].
//!
//! Breakpoints are the engine's own. They change neither the guest's memory nor its debug registers, so the guest cannot see them.

use polder_memory::{GuestAddress, GuestMemory, PAGE_SIZE};

use crate::VcpuState;

/// CR0.PG, CR4.PSE, CR4.PAE, CR4.LA57 and EFER.LMA (SDM vol. 3, 2.5 and 2.2.1).
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
/// Bits of a paging entry (SDM vol. 3, 4.5).
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Which accesses a watchpoint stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchedAccess {
    Read,
    Write,
    ReadOrWrite,
}

/// A range of linear addresses whose data is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watchpoint {
    pub address: u64,
    pub len: u64,
    pub access: WatchedAccess,
}

/// What a vCPU looks out for while it runs. The default is nothing, and costs nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DebugOrders {
    /// Come back after one instruction. Interrupts stay out meanwhile, unless the vCPU halts and needs one to go on.
    pub step: bool,
    /// Linear addresses of instructions; the vCPU comes back before one of them runs. A step runs its instruction whatever lies there.
    pub breakpoints: Vec<u64>,
    /// Data; the vCPU comes back after the instruction that touched it.
    pub watchpoints: Vec<Watchpoint>,
}

/// Why a vCPU came back to its debugger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DebugEvent {
    /// The step is done: an instruction ran, or an exception or interrupt was delivered.
    Step,
    /// The next instruction is at a breakpoint.
    Breakpoint { address: u64 },
    /// The instruction that ran last touched watched data.
    Watchpoint(Watchpoint),
}

/// The x87, SSE and AVX registers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VectorRegisters {
    /// As FXSAVE64 writes them (SDM vol. 1, 10.5.1).
    pub fxsave: [u8; 512],
    /// The high halves of YMM0 to YMM15.
    pub ymm_high: [u128; 16],
}

/// A vCPU that a debugger may look into. All methods only between runs.
pub trait DebugVcpu {
    /// The x87 and vector registers; the others are in [`crate::Vcpu::state`].
    fn vector_registers(&self) -> VectorRegisters;
    /// Sets the general registers, RIP, RFLAGS, the bases of FS and GS, and the vector registers. Everything else in `state` is
    /// ignored: control and segment registers stay as they are, and nothing in flight is lost. A halted vCPU whose RIP changes is runnable.
    fn set_registers(&mut self, state: &VcpuState, vector: &VectorRegisters);
    /// Replaces what the vCPU looks out for.
    fn set_orders(&mut self, orders: &DebugOrders);
}

/// The guest-physical address behind a linear one, by the page tables of a vCPU in `state`; `None` if nothing is mapped there. Rights
/// are not looked at, and no accessed flag is set: the guest does not notice.
pub fn translate(memory: &GuestMemory, state: &VcpuState, linear: u64) -> Option<u64> {
    if state.cr0 & CR0_PG == 0 {
        return Some(linear & 0xffff_ffff);
    }
    if state.cr4 & CR4_PAE == 0 {
        return translate_32(memory, state, linear);
    }
    let (mut shift, mut table) = if state.efer & EFER_LMA == 0 {
        // The processor keeps these four entries from when CR3 was loaded; what lies in memory is as good as that in practice.
        let pointer = entry(memory, (state.cr3 & 0xffff_ffe0) + (linear >> 30 & 3) * 8)?;
        (21, pointer & ADDRESS)
    } else {
        let bits = if state.cr4 & CR4_LA57 == 0 { 48 } else { 57 };
        let unused = 64 - bits;
        if ((linear << unused) as i64 >> unused) as u64 != linear {
            return None;
        }
        (bits - 9, state.cr3 & ADDRESS)
    };
    loop {
        let entry = entry(memory, table + (linear >> shift & 0x1ff) * 8)?;
        if shift == 12 || shift <= 30 && entry & LARGE != 0 {
            let mask = (1 << shift) - 1;
            return Some(entry & ADDRESS & !mask | linear & mask);
        }
        table = entry & ADDRESS;
        shift -= 9;
    }
}

/// Paging with entries of 32 bits (SDM vol. 3, 4.3).
fn translate_32(memory: &GuestMemory, state: &VcpuState, linear: u64) -> Option<u64> {
    let entry =
        |address| memory.load_u32(GuestAddress(address)).ok().map(u64::from).filter(|entry| entry & PRESENT != 0);
    let directory = entry((state.cr3 & 0xffff_f000) + (linear >> 22 & 0x3ff) * 4)?;
    if directory & LARGE != 0 && state.cr4 & CR4_PSE != 0 {
        return Some(directory & 0xffc0_0000 | (directory >> 13 & 0xff) << 32 | linear & 0x3f_ffff);
    }
    let page = entry((directory & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4)?;
    Some(page & 0xffff_f000 | linear & 0xfff)
}

/// A present entry of 64 bits.
fn entry(memory: &GuestMemory, address: u64) -> Option<u64> {
    memory.load_u64(GuestAddress(address)).ok().filter(|entry| entry & PRESENT != 0)
}

/// The parts of `len` bytes at `linear` that lie in one page each: offset in the range and length.
pub fn pages(linear: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let in_page = (PAGE_SIZE - linear.wrapping_add(at as u64) % PAGE_SIZE) as usize;
        let part = (at, in_page.min(len - at));
        at += part.1;
        (part.1 > 0).then_some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::new(&[(GuestAddress(0), 0x10000)]).unwrap()
    }

    fn state(cr0: u64, cr4: u64, efer: u64) -> VcpuState {
        VcpuState { cr0, cr3: 0x1000, cr4, efer, ..VcpuState::power_on(true) }
    }

    #[test]
    fn linear_addresses_are_physical_without_paging() {
        assert_eq!(translate(&memory(), &state(1, 0, 0), 0x1_2345_6789), Some(0x2345_6789));
    }

    #[test]
    fn four_levels_small_and_large_pages_and_holes() {
        let memory = memory();
        let long = state(CR0_PG, CR4_PAE, EFER_LMA);
        let put = |address, value: u64| memory.write_value(GuestAddress(address), &value).unwrap();
        put(0x1000 + 8 * 511, 0x2003);
        put(0x2000, 0x3003);
        put(0x3000, 0x4003);
        put(0x3008, 0x60_0083);
        put(0x4008, 0x8000_0000_0000_9001);
        let base = 0xffff_ff80_0000_0000;
        assert_eq!(translate(&memory, &long, base + 0x1234), Some(0x9234));
        assert_eq!(translate(&memory, &long, base + 0x20_0000 + 0x1234), Some(0x60_1234));
        assert_eq!(translate(&memory, &long, base), None);
        assert_eq!(translate(&memory, &long, 0), None);
        assert_eq!(translate(&memory, &long, 0x8000_0000_0000_0000), None);
        // A table outside RAM is a hole too.
        put(0x2008, 0x7_0000_0003);
        assert_eq!(translate(&memory, &long, base + (1 << 30)), None);
    }

    #[test]
    fn two_and_three_levels() {
        let memory = memory();
        memory.write_value(GuestAddress(0x1000), &0x2003u32).unwrap();
        memory.write_value(GuestAddress(0x1004), &0x40_0083u32).unwrap();
        memory.write_value(GuestAddress(0x2004), &0x9001u32).unwrap();
        let narrow = state(CR0_PG, CR4_PSE, 0);
        assert_eq!(translate(&memory, &narrow, 0x1234), Some(0x9234));
        assert_eq!(translate(&memory, &narrow, 0x40_1234), Some(0x40_1234));
        let put = |address, value: u64| memory.write_value(GuestAddress(address), &value).unwrap();
        put(0x1000, 0x3001);
        put(0x3008, 0x60_0083);
        assert_eq!(translate(&memory, &state(CR0_PG, CR4_PAE, 0), 0x20_1234), Some(0x60_1234));
    }

    #[test]
    fn a_range_falls_into_pages() {
        assert_eq!(pages(0xffe, 0x1004).collect::<Vec<_>>(), [(0, 2), (2, 0x1000), (0x1002, 2)]);
        assert_eq!(pages(5, 0).count(), 0);
    }
}
