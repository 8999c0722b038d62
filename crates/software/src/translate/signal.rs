//! Exceptions that the host raises in translated code: division, misaligned vectors, unmasked numeric exceptions.
//!
//! The instruction has done nothing yet and the guest's registers are at home. The handler lets the thread go on at the
//! landing of its code cache, with the place of the instruction in RCX, which is scratch.

use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::sync::Once;

thread_local! {
    /// Where this thread's translated code lies, and its landing.
    static CODE: Cell<(u64, u64, u64)> = const { Cell::new((0, 0, 0)) };
}

/// Tells the handler of this thread's translated code.
pub fn set_code(range: Range<u64>, landing: u64) {
    CODE.set((range.start, range.end, landing));
}

/// If the thread was in translated code: makes it go on at the landing.
pub fn redirect(registers: &mut [libc::greg_t; 23]) -> bool {
    let (start, end, landing) = CODE.get();
    let rip = registers[libc::REG_RIP as usize] as u64;
    if !(start..end).contains(&rip) {
        return false;
    }
    registers[libc::REG_RCX as usize] = rip as i64;
    registers[libc::REG_RIP as usize] = landing as i64;
    true
}

static mut OLD_ACTIONS: [Option<libc::sigaction>; 2] = [None, None];

/// Installs the handler for misaligned operands; SIGFPE and SIGILL are taken by [`crate::vector`].
pub fn install() -> io::Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = handle;
        for (slot, signal) in [libc::SIGSEGV, libc::SIGBUS].into_iter().enumerate() {
            // SAFETY: an all-zero sigaction is a valid value; the handler is async-signal-safe: it touches a thread-local without a destructor and its
            // own frame. The old action is written before the handler can run, and once.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                let mut old: libc::sigaction = std::mem::zeroed();
                if libc::sigaction(signal, std::ptr::null(), &mut old) == 0 {
                    OLD_ACTIONS[slot] = Some(old);
                }
                action.sa_sigaction = handler as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                if libc::sigaction(signal, &action, std::ptr::null_mut()) != 0 {
                    result = Err(io::Error::last_os_error());
                }
            }
        }
    });
    result
}

extern "C" fn handle(signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid ucontext to an SA_SIGINFO handler.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    if redirect(registers) {
        return;
    }
    // Not ours: put back what was there; the instruction faults again.
    let slot = usize::from(signal == libc::SIGBUS);
    // SAFETY: written once, before this handler was installed.
    unsafe {
        match OLD_ACTIONS[slot] {
            Some(old) => libc::sigaction(signal, &old, std::ptr::null_mut()),
            None => libc::signal(signal, libc::SIG_DFL) as libc::c_int,
        };
    }
}
