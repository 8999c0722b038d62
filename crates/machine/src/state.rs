//! A vCPU's architectural state, as the manuals have it and as no engine stores it.

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SegmentState {
    pub selector: u16,
    pub base: u64,
    /// Limit in bytes, granularity already applied.
    pub limit: u32,
    /// Access rights as in the descriptor's second double word, shifted right by 8: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13,
    /// D/B 14, G 15 (the VMX layout without its unusable bit; a null segment has P clear).
    pub attributes: u16,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TableState {
    pub base: u64,
    pub limit: u16,
}

/// Whether a vCPU runs, waits for an interrupt, or waits for its start-up messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RunState {
    #[default]
    Runnable,
    Halted,
    /// After INIT: waits for SIPI.
    WaitForSipi,
}

/// The registers that a boot protocol sets and a debugger shows. Order of `gpr`: rax rcx rdx rbx rsp rbp rsi rdi r8-r15; order of
/// `segments`: es cs ss ds fs gs (both as x86 encodes them).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VcpuState {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub segments: [SegmentState; 6],
    pub ldtr: SegmentState,
    pub tr: SegmentState,
    pub gdtr: TableState,
    pub idtr: TableState,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub xcr0: u64,
    /// DR0-DR3, DR6, DR7.
    pub debug: [u64; 6],
    pub run_state: RunState,
}

impl VcpuState {
    /// The state after power-on (SDM vol. 3, table 10-1): real mode at f000:fff0. Only the bootstrap processor is runnable.
    pub fn power_on(bootstrap: bool) -> Self {
        let data = SegmentState { selector: 0, base: 0, limit: 0xffff, attributes: 0x93 };
        let code = SegmentState { selector: 0xf000, base: 0xffff_0000, limit: 0xffff, attributes: 0x9b };
        let system = |kind: u16| SegmentState { selector: 0, base: 0, limit: 0xffff, attributes: 0x80 | kind };
        let mut gpr = [0; 16];
        gpr[2] = 0x600;
        VcpuState {
            gpr,
            rip: 0xfff0,
            rflags: 2,
            segments: [data, code, data, data, data, data],
            ldtr: system(2),
            tr: system(0xb),
            gdtr: TableState { base: 0, limit: 0xffff },
            idtr: TableState { base: 0, limit: 0xffff },
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            efer: 0,
            xcr0: 1,
            debug: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
            run_state: if bootstrap { RunState::Runnable } else { RunState::WaitForSipi },
        }
    }
}
