//! The memory that a vCPU's translated code works in.
//!
//! While translated code runs, the host's RSP points at the [`Cpu`]: every field of it has a fixed distance from RSP, and the memory below is
//! a stack for calls into Rust. So the registers, the look-up tables and the jump tables lie together in one mapping:
//!
//! ```text
//! guard page | stack, growing down | Cpu | data tables | their second level | Jumps
//! ```
//!
//! The mapping lives as long as anybody who may write the attention word in it.

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap_anonymous, mprotect, munmap};

use super::bindings::NO_BINDING;
use super::frame::Frame;
use crate::cpu::Cpu;
use crate::second_level::SecondMemory;
use crate::tlb::{DataMemory, DataTables};

/// Stack for what translated code calls: handlers, and the devices behind them.
const STACK_BYTES: usize = 2 << 20;
const GUARD_BYTES: usize = 64 << 10;
/// Entries of one address space's jump table.
pub const JUMPS: usize = 16384;
/// Jump tables; the first is never filled.
pub const JUMP_TABLES: usize = 16;
/// Numbers of bindings; see [`super::bindings`].
pub const BINDINGS: usize = 1 << 16;

/// Entries of [`Jumps::far`].
pub const FAR_JUMPS: usize = 1 << 16;
/// Bit of an address from where on its entry in [`Jumps::far`] is chosen: other bits than the lowest, which choose that in a jump table.
pub const FAR_SHIFT: u32 = 3;

/// Where a jump leads in the address spaces in which the binding holds.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub struct FarJump {
    pub linear: u64,
    pub host: u64,
    pub binding: u32,
}

impl FarJump {
    pub const NONE: FarJump = FarJump { linear: 0, host: 0, binding: NO_BINDING };
}

/// Key of an empty entry: an address whose entry is another one, so that no address finds it. Guests may jump anywhere, to addresses that are not
/// canonical too.
pub const fn no_jump(at: usize) -> u64 {
    !(at as u64)
}

/// Returns that are remembered in an address space, by the place of the return address on the stack: a power of two.
pub const RETURNS: usize = 256;

/// Where returns of an address space lead: what the last call with its return address at such a place of the stack expects to come back to, and the code there. The index of a
/// jump table is the distance of its returns from the first in bytes, so that returns hear of a request for attention too: the first are never filled.
#[repr(C)]
pub struct Returns {
    pub linear: [u64; RETURNS],
    pub host: [u64; RETURNS],
    _unused: [u8; JUMPS - 2 * RETURNS * size_of::<u64>()],
}

const _: () = assert!(size_of::<Returns>() == JUMPS);

/// What an entry of [`Returns`] is while it is empty.
#[derive(Debug, Clone, Copy)]
pub struct NoReturn {
    pub linear: u64,
    pub host: u64,
}

impl Returns {
    fn clear(&mut self, empty: NoReturn) {
        self.linear.fill(empty.linear);
        self.host.fill(empty.host);
    }
}

/// What jumps look at, for each address space.
#[repr(C, align(4096))]
pub struct Jumps {
    /// Where indirect jumps lead: from linear addresses to translated code.
    pub keys: [u64; JUMP_TABLES * JUMPS],
    pub hosts: [u64; JUMP_TABLES * JUMPS],
    returns: [Returns; JUMP_TABLES],
    /// What the jump tables have lost to other addresses in the same place, of all address spaces. All zero is [`FarJump::NONE`].
    far: [FarJump; FAR_JUMPS],
    /// Not zero: the binding holds.
    verified: [u8; JUMP_TABLES * BINDINGS],
    /// The address is one that a guest cannot guess.
    no_return: NoReturn,
}

const _: () =
    assert!(std::mem::offset_of!(Jumps, far) % 4096 == 0 && size_of::<[FarJump; FAR_JUMPS]>().is_multiple_of(4096));

impl Jumps {
    /// Fills an entry.
    pub fn put(&mut self, at: usize, key: u64, host: u64) {
        self.keys[at] = key;
        self.hosts[at] = host;
    }

    /// The entry of [`Jumps::far`] for an address.
    pub fn far(&mut self, linear: u64) -> &mut FarJump {
        &mut self.far[(linear >> FAR_SHIFT) as usize % FAR_JUMPS]
    }

    /// Empties what is for all address spaces. The pages go back to the host: to fill them would take longer than eviction may.
    pub fn clear_far(&mut self) {
        let start = self.far.as_mut_ptr();
        // SAFETY: whole pages of the arena's private anonymous mapping, which read as zeros from here on; so does an empty entry.
        if unsafe { madvise(start.cast(), size_of_val(&self.far), Advice::LinuxDontNeed) }.is_err() {
            self.far.fill(FarJump::NONE);
        }
    }

    /// Empties one table.
    fn clear_table(&mut self, table: usize) {
        let start = table * JUMPS;
        for (at, key) in self.keys[start..start + JUMPS].iter_mut().enumerate() {
            *key = no_jump(at);
        }
    }

    /// Sets what empty entries of returns have: an address that no return has but by chance, and code that is safe even then.
    pub fn set_no_return(&mut self, no_return: NoReturn) {
        self.no_return = no_return;
        self.clear_returns();
    }

    /// Forgets where returns lead: their code is about to go.
    pub fn clear_returns(&mut self) {
        for returns in &mut self.returns {
            returns.clear(self.no_return);
        }
    }

    /// Forgets all of an address space. No binding beyond `last` was ever verified.
    pub fn clear(&mut self, space: usize, last: u32) {
        self.clear_table(space);
        self.returns[space].clear(self.no_return);
        let start = space * BINDINGS;
        self.verified[start..=start + last as usize].fill(0);
    }

    /// Notes that a binding holds in an address space.
    pub fn verify(&mut self, space: usize, binding: u32) {
        if binding != NO_BINDING {
            self.verified[space * BINDINGS + binding as usize] = 1;
        }
    }

    pub fn is_verified(&self, space: usize, binding: u32) -> bool {
        self.verified[space * BINDINGS + binding as usize] != 0
    }

    /// A binding's number is free: it holds nowhere.
    pub fn forget(&mut self, binding: u32) {
        for space in 0..JUMP_TABLES {
            self.verified[space * BINDINGS + binding as usize] = 0;
        }
    }
}

/// What lies above the stack.
#[repr(C, align(4096))]
pub struct Layout {
    pub cpu: Cpu,
    pub data: DataMemory,
    pub second: SecondMemory,
    pub jumps: Jumps,
}

/// A mapping of its own, freed with the last reference.
#[derive(Debug)]
pub struct ArenaMemory {
    start: *mut u8,
    len: usize,
}

// SAFETY: the mapping is plain memory; who may touch which part of it is the business of `CpuBox` and of the atomic attention word.
unsafe impl Send for ArenaMemory {}
// SAFETY: as above.
unsafe impl Sync for ArenaMemory {}

impl ArenaMemory {
    /// Zeros.
    pub fn new() -> io::Result<ArenaMemory> {
        let len = GUARD_BYTES + STACK_BYTES + size_of::<Layout>();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start =
            unsafe { mmap_anonymous(std::ptr::null_mut(), len, protection, MapFlags::PRIVATE | MapFlags::NORESERVE)? };
        let arena = ArenaMemory { start: start.cast(), len };
        // SAFETY: the guard lies at the mapping's start and nothing uses it.
        unsafe { mprotect(start, GUARD_BYTES, MprotectFlags::empty())? };
        Ok(arena)
    }

    fn layout(&self) -> *mut Layout {
        // SAFETY: inside the mapping.
        unsafe { self.start.add(GUARD_BYTES + STACK_BYTES).cast() }
    }

    /// The look-up tables for data.
    pub fn data_memory(&self) -> NonNull<DataMemory> {
        // SAFETY: the field lies inside the mapping.
        unsafe { NonNull::new_unchecked(&raw mut (*self.layout()).data) }
    }

    /// Their second level.
    pub fn second_memory(&self) -> NonNull<SecondMemory> {
        // SAFETY: as above.
        unsafe { NonNull::new_unchecked(&raw mut (*self.layout()).second) }
    }

    /// The word that other threads clear to get the vCPU's attention while it runs translated code.
    pub fn attention(&self) -> &AtomicU32 {
        // SAFETY: the field lies inside the mapping for as long as `self`; everybody accesses it atomically.
        unsafe { &*(&raw const (*self.layout()).cpu.frame.jump_table).cast() }
    }
}

impl Drop for ArenaMemory {
    fn drop(&mut self) {
        // SAFETY: this was the last reference to the mapping. Failing would only leak it.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}

/// A [`Cpu`] in its arena; otherwise like a box.
#[derive(Debug)]
pub struct CpuBox {
    memory: Arc<ArenaMemory>,
}

impl CpuBox {
    /// Puts a processor into an arena whose data tables it uses.
    pub fn new(make: impl FnOnce(DataTables) -> Cpu) -> io::Result<CpuBox> {
        let memory = Arc::new(ArenaMemory::new()?);
        // SAFETY: the arena's first.
        let cpu = make(unsafe { DataTables::new(memory.clone()) });
        // SAFETY: the layout is mapped, aligned and nobody else knows of it yet. The rest of it is integers, which are zero.
        unsafe {
            (&raw mut (*memory.layout()).cpu).write(cpu);
            let jumps = &mut (*memory.layout()).jumps;
            for table in 0..JUMP_TABLES {
                jumps.clear_table(table);
            }
        }
        Ok(CpuBox { memory })
    }

    /// Puts another processor in the place of this one; its data tables are empty.
    pub fn replace(&mut self, make: impl FnOnce(DataTables) -> Cpu) {
        // SAFETY: nobody uses the old processor's until that is gone.
        let cpu = make(unsafe { DataTables::new(self.memory.clone()) });
        **self = cpu;
    }

    pub fn memory(&self) -> &Arc<ArenaMemory> {
        &self.memory
    }

    /// The processor, with leave to reach what lies around it: for translated code.
    pub fn as_mut_ptr(&mut self) -> *mut Cpu {
        self.memory.layout().cast()
    }

    /// The processor and its jump tables.
    pub fn split(&mut self) -> (&mut Cpu, &mut Jumps) {
        let layout = self.memory.layout();
        // SAFETY: `self` owns both. The data tables between them are the processor's to refer to.
        unsafe { (&mut (*layout).cpu, &mut (*layout).jumps) }
    }
}

impl Deref for CpuBox {
    type Target = Cpu;

    fn deref(&self) -> &Cpu {
        // SAFETY: initialised in `new`; `self` owns it.
        unsafe { &(*self.memory.layout()).cpu }
    }
}

impl DerefMut for CpuBox {
    fn deref_mut(&mut self) -> &mut Cpu {
        // SAFETY: as above.
        unsafe { &mut (*self.memory.layout()).cpu }
    }
}

impl Drop for CpuBox {
    fn drop(&mut self) {
        // SAFETY: initialised in `new`, dropped once. The attention word is an integer and stays readable.
        unsafe { std::ptr::drop_in_place(&raw mut (*self.memory.layout()).cpu) };
    }
}

/// The jump tables beside a processor.
///
/// # Safety
/// `cpu` comes from [`CpuBox::as_mut_ptr`], and nobody else has a reference to the tables while the one given lives.
pub unsafe fn jumps_of<'a>(cpu: *mut Cpu) -> &'a mut Jumps {
    // SAFETY: the processor is the first part of its layout.
    unsafe { &mut (*cpu.cast::<Layout>()).jumps }
}

/// Distance of the data tables from the processor.
pub const DATA: usize = std::mem::offset_of!(Layout, data);
pub const SECOND: usize = std::mem::offset_of!(Layout, second);
/// Distance of the jump tables from the processor.
pub const KEYS: i32 = (std::mem::offset_of!(Layout, jumps) + std::mem::offset_of!(Jumps, keys)) as i32;
pub const HOSTS: i32 = (std::mem::offset_of!(Layout, jumps) + std::mem::offset_of!(Jumps, hosts)) as i32;
/// Distance of the first [`Returns`] from the processor.
pub const RETURNS_AT: i32 = (std::mem::offset_of!(Layout, jumps) + std::mem::offset_of!(Jumps, returns)) as i32;
/// Distance of [`Jumps::far`] from the processor.
pub const FAR: i32 = (std::mem::offset_of!(Layout, jumps) + std::mem::offset_of!(Jumps, far)) as i32;
const VERIFIED: i32 = (std::mem::offset_of!(Layout, jumps) + std::mem::offset_of!(Jumps, verified)) as i32;

/// Distance of a binding's byte in the first address space from the processor.
pub const fn verified_at(binding: u32) -> i32 {
    VERIFIED + binding as i32
}

/// Distance of a field of [`Frame`] from the processor.
pub const fn frame_offset(field: usize) -> i32 {
    (std::mem::offset_of!(Cpu, frame) + field) as i32
}

const _: () = assert!(size_of::<Frame>() < 4096);
