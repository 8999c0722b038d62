//! What /dev/kvm is worth: whether it is there, opens, makes a machine, and how fast kernel-mode code runs in it.

use std::path::Path;

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use polder_vmm::CalibrationGuest;

use super::{Probe, calibration};

const MEMORY_LEN: u64 = CalibrationGuest::MEMORY_LEN;

const DEVICE: &str = "/dev/kvm";
/// The only version of the interface that there ever was.
const API_VERSION: i32 = 12;

/// Probes and measures.
pub fn probe() -> Probe {
    if !Path::new(DEVICE).exists() {
        return Probe::Absent;
    }
    match measure() {
        Ok(instructions_per_second) => Probe::Works { instructions_per_second },
        Err(why) => Probe::Unusable { why },
    }
}

/// The guest's memory.
struct Memory {
    start: *mut std::ffi::c_void,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `measure` with this length; the machine that used it is gone, for it is dropped before.
        let _ = unsafe { munmap(self.start, MEMORY_LEN as usize) };
    }
}

fn measure() -> Result<f64, String> {
    let failed = |what: &'static str| move |error: kvm_ioctls::Error| format!("{what}: {error}");
    let kvm = Kvm::new().map_err(failed("it cannot be opened"))?;
    if kvm.get_api_version() != API_VERSION {
        return Err(format!("it speaks version {} of the interface, not {API_VERSION}", kvm.get_api_version()));
    }
    // SAFETY: a fresh mapping chosen by the kernel.
    let start = unsafe {
        mmap_anonymous(
            std::ptr::null_mut(),
            MEMORY_LEN as usize,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }
    .map_err(|error| format!("no memory for the calibration guest: {error}"))?;
    let memory = Memory { start };
    // SAFETY: the code's place lies inside the mapping, which nobody else uses yet.
    unsafe {
        let target = memory.start.cast::<u8>().add(CalibrationGuest::CODE_START as usize);
        std::ptr::copy_nonoverlapping(CalibrationGuest::CODE.as_ptr(), target, CalibrationGuest::CODE.len());
    }
    let vm = kvm.create_vm().map_err(failed("it makes no machine"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY_LEN,
        userspace_addr: memory.start as u64,
    };
    // SAFETY: the mapping outlives the machine: it is dropped after it.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("it takes no memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("it makes no vCPU"))?;
    set_protected_mode(&mut vcpu).map_err(failed("it takes no registers"))?;
    let result = calibration::measure(|turns| {
        let mut registers = vcpu.get_regs().map_err(failed("it gives no registers"))?;
        registers.rip = CalibrationGuest::CODE_START;
        registers.rflags = 2;
        registers.rbx = CalibrationGuest::DATA_START;
        registers.rcx = turns.into();
        vcpu.set_regs(&registers).map_err(failed("it takes no registers"))?;
        match vcpu.run().map_err(failed("the guest does not run"))? {
            VcpuExit::IoOut(CalibrationGuest::DONE_PORT, _) => Ok(()),
            exit => Err(format!("the calibration guest ended with {exit:?}")),
        }
    });
    drop(vcpu);
    drop(vm);
    result
}

/// Flat 32-bit segments at privilege level 0.
fn set_protected_mode(vcpu: &mut kvm_ioctls::VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut special = vcpu.get_sregs()?;
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x18,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    special.cs = kvm_segment { selector: 0x10, type_: 11, ..data };
    special.ds = data;
    special.es = data;
    special.ss = data;
    special.cr0 |= 1;
    vcpu.set_sregs(&special)
}
