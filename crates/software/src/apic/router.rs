//! From an interrupt message to the vCPUs that it is for (SDM vol. 3, 11.6 and 11.11).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use polder_machine::{MsiMessage, MsiSink};

use super::inbox::{Inbox, mode};

/// How a message is delivered: bits 8-10 of an interrupt command or of MSI data. SMI (2) has nobody to take it.
pub mod delivery {
    pub const FIXED: u8 = 0;
    pub const LOWEST_PRIORITY: u8 = 1;
    pub const NMI: u8 = 4;
    pub const INIT: u8 = 5;
    pub const START_UP: u8 = 6;
    pub const EXTERNAL: u8 = 7;
}

/// Which vCPUs a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// By APIC id; `u32::MAX` is all.
    Physical(u32),
    /// By the logical destination register.
    Logical(u32),
    All,
    AllBut(usize),
    Only(usize),
}

/// A message on the (imagined) bus between APICs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    pub destination: Destination,
    /// One of [`delivery`].
    pub delivery: u8,
    pub vector: u8,
    pub is_level: bool,
}

/// Knows all inboxes of a machine.
#[derive(Debug)]
pub struct Router {
    inboxes: Vec<Arc<Inbox>>,
    /// Where the search for the lowest priority starts, so that equals take turns.
    turn: AtomicUsize,
}

impl Router {
    /// A router for these vCPUs, in index order.
    pub fn new(inboxes: Vec<Arc<Inbox>>) -> Self {
        Router { inboxes, turn: AtomicUsize::new(0) }
    }

    /// All inboxes in index order.
    pub fn inboxes(&self) -> &[Arc<Inbox>] {
        &self.inboxes
    }

    fn matches(&self, index: usize, inbox: &Inbox, destination: Destination) -> bool {
        let address = &inbox.address;
        let id = address.id.load(Ordering::Relaxed);
        let apic_mode = address.mode.load(Ordering::Relaxed);
        match destination {
            Destination::All => true,
            Destination::AllBut(but) => but != index,
            Destination::Only(only) => only == index,
            _ if apic_mode == mode::OFF => false,
            Destination::Physical(u32::MAX) => true,
            Destination::Physical(wanted) => wanted == id,
            Destination::Logical(u32::MAX) => true,
            Destination::Logical(wanted) if apic_mode == mode::X2APIC => {
                let logical = address.logical.load(Ordering::Relaxed);
                logical >> 16 == wanted >> 16 && logical & wanted & 0xffff != 0
            }
            Destination::Logical(wanted) => {
                let logical = address.logical.load(Ordering::Relaxed) >> 24;
                if address.is_cluster.load(Ordering::Relaxed) {
                    logical >> 4 == wanted >> 4 & 0xf && logical & wanted & 0xf != 0
                } else {
                    logical & wanted & 0xff != 0
                }
            }
        }
    }

    /// Delivers a message; whether anybody took it.
    pub fn deliver(&self, message: Message) -> bool {
        let targets = || {
            let candidates = self.inboxes.iter().enumerate();
            candidates.filter(|(index, inbox)| self.matches(*index, inbox, message.destination))
        };
        if message.delivery == delivery::LOWEST_PRIORITY {
            let count = self.inboxes.len();
            let turn = self.turn.fetch_add(1, Ordering::Relaxed);
            let lowest = targets().filter(|(_, inbox)| inbox.address.is_enabled.load(Ordering::Relaxed)).min_by_key(
                |(index, inbox)| {
                    (inbox.address.priority.load(Ordering::Relaxed) >> 4, (index + count - turn % count) % count)
                },
            );
            if let Some((_, inbox)) = lowest {
                inbox.post_fixed(message.vector, message.is_level);
            }
            return lowest.is_some();
        }
        let mut taken = false;
        for (_, inbox) in targets() {
            match message.delivery {
                delivery::FIXED if inbox.address.is_enabled.load(Ordering::Relaxed) => {
                    inbox.post_fixed(message.vector, message.is_level);
                }
                delivery::NMI => inbox.post_nmi(),
                delivery::INIT => inbox.post_init(),
                delivery::START_UP => inbox.post_sipi(message.vector),
                // What a board sends in place of its 8259: the vector comes with the message. An APIC that is enabled has its LINT0
                // masked, as no firmware opened it.
                delivery::EXTERNAL if !inbox.address.is_enabled.load(Ordering::Relaxed) => {
                    inbox.post_external(message.vector);
                }
                // SMI: there is no system management mode.
                _ => continue,
            }
            taken = true;
        }
        taken
    }
}

impl MsiSink for Router {
    fn send(&self, message: MsiMessage) {
        let id = (message.address >> 12 & 0xff) as u32;
        let destination = match message.address & 1 << 2 != 0 {
            _ if id == 0xff => Destination::Physical(u32::MAX),
            true => Destination::Logical(id),
            false => Destination::Physical(id),
        };
        let vector = message.data as u8;
        let delivery = (message.data >> 8 & 7) as u8;
        // A vector below 16 is refused by the receiver; nobody would see the error bit of a message from a device.
        if vector < 16 && matches!(delivery, delivery::FIXED | delivery::LOWEST_PRIORITY) {
            return;
        }
        self.deliver(Message { destination, delivery, vector, is_level: message.data & 1 << 15 != 0 });
    }
}
