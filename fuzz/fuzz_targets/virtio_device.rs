//! Each virtio device behind its registers and rings, in the hands of a driver that does anything.
//!
//! The first byte picks the device, which is initialised properly; then the input writes memory, registers and doorbells. Holds: no
//! panic, and a reset ends within its bound whatever came before.
#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use polder_basics::SystemClock;
use polder_devices::pci::{Ecam, PciBus};
use polder_devices::virtio::balloon::Balloon;
use polder_devices::virtio::block::{Block, BlockOptions, DiskAccess, DiskMedium, EngineChoice};
use polder_devices::virtio::console::Console;
use polder_devices::virtio::net::{Net, NetBackend, NetOptions, Offloads};
use polder_devices::virtio::rng::Rng;
use polder_devices::virtio::vsock::{GUEST_CID_MIN, Vsock};
use polder_devices::virtio::{VirtioDevice, VirtioPciFunction};
use polder_machine::AccessSize::{Byte, Dword, Qword, Word};
use polder_machine::layout::{ECAM_LEN, ECAM_START};
use polder_machine::{Bus, MsiMessage, MsiSink};
use polder_memory::{GuestAddress, GuestMemory};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

/// The leak sanitizer looks while threads that did a reset still end, and takes what they are about to free for lost.
#[unsafe(no_mangle)]
extern "C" fn __lsan_is_turned_off() -> i32 {
    1
}

const RAM_LEN: u64 = 0x4_0000;
const CONFIG: u64 = ECAM_START + 0x8000;
const RESET_BOUND: Duration = Duration::from_secs(5);

struct Nothing;

impl MsiSink for Nothing {
    fn send(&self, _message: MsiMessage) {}
}

/// A cable whose other end nobody reads.
struct Cable {
    near: OwnedFd,
    _far: OwnedFd,
}

impl NetBackend for Cable {
    fn file(&self) -> std::os::fd::BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.near)
    }

    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tcp4: true, tcp6: true, ecn: true }
    }

    fn set_offloads(&self, _guest: Offloads) -> std::io::Result<()> {
        Ok(())
    }
}

fn block(engine: EngineChoice) -> Arc<dyn VirtioDevice> {
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("a memfd"));
    file.set_len(64 * 512).expect("a memfd grows");
    let access = DiskAccess::ReadWrite;
    let medium = DiskMedium::File(file);
    let options = BlockOptions { medium, access, serial: "fuzz".to_owned(), queues: 1, engine };
    Arc::new(Block::new(options).expect("64 sectors are a disk"))
}

fn device(choice: u8) -> Arc<dyn VirtioDevice> {
    match choice % 7 {
        0 => block(EngineChoice::Auto),
        1 => block(EngineChoice::Threads),
        2 => {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
            let (near, _far) = pair.expect("a socket pair");
            Arc::new(Net::new(Arc::new(Cable { near, _far }), NetOptions { mac: [2; 6], mtu: None }))
        }
        3 => Arc::new(Rng::new(Arc::new(SystemClock))),
        4 => Arc::new(Balloon::new()),
        5 => {
            let console = Console::new(Box::new(std::io::sink()));
            console.push_input(b"typed before there is a driver");
            Arc::new(console)
        }
        _ => {
            let path = std::env::temp_dir().join(format!("polder-fuzz-{}", std::process::id()));
            let _ = std::fs::remove_file(&path);
            let listener = UnixListener::bind(&path).expect("a socket in the temporary folder");
            let made = Vsock::new(GUEST_CID_MIN, listener, path, Arc::new(SystemClock));
            Arc::new(made.expect("descriptors for vsock"))
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((&choice, steps)) = input.split_first() else { return };
    let memory = GuestMemory::new(&[(GuestAddress(0), RAM_LEN)]).expect("the host has memory");
    let bus = Arc::new(Bus::new());
    let pci = PciBus::new(&bus, [Arc::new(()), Arc::new(()), Arc::new(()), Arc::new(())]);
    let function = VirtioPciFunction::new(device(choice), memory.clone(), Arc::new(Nothing), pci.interrupt_line(1));
    pci.add(1, function).expect("the slot is free");
    bus.insert(ECAM_START, ECAM_LEN, Arc::new(Ecam(pci.clone()))).expect("the range is free");
    bus.write(CONFIG + 4, Word, 6);
    let bar = bus.read(CONFIG + 0x10, Dword) & !0xf;
    let status = |value| bus.write(bar + 0x14, Byte, value);
    status(3);
    for select in 0..2 {
        bus.write(bar, Dword, select);
        bus.write(bar + 8, Dword, select);
        let offered = bus.read(bar + 4, Dword);
        bus.write(bar + 0x0c, Dword, offered);
    }
    status(0xb);
    let queues = bus.read(bar + 0x12, Word);
    for queue in 0..queues {
        bus.write(bar + 0x16, Word, queue);
        bus.write(bar + 0x18, Word, 16);
        let start = queue * 0x400;
        for (register, address) in [(0x20, start), (0x28, start + 0x100), (0x30, start + 0x200)] {
            bus.write(bar + register, Qword, address);
        }
        bus.write(bar + 0x1c, Word, 1);
    }
    status(0xf);
    // Each step: what (1 byte), where (2), value (8).
    for step in steps.as_chunks::<11>().0 {
        let [what, low, high, value @ ..] = *step;
        let offset = u64::from(u16::from_le_bytes([low, high]));
        let size = [Byte, Word, Dword, Qword][(what & 3) as usize];
        match what >> 2 & 3 {
            // Rings and buffers, the rings more often than not.
            0 => drop(memory.write(GuestAddress(offset & 0xfff), &value)),
            1 => drop(memory.write(GuestAddress(offset << 1), &value)),
            2 => bus.write(bar + 0x3000 + 4 * (offset % queues.max(1)), Word, 0),
            _ => {
                bus.write(bar + offset % 0x5000, size, u64::from_le_bytes(value) & size.all_ones());
                bus.read(bar + offset % 0x5000, size);
            }
        }
    }
    status(0);
    let deadline = Instant::now() + RESET_BOUND;
    while bus.read(bar + 0x14, Byte) != 0 {
        assert!(Instant::now() < deadline, "a reset does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
});
