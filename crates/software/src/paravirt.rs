//! What KVM offers its guests beside real hardware: a clock in shared memory, the end of an interrupt by a bit in memory, and
//! hypercalls. Layouts and numbers are KVM's (Linux, Documentation/virt/kvm/x86: msr.rst, cpuid.rst, hypercalls.rst).

use std::sync::atomic::{AtomicU32, Ordering};

use polder_memory::GuestAddress;

use crate::apic::{Destination, EVENT_KICK, Message, delivery};
use crate::cpu::{Cpu, RAX, RBX, RCX, RDX, RSI};
use crate::fault::Fault;
use crate::msr::number;
use crate::time::{host_tsc, ticks_to_ns};

/// Registers of the paravirtual features of one vCPU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paravirt {
    /// Address of the vCPU's clock page entry; bit 0: enabled.
    system_time: u64,
    wall_clock: u64,
    /// Address of the end-of-interrupt word; bit 0: enabled.
    eoi: u64,
    /// The engine has set the end-of-interrupt bit in memory and waits for the guest to clear it.
    eoi_offered: bool,
    version: u32,
}

/// Flags of the clock: time stamps of all vCPUs agree.
const TSC_STABLE: u8 = 1;

/// Hypercall numbers.
const HYPERCALL_KICK_CPU: u64 = 5;
const HYPERCALL_CLOCK_PAIRING: u64 = 9;
const HYPERCALL_SEND_IPI: u64 = 10;
const HYPERCALL_SCHED_YIELD: u64 = 11;
const ERROR_NO_SUCH_CALL: u64 = -1000i64 as u64;
const ERROR_NOT_PERMITTED: u64 = -1i64 as u64;

/// Multiplier and shift that turn TSC ticks into nanoseconds: `((ticks << shift) * multiplier) >> 32`, a negative shift to the right.
fn scale(tsc_khz: u64) -> (u32, i8) {
    let khz = u128::from(tsc_khz.max(1));
    let mut shift = 0i8;
    let multiplier = |shift: i8| {
        let numerator = 1_000_000u128 << 32;
        if shift >= 0 { (numerator >> shift) / khz } else { (numerator << -shift) / khz }
    };
    while multiplier(shift) > u128::from(u32::MAX) {
        shift += 1;
    }
    while multiplier(shift) < 1 << 31 {
        shift -= 1;
    }
    (multiplier(shift) as u32, shift)
}

impl Cpu {
    pub(crate) fn read_paravirtual_msr(&mut self, msr: u32) -> Option<u64> {
        Some(match msr {
            number::KVM_SYSTEM_TIME | number::KVM_SYSTEM_TIME_OLD => self.paravirt.system_time,
            number::KVM_WALL_CLOCK | number::KVM_WALL_CLOCK_OLD => self.paravirt.wall_clock,
            number::KVM_PV_EOI => self.paravirt.eoi,
            _ => return None,
        })
    }

    pub(crate) fn write_paravirtual_msr(&mut self, msr: u32, value: u64) -> Option<()> {
        match msr {
            number::KVM_SYSTEM_TIME | number::KVM_SYSTEM_TIME_OLD => {
                self.paravirt.system_time = value;
                self.update_system_time();
            }
            number::KVM_WALL_CLOCK | number::KVM_WALL_CLOCK_OLD => {
                self.paravirt.wall_clock = value;
                self.write_wall_clock(value);
            }
            number::KVM_PV_EOI => {
                if value & 1 != 0 && value & 2 != 0 {
                    return None;
                }
                self.end_quiet_interrupt();
                self.paravirt.eoi = value;
                self.paravirt.eoi_offered = false;
            }
            _ => return None,
        }
        Some(())
    }

    /// Nanoseconds since the machine's clock began.
    fn system_ns(&self) -> u64 {
        ticks_to_ns(host_tsc().saturating_sub(self.epoch_tsc), self.apic.timer.tsc_khz())
    }

    /// Writes the clock's page (`struct pvclock_vcpu_time_info`). It counts from the machine's epoch, the same for all vCPUs,
    /// and changes only when the guest moves its TSC.
    pub(crate) fn update_system_time(&mut self) {
        if self.paravirt.system_time & 1 == 0 {
            return;
        }
        let at = self.paravirt.system_time & !1;
        let (multiplier, shift) = scale(self.apic.timer.tsc_khz());
        let odd = self.paravirt.version.wrapping_add(1) | 1;
        let mut bytes = [0; 32];
        bytes[0..4].copy_from_slice(&odd.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.epoch_tsc.wrapping_add(self.tsc_offset).to_le_bytes());
        bytes[24..28].copy_from_slice(&multiplier.to_le_bytes());
        bytes[28] = shift as u8;
        bytes[29] = TSC_STABLE;
        self.paravirt.version = odd.wrapping_add(1);
        // A page that is not RAM is the guest's own mistake.
        let memory = &self.services.memory;
        let _ = memory.write(GuestAddress(at), &bytes[0..4]);
        let _ = memory.write(GuestAddress(at.wrapping_add(4)), &bytes[4..]);
        let _ = memory.write(GuestAddress(at), &self.paravirt.version.to_le_bytes());
    }

    /// Writes the wall-clock structure: the wall time at which the system time was zero.
    fn write_wall_clock(&mut self, at: u64) {
        let start_ns = self.services.clock.wall_ns().saturating_sub(self.system_ns());
        let words = [2u32, (start_ns / 1_000_000_000) as u32, (start_ns % 1_000_000_000) as u32];
        for (index, word) in (0..).zip(words) {
            let _ = self.services.memory.write(GuestAddress(at.wrapping_add(4 * index)), &word.to_le_bytes());
        }
    }

    fn eoi_word(&self) -> Option<&AtomicU32> {
        let range = self.services.memory.host_range(GuestAddress(self.paravirt.eoi & !3), 4).ok()?;
        // SAFETY: four mapped bytes of guest RAM, aligned; shared with the guest as an atomic.
        Some(unsafe { AtomicU32::from_ptr(range.pointer.cast()) })
    }

    /// Offers the guest to end the interrupt that was just accepted by clearing a bit in memory; only while no other waits.
    pub(crate) fn offer_quiet_end(&mut self) {
        if self.paravirt.eoi & 1 != 0
            && self.apic.may_end_quietly()
            && let Some(word) = self.eoi_word()
        {
            word.fetch_or(1, Ordering::SeqCst);
            self.services.memory.mark_written(GuestAddress(self.paravirt.eoi & !3), 4);
            self.paravirt.eoi_offered = true;
        }
    }

    /// Takes the offer back; if the guest has accepted it, the interrupt ends here. Called before anything looks at the local APIC.
    #[inline]
    pub(crate) fn end_quiet_interrupt(&mut self) {
        if self.paravirt.eoi_offered {
            self.take_back_offer();
        }
    }

    #[cold]
    fn take_back_offer(&mut self) {
        self.paravirt.eoi_offered = false;
        let Some(word) = self.eoi_word() else { return };
        let still_there = word.fetch_and(!1, Ordering::SeqCst) & 1 != 0;
        self.services.memory.mark_written(GuestAddress(self.paravirt.eoi & !3), 4);
        if !still_there && let Some(vector) = self.apic.end_of_interrupt() {
            self.services.eoi.end_of_interrupt(vector);
        }
    }

    /// VMCALL: a hypercall. Number in RAX, arguments in RBX, RCX, RDX, RSI, result in RAX.
    pub fn hypercall(&mut self) -> Result<(), Fault> {
        let wide = self.is_64_bit();
        let argument = |register: usize| if wide { self.gpr[register] } else { self.gpr[register] & 0xffff_ffff };
        let (call, a, b, c, d) = (argument(RAX), argument(RBX), argument(RCX), argument(RDX), argument(RSI));
        let result = if self.cpl() != 0 {
            ERROR_NOT_PERMITTED
        } else {
            match call {
                HYPERCALL_KICK_CPU => {
                    if let Some(inbox) = self.apic.router().inboxes().get(b as usize) {
                        inbox.post_event(EVENT_KICK);
                    }
                    0
                }
                HYPERCALL_SEND_IPI => self.send_ipis([a, b], c as u32, d, wide),
                HYPERCALL_SCHED_YIELD => 0,
                HYPERCALL_CLOCK_PAIRING => ERROR_NO_SUCH_CALL,
                _ => ERROR_NO_SUCH_CALL,
            }
        };
        self.gpr[RAX] = if wide { result } else { result & 0xffff_ffff };
        Ok(())
    }

    /// Sends a fixed interrupt or an NMI to the APIC ids `first + n` for each bit n of the mask; the number of receivers.
    fn send_ipis(&self, mask: [u64; 2], first: u32, command: u64, wide: bool) -> u64 {
        let delivery = (command >> 8 & 7) as u8;
        let vector = command as u8;
        let word_bits = if wide { 64 } else { 32 };
        let mut count = 0;
        for (word, bits) in (0..).zip(mask) {
            for bit in 0..word_bits {
                let id = first.wrapping_add(word * word_bits + bit);
                let wanted = bits >> bit & 1 != 0 && matches!(delivery, delivery::FIXED | delivery::NMI);
                if wanted && (delivery == delivery::NMI || vector >= 16) {
                    let message = Message { destination: Destination::Physical(id), delivery, vector, is_level: false };
                    count += u64::from(self.apic.router().deliver(message));
                }
            }
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbench::{DATA, TestBench};

    fn word(bench: &TestBench, offset: u64) -> u32 {
        u32::from_le_bytes(bench.read(DATA + offset))
    }

    #[test]
    fn the_clock_page_turns_the_tsc_into_nanoseconds_since_the_epoch() {
        let mut bench = TestBench::new();
        bench.cpu.write_msr(number::KVM_SYSTEM_TIME, DATA | 1).unwrap();
        assert_eq!((word(&bench, 0), word(&bench, 28) >> 8 & 0xff), (2, u32::from(TSC_STABLE)));
        let (stamp, base) = (bench.read_u64(DATA + 8), bench.read_u64(DATA + 16));
        let (multiplier, shift) = (word(&bench, 24), word(&bench, 28) as i8);
        let delta = u128::from(bench.cpu.tsc().wrapping_sub(stamp));
        let shifted = if shift >= 0 { delta << shift } else { delta >> -shift };
        let ns = base + ((shifted * u128::from(multiplier)) >> 32) as u64;
        assert!(bench.cpu.system_ns().abs_diff(ns) < 10_000_000);
        // Moving the TSC moves the stamp, not the time.
        bench.cpu.write_msr(number::TSC_ADJUST, 1 << 40).unwrap();
        assert_eq!((word(&bench, 0), bench.read_u64(DATA + 8)), (4, stamp.wrapping_add(1 << 40)));
        bench.cpu.write_msr(number::KVM_SYSTEM_TIME, 0).unwrap();
        bench.cpu.write_msr(number::TSC_ADJUST, 0).unwrap();
        assert_eq!(word(&bench, 0), 4);
    }

    #[test]
    fn the_wall_clock_tells_when_the_system_time_was_zero() {
        let mut bench = TestBench::new();
        bench.cpu.write_msr(number::KVM_WALL_CLOCK, DATA).unwrap();
        let start_ns = u64::from(word(&bench, 4)) * 1_000_000_000 + u64::from(word(&bench, 8));
        let now_ns = bench.cpu.services.clock.wall_ns();
        assert_eq!(word(&bench, 0), 2);
        assert!((start_ns + bench.cpu.system_ns()).abs_diff(now_ns) < 1_000_000_000);
    }

    #[test]
    fn a_clock_outside_ram_is_the_guests_own_mistake() {
        let mut bench = TestBench::new();
        bench.cpu.write_msr(number::KVM_SYSTEM_TIME, u64::MAX).unwrap();
        bench.cpu.write_msr(number::KVM_WALL_CLOCK, u64::MAX).unwrap();
        bench.cpu.write_msr(number::KVM_PV_EOI, !2).unwrap();
        bench.cpu.store_local_apic(0xf0, 0x1ff, 4);
        bench.cpu.apic.inbox().post_fixed(0x41, false);
        bench.cpu.apic.accept(0x41);
        bench.cpu.offer_quiet_end();
        bench.cpu.end_quiet_interrupt();
    }

    #[test]
    fn clearing_the_offered_bit_ends_the_interrupt() {
        let mut bench = TestBench::new();
        bench.cpu.write_msr(number::KVM_PV_EOI, DATA | 1).unwrap();
        bench.cpu.store_local_apic(0xf0, 0x1ff, 4);
        for accepts in [true, false] {
            bench.cpu.apic.inbox().post_fixed(0x41, false);
            bench.cpu.apic.accept(0x41);
            bench.cpu.offer_quiet_end();
            assert_eq!(word(&bench, 0), 1);
            if accepts {
                bench.write(DATA, &[0]);
            }
            bench.cpu.end_quiet_interrupt();
            assert_eq!((word(&bench, 0), bench.cpu.apic.ppr()), (0, if accepts { 0 } else { 0x40 }));
        }
    }

    #[test]
    fn no_quiet_end_is_offered_for_level_interrupts_or_while_others_wait() {
        let mut bench = TestBench::new();
        bench.cpu.write_msr(number::KVM_PV_EOI, DATA | 1).unwrap();
        bench.cpu.store_local_apic(0xf0, 0x1ff, 4);
        bench.cpu.apic.inbox().post_fixed(0x41, true);
        bench.cpu.apic.accept(0x41);
        bench.cpu.offer_quiet_end();
        assert_eq!(word(&bench, 0), 0);
        bench.cpu.apic.inbox().post_fixed(0x61, false);
        bench.cpu.apic.accept(0x61);
        bench.cpu.apic.inbox().post_fixed(0x31, false);
        bench.cpu.offer_quiet_end();
        assert_eq!(word(&bench, 0), 0);
    }

    #[test]
    fn hypercalls_send_interrupts_and_refuse_users() {
        let mut bench = TestBench::new();
        bench.cpu.store_local_apic(0xf0, 0x1ff, 4);
        let call = |bench: &mut TestBench, arguments: [u64; 5]| {
            for (register, value) in [RAX, RBX, RCX, RDX, RSI].into_iter().zip(arguments) {
                bench.cpu.gpr[register] = value;
            }
            bench.cpu.hypercall().unwrap();
            bench.cpu.gpr[RAX]
        };
        assert_eq!(call(&mut bench, [HYPERCALL_SEND_IPI, 0b11, 0, 0, 0x41]), 1);
        assert_eq!(bench.cpu.apic.inbox().highest_request(), Some(0x41));
        assert_eq!(call(&mut bench, [HYPERCALL_KICK_CPU, 0, 0, 0, 0]), 0);
        assert!(bench.cpu.apic.inbox().take_event(EVENT_KICK));
        assert_eq!(call(&mut bench, [HYPERCALL_KICK_CPU, 0, u64::MAX, 0, 0]), 0);
        assert_eq!(call(&mut bench, [99, 0, 0, 0, 0]), ERROR_NO_SUCH_CALL);
        bench.set_mode(crate::cpu::CodeSize::Bits64, 3);
        assert_eq!(call(&mut bench, [HYPERCALL_KICK_CPU, 0, 0, 0, 0]), ERROR_NOT_PERMITTED);
    }

    #[test]
    fn the_scale_turns_ticks_into_nanoseconds() {
        for khz in [1, 999, 1_000_000, 2_596_120, 5_000_000, 123_456_789] {
            let (multiplier, shift) = scale(khz);
            let ticks = u128::from(khz) * 1000;
            let shifted = if shift >= 0 { ticks << shift } else { ticks >> -shift };
            let ns = (shifted * u128::from(multiplier)) >> 32;
            assert!(
                ns.abs_diff(1_000_000_000) <= 1_000_000_000 / (khz.min(1 << 20) as u128 * 100).max(1) + 4,
                "{khz}: {ns}"
            );
        }
    }
}
