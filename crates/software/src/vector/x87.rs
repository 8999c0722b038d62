//! x87 control instructions and environments (SDM vol. 1, 8.1.10; vol. 3, 22.18).

use std::arch::asm;

use super::area::SaveArea;
use super::{Pointers, VectorState, class};
use crate::cpu::{Cpu, RAX, cr0};
use crate::fault::Fault;
use crate::op::{Flow, Op};
use crate::ops::operand::flow;
use crate::page_walk::Access;

/// Exception summary and busy bits of the status word.
const SUMMARY: u16 = 0x8080;
/// The six exception bits of the status and control words.
const EXCEPTIONS: u16 = 0x3f;

impl VectorState {
    /// Whether an unmasked x87 exception waits for the next waiting instruction.
    pub fn x87_pending(&mut self) -> bool {
        let image = self.x87_image();
        let control = u16::from_le_bytes([image.0[0], image.0[1]]);
        let status = u16::from_le_bytes([image.0[2], image.0[3]]);
        status & !control & EXCEPTIONS != 0
    }

    /// Clears the exceptions that are pending, and tells them for [`VectorState::put_pending_back`].
    pub fn set_pending_aside(&mut self) -> u16 {
        let image = self.x87_image_mut();
        let status = u16::from_le_bytes([image.0[2], image.0[3]]);
        image.0[2..4].copy_from_slice(&(status & !(EXCEPTIONS | SUMMARY)).to_le_bytes());
        self.make_x87_live();
        status & EXCEPTIONS
    }

    /// Sets exceptions that were pending before.
    pub fn put_pending_back(&mut self, exceptions: u16) {
        self.x87_image_mut().0[2] |= exceptions as u8;
        self.normalise_image();
    }

    /// An MMX register.
    pub fn mmx(&mut self, register: u8) -> u64 {
        let image = self.x87_image();
        let top = image.0[3] >> 3 & 7;
        let at = 32 + 16 * usize::from(register.wrapping_sub(top) & 7);
        (0..8).fold(0, |value, index| value | u64::from(image.0[at + index]) << (8 * index))
    }

    /// What every MMX instruction but EMMS does to the x87 registers: the top of the stack is 0, all are in use.
    pub fn enter_mmx(&mut self) {
        let image = &mut self.x87_image_mut().0;
        let top = usize::from(image[3] >> 3 & 7);
        // ST(i) is register TOP + i; with TOP 0, register i.
        image[32..160].rotate_right(16 * top);
        image[3] &= !0x38;
        image[4] = 0xff;
    }

    /// Makes an image that came from elsewhere one that the CPU could have written.
    pub fn normalise_image(&mut self) {
        let image = &mut self.x87_image_mut().0;
        let control = u16::from_le_bytes([image[0], image[1]]) & 0x1f7f | 0x40;
        let status = u16::from_le_bytes([image[2], image[3]]) & !SUMMARY;
        let pending = status & !control & EXCEPTIONS != 0;
        let status = if pending { status | SUMMARY } else { status };
        image[0..2].copy_from_slice(&control.to_le_bytes());
        image[2..4].copy_from_slice(&status.to_le_bytes());
        image[5] = 0;
        for register in 0..8 {
            image[32 + 16 * register + 10..48 + 16 * register].fill(0);
        }
    }
}

impl Cpu {
    /// Raises what comes before an x87 instruction that does not wait for exceptions.
    pub(super) fn begin_x87(&mut self) -> Result<(), Fault> {
        if self.vector.enabled & class::X87 == 0 {
            return Err(self.raise_disabled(class::X87));
        }
        self.vector.make_x87_live();
        Ok(())
    }

    /// Raises what comes before an x87 instruction that waits.
    fn begin_waiting(&mut self) -> Result<(), Fault> {
        self.begin_x87()?;
        if self.cr0 & cr0::NE != 0 && self.vector.x87_pending() {
            return Err(self.raise_x87());
        }
        Ok(())
    }
}

/// WAIT
pub extern "sysv64" fn wait(cpu: &mut Cpu, _op: &Op) -> Flow {
    if cpu.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
        let _ = cpu.raise_nm();
        return Flow::Fault;
    }
    if cpu.cr0 & cr0::NE != 0 && cpu.vector.x87_pending() {
        let _ = cpu.raise_x87();
        return Flow::Fault;
    }
    Flow::Next
}

/// FNINIT
pub extern "sysv64" fn initialise(cpu: &mut Cpu, _op: &Op) -> Flow {
    let result = cpu.begin_x87();
    if result.is_ok() {
        // SAFETY: the host's x87 registers are the guest's here.
        unsafe { asm!("fninit", options(nostack, nomem)) };
        cpu.vector.pointers = Pointers::default();
    }
    flow(result)
}

/// FNSTSW AX
pub extern "sysv64" fn store_status_ax(cpu: &mut Cpu, _op: &Op) -> Flow {
    let result = cpu.begin_x87();
    if result.is_ok() {
        let status: u16;
        // SAFETY: reads a register.
        unsafe { asm!("fnstsw ax", out("ax") status, options(nostack, nomem)) };
        cpu.set_word(RAX as u8, status);
    }
    flow(result)
}

/// Environment formats: the operand size; the mode adds the other half of the choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Format {
    wide: bool,
    protected: bool,
}

impl Format {
    fn of(cpu: &Cpu, op: &Op) -> Format {
        Format { wide: op.extra != 0, protected: cpu.mode.protected }
    }

    fn environment_len(self) -> usize {
        if self.wide { 28 } else { 14 }
    }
}

/// Writes an environment: the words as FNSTENV gives them, the guest's own pointers.
fn compose(host: &[u8; 28], pointers: &Pointers, format: Format) -> [u8; 28] {
    let word = |at: usize| u16::from_le_bytes([host[at], host[at + 1]]);
    let (code, data) = if format.protected {
        (pointers.instruction, pointers.data)
    } else {
        let linear = |selector: u16, offset: u64| (u64::from(selector) << 4).wrapping_add(offset);
        (linear(pointers.code_selector, pointers.instruction), linear(pointers.data_selector, pointers.data))
    };
    let mut image = [0; 28];
    if format.wide {
        let (code_high, data_high) = if format.protected {
            let opcode = u32::from(pointers.opcode) << 16;
            (u32::from(pointers.code_selector) | opcode, 0xffff_0000 | u32::from(pointers.data_selector))
        } else {
            let high = |linear: u64| (linear as u32 >> 16) << 12;
            (high(code) | u32::from(pointers.opcode), high(data))
        };
        let cut = |value: u64| if format.protected { value as u32 } else { 0xffff_0000 | value as u32 & 0xffff };
        let words = [
            0xffff_0000 | u32::from(word(0)),
            0xffff_0000 | u32::from(word(4)),
            0xffff_0000 | u32::from(word(8)),
            cut(code),
            code_high,
            cut(data),
            data_high,
        ];
        for (target, value) in image.chunks_exact_mut(4).zip(words) {
            target.copy_from_slice(&value.to_le_bytes());
        }
    } else {
        let (code_high, data_high) = if format.protected {
            (pointers.code_selector, pointers.data_selector)
        } else {
            let high = |linear: u64| ((linear >> 16) as u16) << 12;
            (high(code) | pointers.opcode, high(data))
        };
        let words = [word(0), word(4), word(8), code as u16, code_high, data as u16, data_high];
        for (target, value) in image.chunks_exact_mut(2).zip(words) {
            target.copy_from_slice(&value.to_le_bytes());
        }
    }
    image
}

/// Reads an environment: the words for FLDENV, and the pointers.
fn parse(image: &[u8; 28], format: Format) -> ([u8; 28], Pointers) {
    let word = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
    let dword = |at: usize| u32::from(word(at)) | u32::from(word(at + 2)) << 16;
    let mut host = [0; 28];
    let step = if format.wide { 4 } else { 2 };
    for index in 0..3 {
        host[4 * index..4 * index + 2].copy_from_slice(&word(step * index).to_le_bytes());
    }
    let mut pointers = Pointers::default();
    match (format.wide, format.protected) {
        (true, true) => {
            pointers.instruction = u64::from(dword(12));
            pointers.code_selector = word(16);
            pointers.opcode = word(18) & 0x7ff;
            pointers.data = u64::from(dword(20));
            pointers.data_selector = word(24);
        }
        (true, false) => {
            pointers.instruction = u64::from(word(12)) | u64::from(dword(16) >> 12 & 0xffff) << 16;
            pointers.opcode = word(16) & 0x7ff;
            pointers.data = u64::from(word(20)) | u64::from(dword(24) >> 12 & 0xffff) << 16;
        }
        (false, true) => {
            pointers.instruction = u64::from(word(6));
            pointers.code_selector = word(8);
            pointers.data = u64::from(word(10));
            pointers.data_selector = word(12);
        }
        (false, false) => {
            pointers.instruction = u64::from(word(6)) | u64::from(word(8) >> 12) << 16;
            pointers.opcode = word(8) & 0x7ff;
            pointers.data = u64::from(word(10)) | u64::from(word(12) >> 12) << 16;
        }
    }
    (host, pointers)
}

/// FNSTENV (`extra`: 32-bit operand size)
pub extern "sysv64" fn store_environment(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(store_environment_or_fault(cpu, op))
}

fn store_environment_or_fault(cpu: &mut Cpu, op: &Op) -> Result<(), Fault> {
    cpu.begin_x87()?;
    let format = Format::of(cpu, op);
    let len = format.environment_len();
    let linear = cpu.linear(op, len as u64, Access::Write)?;
    let area = SaveArea::new(cpu, linear, len as u64, Access::Write, op.segment)?;
    let mut host = [0u8; 28];
    // SAFETY: the buffer takes the 28 bytes of 64-bit mode's FNSTENV, which also masks all exceptions, as the guest's does.
    unsafe { asm!("fnstenv [{}]", in(reg) host.as_mut_ptr(), options(nostack, preserves_flags)) };
    let image = compose(&host, &cpu.vector.pointers, format);
    area.put(cpu, 0, &image[..len])?;
    area.finish(cpu);
    Ok(())
}

/// FLDENV (`extra`: 32-bit operand size)
pub extern "sysv64" fn load_environment(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(load_environment_or_fault(cpu, op))
}

fn load_environment_or_fault(cpu: &mut Cpu, op: &Op) -> Result<(), Fault> {
    cpu.begin_waiting()?;
    let format = Format::of(cpu, op);
    let len = format.environment_len();
    let linear = cpu.linear(op, len as u64, Access::Read)?;
    let mut image = [0; 28];
    SaveArea::new(cpu, linear, len as u64, Access::Read, op.segment)?.get(cpu, 0, &mut image[..len])?;
    let (host, pointers) = parse(&image, format);
    // SAFETY: the buffer has the 28 bytes of 64-bit mode's FLDENV; the host's x87 registers are the guest's here. No exception is
    // pending, or its being ignored was checked: FNCLEX keeps the host from faulting.
    unsafe { asm!("fnclex", "fldenv [{}]", in(reg) host.as_ptr(), options(nostack, readonly)) };
    cpu.vector.pointers = pointers;
    Ok(())
}

/// FNSAVE (`extra`: 32-bit operand size)
pub extern "sysv64" fn save(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(save_or_fault(cpu, op))
}

fn save_or_fault(cpu: &mut Cpu, op: &Op) -> Result<(), Fault> {
    cpu.begin_x87()?;
    let format = Format::of(cpu, op);
    let environment_len = format.environment_len();
    let len = environment_len as u64 + 80;
    let linear = cpu.linear(op, len, Access::Write)?;
    let area = SaveArea::new(cpu, linear, len, Access::Write, op.segment)?;
    let mut host = [0u8; 108];
    // SAFETY: the buffer takes the 108 bytes of 64-bit mode's FNSAVE, which also initialises, as the guest's does.
    unsafe { asm!("fnsave [{}]", in(reg) host.as_mut_ptr(), options(nostack, preserves_flags)) };
    let mut environment = [0; 28];
    environment.copy_from_slice(&host[..28]);
    let environment = compose(&environment, &cpu.vector.pointers, format);
    cpu.vector.pointers = Pointers::default();
    area.put(cpu, 0, &environment[..environment_len])?;
    area.put(cpu, environment_len as u64, &host[28..])?;
    area.finish(cpu);
    Ok(())
}

/// FRSTOR (`extra`: 32-bit operand size)
pub extern "sysv64" fn restore(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(restore_or_fault(cpu, op))
}

fn restore_or_fault(cpu: &mut Cpu, op: &Op) -> Result<(), Fault> {
    cpu.begin_waiting()?;
    let format = Format::of(cpu, op);
    let environment_len = format.environment_len();
    let len = environment_len as u64 + 80;
    let linear = cpu.linear(op, len, Access::Read)?;
    let area = SaveArea::new(cpu, linear, len, Access::Read, op.segment)?;
    let mut image = [0; 28];
    area.get(cpu, 0, &mut image[..environment_len])?;
    let (environment, pointers) = parse(&image, format);
    let mut host = [0u8; 108];
    host[..28].copy_from_slice(&environment);
    area.get(cpu, environment_len as u64, &mut host[28..])?;
    // SAFETY: the buffer has the 108 bytes of 64-bit mode's FRSTOR; FNCLEX as in FLDENV.
    unsafe { asm!("fnclex", "frstor [{}]", in(reg) host.as_ptr(), options(nostack, readonly)) };
    cpu.vector.pointers = pointers;
    Ok(())
}
