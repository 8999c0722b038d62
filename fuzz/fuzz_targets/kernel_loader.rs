//! Kernel files of every kind: bzImage, ELF, multiboot, packed payloads.
//!
//! Holds: no panic, and nothing outside guest memory grows beyond what a payload may unpack to. A file that is accepted gives a
//! state whose descriptor table lies in guest memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polder_machine::boot::{Boot, Initrd, load};
use polder_machine::layout;
use polder_memory::{GuestAddress, GuestMemory};

const RAM_BYTES: u64 = 32 << 20;

fuzz_target!(|input: &[u8]| {
    let Some((&choices, kernel)) = input.split_first() else { return };
    let memory = GuestMemory::new(&layout::ram_regions(RAM_BYTES)).expect("the host has memory");
    // The header's magic numbers are given away, so that the fuzzer need not find them.
    let mut kernel = kernel.to_vec();
    match choices & 3 {
        0 if kernel.len() >= 0x250 => {
            kernel[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
            kernel[0x202..0x206].copy_from_slice(b"HdrS");
        }
        1 if kernel.len() >= 20 => {
            kernel[..6].copy_from_slice(b"\x7fELF\x02\x01");
            kernel[18..20].copy_from_slice(&62u16.to_le_bytes());
        }
        2 if kernel.len() >= 12 => {
            let flags = u32::from_le_bytes([kernel[4], kernel[5], kernel[6], kernel[7]]);
            let sum = 0x1bad_b002u32.wrapping_add(flags);
            kernel[..4].copy_from_slice(&0x1bad_b002u32.to_le_bytes());
            kernel[8..12].copy_from_slice(&0u32.wrapping_sub(sum).to_le_bytes());
        }
        _ => {}
    }
    let mut reader = &input[..];
    let initrd = (choices & 4 != 0).then_some(Initrd { len: input.len() as u64, reader: &mut reader });
    let boot = Boot {
        kernel: &kernel,
        kernel_name: "kernel",
        initrd,
        command_line: "console=ttyS0",
        rsdp: layout::RSDP_START,
    };
    if let Ok(state) = load(&memory, boot) {
        assert!(memory.host_range(GuestAddress(state.gdtr.base), u64::from(state.gdtr.limit)).is_ok());
    }
});
