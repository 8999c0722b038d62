//! Numeric exceptions inside stubs.
//!
//! A guest may unmask x87 and SIMD exceptions. Its instruction then faults on the host too, exactly when and how it should; the kernel
//! turns the fault into SIGFPE. The handler here redirects a thread that was inside the code area to one of two landings, which
//! return from the stub with a code. SIGILL is taken the same way: should the host refuse an instruction that the CPU model has, the
//! guest gets #UD. Either signal anywhere else is a bug and gets the default action.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

/// The code area and its landings; written before the handler is installed.
static AREA_START: AtomicU64 = AtomicU64::new(0);
static AREA_END: AtomicU64 = AtomicU64::new(0);
static X87_LANDING: AtomicU64 = AtomicU64::new(0);
static SIMD_LANDING: AtomicU64 = AtomicU64::new(0);
static UNDEFINED_LANDING: AtomicU64 = AtomicU64::new(0);

const TRAP_X87: i64 = 16;

/// Where a stub goes on whose instruction faulted; addresses inside the area.
#[derive(Debug, Clone, Copy)]
pub struct Landings {
    pub x87: u64,
    pub simd: u64,
    pub undefined: u64,
}

/// Installs the handler.
pub fn install(area: std::ops::Range<u64>, landings: Landings) -> io::Result<()> {
    AREA_START.store(area.start, Ordering::Relaxed);
    AREA_END.store(area.end, Ordering::Relaxed);
    X87_LANDING.store(landings.x87, Ordering::Relaxed);
    SIMD_LANDING.store(landings.simd, Ordering::Relaxed);
    UNDEFINED_LANDING.store(landings.undefined, Ordering::Release);
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = handle;
    for signal in [libc::SIGFPE, libc::SIGILL] {
        // SAFETY: an all-zero sigaction is a valid value; the handler is async-signal-safe: it touches atomics and its own frame.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(signal, &action, std::ptr::null_mut())
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

extern "C" fn handle(signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid ucontext to an SA_SIGINFO handler.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = registers[libc::REG_RIP as usize] as u64;
    if crate::translate::redirect(registers) {
        return;
    }
    if (AREA_START.load(Ordering::Relaxed)..AREA_END.load(Ordering::Relaxed)).contains(&rip) {
        let landing = if signal == libc::SIGILL {
            &UNDEFINED_LANDING
        } else if registers[libc::REG_TRAPNO as usize] == TRAP_X87 {
            &X87_LANDING
        } else {
            &SIMD_LANDING
        };
        registers[libc::REG_RIP as usize] = landing.load(Ordering::Relaxed) as i64;
    } else {
        // SAFETY: restores the default action; the instruction faults again and the process ends with a core.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}
