//! A bare processor in a few MiB of memory, for tests and small benchmarks: flat 64-bit mode with identity paging, no devices.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use polder_basics::SystemClock;
use polder_machine::state::SegmentState;
use polder_machine::{Bus, EngineServices, EoiListener};
use polder_memory::{CodeWatcher, GuestAddress, GuestMemory};

use crate::apic::{Inbox, LocalApic, Router};
use crate::block_cache::Blocks;
pub use crate::cpu::CodeSize;
use crate::cpu::{CS, Cpu, SS, cr0, cr4, efer};
use crate::cpu_model::CpuModel;
use crate::fault::Exception;
use crate::run::Outcome;
use crate::time;
use crate::tlb::DataTables;
pub use crate::translate::CpuBox;
use crate::translate::{ArenaMemory, FUNCTIONS, Translator};

/// Bytes of memory.
pub const MEMORY_BYTES: u64 = 8 << 20;
/// A page table entry's bit that forbids fetch.
const NO_EXECUTE: u64 = 1 << 63;
/// Where code goes.
pub const CODE: u64 = 0x10_0000;
/// Where data goes.
pub const DATA: u64 = 0x20_0000;
/// First stack pointer.
pub const STACK: u64 = 0x18_0000;
/// Page tables of four levels, up to 0x8000.
pub(crate) const TABLES: u64 = 0x1000;

mod tier;

pub use tier::{Tier, on_each_tier};

struct NoListener;

impl EoiListener for NoListener {
    fn end_of_interrupt(&self, _vector: u8) {}
}

/// A machine of memory alone.
pub(crate) fn services(memory: GuestMemory) -> EngineServices {
    EngineServices {
        memory,
        ports: Arc::new(Bus::new()),
        mmio: Arc::new(Bus::new()),
        eoi: Arc::new(NoListener),
        clock: Arc::new(SystemClock),
    }
}

/// Stale code, as (page number, granules), and the flag that brings the inner loop back to drop it.
#[derive(Default)]
pub(crate) struct Stale {
    pages: Mutex<Vec<(u64, u64)>>,
    pub(crate) attention: AtomicBool,
    arena: OnceLock<Arc<ArenaMemory>>,
}

impl CodeWatcher for Stale {
    fn code_written(&self, page_number: u64, granules: u64) {
        self.pages.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push((page_number, granules));
        self.attention.store(true, Ordering::SeqCst);
        if let Some(arena) = self.arena.get() {
            arena.attention().store(0, Ordering::SeqCst);
        }
    }
}

/// Brings translated code back now and then, as the timer of a machine does: a guest may loop for ever.
struct Ticker(Arc<AtomicBool>);

impl Ticker {
    fn start(arena: Arc<ArenaMemory>) -> Ticker {
        let ended = Arc::new(AtomicBool::new(false));
        let ticker = Ticker(ended.clone());
        std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                std::thread::sleep(std::time::Duration::from_millis(2));
                arena.attention().store(0, Ordering::SeqCst);
            }
        });
        ticker
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A processor of the newest model, alone in its machine.
fn alone(data_tables: DataTables, services: EngineServices) -> Cpu {
    let model = CpuModel::named(CpuModel::NEWEST, &[]).expect("the newest model has a name");
    let router = Arc::new(Router::new(vec![Arc::new(Inbox::default())]));
    let apic = LocalApic::new(router, 0, time::tsc_khz());
    Cpu::with_platform(data_tables, services, Arc::new(model), apic, time::host_tsc())
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    Fault(Exception),
    Halted,
    /// As many instructions as asked for have run.
    Limit,
}

/// The bench.
pub struct TestBench {
    pub cpu: CpuBox,
    /// Translates everything before it runs for the first time.
    translator: Option<Box<Translator>>,
    _ticker: Option<Ticker>,
    pub blocks: Blocks,
    pub(crate) stale: Arc<Stale>,
}

impl Default for TestBench {
    fn default() -> Self {
        Self::new()
    }
}

impl TestBench {
    /// A processor at `CODE` in 64-bit mode at privilege level 0, with all of memory mapped at its own address, writable, for user and supervisor.
    pub fn new() -> Self {
        // Signal handlers are in place from here on.
        crate::vector::stub::prepare().expect("executable memory for a test");
        let memory = GuestMemory::new(&[(GuestAddress(0), MEMORY_BYTES)]).expect("memory for a test");
        let stale = Arc::new(Stale::default());
        memory.set_code_watcher(stale.clone());
        let cpu = CpuBox::new(|tables| alone(tables, services(memory))).expect("memory for a test");
        let _ = stale.arena.set(cpu.memory().clone());
        let mut bench = TestBench { cpu, translator: None, _ticker: None, blocks: Blocks::new(), stale };
        bench.write_page_tables();
        bench.set_mode(CodeSize::Bits64, 0);
        bench
    }

    /// As [`TestBench::new`], with a translator that translates all code before it runs for the first time into a cache of that size; `None` on a host that cannot.
    pub fn translating(code_cache_bytes: usize) -> Option<TestBench> {
        let mut bench = TestBench::new();
        bench.translator = Translator::new(FUNCTIONS, 0, code_cache_bytes).expect("memory for a test").map(Box::new);
        bench._ticker = Some(Ticker::start(bench.cpu.memory().clone()));
        bench.translator.is_some().then_some(bench)
    }

    /// As [`TestBench::translating`]; each unit is compared with the interpreter.
    pub fn in_lockstep() -> Option<TestBench> {
        let mut bench = TestBench::translating(crate::CODE_CACHE_BYTES_DEFAULT)?;
        if let Some(translator) = &mut bench.translator {
            translator.lockstep = Some(Box::default());
        }
        Some(bench)
    }

    /// Units compared so far, and the first differences, in words.
    pub fn lockstep(&self) -> (u64, &[String]) {
        let lockstep = self.translator.as_ref().and_then(|translator| translator.lockstep.as_ref());
        lockstep.map_or((0, &[]), |lockstep| (lockstep.units, &lockstep.told))
    }

    /// What the translator counted.
    #[cfg(test)]
    pub(crate) fn translation_counters(&self) -> crate::counters::Counters {
        let mut counters = self.cpu.counters;
        if let Some(translator) = &self.translator {
            translator.report(&mut counters);
        }
        counters
    }

    /// Runs a while, by the tier that the bench has.
    pub(crate) fn advance(&mut self, attention: &AtomicBool, budget: u32) -> Outcome {
        match &mut self.translator {
            Some(translator) => translator.run(&mut self.cpu, &mut self.blocks, attention, budget),
            None => self.blocks.run(&mut self.cpu, attention, budget),
        }
    }

    /// Identity tables of four levels.
    fn write_page_tables(&self) {
        let entry = |at: u64, value: u64| self.write(at, &value.to_le_bytes());
        entry(TABLES, (TABLES + 0x1000) | 7);
        entry(TABLES + 0x1000, (TABLES + 0x2000) | 7);
        let pages = MEMORY_BYTES >> 12;
        for table in 0..pages / 512 {
            entry(TABLES + 0x2000 + 8 * table, (TABLES + 0x3000 + 0x1000 * table) | 7);
        }
        let entries: Vec<u8> = (0..pages).flat_map(|page| (page << 12 | 7).to_le_bytes()).collect();
        self.write(TABLES + 0x3000, &entries);
    }

    /// A new processor in the same memory, with fresh page tables and no decoded code.
    pub(crate) fn renew(&mut self) {
        self.write_page_tables();
        self.drop_stale();
        let services = self.cpu.services.clone();
        self.cpu.replace(|tables| alone(tables, services));
        self.flush();
    }

    /// Drops all decoded and translated code.
    fn flush(&mut self) {
        self.blocks.flush();
        if let Some(translator) = &mut self.translator {
            translator.flush(self.cpu.split().1);
        }
    }

    /// Flat segments for code of a size at a privilege level, with paging as it is: long mode with identity tables. The other
    /// registers are reset.
    pub fn set_mode(&mut self, code: CodeSize, cpl: u16) {
        let cpu = &mut self.cpu;
        cpu.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
        cpu.cr3 = TABLES;
        cpu.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        cpu.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
        let size = match code {
            CodeSize::Bits64 => 1 << 13,
            CodeSize::Bits32 => 1 << 14,
            CodeSize::Bits16 => 0,
        };
        let limit = 0xffff_ffff;
        for (number, segment) in (0..).zip(&mut cpu.segments) {
            let kind = if number == CS { 0x1b | size } else { 0x13 | (size & 1 << 14) };
            *segment = SegmentState {
                selector: (8 + 8 * u16::from(number)) | cpl,
                base: 0,
                limit,
                attributes: 0x80 | kind | cpl << 5,
            };
        }
        cpu.segments[SS as usize].attributes |= if code == CodeSize::Bits64 { 1 << 14 } else { 0 };
        cpu.gpr = [0; 32];
        cpu.gpr[crate::cpu::RSP] = STACK;
        cpu.rip = CODE;
        cpu.set_rflags(2);
        cpu.tlb.flush_all();
    }

    /// Puts bytes into memory.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.cpu.services.memory.write(GuestAddress(address), bytes).expect("inside memory");
    }

    /// Takes bytes from memory.
    pub fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.cpu.services.memory.read(GuestAddress(address), &mut bytes).expect("inside memory");
        bytes
    }

    /// A 64-bit value from memory.
    pub fn read_u64(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.read(address))
    }

    /// Puts code at `CODE` and runs it from there with the block cache, at least until `instructions` have completed.
    pub fn run_code(&mut self, code: &[u8], instructions: u64) -> Stop {
        self.write(CODE, code);
        self.cpu.rip = CODE;
        self.run(instructions)
    }

    /// Runs blocks, at least until `instructions` have completed.
    pub fn run(&mut self, instructions: u64) -> Stop {
        self.cpu.vector.resume_floats();
        let stop = self.run_until(instructions);
        self.cpu.vector.pause_floats();
        stop
    }

    fn run_until(&mut self, instructions: u64) -> Stop {
        let end = self.cpu.instructions + instructions;
        let stale = self.stale.clone();
        while self.cpu.instructions < end {
            self.drop_stale();
            let outcome = self.advance(&stale.attention, 1 << 16);
            if let Some(stop) = self.stop(outcome) {
                return stop;
            }
        }
        Stop::Limit
    }

    /// Runs at most so many blocks, in pieces that end wherever the engine wants to look around.
    pub fn run_blocks(&mut self, blocks: u32) {
        let stale = self.stale.clone();
        for _ in 0..blocks {
            self.drop_stale();
            let outcome = self.advance(&stale.attention, 2);
            if self.stop(outcome).is_some() {
                return;
            }
        }
    }

    /// Runs exactly so many instructions, one at a time, by the tier that the bench has.
    pub fn step(&mut self, instructions: u64) -> Stop {
        self.cpu.vector.resume_floats();
        let stop = self.run_singly(instructions);
        self.cpu.vector.pause_floats();
        stop
    }

    fn run_singly(&mut self, instructions: u64) -> Stop {
        for _ in 0..instructions {
            self.drop_stale();
            let outcome = self.run_one();
            if let Some(stop) = self.stop(outcome) {
                return stop;
            }
        }
        Stop::Limit
    }

    /// Takes bytes from memory.
    pub fn read_into(&self, address: u64, bytes: &mut [u8]) {
        self.cpu.services.memory.read(GuestAddress(address), bytes).expect("inside memory");
    }

    /// User mode with the vector units on, as a Linux program has it; only these pages stay mapped, and only that of [`CODE`] for fetch.
    pub fn enter_user_mode(&mut self, code: CodeSize, pages: &[u64], gs_base: u64) {
        self.set_mode(code, 3);
        for page in 0..MEMORY_BYTES >> 12 {
            let at = TABLES + 0x3000 + 8 * page;
            if !pages.contains(&page) {
                self.write(at, &0u64.to_le_bytes());
            } else if page != CODE >> 12 {
                let entry = u64::from_le_bytes(self.read(at)) | NO_EXECUTE;
                self.write(at, &entry.to_le_bytes());
            }
        }
        self.cpu.xcr0 = 7;
        self.cpu.segments[crate::cpu::GS as usize].base = gs_base;
        self.cpu.tlb.flush_all();
        self.cpu.update_mode();
    }

    /// The x87 registers as FXSAVE writes them; the thread's own registers are free again.
    pub fn x87(&mut self) -> [u8; 160] {
        self.cpu.vector.retire();
        let mut bytes = [0; 160];
        bytes.copy_from_slice(&self.cpu.vector.x87_image().0[..160]);
        bytes
    }

    fn stop(&self, outcome: Outcome) -> Option<Stop> {
        match outcome {
            Outcome::Fault => Some(Stop::Fault(self.cpu.fault)),
            _ if self.cpu.halted => Some(Stop::Halted),
            _ => None,
        }
    }

    pub(crate) fn drop_stale(&mut self) {
        self.stale.attention.store(false, Ordering::SeqCst);
        let stale = std::mem::take(&mut *self.stale.pages.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
        for (page_number, granules) in stale {
            self.blocks.invalidate(page_number, granules);
            if let Some(translator) = &mut self.translator {
                translator.invalidate(page_number, granules, self.cpu.split().1);
            }
        }
    }
}
