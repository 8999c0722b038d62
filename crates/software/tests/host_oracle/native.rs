//! Runs one instruction on the host CPU itself, with all registers as given, and takes everything back, faults included.
//!
//! The pages that the bench has are mapped here at the same addresses, so that addresses need no translation. The instruction is followed by a
//! jump to code that saves all registers; a fault ends in a signal handler that saves them from the signal frame.

use std::arch::asm;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, Ordering};

use polder_software::testbench::{CODE, DATA, STACK};

pub const PAGE: u64 = 4096;
/// Pages of data on both sides.
pub const DATA_PAGES: u64 = 2;
/// Where the state is: reachable by 32-bit absolute addresses from anywhere.
pub const STATE: u64 = 0x5ab3_1000;
/// Where 32-bit code leaves by.
const TRAMPOLINE: u64 = STATE - 0x1_0000;
/// mincore does not know this page (Linux, arch/x86/entry/vsyscall).
pub const VSYSCALL: u64 = 0xffff_ffff_ff60_0000;
/// Linux's selectors.
const USER_CODE_64: u16 = 0x33;
const USER_CODE_32: u16 = 0x23;
const USER_DATA: u32 = 0x2b;
const STATE_BYTES: usize = 8 << 10;

/// All registers, before and after.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct State {
    /// As FXSAVE64 has them.
    pub fx: [u8; 512],
    pub ymm: [[u64; 4]; 16],
    pub gpr: [u64; 16],
    pub flags: u64,
    pub rip: u64,
    /// Where the instruction is, as a far pointer: offset, then selector.
    entry: [u32; 2],
    exit: u64,
    landing: u64,
    host_rsp: u64,
    pub fault: Fault,
}

/// What the host raised; vector 255 for nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Fault {
    pub vector: u64,
    pub error_code: u64,
    pub address: u64,
}

pub const NO_FAULT: u64 = 255;

static OLD: std::sync::OnceLock<Vec<(i32, libc::sigaction)>> = std::sync::OnceLock::new();
static RUNNING: AtomicBool = AtomicBool::new(false);

/// The host as a processor. One at a time.
pub struct Native {
    bits: u32,
}

fn map(address: u64, len: usize, protection: i32) {
    // SAFETY: the addresses are low and free in a position-independent program; the call fails rather than replace a mapping.
    let mapped = unsafe {
        libc::mmap(
            address as *mut libc::c_void,
            len,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    assert_eq!(mapped as u64, address, "cannot map {address:#x}: {}", std::io::Error::last_os_error());
}

/// The pages that both sides have.
pub fn pages() -> Vec<u64> {
    let mut pages = vec![CODE / PAGE, STACK / PAGE - 1, STACK / PAGE];
    pages.extend((0..DATA_PAGES).map(|page| DATA / PAGE + page));
    pages
}

/// Whether the host has this address mapped and the bench has not: the process' own memory, the state of this module included, and the
/// page where Linux emulates system calls of old. What an instruction does there says nothing, and may break the process.
pub fn only_the_host_has(address: u64) -> bool {
    let page = address / PAGE;
    if page == VSYSCALL / PAGE {
        return true;
    }
    // SAFETY: mincore only writes the one byte about the one page; it fails where nothing is mapped.
    let is_mapped = unsafe { libc::mincore((page * PAGE) as *mut libc::c_void, 1, &mut 0) } == 0;
    is_mapped && !pages().contains(&page)
}

fn map_pages() {
    let (read, write, execute) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
    for page in pages() {
        let execute = if page == CODE / PAGE { execute } else { 0 };
        map(page * PAGE, PAGE as usize, read | write | execute);
    }
    map(STATE, STATE_BYTES, read | write);
    map(TRAMPOLINE, PAGE as usize, read | write | execute);
}

fn take_signals() {
    let mut old = Vec::new();
    for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP] {
        // SAFETY: an all-zero sigaction is a valid value; the handler is async-signal-safe.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            let mut before: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = handle;
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            assert_eq!(libc::sigaction(signal, &action, &mut before), 0);
            old.push((signal, before));
        }
    }
    assert!(OLD.set(old).is_ok());
}

impl Native {
    /// Maps the pages and takes the signals, once a process; the engine's own handlers, installed before, get what is theirs. The rest is the
    /// thread's: its signal stack and segments.
    pub fn new(bits: u32) -> Native {
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| {
            map_pages();
            take_signals();
        });
        let stack = vec![0u8; 256 << 10].leak();
        let alternate = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: stack.len() };
        // SAFETY: the stack lives for ever. x86-64 Linux programs leave GS to themselves; 64-bit code does not use DS and ES, 32-bit
        // code needs them flat.
        unsafe {
            assert_eq!(libc::sigaltstack(&alternate, std::ptr::null_mut()), 0);
            asm!("wrgsbase {}", in(reg) GS_BASE);
            asm!("mov ds, {0:e}", "mov es, {0:e}", in(reg) USER_DATA);
        }
        let mut native = Native { bits };
        for page in pages() {
            // Breakpoints wherever a branch may lead.
            let byte = if page == CODE / PAGE { 0xcc } else { 0 };
            native.memory(page * PAGE, PAGE as usize).fill(byte);
        }
        let jump = Native { bits: 64 }.exit_jump();
        native.memory(TRAMPOLINE, jump.len()).copy_from_slice(&jump);
        native
    }

    /// The bytes at a mapped address.
    pub fn memory(&mut self, address: u64, len: usize) -> &mut [u8] {
        // SAFETY: callers name mapped pages; nothing else refers to them while the slice lives.
        unsafe { std::slice::from_raw_parts_mut(address as *mut u8, len) }
    }

    /// What follows the instruction: `jmp [exit]`, in 32-bit code by way of a far jump to it.
    pub fn exit_jump(&self) -> [u8; 7] {
        if self.bits == 64 {
            let exit = (STATE as u32 + offset_of!(State, exit) as u32).to_le_bytes();
            [0xff, 0x24, 0x25, exit[0], exit[1], exit[2], exit[3]]
        } else {
            let way = (TRAMPOLINE as u32).to_le_bytes();
            [0xea, way[0], way[1], way[2], way[3], USER_CODE_64 as u8, 0]
        }
    }

    /// Runs the instruction at `at`, of `len` bytes of `code`, with these registers. [`Native::exit_jump`] follows it in `code`.
    pub fn run(&mut self, state: &mut State, at: u64, code: &[u8], len: usize) {
        self.memory(at, code.len()).copy_from_slice(code);
        state.rip = at;
        let selector = if self.bits == 64 { USER_CODE_64 } else { USER_CODE_32 };
        state.entry = [at as u32, u32::from(selector)];
        state.fault = Fault { vector: NO_FAULT, error_code: 0, address: 0 };
        // SAFETY: the state's page is mapped and nobody else uses it.
        let there = unsafe { &mut *(STATE as *mut State) };
        there.clone_from(state);
        RUNNING.store(true, Ordering::SeqCst);
        // SAFETY: the code saves what the ABI preserves, runs one instruction with the state's registers, and comes back by way of
        // `exit` or, after a signal, of `landing`. The instruction was chosen so that it touches the mapped pages only.
        unsafe { enter() };
        RUNNING.store(false, Ordering::SeqCst);
        state.clone_from(there);
        if state.fault.vector == NO_FAULT {
            state.rip = at + len as u64;
        }
    }
}

pub const GS_BASE: u64 = DATA + 0x180;

unsafe fn enter() {
    // SAFETY: see the caller.
    unsafe {
        asm!(
            "push rbx", "push rbp",
            "mov [{state} + {host_rsp}], rsp",
            "lea rax, [rip + 2f]", "mov [{state} + {exit}], rax",
            "lea rax, [rip + 3f]", "mov [{state} + {landing}], rax",
            "fxrstor64 [{state}]",
            "vmovups ymm0, [{state} + 512 + 32 * 0]", "vmovups ymm1, [{state} + 512 + 32 * 1]",
            "vmovups ymm2, [{state} + 512 + 32 * 2]", "vmovups ymm3, [{state} + 512 + 32 * 3]",
            "vmovups ymm4, [{state} + 512 + 32 * 4]", "vmovups ymm5, [{state} + 512 + 32 * 5]",
            "vmovups ymm6, [{state} + 512 + 32 * 6]", "vmovups ymm7, [{state} + 512 + 32 * 7]",
            "vmovups ymm8, [{state} + 512 + 32 * 8]", "vmovups ymm9, [{state} + 512 + 32 * 9]",
            "vmovups ymm10, [{state} + 512 + 32 * 10]", "vmovups ymm11, [{state} + 512 + 32 * 11]",
            "vmovups ymm12, [{state} + 512 + 32 * 12]", "vmovups ymm13, [{state} + 512 + 32 * 13]",
            "vmovups ymm14, [{state} + 512 + 32 * 14]", "vmovups ymm15, [{state} + 512 + 32 * 15]",
            "mov rsp, {stack}",
            "push qword ptr [{state} + {flags}]", "popfq",
            "mov rax, [{state} + 1024 + 8 * 0]", "mov rcx, [{state} + 1024 + 8 * 1]",
            "mov rdx, [{state} + 1024 + 8 * 2]", "mov rbx, [{state} + 1024 + 8 * 3]",
            "mov rsp, [{state} + 1024 + 8 * 4]", "mov rbp, [{state} + 1024 + 8 * 5]",
            "mov rsi, [{state} + 1024 + 8 * 6]", "mov rdi, [{state} + 1024 + 8 * 7]",
            "mov r8, [{state} + 1024 + 8 * 8]", "mov r9, [{state} + 1024 + 8 * 9]",
            "mov r10, [{state} + 1024 + 8 * 10]", "mov r11, [{state} + 1024 + 8 * 11]",
            "mov r12, [{state} + 1024 + 8 * 12]", "mov r13, [{state} + 1024 + 8 * 13]",
            "mov r14, [{state} + 1024 + 8 * 14]", "mov r15, [{state} + 1024 + 8 * 15]",
            "jmp fword ptr [{state} + {entry}]",
            "2:",
            "mov [{state} + 1024 + 8 * 4], rsp",
            "mov rsp, {stack}",
            "pushfq", "pop qword ptr [{state} + {flags}]",
            "mov [{state} + 1024 + 8 * 0], rax", "mov [{state} + 1024 + 8 * 1], rcx",
            "mov [{state} + 1024 + 8 * 2], rdx", "mov [{state} + 1024 + 8 * 3], rbx",
            "mov [{state} + 1024 + 8 * 5], rbp",
            "mov [{state} + 1024 + 8 * 6], rsi", "mov [{state} + 1024 + 8 * 7], rdi",
            "mov [{state} + 1024 + 8 * 8], r8", "mov [{state} + 1024 + 8 * 9], r9",
            "mov [{state} + 1024 + 8 * 10], r10", "mov [{state} + 1024 + 8 * 11], r11",
            "mov [{state} + 1024 + 8 * 12], r12", "mov [{state} + 1024 + 8 * 13], r13",
            "mov [{state} + 1024 + 8 * 14], r14", "mov [{state} + 1024 + 8 * 15], r15",
            "vmovups [{state} + 512 + 32 * 0], ymm0", "vmovups [{state} + 512 + 32 * 1], ymm1",
            "vmovups [{state} + 512 + 32 * 2], ymm2", "vmovups [{state} + 512 + 32 * 3], ymm3",
            "vmovups [{state} + 512 + 32 * 4], ymm4", "vmovups [{state} + 512 + 32 * 5], ymm5",
            "vmovups [{state} + 512 + 32 * 6], ymm6", "vmovups [{state} + 512 + 32 * 7], ymm7",
            "vmovups [{state} + 512 + 32 * 8], ymm8", "vmovups [{state} + 512 + 32 * 9], ymm9",
            "vmovups [{state} + 512 + 32 * 10], ymm10", "vmovups [{state} + 512 + 32 * 11], ymm11",
            "vmovups [{state} + 512 + 32 * 12], ymm12", "vmovups [{state} + 512 + 32 * 13], ymm13",
            "vmovups [{state} + 512 + 32 * 14], ymm14", "vmovups [{state} + 512 + 32 * 15], ymm15",
            "fxsave64 [{state}]",
            "3:",
            "mov rsp, [{state} + {host_rsp}]",
            "push 0x202", "popfq",
            "fninit",
            "push 0x1f80", "ldmxcsr [rsp]", "pop rax",
            "vzeroupper",
            "pop rbp", "pop rbx",
            state = const STATE as i32,
            stack = const STATE as i32 + STATE_BYTES as i32 - 64,
            flags = const offset_of!(State, flags),
            entry = const offset_of!(State, entry),
            exit = const offset_of!(State, exit),
            landing = const offset_of!(State, landing),
            host_rsp = const offset_of!(State, host_rsp),
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            clobber_abi("sysv64"),
        );
    }
}

const _: () = assert!(offset_of!(State, ymm) == 512 && offset_of!(State, gpr) == 1024);

/// Registers of a signal frame in x86's order.
const ORDER: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid frame.
    let context_ref = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let registers = &mut context_ref.uc_mcontext.gregs;
    let rip = registers[libc::REG_RIP as usize] as u64;
    let host_code = handle as *const () as u64;
    // The program's own code and the engine's stubs are far above; what ran natively is low, or wherever a wild branch led.
    if !RUNNING.load(Ordering::SeqCst) || rip.abs_diff(host_code) < 1 << 30 {
        forward(signal, info, context);
        return;
    }
    // SAFETY: the state is mapped; the instruction that was running no longer uses it.
    let state = unsafe { &mut *(STATE as *mut State) };
    for (target, register) in state.gpr.iter_mut().zip(ORDER) {
        *target = registers[register as usize] as u64;
    }
    state.flags = registers[libc::REG_EFL as usize] as u64;
    state.rip = rip;
    state.fault = Fault {
        vector: registers[libc::REG_TRAPNO as usize] as u64,
        error_code: registers[libc::REG_ERR as usize] as u64,
        address: registers[libc::REG_CR2 as usize] as u64,
    };
    // SAFETY: the frame holds an XSAVE area in standard format.
    unsafe { take_vectors(state, context_ref.uc_mcontext.fpregs.cast()) };
    registers[libc::REG_RIP as usize] = state.landing as i64;
    registers[libc::REG_EFL as usize] = 0x202;
    let selectors = &mut registers[libc::REG_CSGSFS as usize];
    *selectors = *selectors & !0xffff | i64::from(USER_CODE_64);
}

/// # Safety
/// `area` is the kernel's save area.
unsafe fn take_vectors(state: &mut State, area: *const u8) {
    // SAFETY: the legacy area and header are always there; the AVX part is when the header says so.
    unsafe {
        std::ptr::copy_nonoverlapping(area, state.fx.as_mut_ptr(), 512);
        let extended = area.add(464).cast::<u32>().read_unaligned() == 0x4650_5853;
        let present = if extended { area.add(512).cast::<u64>().read_unaligned() } else { 3 };
        if present & 1 == 0 {
            state.fx[..24].fill(0);
            state.fx[..2].copy_from_slice(&[0x7f, 3]);
            state.fx[32..160].fill(0);
        }
        for (register, target) in state.ymm.iter_mut().enumerate() {
            for word in 0..2 {
                let low = area.add(160 + 16 * register + 8 * word).cast::<u64>().read_unaligned();
                target[word] = if present & 2 == 0 { 0 } else { low };
                target[2 + word] = if present & 4 == 0 {
                    0
                } else {
                    area.add(576 + 16 * register + 8 * word).cast::<u64>().read_unaligned()
                };
            }
        }
    }
}

fn forward(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let old = OLD.get().and_then(|old| old.iter().find(|entry| entry.0 == signal));
    match old {
        Some((_, action)) if action.sa_sigaction != libc::SIG_DFL && action.sa_sigaction != libc::SIG_IGN => {
            // SAFETY: it was installed with SA_SIGINFO.
            let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(action.sa_sigaction) };
            handler(signal, info, context);
        }
        // SAFETY: restores the default; the instruction faults again.
        _ => unsafe {
            libc::signal(signal, libc::SIG_DFL);
        },
    }
}
