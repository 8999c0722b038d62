//! What other threads put to a vCPU, and how they get its attention.
//!
//! Senders first record what they want (a bit in the interrupt request register, an event bit, a queue entry), then call
//! [`Inbox::signal`]. The vCPU looks at its attention flag between blocks; when it finds it set, it clears it and *then* reads
//! everything. A record made after the flag was cleared comes with a new signal, so none is lost.
//!
//! Sleeping (HLT, waiting for SIPI) is the same with a futex. The sleeper stores SLEEPING, then looks at the attention flag; a signal
//! stores the flag, then looks for SLEEPING. All four are sequentially consistent, so at least one of the two sees the other's
//! store: either the sleeper does not go to sleep, or the sender wakes it. If the sender's change comes between the sleeper's look
//! and its futex call, the word no longer is SLEEPING and the kernel refuses to wait.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use rustix::thread::futex;

use crate::translate::ArenaMemory;

/// Someone called [`polder_machine::VcpuHandle::stop`].
pub const EVENT_STOP: u32 = 1 << 0;
/// An INIT message.
pub const EVENT_INIT: u32 = 1 << 1;
/// A start-up message; its vector is in the bits from [`SIPI_VECTOR_SHIFT`].
pub const EVENT_SIPI: u32 = 1 << 2;
/// A non-maskable interrupt.
pub const EVENT_NMI: u32 = 1 << 3;
/// The hypercall that wakes a halted vCPU.
pub const EVENT_KICK: u32 = 1 << 4;
/// Another non-maskable interrupt came before the first was taken out of the inbox.
pub const EVENT_SECOND_NMI: u32 = 1 << 5;
const SIPI_VECTOR_SHIFT: u32 = 8;

/// Stale-code notices that wait at most; beyond that all decoded code goes.
const STALE_LEN_MAX: usize = 256;

const AWAKE: u32 = 0;
const SLEEPING: u32 = 1;

/// How others see this vCPU's local APIC: what decides whether a message is for it.
#[derive(Debug, Default)]
pub struct Address {
    pub id: AtomicU32,
    pub logical: AtomicU32,
    /// One of [`mode`].
    pub mode: AtomicU8,
    /// Destination format register: cluster model.
    pub is_cluster: AtomicBool,
    /// Spurious-vector register, bit 8.
    pub is_enabled: AtomicBool,
    /// Task priority, for lowest-priority delivery.
    pub priority: AtomicU8,
}

/// Modes of a local APIC.
pub mod mode {
    pub const OFF: u8 = 0;
    pub const XAPIC: u8 = 1;
    pub const X2APIC: u8 = 2;
}

/// Decoded code that went stale.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Stale {
    /// (page number, granules)
    pub pages: Vec<(u64, u64)>,
    /// There were too many to keep: drop everything.
    pub everything: bool,
}

/// One vCPU's inbox. Shared by all threads; emptied by the vCPU's own.
#[derive(Debug, Default)]
pub struct Inbox {
    attention: AtomicBool,
    sleep: AtomicU32,
    events: AtomicU32,
    /// Interrupt request register.
    requests: [AtomicU64; 4],
    /// Trigger mode register: set for level-triggered.
    levels: [AtomicU64; 4],
    /// An external interrupt's vector with bit 8 set; else 0.
    external: AtomicU32,
    stale: Mutex<Stale>,
    /// Where the vCPU's translated code looks for attention.
    arena: OnceLock<Arc<ArenaMemory>>,
    pub address: Address,
}

impl Inbox {
    /// The flag that running code is interrupted by.
    pub fn attention(&self) -> &AtomicBool {
        &self.attention
    }

    /// Tells where the vCPU's translated code looks for attention; once.
    pub fn set_arena(&self, arena: Arc<ArenaMemory>) {
        let _ = self.arena.set(arena);
    }

    /// Makes the vCPU's thread look at its inbox soon; it is awake. Safe to call in a signal handler.
    pub fn attract(&self) {
        self.attention.store(true, Ordering::SeqCst);
        if let Some(arena) = self.arena.get() {
            arena.attention().store(0, Ordering::SeqCst);
        }
    }

    /// Makes the vCPU look at its inbox soon, asleep or not.
    pub fn signal(&self) {
        self.attract();
        if self.sleep.load(Ordering::SeqCst) == SLEEPING && self.sleep.swap(AWAKE, Ordering::SeqCst) == SLEEPING {
            // Failing means that nobody waits any more.
            let _ = futex::wake(&self.sleep, futex::Flags::PRIVATE, 1);
        }
    }

    /// Clears the attention flag; whatever was signalled before can be read now.
    pub fn take_attention(&self) -> bool {
        self.attention.load(Ordering::Relaxed) && self.attention.swap(false, Ordering::SeqCst)
    }

    /// Sleeps until a signal, or for `timeout_ns` at most (`None`: without end). Returns at once if there was a signal since the attention flag was cleared.
    pub fn sleep(&self, timeout_ns: Option<u64>) {
        self.sleep.store(SLEEPING, Ordering::SeqCst);
        if !self.attention.load(Ordering::SeqCst) {
            let timeout = timeout_ns.map(|ns| rustix::thread::Timespec {
                tv_sec: (ns / 1_000_000_000) as i64,
                tv_nsec: (ns % 1_000_000_000) as i64,
            });
            // Time out, interruption and a changed word all mean: look again.
            let _ = futex::wait(&self.sleep, futex::Flags::PRIVATE, SLEEPING, timeout.as_ref());
        }
        self.sleep.store(AWAKE, Ordering::SeqCst);
    }

    /// Records events and signals.
    pub fn post_event(&self, events: u32) {
        self.events.fetch_or(events, Ordering::SeqCst);
        self.signal();
    }

    /// Records a non-maskable interrupt; a processor holds two of them, one in its local APIC and one in its core.
    pub fn post_nmi(&self) {
        let _ = self.events.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |events| {
            Some(events | if events & EVENT_NMI != 0 { EVENT_SECOND_NMI } else { EVENT_NMI })
        });
        self.signal();
    }

    /// Records an INIT message; a start-up message that came before it no longer counts.
    pub fn post_init(&self) {
        let sipi = EVENT_SIPI | 0xff << SIPI_VECTOR_SHIFT;
        let _ =
            self.events.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |events| Some(events & !sipi | EVENT_INIT));
        self.signal();
    }

    /// Records a start-up message; the first of several counts.
    pub fn post_sipi(&self, vector: u8) {
        let _ = self.events.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |events| {
            (events & EVENT_SIPI == 0).then_some(events | EVENT_SIPI | u32::from(vector) << SIPI_VECTOR_SHIFT)
        });
        self.signal();
    }

    /// Takes all events; the second is the start-up message's vector.
    pub fn take_events(&self) -> (u32, u8) {
        if self.events.load(Ordering::Relaxed) == 0 {
            return (0, 0);
        }
        let events = self.events.swap(0, Ordering::SeqCst);
        (events & 0xff, (events >> SIPI_VECTOR_SHIFT) as u8)
    }

    /// Takes one kind of event, and leaves the others.
    pub fn take_event(&self, event: u32) -> bool {
        self.events.load(Ordering::Relaxed) & event != 0 && self.events.fetch_and(!event, Ordering::SeqCst) & event != 0
    }

    /// Records an external interrupt; the last of several counts.
    pub fn post_external(&self, vector: u8) {
        self.external.store(0x100 | u32::from(vector), Ordering::SeqCst);
        self.signal();
    }

    /// The external interrupt that waits, if there is one.
    pub fn external(&self) -> Option<u8> {
        let external = self.external.load(Ordering::Relaxed);
        (external != 0).then_some(external as u8)
    }

    /// Takes the external interrupt that waits.
    pub fn take_external(&self) -> Option<u8> {
        let external = self.external.swap(0, Ordering::SeqCst);
        (external != 0).then_some(external as u8)
    }

    /// Records a fixed interrupt and signals.
    pub fn post_fixed(&self, vector: u8, is_level: bool) {
        let (word, bit) = (usize::from(vector / 64), 1 << (vector % 64));
        if is_level {
            self.levels[word].fetch_or(bit, Ordering::SeqCst);
        } else if self.levels[word].load(Ordering::Relaxed) & bit != 0 {
            self.levels[word].fetch_and(!bit, Ordering::SeqCst);
        }
        self.requests[word].fetch_or(bit, Ordering::SeqCst);
        self.signal();
    }

    /// The highest requested vector.
    #[inline]
    pub fn highest_request(&self) -> Option<u8> {
        (0..4).rev().find_map(|word: usize| {
            let bits = self.requests[word].load(Ordering::Relaxed);
            (bits != 0).then(|| (word as u8) * 64 + 63 - bits.leading_zeros() as u8)
        })
    }

    /// Withdraws a request: it was accepted.
    pub fn take_request(&self, vector: u8) {
        self.requests[usize::from(vector / 64)].fetch_and(!(1 << (vector % 64)), Ordering::SeqCst);
    }

    /// Whether a vector's latest interrupt was level-triggered.
    pub fn is_level(&self, vector: u8) -> bool {
        self.levels[usize::from(vector / 64)].load(Ordering::SeqCst) & 1 << (vector % 64) != 0
    }

    /// 32 bits of the interrupt request register.
    pub fn request_bits(&self, index: usize) -> u32 {
        (self.requests[(index / 2) & 3].load(Ordering::SeqCst) >> (32 * (index % 2))) as u32
    }

    /// 32 bits of the trigger mode register.
    pub fn level_bits(&self, index: usize) -> u32 {
        (self.levels[(index / 2) & 3].load(Ordering::SeqCst) >> (32 * (index % 2))) as u32
    }

    /// Drops all interrupt requests.
    pub fn clear_requests(&self) {
        for word in self.requests.iter().chain(&self.levels) {
            word.store(0, Ordering::SeqCst);
        }
    }

    /// Records that decoded code went stale, and signals.
    pub fn post_stale(&self, page_number: u64, granules: u64) {
        {
            let mut stale = self.stale.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if stale.everything || stale.pages.len() >= STALE_LEN_MAX {
                stale.everything = true;
                stale.pages.clear();
            } else if let Some(entry) = stale.pages.iter_mut().find(|entry| entry.0 == page_number) {
                entry.1 |= granules;
            } else {
                stale.pages.push((page_number, granules));
            }
        }
        self.signal();
    }

    /// Takes the notices of stale code.
    pub fn take_stale(&self) -> Stale {
        std::mem::take(&mut self.stale.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn no_wake_up_is_lost() {
        const ROUNDS: u32 = 20_000;
        let inbox = Arc::new(Inbox::default());
        let answer = Arc::new(Inbox::default());
        let sleeper = {
            let (inbox, answer) = (inbox.clone(), answer.clone());
            std::thread::spawn(move || {
                let mut seen = 0;
                while seen < ROUNDS {
                    inbox.take_attention();
                    match inbox.highest_request() {
                        Some(vector) => {
                            inbox.take_request(vector);
                            seen += 1;
                            answer.post_event(EVENT_KICK);
                        }
                        // Without end: a lost wake-up hangs the test.
                        None => inbox.sleep(None),
                    }
                }
            })
        };
        for round in 0..ROUNDS {
            inbox.post_fixed((round % 256) as u8, false);
            loop {
                answer.take_attention();
                if answer.take_event(EVENT_KICK) {
                    break;
                }
                answer.sleep(None);
            }
        }
        sleeper.join().unwrap();
    }

    #[test]
    fn an_init_forgets_the_start_up_message_before_it() {
        let inbox = Inbox::default();
        inbox.post_sipi(0x10);
        inbox.post_init();
        assert_eq!(inbox.take_events(), (EVENT_INIT, 0));
        inbox.post_init();
        inbox.post_sipi(0x11);
        inbox.post_sipi(0x12);
        assert_eq!(inbox.take_events(), (EVENT_INIT | EVENT_SIPI, 0x11));
        assert_eq!(inbox.take_events(), (0, 0));
    }

    #[test]
    fn too_many_stale_pages_become_everything() {
        let inbox = Inbox::default();
        for page in 0..=STALE_LEN_MAX as u64 {
            inbox.post_stale(page, 1);
        }
        assert_eq!(inbox.take_stale(), Stale { pages: Vec::new(), everything: true });
        inbox.post_stale(3, 1);
        inbox.post_stale(3, 4);
        assert_eq!(inbox.take_stale(), Stale { pages: vec![(3, 5)], everything: false });
    }

    #[test]
    fn the_highest_request_comes_first() {
        let inbox = Inbox::default();
        assert_eq!(inbox.highest_request(), None);
        inbox.post_fixed(0x31, false);
        inbox.post_fixed(0xef, true);
        assert_eq!(inbox.highest_request(), Some(0xef));
        assert!(inbox.is_level(0xef) && !inbox.is_level(0x31));
        inbox.take_request(0xef);
        assert_eq!(inbox.highest_request(), Some(0x31));
        inbox.post_fixed(0xef, false);
        assert!(!inbox.is_level(0xef));
    }
}
