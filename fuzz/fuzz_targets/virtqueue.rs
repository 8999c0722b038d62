//! Descriptors, rings and indirect tables: all of a small guest memory is the input.
//!
//! Holds: no panic, and a chain names only RAM, whatever the rings hold.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polder_devices::virtio::{FEATURE_EVENT_INDEX, FEATURE_INDIRECT, Queue, QueuePlace};
use polder_memory::{GuestAddress, GuestMemory};

const RAM_LEN: u64 = 0x4000;
const SIZE: u16 = 16;

fuzz_target!(|input: &[u8]| {
    let Some((&features, bytes)) = input.split_first() else { return };
    let memory = GuestMemory::new(&[(GuestAddress(0), RAM_LEN)]).expect("the host has memory");
    let len = bytes.len().min(RAM_LEN as usize);
    memory.write(GuestAddress(0), &bytes[..len]).expect("the input was cut to fit");
    let features = match features & 3 {
        0 => 0,
        1 => FEATURE_INDIRECT,
        2 => FEATURE_EVENT_INDEX,
        _ => FEATURE_INDIRECT | FEATURE_EVENT_INDEX,
    };
    // Descriptors at 0, then both rings; indirect tables lie where the descriptors say.
    let place = QueuePlace {
        size: SIZE,
        descriptors: GuestAddress(0),
        available: GuestAddress(0x100),
        used: GuestAddress(0x140),
    };
    let mut queue = Queue::new(memory.clone(), 0, place, SIZE, features).expect("the place is sound");
    // What the device writes may make more chains available: a bound on the rounds, not on what one chain does.
    for _ in 0..64 {
        let Ok(Some(chain)) = queue.pop() else { break };
        for (address, len) in chain.readable.guest_ranges().chain(chain.writable.guest_ranges()) {
            assert!(memory.host_range(address, len).is_ok());
        }
        let mut copy = [0; 256];
        let len = copy.len().min(chain.readable.len() as usize);
        chain.readable.read(0, &mut copy[..len]).expect("the length is the chain's");
        let len = len.min(chain.writable.len() as usize);
        chain.writable.write(0, &copy[..len]).expect("the length is the chain's");
        assert!(chain.writable.write(chain.writable.len(), &[0]).is_err());
        queue.add_used(chain.head, len as u32);
        queue.interrupt_wanted();
        if queue.enable_notifications().is_err() {
            break;
        }
    }
});
