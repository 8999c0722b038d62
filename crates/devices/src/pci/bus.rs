//! The root bus: slots, configuration accesses, and the claims of BARs on the memory bus.

use std::sync::{Arc, Mutex, RwLock, Weak};

use polder_machine::layout::{
    ECAM_LEN, PCI_INTX_GSI, PCI_MMIO32_LEN, PCI_MMIO32_START, PCI_MMIO64_LEN, PCI_MMIO64_START,
};
use polder_machine::{AccessSize, Bus, BusDevice, InterruptLine};

use super::{BarKind, BarPlace, HostBridge, PciFunction, SharedLine};
use crate::lock;

/// Slots on the root bus; slot 0 is the host bridge.
pub const PCI_SLOTS: u8 = 32;

/// BARs of up to this size are first placed below 4 GiB, where every guest reaches them.
const SMALL_BAR_MAX: u64 = 1 << 20;
/// Registers from here on concern neither the command register nor a BAR.
const HEADER_DECODE_END: u16 = 0x28;

/// The function cannot be added.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciError {
    /// The slot does not exist or is taken.
    #[error("PCI slot {slot} does not exist or is taken")]
    Slot { slot: u8 },
    /// The windows are full.
    #[error("no room in the PCI memory windows for {len:#x} bytes")]
    NoRoom { len: u64 },
}

/// A BAR as the memory bus sees it.
struct BarWindow {
    function: Arc<dyn PciFunction>,
    index: u8,
}

impl BusDevice for BarWindow {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        self.function.bar_read(self.index, offset, size)
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        self.function.bar_write(self.index, offset, size, value);
    }
}

#[derive(Default)]
struct Claims {
    /// (slot, place) of each BAR that the memory bus knows.
    claimed: Vec<(u8, BarPlace)>,
    next_32: u64,
    next_64: u64,
}

/// Bus 0.
pub struct PciBus {
    /// Weak, because the memory bus holds our ECAM and BARs.
    memory_bus: Weak<Bus>,
    slots: RwLock<Vec<Option<Arc<dyn PciFunction>>>>,
    lines: [Arc<SharedLine>; 4],
    claims: Mutex<Claims>,
}

impl PciBus {
    /// A bus with a host bridge. BARs appear on `memory_bus`; `lines[n]` is the wire to pin `PCI_INTX_GSI + n`.
    pub fn new(memory_bus: &Arc<Bus>, lines: [Arc<dyn InterruptLine>; 4]) -> Arc<Self> {
        let mut slots: Vec<Option<Arc<dyn PciFunction>>> = vec![None; PCI_SLOTS as usize];
        slots[0] = Some(Arc::new(HostBridge::new()));
        Arc::new(PciBus {
            memory_bus: Arc::downgrade(memory_bus),
            slots: RwLock::new(slots),
            lines: lines.map(SharedLine::new),
            claims: Mutex::new(Claims { claimed: Vec::new(), next_32: PCI_MMIO32_START, next_64: PCI_MMIO64_START }),
        })
    }

    /// The INTA line of a slot, for the function that will be added there.
    pub fn interrupt_line(&self, slot: u8) -> Arc<dyn InterruptLine> {
        self.lines[(slot % 4) as usize].end(slot)
    }

    /// The pin of the I/O APIC that a slot's INTA reaches.
    pub fn interrupt_gsi(slot: u8) -> u8 {
        PCI_INTX_GSI + slot % 4
    }

    /// Adds a function and gives its BARs their first addresses.
    pub fn add(&self, slot: u8, function: Arc<dyn PciFunction>) -> Result<(), PciError> {
        let mut slots = self.slots.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        let place = slots.get_mut(slot as usize).filter(|place| place.is_none()).ok_or(PciError::Slot { slot })?;
        let mut claims = lock(&self.claims);
        for bar in function.bars() {
            let address = allocate(&mut claims, bar.kind, bar.len).ok_or(PciError::NoRoom { len: bar.len })?;
            function.place_bar(bar.index, address);
        }
        function.set_interrupt_line(Self::interrupt_gsi(slot));
        *place = Some(function);
        Ok(())
    }

    fn function(&self, address: u64) -> Option<(Arc<dyn PciFunction>, u16)> {
        if address >= ECAM_LEN || address >> 12 & 7 != 0 {
            return None;
        }
        let slots = self.slots.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let function = slots.get((address >> 15) as usize)?.clone()?;
        Some((function, (address & 0xfff) as u16))
    }

    /// Reads configuration space at an ECAM address (slot << 15 | function << 12 | register); absent functions give ones.
    pub fn config_read(&self, address: u64, size: AccessSize) -> u64 {
        if size == AccessSize::Qword || !address.is_multiple_of(size.bytes()) {
            return (0..size.bytes()).fold(0, |value, index| {
                value | self.config_read(address.wrapping_add(index), AccessSize::Byte) << (8 * index)
            });
        }
        match self.function(address) {
            Some((function, offset)) => u64::from(function.config_read(offset, size)) & size.all_ones(),
            None => size.all_ones(),
        }
    }

    /// Writes configuration space; absent functions drop it.
    pub fn config_write(&self, address: u64, size: AccessSize, value: u64) {
        if size == AccessSize::Qword || !address.is_multiple_of(size.bytes()) {
            for index in 0..size.bytes() {
                let byte = value >> (8 * index) & 0xff;
                self.config_write(address.wrapping_add(index), AccessSize::Byte, byte);
            }
            return;
        }
        if let Some((function, offset)) = self.function(address) {
            function.config_write(offset, size, value as u32);
            if offset < HEADER_DECODE_END {
                self.update_claims();
            }
        }
    }

    /// Makes the memory bus agree with the BARs: first all that moved let go, then all that can claim do.
    fn update_claims(&self) {
        let Some(memory_bus) = self.memory_bus.upgrade() else { return };
        let slots = self.slots.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut claims = lock(&self.claims);
        let mut wanted = Vec::new();
        for (slot, function) in slots.iter().enumerate() {
            let Some(function) = function else { continue };
            if function.decodes_memory() {
                wanted.extend(function.bars().into_iter().filter(in_window).map(|bar| (slot as u8, bar, function)));
            }
        }
        claims.claimed.retain(|&(slot, bar)| {
            let stays = wanted.iter().any(|&(wanted_slot, wanted_bar, _)| (wanted_slot, wanted_bar) == (slot, bar));
            if !stays {
                memory_bus.remove(bar.address);
            }
            stays
        });
        for (slot, bar, function) in wanted {
            if claims.claimed.contains(&(slot, bar)) {
                continue;
            }
            let window = BarWindow { function: function.clone(), index: bar.index };
            // A BAR on top of another is not claimed; it will be when the other has moved away.
            if memory_bus.insert(bar.address, bar.len, Arc::new(window)).is_ok() {
                claims.claimed.push((slot, bar));
            }
        }
    }
}

/// The first free address for a BAR. Addresses are never given back: functions are not unplugged yet.
fn allocate(claims: &mut Claims, kind: BarKind, len: u64) -> Option<u64> {
    let high = kind == BarKind::Memory64 && len > SMALL_BAR_MAX;
    let (next, end) = if high {
        (&mut claims.next_64, PCI_MMIO64_START + PCI_MMIO64_LEN)
    } else {
        (&mut claims.next_32, PCI_MMIO32_START + PCI_MMIO32_LEN)
    };
    let address = next.checked_next_multiple_of(len)?;
    let after = address.checked_add(len).filter(|&after| after <= end)?;
    *next = after;
    Some(address)
}

fn in_window(bar: &BarPlace) -> bool {
    let inside = |start: u64, len: u64| {
        bar.address >= start && bar.address.checked_add(bar.len).is_some_and(|end| end <= start + len)
    };
    inside(PCI_MMIO32_START, PCI_MMIO32_LEN) || inside(PCI_MMIO64_START, PCI_MMIO64_LEN)
}

/// The memory-mapped way to configuration space, for the range `ECAM_START..ECAM_START + ECAM_LEN`.
pub struct Ecam(pub Arc<PciBus>);

impl BusDevice for Ecam {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        self.0.config_read(offset, size)
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        self.0.config_write(offset, size, value);
    }
}
