//! How fast the software engine runs on this host: a bare machine without devices runs a loop of kernel-mode code.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use polder_basics::{MIB, SystemClock};
use polder_machine::{AccessSize, Bus, BusDevice, EngineServices, IoApic, Vcpu, VcpuExit, VcpuHandle, boot, layout};
use polder_memory::{GuestAddress, GuestMemory};

use crate::{EngineChoice, MachineConfig, VmmError, engine};

/// 32-bit code at [`CalibrationGuest::CODE_START`]: `ecx` counts down, `ebx` points to data, and in the end a port is written.
const CODE: [u8; 13] = [
    0x01,
    0xc8, // again: add eax, ecx
    0x31,
    0x03, // xor [ebx], eax
    0x83,
    0xe9,
    0x01, // sub ecx, 1
    0x75,
    0xf7, // jnz again
    0xe6,
    CalibrationGuest::DONE_PORT as u8, // out DONE_PORT, al
    0xeb,
    0xf3, // jmp again
];

/// The guest that every engine is timed with.
pub struct CalibrationGuest {
    _private: (),
}

impl CalibrationGuest {
    pub const CODE: &'static [u8] = &CODE;
    pub const CODE_START: u64 = 0x10_0000;
    pub const DATA_START: u64 = 0x11_0000;
    /// The port that it writes when the loop is done.
    pub const DONE_PORT: u16 = 0x10;
    /// Memory that it needs.
    pub const MEMORY_LEN: u64 = 2 * MIB;
    /// Instructions in one turn of the loop.
    pub const INSTRUCTIONS_PER_TURN: u64 = 4;
}

/// Stops the vCPU when the guest is done.
#[derive(Default)]
struct Done {
    vcpu: Mutex<Option<Arc<dyn VcpuHandle>>>,
    seen: AtomicBool,
}

impl BusDevice for Done {
    fn read(&self, _offset: u64, size: AccessSize) -> u64 {
        size.all_ones()
    }

    fn write(&self, _offset: u64, _size: AccessSize, _value: u64) {
        self.seen.store(true, Ordering::SeqCst);
        if let Some(vcpu) = &*self.vcpu.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            vcpu.stop();
        }
    }
}

/// A machine with the calibration guest, on the software engine.
pub struct SoftwareCalibration {
    vcpu: Box<dyn Vcpu>,
    done: Arc<Done>,
}

impl SoftwareCalibration {
    /// Makes the machine.
    pub fn new() -> Result<Self, VmmError> {
        let memory = GuestMemory::new(&[(GuestAddress(0), CalibrationGuest::MEMORY_LEN)])?;
        let ports = Arc::new(Bus::new());
        let done = Arc::new(Done::default());
        ports.insert(CalibrationGuest::DONE_PORT.into(), 1, done.clone())?;
        let services = EngineServices {
            memory: memory.clone(),
            ports,
            mmio: Arc::new(Bus::new()),
            eoi: IoApic::new(),
            clock: Arc::new(SystemClock),
        };
        let config = MachineConfig { engine: EngineChoice::Software, ..MachineConfig::new("calibration".into()) };
        let engine = engine::make(&config, services, 1)?;
        *done.vcpu.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = engine.handles().into_iter().next();
        let mut vcpu = engine.take_vcpus().into_iter().next().ok_or(VmmError::VcpuDied { index: 0 })?;
        let state = boot::load(
            &memory,
            boot::Boot {
                kernel: &flat_image(),
                kernel_name: "calibration",
                initrd: None,
                command_line: "",
                rsdp: layout::RSDP_START,
            },
        )
        .map_err(|source| VmmError::Boot { path: "calibration".into(), source })?;
        vcpu.set_state(&state);
        Ok(SoftwareCalibration { vcpu, done })
    }

    /// Runs the guest's loop so many times, at least once.
    pub fn run(&mut self, turns: u32) -> Result<(), VmmError> {
        let mut state = self.vcpu.state();
        state.rip = CalibrationGuest::CODE_START;
        state.gpr[1] = turns.max(1).into();
        state.gpr[3] = CalibrationGuest::DATA_START;
        self.vcpu.set_state(&state);
        self.done.seen.store(false, Ordering::SeqCst);
        while !self.done.seen.load(Ordering::SeqCst) {
            if self.vcpu.run() != VcpuExit::Stopped {
                return Err(VmmError::VcpuDied { index: 0 });
            }
        }
        Ok(())
    }
}

/// The guest as a multiboot file whose header follows its code.
fn flat_image() -> Vec<u8> {
    let mut image = CODE.to_vec();
    image.resize(CODE.len().next_multiple_of(4), 0x90);
    let start = CalibrationGuest::CODE_START as u32;
    let (magic, flags, header) = (0x1bad_b002u32, 1u32 << 16, start + image.len() as u32);
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    for word in [magic, flags, checksum, header, start, 0, 0, start] {
        image.extend(word.to_le_bytes());
    }
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_software_engine_runs_the_calibration_guest_again_and_again() {
        let mut calibration = SoftwareCalibration::new().unwrap();
        for turns in [1, 1000, 1] {
            calibration.run(turns).unwrap();
        }
    }
}
