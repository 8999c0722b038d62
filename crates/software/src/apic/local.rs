//! One local APIC: its registers and rules (SDM vol. 3, chapter 11), without clock or memory access of its own.
//!
//! Requests come in through the [`Inbox`]; everything else here belongs to the vCPU's thread. Time is always an argument, in
//! host TSC ticks.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::inbox::{Inbox, mode};
use super::router::{Destination, Message, Router, delivery};
use super::timer::Timer;

/// IA32_APIC_BASE: this is the bootstrap processor.
pub const BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
pub const BASE_X2APIC: u64 = 1 << 10;
/// IA32_APIC_BASE: on.
pub const BASE_ENABLE: u64 = 1 << 11;

/// Register numbers: offset in the page / 16, number of the MSR - 0x800.
pub mod register {
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TPR: u32 = 0x08;
    pub const PPR: u32 = 0x0a;
    pub const EOI: u32 = 0x0b;
    pub const LDR: u32 = 0x0d;
    pub const DFR: u32 = 0x0e;
    pub const SVR: u32 = 0x0f;
    pub const ISR: u32 = 0x10;
    pub const TMR: u32 = 0x18;
    pub const IRR: u32 = 0x20;
    pub const ESR: u32 = 0x28;
    pub const ICR: u32 = 0x30;
    pub const ICR_HIGH: u32 = 0x31;
    pub const LVT_TIMER: u32 = 0x32;
    pub const LVT_ERROR: u32 = 0x37;
    pub const TIMER_INITIAL: u32 = 0x38;
    pub const TIMER_CURRENT: u32 = 0x39;
    pub const TIMER_DIVIDE: u32 = 0x3e;
    pub const SELF_IPI: u32 = 0x3f;
}

/// Local vector table: timer, thermal, performance, LINT0, LINT1, error.
const LVT_COUNT: usize = 6;
const LVT_TIMER: usize = 0;
const LVT_LINT0: usize = 3;
const LVT_LINT1: usize = 4;
const LVT_ERROR: usize = 5;
const LVT_MASKED: u32 = 1 << 16;
/// The bits that software can set in each entry.
const LVT_WRITABLE: [u32; LVT_COUNT] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];

/// An integrated APIC with six LVT entries, without EOI-broadcast suppression.
const VERSION: u32 = 0x14 | (LVT_COUNT as u32 - 1) << 16;
const SVR_ENABLE: u32 = 1 << 8;
const ESR_SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
const ESR_RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;
/// Reserved bits of the x2APIC's 64-bit interrupt command register.
const ICR_RESERVED: u64 = 0xfff3_2000;

/// The register does not exist, cannot be written, or the value has reserved bits set: #GP in x2APIC mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused;

/// One vCPU's local APIC.
#[derive(Debug)]
pub struct LocalApic {
    inbox: Arc<Inbox>,
    router: Arc<Router>,
    index: usize,
    base: u64,
    id: u32,
    tpr: u8,
    logical: u32,
    format: u32,
    svr: u32,
    in_service: [u64; 4],
    esr: u32,
    /// Errors since ESR was last written.
    errors: u32,
    icr: u64,
    lvt: [u32; LVT_COUNT],
    pub timer: Timer,
}

impl LocalApic {
    /// The APIC of vCPU `index` after power-on. The router knows its inbox.
    pub fn new(router: Arc<Router>, index: usize, tsc_khz: u64) -> Self {
        let mut apic = LocalApic {
            inbox: router.inboxes()[index].clone(),
            router,
            index,
            base: 0,
            id: index as u32,
            tpr: 0,
            logical: 0,
            format: u32::MAX,
            svr: 0xff,
            in_service: [0; 4],
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [LVT_MASKED; LVT_COUNT],
            timer: Timer::new(tsc_khz),
        };
        apic.reset();
        apic
    }

    /// Power-on: xAPIC mode at the default address.
    pub fn reset(&mut self) {
        let bsp = if self.index == 0 { BASE_BSP } else { 0 };
        self.base = polder_machine::layout::LOCAL_APIC_START | BASE_ENABLE | bsp;
        self.init();
    }

    /// An INIT message: all registers as after power-on but the base and the id (SDM vol. 3, 11.4.7.3).
    pub fn init(&mut self) {
        self.id = self.index as u32;
        self.tpr = 0;
        self.logical = 0;
        self.format = u32::MAX;
        self.svr = 0xff;
        self.in_service = [0; 4];
        self.esr = 0;
        self.errors = 0;
        self.icr = 0;
        self.lvt = [LVT_MASKED; LVT_COUNT];
        self.timer.reset();
        self.inbox.clear_requests();
        self.derive_logical();
        self.publish();
    }

    /// This vCPU's inbox.
    pub fn inbox(&self) -> &Arc<Inbox> {
        &self.inbox
    }

    /// All vCPUs' inboxes.
    pub fn router(&self) -> &Arc<Router> {
        &self.router
    }

    /// The x2APIC id.
    pub fn id(&self) -> u32 {
        self.index as u32
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Writes IA32_APIC_BASE (SDM vol. 3, 11.4.3, 11.12.1 and figure 11-27).
    pub fn set_base(&mut self, base: u64) -> Result<(), Refused> {
        let reserved =
            !(((1u64 << crate::page_walk::PHYSICAL_BITS) - 1) & !0xfff | BASE_BSP | BASE_X2APIC | BASE_ENABLE);
        let enable = |value: u64| (value & BASE_ENABLE != 0, value & BASE_X2APIC != 0);
        let allowed = match (enable(self.base), enable(base)) {
            // x2APIC needs the APIC on, is not entered from off, and is left only to off.
            (_, (false, true)) | ((false, _), (true, true)) | ((true, true), (true, false)) => false,
            _ => true,
        };
        if base & reserved != 0 || !allowed {
            return Err(Refused);
        }
        let (was_x2apic, is_enabled) = (self.is_x2apic(), base & BASE_ENABLE != 0);
        // The bootstrap flag is the hardware's.
        self.base = base & !BASE_BSP | self.base & BASE_BSP;
        if !is_enabled {
            self.init();
        } else if self.is_x2apic() && !was_x2apic {
            self.id = self.index as u32;
            self.derive_logical();
        }
        self.publish();
        Ok(())
    }

    /// Whether the APIC is on and in x2APIC mode.
    pub fn is_x2apic(&self) -> bool {
        self.base & (BASE_X2APIC | BASE_ENABLE) == BASE_X2APIC | BASE_ENABLE
    }

    /// Whether IA32_APIC_BASE has the APIC on.
    pub fn is_on(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }

    /// The guest-physical page of the memory-mapped registers, or `u64::MAX`.
    pub fn page(&self) -> u64 {
        if self.is_on() && !self.is_x2apic() { self.base >> 12 } else { u64::MAX }
    }

    fn derive_logical(&mut self) {
        if self.is_x2apic() {
            self.logical = (self.id >> 4) << 16 | 1 << (self.id & 15);
        }
    }

    /// Tells senders how to find this APIC.
    fn publish(&self) {
        let address = &self.inbox.address;
        address.id.store(self.id, Ordering::SeqCst);
        address.logical.store(self.logical, Ordering::SeqCst);
        address.is_cluster.store(self.format >> 28 == 0, Ordering::SeqCst);
        address.is_enabled.store(self.is_on() && self.svr & SVR_ENABLE != 0, Ordering::SeqCst);
        address.priority.store(self.tpr, Ordering::SeqCst);
        let now = match (self.is_on(), self.is_x2apic()) {
            (false, _) => mode::OFF,
            (true, false) => mode::XAPIC,
            (true, true) => mode::X2APIC,
        };
        address.mode.store(now, Ordering::SeqCst);
    }

    fn highest_in_service(&self) -> Option<u8> {
        (0..4).rev().find_map(|word: usize| {
            let bits = self.in_service[word];
            (bits != 0).then(|| (word as u8) * 64 + 63 - bits.leading_zeros() as u8)
        })
    }

    /// The task priority; CR8 is its high half.
    pub fn tpr(&self) -> u8 {
        self.tpr
    }

    /// Sets the task priority.
    pub fn set_tpr(&mut self, tpr: u8) {
        let lower = tpr < self.tpr;
        self.tpr = tpr;
        self.inbox.address.priority.store(tpr, Ordering::Relaxed);
        if lower {
            self.look_again();
        }
    }

    /// The processor priority (SDM vol. 3, 11.8.3.1).
    pub fn ppr(&self) -> u8 {
        let serving = self.highest_in_service().unwrap_or(0) & 0xf0;
        if self.tpr >> 4 >= serving >> 4 { self.tpr } else { serving }
    }

    /// The vector to deliver now, if the processor takes interrupts.
    #[inline]
    pub fn deliverable(&self) -> Option<u8> {
        let vector = self.inbox.highest_request()?;
        let enabled = self.svr & SVR_ENABLE != 0 && self.is_on();
        (enabled && vector >> 4 > self.ppr() >> 4).then_some(vector)
    }

    /// Accepts a vector that [`LocalApic::deliverable`] gave.
    pub fn accept(&mut self, vector: u8) {
        self.inbox.take_request(vector);
        self.in_service[usize::from(vector / 64)] |= 1 << (vector % 64);
    }

    /// Ends the interrupt in service of the highest priority; the vector if the I/O APIC must hear of it.
    pub fn end_of_interrupt(&mut self) -> Option<u8> {
        let vector = self.highest_in_service()?;
        self.in_service[usize::from(vector / 64)] &= !(1 << (vector % 64));
        self.look_again();
        self.inbox.is_level(vector).then_some(vector)
    }

    /// Whether accepting no further vector is due and the highest in service is edge-triggered: then its end may be told through memory.
    pub fn may_end_quietly(&self) -> bool {
        self.inbox.highest_request().is_none()
            && self.highest_in_service().is_some_and(|vector| !self.inbox.is_level(vector))
    }

    /// A priority fell: a request that waited may be deliverable.
    fn look_again(&self) {
        if self.inbox.highest_request().is_some() {
            self.inbox.signal();
        }
    }

    fn error(&mut self, error: u32) {
        self.errors |= error;
        // An error about the error's own vector must not recurse.
        let entry = self.lvt[LVT_ERROR];
        if entry & LVT_MASKED == 0 && entry & 0xff >= 16 {
            self.inbox.post_fixed(entry as u8, false);
        }
    }

    /// Raises the interrupt of a local vector table entry.
    fn local_interrupt(&mut self, index: usize) {
        let entry = self.lvt[index];
        if entry & LVT_MASKED != 0 {
            return;
        }
        let has_delivery_mode = index != LVT_TIMER && index != LVT_ERROR;
        match if has_delivery_mode { (entry >> 8 & 7) as u8 } else { delivery::FIXED } {
            delivery::FIXED if entry & 0xff < 16 => self.error(ESR_RECEIVE_ILLEGAL_VECTOR),
            delivery::FIXED => {
                let is_level = (index == LVT_LINT0 || index == LVT_LINT1) && entry & 1 << 15 != 0;
                self.inbox.post_fixed(entry as u8, is_level);
            }
            delivery::NMI => self.inbox.post_nmi(),
            delivery::INIT => self.inbox.post_init(),
            _ => {}
        }
    }

    /// Fires the timer if its deadline has passed.
    pub fn poll_timer(&mut self, now: u64) {
        if self.timer.expire(now) {
            self.local_interrupt(LVT_TIMER);
        }
    }

    /// Reads a register.
    pub fn read(&mut self, number: u32, now: u64) -> Result<u64, Refused> {
        let x2apic = self.is_x2apic();
        Ok(match number {
            register::ID if x2apic => u64::from(self.id),
            register::ID => u64::from(self.id) << 24,
            register::VERSION => u64::from(VERSION),
            register::TPR => u64::from(self.tpr),
            register::PPR => u64::from(self.ppr()),
            register::EOI if !x2apic => 0,
            register::LDR => u64::from(self.logical),
            register::DFR if !x2apic => u64::from(self.format),
            register::SVR => u64::from(self.svr),
            register::ISR..register::TMR => {
                let index = (number - register::ISR) as usize;
                self.in_service[index / 2] >> (32 * (index % 2)) & 0xffff_ffff
            }
            register::TMR..register::IRR => u64::from(self.inbox.level_bits((number - register::TMR) as usize)),
            register::IRR..register::ESR => u64::from(self.inbox.request_bits((number - register::IRR) as usize)),
            register::ESR => u64::from(self.esr),
            register::ICR if x2apic => self.icr,
            register::ICR => self.icr & 0xffff_ffff,
            register::ICR_HIGH if !x2apic => self.icr >> 32,
            register::LVT_TIMER..=register::LVT_ERROR => u64::from(self.lvt[(number - register::LVT_TIMER) as usize]),
            register::TIMER_INITIAL => u64::from(self.timer.initial()),
            register::TIMER_CURRENT => u64::from(self.timer.current(now)),
            register::TIMER_DIVIDE => u64::from(self.timer.divide()),
            _ => {
                if !x2apic {
                    self.error(ESR_ILLEGAL_REGISTER);
                }
                return Err(Refused);
            }
        })
    }

    /// Writes a register. `Ok(Some(vector))`: a level-triggered interrupt ended.
    pub fn write(&mut self, number: u32, value: u64, now: u64) -> Result<Option<u8>, Refused> {
        let x2apic = self.is_x2apic();
        // In x2APIC mode reserved bits fault; memory-mapped they are ignored.
        let allow = |mask: u64| if x2apic && value & !mask != 0 { Err(Refused) } else { Ok(()) };
        match number {
            register::ID if !x2apic => {
                self.id = (value >> 24) as u32 & 0xff;
                self.publish();
            }
            register::TPR => {
                allow(0xff)?;
                self.set_tpr(value as u8);
            }
            register::EOI => {
                allow(0)?;
                return Ok(self.end_of_interrupt());
            }
            register::LDR if !x2apic => {
                self.logical = value as u32 & 0xff00_0000;
                self.publish();
            }
            register::DFR if !x2apic => {
                self.format = value as u32 | 0x0fff_ffff;
                self.publish();
            }
            register::SVR => {
                allow(0x1ff)?;
                self.svr = value as u32 & 0x1ff;
                if self.svr & SVR_ENABLE == 0 {
                    for entry in &mut self.lvt {
                        *entry |= LVT_MASKED;
                    }
                }
                self.publish();
                self.look_again();
            }
            register::ESR => {
                allow(0)?;
                self.esr = std::mem::take(&mut self.errors);
            }
            register::ICR if x2apic => {
                if value & ICR_RESERVED != 0 {
                    return Err(Refused);
                }
                self.icr = value;
                self.send_command((value >> 32) as u32);
            }
            register::ICR => {
                // The delivery status always reads as idle.
                self.icr = self.icr & !0xffff_ffff | value & 0xcdfff & !(1 << 12);
                self.send_command((self.icr >> 56) as u32);
            }
            register::ICR_HIGH if !x2apic => self.icr = self.icr & 0xffff_ffff | (value & 0xff00_0000) << 32,
            register::LVT_TIMER..=register::LVT_ERROR => {
                let index = (number - register::LVT_TIMER) as usize;
                allow(u64::from(LVT_WRITABLE[index] | 1 << 12))?;
                let mut entry = value as u32 & LVT_WRITABLE[index];
                if self.svr & SVR_ENABLE == 0 {
                    entry |= LVT_MASKED;
                }
                self.lvt[index] = entry;
                if index == LVT_TIMER {
                    self.timer.set_mode(entry >> 17 & 3);
                }
            }
            register::TIMER_INITIAL => {
                allow(0xffff_ffff)?;
                self.timer.set_initial(value as u32, now);
            }
            register::TIMER_DIVIDE => {
                allow(0xb)?;
                self.timer.set_divide(value as u32 & 0xb, now);
            }
            register::SELF_IPI if x2apic => {
                allow(0xff)?;
                self.send_self(value as u8);
            }
            // Read-only registers: writes are errors in x2APIC mode and nothing otherwise.
            register::VERSION | register::PPR | register::TIMER_CURRENT | register::ISR..register::ESR if !x2apic => {}
            _ => {
                if !x2apic {
                    self.error(ESR_ILLEGAL_REGISTER);
                }
                return Err(Refused);
            }
        }
        Ok(None)
    }

    fn send_self(&mut self, vector: u8) {
        if vector < 16 {
            self.error(ESR_SEND_ILLEGAL_VECTOR);
        } else {
            self.inbox.post_fixed(vector, false);
        }
    }

    /// Carries out the interrupt command register (SDM vol. 3, 11.6.1).
    fn send_command(&mut self, destination: u32) {
        let command = self.icr as u32;
        let vector = command as u8;
        let mode = (command >> 8 & 7) as u8;
        let is_logical = command & 1 << 11 != 0;
        let everyone = if self.is_x2apic() { u32::MAX } else { 0xff };
        let destination = match command >> 18 & 3 {
            1 => Destination::Only(self.index),
            2 => Destination::All,
            3 => Destination::AllBut(self.index),
            _ if destination == everyone => Destination::Physical(u32::MAX),
            _ if is_logical => Destination::Logical(destination),
            _ => Destination::Physical(destination),
        };
        // INIT level de-assert only set arbitration ids of old processors.
        if mode == delivery::INIT && command & 1 << 15 != 0 && command & 1 << 14 == 0 {
            return;
        }
        if vector < 16 && matches!(mode, delivery::FIXED | delivery::LOWEST_PRIORITY) {
            self.error(ESR_SEND_ILLEGAL_VECTOR);
            return;
        }
        self.router.deliver(Message { destination, delivery: mode, vector, is_level: false });
    }
}
