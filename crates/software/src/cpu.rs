//! The registers of one vCPU, as handlers use them.

use std::sync::Arc;

use polder_machine::EngineServices;
use polder_machine::state::{SegmentState, TableState};

use crate::apic::LocalApic;
use crate::block::RunningBlock;
use crate::counters::Counters;
use crate::cpu_model::{CpuModel, CpuidContext};
use crate::debugger::Debugger;
use crate::fault::Exception;
use crate::flags::{self, ArithmeticFlags};
use crate::msr::Msrs;
use crate::paravirt::Paravirt;
use crate::stopwatch::Stopwatch;
use crate::tlb::{DataTables, Tlb};
use crate::translate::Frame;
use crate::vector::VectorState;

/// Index in `Cpu::gpr` that always reads as zero: an absent base or index register.
pub const ZERO: usize = 16;
/// Index in `Cpu::gpr` of the running block's first byte's instruction pointer: the base of RIP-relative operands.
pub const BLOCK_RIP: usize = 17;

pub const RAX: usize = 0;
pub const RCX: usize = 1;
pub const RDX: usize = 2;
pub const RBX: usize = 3;
pub const RSP: usize = 4;
pub const RBP: usize = 5;
pub const RSI: usize = 6;
pub const RDI: usize = 7;

/// Segment registers in x86's order.
pub const ES: u8 = 0;
pub const CS: u8 = 1;
pub const SS: u8 = 2;
pub const DS: u8 = 3;
pub const FS: u8 = 4;
pub const GS: u8 = 5;

pub mod cr0 {
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

pub mod cr4 {
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
}

pub mod efer {
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// Code, stack or operand size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum CodeSize {
    Bits16 = 0,
    Bits32 = 1,
    Bits64 = 2,
}

/// What of CR0, EFER, RFLAGS.VM, CS and SS decides how code runs. Derived: [`Cpu::update_mode`] recomputes it after every change of those.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mode {
    /// 0 to 3; 3 in virtual-8086 mode, 0 in real mode.
    pub cpl: u8,
    pub code: CodeSize,
    /// Size of the stack pointer.
    pub stack: CodeSize,
    /// CR0.PE and not RFLAGS.VM.
    pub protected: bool,
    /// EFER.LMA.
    pub long: bool,
    /// RFLAGS.VM.
    pub virtual_8086: bool,
}

/// One virtual processor's registers, look-up tables and surroundings.
#[repr(C)]
pub struct Cpu {
    /// RAX to R15 in x86's order, then [`ZERO`] and [`BLOCK_RIP`]; 32 long, so that an index of five bits needs no check.
    pub gpr: [u64; 32],
    /// In 16- and 32-bit code cut to that size. Valid between blocks.
    pub rip: u64,
    /// Instructions completed.
    pub instructions: u64,
    /// The block that is running.
    pub(crate) running: RunningBlock,
    /// PAUSEs so far: who waits long lets others have the host's processor.
    pub(crate) pauses: u32,
    /// SF ZF AF PF CF OF.
    pub arithmetic: ArithmeticFlags,
    /// All other flags of RFLAGS ([`flags::SYSTEM`]) at their places; DF among them.
    pub system_flags: u64,
    pub mode: Mode,
    pub segments: [SegmentState; 6],
    pub tlb: Tlb,
    /// The exception that a [`crate::fault::Fault`] stands for.
    pub fault: Exception,
    pub ldtr: SegmentState,
    pub tr: SegmentState,
    pub gdtr: TableState,
    pub idtr: TableState,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub xcr0: u64,
    /// Protection keys of user pages; only with CR4.PKE.
    pub pkru: u32,
    /// DR0 to DR3, DR6, DR7.
    pub debug: [u64; 6],
    /// Page-directory pointers of PAE paging, loaded with CR3.
    pub pae_pointers: [u64; 4],
    /// Interrupts stay out for one instruction after STI, MOV SS and POP SS.
    pub interrupt_shadow: bool,
    /// Guest-physical page of the local APIC's registers, or `u64::MAX` while they are not memory-mapped.
    pub apic_page: u64,
    /// NMIs stay out until the next IRET.
    pub nmi_blocked: bool,
    /// HLT: nothing runs until an interrupt, an NMI or INIT comes.
    pub halted: bool,
    /// DR6 bits of debug traps that the finished instruction earned; delivered before the next one (`system::debug`).
    pub pending_debug: u64,
    /// MOV SS and POP SS: debug traps too stay out for one instruction.
    pub stack_shadow: bool,
    /// The instruction went through the interrupt table or cleared TF itself: no single-step trap comes after it.
    pub step_consumed: bool,
    /// The instruction set RFLAGS.RF itself (IRET): it stays for the next one.
    pub resume_set: bool,
    /// `fault` was raised after its instruction had taken effect (a task switch): it is delivered before the next one, at `rip`.
    pub late_fault: bool,
    pub system_call: SystemCallRegisters,
    /// IA32_TSC_AUX.
    pub tsc_aux: u32,
    /// What the guest's time-stamp counter is ahead of the host's.
    pub tsc_offset: u64,
    /// The host's TSC at the machine's power-on.
    pub epoch_tsc: u64,
    pub model: Arc<CpuModel>,
    pub apic: LocalApic,
    pub msr: Msrs,
    pub paravirt: Paravirt,
    pub counters: Counters,
    pub stopwatch: Stopwatch,
    /// x87, MMX, SSE and AVX.
    pub vector: VectorState,
    pub services: EngineServices,
    pub debugger: Debugger,
    /// What translated code keeps here.
    pub(crate) frame: Frame,
}

/// The model-specific registers of the fast system calls and of SWAPGS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SystemCallRegisters {
    /// IA32_STAR
    pub star: u64,
    /// IA32_LSTAR
    pub lstar: u64,
    /// IA32_CSTAR
    pub cstar: u64,
    /// IA32_FMASK
    pub mask: u64,
    /// IA32_KERNEL_GS_BASE
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP
    pub sysenter_eip: u64,
}

impl Cpu {
    /// A processor of a model with its local APIC, in a machine that was switched on at `epoch_tsc`; after power-on (SDM vol. 3, table 10-1).
    pub fn with_platform(
        data_tables: DataTables,
        services: EngineServices,
        model: Arc<CpuModel>,
        apic: LocalApic,
        epoch_tsc: u64,
    ) -> Cpu {
        let data = SegmentState { selector: 0, base: 0, limit: 0xffff, attributes: 0x93 };
        let code = SegmentState { selector: 0xf000, base: 0xffff_0000, limit: 0xffff, attributes: 0x9b };
        let system = |kind: u16| SegmentState { selector: 0, base: 0, limit: 0xffff, attributes: 0x80 | kind };
        let table = TableState { base: 0, limit: 0xffff };
        let mode = Mode {
            cpl: 0,
            code: CodeSize::Bits16,
            stack: CodeSize::Bits16,
            protected: false,
            long: false,
            virtual_8086: false,
        };
        let mut cpu = Cpu {
            gpr: [0; 32],
            rip: 0xfff0,
            instructions: 0,
            running: RunningBlock::default(),
            pauses: 0,
            arithmetic: ArithmeticFlags::default(),
            system_flags: 0,
            mode,
            segments: [data, code, data, data, data, data],
            tlb: Tlb::new(data_tables),
            fault: Exception::default(),
            ldtr: system(2),
            tr: system(0xb),
            gdtr: table,
            idtr: table,
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            pkru: 0,
            debug: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
            pae_pointers: [0; 4],
            interrupt_shadow: false,
            apic_page: apic.page(),
            nmi_blocked: false,
            halted: false,
            pending_debug: 0,
            stack_shadow: false,
            step_consumed: false,
            resume_set: false,
            late_fault: false,
            system_call: SystemCallRegisters::default(),
            tsc_aux: 0,
            // The guest's TSC starts from zero, on all vCPUs alike.
            tsc_offset: epoch_tsc.wrapping_neg(),
            epoch_tsc,
            model,
            apic,
            msr: Msrs::default(),
            paravirt: Paravirt::default(),
            counters: Counters::default(),
            stopwatch: Stopwatch::default(),
            vector: VectorState::default(),
            services,
            debugger: Debugger::default(),
            frame: Frame::default(),
        };
        cpu.gpr[RDX] = 0x600;
        cpu.update_mode();
        cpu
    }

    /// CPUID: EAX, EBX, ECX, EDX.
    pub fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.counters.cpuid += 1;
        let context = CpuidContext {
            apic_id: self.apic.id(),
            vcpu_count: self.apic.router().inboxes().len() as u32,
            cr4_osxsave: self.cr4 & cr4::OSXSAVE != 0,
            cr4_pke: self.cr4 & cr4::PKE != 0,
            apic_enabled: self.apic.is_on(),
            xcr0: self.xcr0,
            tsc_khz: self.apic.timer.tsc_khz(),
        };
        self.model.cpuid(leaf, subleaf, &context)
    }

    /// RFLAGS as PUSHF would see it (VM and RF included).
    #[inline]
    pub fn rflags(&self) -> u64 {
        self.arithmetic.to_rflags() | self.system_flags | 2
    }

    /// Sets all of RFLAGS, without any check; recomputes the mode.
    pub fn set_rflags(&mut self, rflags: u64) {
        self.arithmetic = ArithmeticFlags::from_rflags(rflags);
        self.system_flags = rflags & flags::SYSTEM;
        self.update_mode();
    }

    /// Whether the code runs in 64-bit mode.
    #[inline(always)]
    pub fn is_64_bit(&self) -> bool {
        matches!(self.mode.code, CodeSize::Bits64)
    }

    /// The current privilege level.
    #[inline(always)]
    pub fn cpl(&self) -> u8 {
        self.mode.cpl
    }

    /// The I/O privilege level.
    pub fn iopl(&self) -> u8 {
        (self.system_flags >> 12 & 3) as u8
    }

    /// Recomputes [`Mode`] and the look-up table in use. Call after any change of CR0, CR4, XCR0, EFER, RFLAGS.VM, RFLAGS.AC, CS, SS or DR7.
    pub fn update_mode(&mut self) {
        let protected_enabled = self.cr0 & cr0::PE != 0;
        let virtual_8086 = protected_enabled && self.system_flags & flags::VM != 0;
        let long = self.efer & efer::LMA != 0;
        let code_attributes = self.segments[CS as usize].attributes;
        let stack_attributes = self.segments[SS as usize].attributes;
        let code = if long && code_attributes & 1 << 13 != 0 {
            CodeSize::Bits64
        } else if protected_enabled && !virtual_8086 && code_attributes & 1 << 14 != 0 {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        };
        let stack = if code == CodeSize::Bits64 {
            CodeSize::Bits64
        } else if protected_enabled && !virtual_8086 && stack_attributes & 1 << 14 != 0 {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        };
        let cpl = if virtual_8086 {
            3
        } else if protected_enabled {
            (stack_attributes >> 5 & 3) as u8
        } else {
            0
        };
        self.mode = Mode { cpl, code, stack, protected: protected_enabled && !virtual_8086, long, virtual_8086 };
        self.select_tables();
        self.vector.enabled = self.enabled_vector_classes();
    }

    /// A byte register by its offset in the bytes of `gpr`: 8 * register, or 8 * register + 1 for AH, CH, DH and BH.
    #[inline(always)]
    pub fn byte(&self, offset: u8) -> u8 {
        (self.gpr[usize::from(offset >> 3) & 31] >> (8 * u32::from(offset & 1))) as u8
    }

    /// Writes a byte register; the register's other bytes stay.
    #[inline(always)]
    pub fn set_byte(&mut self, offset: u8, value: u8) {
        let shift = 8 * u32::from(offset & 1);
        let register = &mut self.gpr[usize::from(offset >> 3) & 31];
        *register = *register & !(0xff << shift) | u64::from(value) << shift;
    }

    /// Writes the low 16 bits of a register; the others stay.
    #[inline(always)]
    pub fn set_word(&mut self, register: u8, value: u16) {
        let register = &mut self.gpr[usize::from(register) & 31];
        *register = *register & !0xffff | u64::from(value);
    }

    /// Writes a register's low 32 bits and clears the high ones.
    #[inline(always)]
    pub fn set_dword(&mut self, register: u8, value: u32) {
        self.gpr[usize::from(register) & 31] = u64::from(value);
    }
}

/// Whether an address is canonical: bits above the linear-address width repeat its top bit.
#[inline]
pub fn is_canonical(address: u64, linear_bits: u32) -> bool {
    let unused = 64 - linear_bits;
    ((address << unused) as i64 >> unused) as u64 == address
}
