//! virtio over PCI (4.1): everything between a device and the root bus.
//!
//! One 64-bit BAR holds all structures. A driver's reset is done on a thread of its own, because the device waits for what is
//! in flight: the status register keeps its old value until then, and the driver polls it for zero (4.1.4.3.2). So that
//! drivers which do not poll work too, the write itself waits for a short bounded time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use polder_machine::{AccessSize, InterruptLine, MsiSink};
use polder_memory::GuestMemory;

use super::common_config::{CommonConfig, DEVICE_STATUS, STATUS_FEATURES_OK};
use super::interrupts::PciInterrupts;
use super::{
    ActivateError, Activation, DeviceInterrupts, DeviceType, FEATURE_EVENT_INDEX, FEATURE_INDIRECT, FEATURE_VERSION_1,
    Queue, QueueError, VirtioDevice,
};
use crate::lock;
use crate::pci::{
    BarKind, BarPlace, COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE, COMMAND_MEMORY, ConfigSpace, Identity, Msix,
    PciFunction,
};

/// How long a write of the reset value waits for the device before the driver has to poll.
const RESET_WAIT_MS: u64 = 20;

const BAR: u8 = 0;
const BAR_LEN: u64 = 0x8000;
const REGION_LEN: u64 = 0x1000;
const COMMON_START: u64 = 0;
const ISR_START: u64 = 0x1000;
const DEVICE_START: u64 = 0x2000;
const NOTIFY_START: u64 = 0x3000;
const MSIX_TABLE_START: u64 = 0x4000;
const MSIX_PENDING_START: u64 = 0x4800;
const NOTIFY_MULTIPLIER: u32 = 4;

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
const STRUCTURE_COMMON: u8 = 1;
const STRUCTURE_NOTIFY: u8 = 2;
const STRUCTURE_ISR: u8 = 3;
const STRUCTURE_DEVICE: u8 = 4;
const STRUCTURE_PCI: u8 = 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The driver is not ready; the device does nothing.
    Idle,
    /// The device works.
    Active,
    /// The driver asked for a reset and the device still drains.
    Resetting,
}

struct Registers {
    common: CommonConfig,
    phase: Phase,
}

struct Shared {
    device: Arc<dyn VirtioDevice>,
    memory: GuestMemory,
    registers: Mutex<Registers>,
    idle: Condvar,
    interrupts: Arc<PciInterrupts>,
    /// Doorbells reach the device; mirrors `Phase::Active` without its lock.
    active: AtomicBool,
}

#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("queue {queue} cannot be used")]
    Queue {
        queue: u16,
        #[source]
        source: QueueError,
    },
    #[error("the device did not start")]
    Device(#[from] ActivateError),
}

impl Shared {
    fn write_status(self: &Arc<Self>, value: u8) {
        let mut registers = lock(&self.registers);
        match registers.phase {
            Phase::Resetting => {}
            _ if value == 0 => self.reset(registers),
            Phase::Active => {
                registers.common.add_status(value);
            }
            Phase::Idle => {
                if registers.common.add_status(value) {
                    self.start(&mut registers);
                }
            }
        }
    }

    fn start(&self, registers: &mut Registers) {
        self.interrupts.set_live(true);
        match self.activate(&registers.common) {
            Ok(()) => {
                registers.phase = Phase::Active;
                self.active.store(true, Ordering::SeqCst);
            }
            Err(error) => {
                let device = self.device.device_type();
                tracing::warn!(?device, error = &error as &dyn std::error::Error, "a virtio device did not start");
                self.interrupts.needs_reset();
            }
        }
    }

    fn activate(&self, common: &CommonConfig) -> Result<(), StartError> {
        let features = common.driver_features;
        let mut queues = Vec::with_capacity(common.queues.len());
        for (index, registers) in common.queues.iter().enumerate() {
            let queue = index as u16;
            queues.push(if registers.enabled {
                let made = Queue::new(self.memory.clone(), queue, registers.place, registers.size_max, features);
                Some(made.map_err(|source| StartError::Queue { queue, source })?)
            } else {
                None
            });
        }
        let memory = self.memory.clone();
        self.device.activate(Activation { memory, queues, interrupts: self.interrupts.clone(), features })?;
        Ok(())
    }

    fn reset(self: &Arc<Self>, mut registers: std::sync::MutexGuard<'_, Registers>) {
        if registers.phase == Phase::Idle {
            self.finish_reset(&mut registers);
            return;
        }
        registers.phase = Phase::Resetting;
        self.active.store(false, Ordering::SeqCst);
        // The driver no longer expects interrupts, though completions may still come in.
        self.interrupts.set_live(false);
        let shared = self.clone();
        let drain = move || {
            shared.device.reset();
            shared.finish_reset(&mut lock(&shared.registers));
        };
        match std::thread::Builder::new().name("virtio-reset".to_owned()).spawn(drain) {
            Ok(_) => {
                let wait = Duration::from_millis(RESET_WAIT_MS);
                let _ = self.idle.wait_timeout_while(registers, wait, |now| now.phase == Phase::Resetting);
            }
            Err(_) => {
                // The host has no thread left: better to wait here than not to reset.
                drop(registers);
                self.device.reset();
                self.finish_reset(&mut lock(&self.registers));
            }
        }
    }

    fn finish_reset(&self, registers: &mut Registers) {
        registers.common.reset();
        registers.phase = Phase::Idle;
        self.interrupts.reset();
        self.idle.notify_all();
    }
}

/// A PCI function that carries a virtio device.
pub struct VirtioPciFunction {
    shared: Arc<Shared>,
    config: Mutex<ConfigSpace>,
    msix_capability: u16,
    pci_access_capability: u16,
    queues: u64,
}

impl VirtioPciFunction {
    /// Wraps a device. `msi` takes its MSI-X messages, `line` is the INTA wire of its slot ([`crate::pci::PciBus::interrupt_line`]).
    /// There is one vector for each queue and one for configuration changes, as far as vectors go.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        memory: GuestMemory,
        msi: Arc<dyn MsiSink>,
        line: Arc<dyn InterruptLine>,
    ) -> Arc<Self> {
        let queue_sizes = device.queue_sizes();
        assert!(
            queue_sizes.len() as u64 * u64::from(NOTIFY_MULTIPLIER) <= REGION_LEN,
            "every queue has a doorbell in the notification structure"
        );
        let features = device.features() | FEATURE_VERSION_1 | FEATURE_INDIRECT | FEATURE_EVENT_INDEX;
        let msix = Msix::new(queue_sizes.len().saturating_add(1).min(usize::from(u16::MAX)) as u16, msi);
        let mut config = ConfigSpace::new(&identity(device.device_type()));
        config.add_bar(BAR, BarKind::Memory64, BAR_LEN);
        config.set_interrupt(1, 0);
        config.add_express_capability();
        let (body, writable) = msix.capability(BAR, MSIX_TABLE_START as u32, MSIX_PENDING_START as u32);
        let msix_capability = config.add_capability(CAPABILITY_MSIX, &body, &writable);
        let region = REGION_LEN as u32;
        for (structure, start) in
            [(STRUCTURE_COMMON, COMMON_START), (STRUCTURE_ISR, ISR_START), (STRUCTURE_DEVICE, DEVICE_START)]
        {
            config.add_capability(CAPABILITY_VENDOR, &structure_capability(structure, start as u32, region, &[]), &[]);
        }
        let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
        let notify = structure_capability(STRUCTURE_NOTIFY, NOTIFY_START as u32, region, &multiplier);
        config.add_capability(CAPABILITY_VENDOR, &notify, &[]);
        // The driver writes bar, offset, length and data of this one (4.1.4.9).
        let mut writable = [0xff; 18];
        for read_only in [0, 1, 3, 4, 5] {
            writable[read_only] = 0;
        }
        let access = structure_capability(STRUCTURE_PCI, 0, 0, &[0; 4]);
        let pci_access_capability = config.add_capability(CAPABILITY_VENDOR, &access, &writable);
        let interrupts = Arc::new(PciInterrupts::new(queue_sizes.len(), msix, line));
        let registers = Registers { common: CommonConfig::new(features, &queue_sizes), phase: Phase::Idle };
        Arc::new(VirtioPciFunction {
            shared: Arc::new(Shared {
                device,
                memory,
                registers: Mutex::new(registers),
                idle: Condvar::new(),
                interrupts,
                active: AtomicBool::new(false),
            }),
            config: Mutex::new(config),
            msix_capability,
            pci_access_capability,
            queues: queue_sizes.len() as u64,
        })
    }

    /// The interrupts of the device, for those who tell it of the world (a new size, a new link state).
    pub fn interrupts(&self) -> Arc<dyn DeviceInterrupts> {
        self.shared.interrupts.clone()
    }

    /// Where in the BAR the configuration access capability points, if that makes sense: (offset, size).
    fn pci_access(&self, config: &ConfigSpace) -> Option<(u64, AccessSize)> {
        let at = self.pci_access_capability;
        let bar = config.read(at + 4, AccessSize::Byte);
        let offset = u64::from(config.read(at + 8, AccessSize::Dword));
        let size = AccessSize::from_bytes(config.read(at + 12, AccessSize::Dword) as usize)?;
        let inside = offset + size.bytes() <= BAR_LEN && offset % size.bytes() == 0;
        (bar == u32::from(BAR) && size != AccessSize::Qword && inside).then_some((offset, size))
    }

    fn is_pci_access_data(&self, offset: u16) -> bool {
        (16..20).contains(&offset.wrapping_sub(self.pci_access_capability))
    }

    /// Tells the interrupts what the command register and the MSI-X control register say now.
    fn apply_control(&self, config: &ConfigSpace) {
        let interrupts = &self.shared.interrupts;
        let command = config.command();
        interrupts.msix.set_bus_master(command & COMMAND_BUS_MASTER != 0);
        interrupts.set_intx_disabled(command & COMMAND_INTX_DISABLE != 0);
        interrupts.msix.set_control(config.read(self.msix_capability + 2, AccessSize::Word) as u16);
        interrupts.msix_changed();
    }

    fn common_write(&self, offset: u64, size: AccessSize, value: u64) {
        if offset == DEVICE_STATUS {
            if size == AccessSize::Byte {
                self.shared.write_status(value as u8);
            }
            return;
        }
        let mut registers = lock(&self.shared.registers);
        if registers.phase != Phase::Resetting {
            registers.common.write(offset, size, value, &self.shared.interrupts);
        }
    }

    /// Rings a doorbell: one for each queue, whatever value and size is written.
    fn doorbell(&self, offset: u64) {
        let queue = offset / u64::from(NOTIFY_MULTIPLIER);
        if queue < self.queues && self.shared.active.load(Ordering::SeqCst) {
            self.shared.device.notify(queue as u16);
        }
    }

    fn device_config_write(&self, offset: u64, size: AccessSize, value: u64) {
        // 2.5.2: the driver does not touch the configuration before features are settled.
        if lock(&self.shared.registers).common.status & STATUS_FEATURES_OK != 0 {
            self.shared.device.config_write(offset, &value.to_le_bytes()[..size.bytes() as usize]);
        }
    }
}

impl PciFunction for VirtioPciFunction {
    fn config_read(&self, offset: u16, size: AccessSize) -> u32 {
        if self.is_pci_access_data(offset) {
            let access = self.pci_access(&lock(&self.config));
            if let Some((bar_offset, bar_size)) = access {
                let value = self.bar_read(BAR, bar_offset, bar_size);
                lock(&self.config).write(self.pci_access_capability + 16, AccessSize::Dword, value as u32);
            }
        }
        let mut config = lock(&self.config);
        config.set_interrupt_status(self.shared.interrupts.is_intx_pending());
        config.read(offset, size)
    }

    fn config_write(&self, offset: u16, size: AccessSize, value: u32) {
        let access = {
            let mut config = lock(&self.config);
            config.write(offset, size, value);
            self.apply_control(&config);
            let data = config.read(self.pci_access_capability + 16, AccessSize::Dword);
            self.pci_access(&config).filter(|_| self.is_pci_access_data(offset)).map(|access| (access, data))
        };
        if let Some(((bar_offset, bar_size), data)) = access {
            self.bar_write(BAR, bar_offset, bar_size, u64::from(data) & bar_size.all_ones());
        }
    }

    fn bars(&self) -> Vec<BarPlace> {
        lock(&self.config).bars()
    }

    fn decodes_memory(&self) -> bool {
        lock(&self.config).command() & COMMAND_MEMORY != 0
    }

    fn place_bar(&self, index: u8, address: u64) {
        lock(&self.config).place_bar(index, address);
    }

    fn set_interrupt_line(&self, line: u8) {
        lock(&self.config).set_interrupt(1, line);
    }

    fn bar_read(&self, index: u8, offset: u64, size: AccessSize) -> u64 {
        if index != BAR {
            return size.all_ones();
        }
        match offset {
            COMMON_START..ISR_START => lock(&self.shared.registers).common.read(offset, size, &self.shared.interrupts),
            ISR_START => self.shared.interrupts.read_isr().into(),
            DEVICE_START..NOTIFY_START => {
                let mut bytes = [0; 8];
                self.shared.device.config_read(offset - DEVICE_START, &mut bytes[..size.bytes() as usize]);
                u64::from_le_bytes(bytes)
            }
            MSIX_TABLE_START..MSIX_PENDING_START => {
                self.shared.interrupts.msix.table_read(offset - MSIX_TABLE_START, size)
            }
            MSIX_PENDING_START..BAR_LEN => self.shared.interrupts.msix.pending_read(offset - MSIX_PENDING_START, size),
            _ => 0,
        }
    }

    fn bar_write(&self, index: u8, offset: u64, size: AccessSize, value: u64) {
        if index != BAR {
            return;
        }
        match offset {
            COMMON_START..ISR_START => self.common_write(offset, size, value),
            DEVICE_START..NOTIFY_START => self.device_config_write(offset - DEVICE_START, size, value),
            NOTIFY_START..MSIX_TABLE_START => self.doorbell(offset - NOTIFY_START),
            MSIX_TABLE_START..MSIX_PENDING_START => {
                self.shared.interrupts.msix.table_write(offset - MSIX_TABLE_START, size, value);
            }
            _ => {}
        }
    }
}

/// The body of a virtio structure capability (4.1.4), after id and link.
fn structure_capability(structure: u8, offset: u32, len: u32, extra: &[u8]) -> Vec<u8> {
    let mut body = vec![(16 + extra.len()) as u8, structure, BAR, 0, 0, 0];
    body.extend_from_slice(&offset.to_le_bytes());
    body.extend_from_slice(&len.to_le_bytes());
    body.extend_from_slice(extra);
    body
}

/// PCI identity (4.1.2): vendor 0x1af4, device 0x1040 + type; the class is a hint for people.
fn identity(device_type: DeviceType) -> Identity {
    let class = match device_type {
        DeviceType::Net => [0x02, 0x00, 0x00],
        DeviceType::Block => [0x01, 0x80, 0x00],
        DeviceType::Console => [0x07, 0x80, 0x00],
        DeviceType::Rng | DeviceType::Balloon | DeviceType::Vsock => [0xff, 0x00, 0x00],
    };
    Identity {
        vendor: 0x1af4,
        device: 0x1040 + device_type as u16,
        revision: 1,
        class,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    }
}
