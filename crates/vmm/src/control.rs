//! Reaches a machine from other threads, and carries what happens to the control thread.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use polder_devices::virtio::balloon::Balloon;
use polder_devices::virtio::console::Console;
use polder_devices::{AcpiRegisters, Serial};
use polder_machine::{GuestRequest, RequestSink};
use polder_memory::PAGE_SIZE;

use crate::gate::Gate;

/// Events that wait at most; a guest that asks for more in the moment before it is stopped is not heard.
const EVENTS_MAX: usize = 64;

/// What the control thread hears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    Guest(GuestRequest),
    TripleFault,
    /// A vCPU thread ended though nobody stopped it.
    VcpuDied {
        index: usize,
    },
    /// [`Control::stop`].
    Stop,
}

/// The parts of the running machine that other threads reach. Weak: a control that outlives its machine keeps nothing of it.
#[derive(Default)]
pub(crate) struct Running {
    pub(crate) gate: Weak<Gate>,
    pub(crate) keyboard: Keyboard,
    pub(crate) acpi: Weak<AcpiRegisters>,
    pub(crate) balloon: Weak<Balloon>,
    pub(crate) ram_bytes: u64,
}

/// How much of its memory a guest has: all of it but what it has put into the balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestShare {
    /// The machine's memory.
    pub ram_bytes: u64,
    /// What the guest was asked to have.
    pub target_bytes: u64,
    /// What it has, as it says itself.
    pub actual_bytes: u64,
    /// Whether it has a driver that hears what is asked of it.
    pub is_heard: bool,
}

/// Where typed text goes.
#[derive(Clone, Default)]
pub(crate) enum Keyboard {
    #[default]
    None,
    Serial(Weak<Serial>),
    Virtio(Weak<Console>),
}

impl Keyboard {
    fn push_input(&self, bytes: &[u8]) -> usize {
        match self {
            Keyboard::None => 0,
            Keyboard::Serial(serial) => serial.upgrade().map_or(0, |serial| serial.push_input(bytes)),
            Keyboard::Virtio(console) => console.upgrade().map_or(0, |console| console.push_input(bytes)),
        }
    }
}

#[derive(Default)]
struct Shared {
    events: Mutex<VecDeque<Event>>,
    changed: Condvar,
    running: Mutex<Running>,
    /// What the guest was asked to have; it holds over resets.
    share_target_bytes: Mutex<Option<u64>>,
}

/// A handle to a machine, whichever reset it is at. Cheap to clone; usable from any thread, before, during and after the run.
#[derive(Clone, Default)]
pub struct Control {
    shared: Arc<Shared>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Control {
    /// A handle for a machine that has yet to be run.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the machine at once, as pulling the plug does.
    pub fn stop(&self) {
        self.push(Event::Stop);
    }

    /// Presses the power button: asks the guest to switch itself off.
    pub fn press_power_button(&self) {
        if let Some(acpi) = lock(&self.shared.running).acpi.upgrade() {
            acpi.press_power_button();
        }
    }

    /// Types at the console; says how many bytes the machine took. The rest can be offered again a little later.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let keyboard = lock(&self.shared.running).keyboard.clone();
        keyboard.push_input(bytes)
    }

    /// Whether there is a machine: put together, and not yet at its end.
    pub fn is_running(&self) -> bool {
        lock(&self.shared.running).gate.strong_count() > 0
    }

    /// Stops all vCPUs until [`Control::resume`] and returns when they have stopped; whether there is a machine.
    pub fn pause(&self) -> bool {
        let gate = lock(&self.shared.running).gate.upgrade();
        gate.map(|gate| gate.pause()).is_some()
    }

    /// Lets the vCPUs run on; whether there is a machine.
    pub fn resume(&self) -> bool {
        let gate = lock(&self.shared.running).gate.upgrade();
        gate.map(|gate| gate.resume()).is_some()
    }

    /// Asks the guest to have so much of its memory and to lend the rest to the host, in whole pages; more than it has means all. The
    /// guest follows as far and as fast as it can. Whether there is a machine.
    pub fn set_guest_share(&self, bytes: u64) -> bool {
        *lock(&self.shared.share_target_bytes) = Some(bytes);
        self.apply_guest_share()
    }

    /// How much of its memory the guest has, if there is a machine.
    pub fn guest_share(&self) -> Option<GuestShare> {
        let running = lock(&self.shared.running);
        let balloon = running.balloon.upgrade()?;
        let without = |pages: u32| running.ram_bytes.saturating_sub(u64::from(pages) * PAGE_SIZE);
        Some(GuestShare {
            ram_bytes: running.ram_bytes,
            target_bytes: without(balloon.target_pages()),
            actual_bytes: without(balloon.actual_pages()),
            is_heard: balloon.has_driver(),
        })
    }

    fn apply_guest_share(&self) -> bool {
        // Held until the balloon knows: of two orders at once the later one is what remains.
        let target = lock(&self.shared.share_target_bytes);
        let running = lock(&self.shared.running);
        let balloon = running.balloon.upgrade();
        if let (Some(balloon), Some(bytes)) = (&balloon, *target) {
            let lent_bytes = running.ram_bytes.saturating_sub(bytes);
            balloon.set_target((lent_bytes / PAGE_SIZE).try_into().unwrap_or(u32::MAX));
        }
        balloon.is_some()
    }

    pub(crate) fn set_running(&self, running: Running) {
        *lock(&self.shared.running) = running;
        self.apply_guest_share();
    }

    pub(crate) fn push(&self, event: Event) {
        let mut events = lock(&self.shared.events);
        if event == Event::Stop {
            // Stopping never waits behind what a guest asks for.
            events.push_front(event);
            events.truncate(EVENTS_MAX);
        } else if events.len() < EVENTS_MAX {
            events.push_back(event);
        }
        self.shared.changed.notify_all();
    }

    /// The next event, or `None` if none came for so long.
    pub(crate) fn wait(&self, at_most: Duration) -> Option<Event> {
        let end = Instant::now() + at_most;
        let mut events = lock(&self.shared.events);
        loop {
            if let Some(event) = events.pop_front() {
                return Some(event);
            }
            let left = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
            events = self.shared.changed.wait_timeout(events, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether the machine was ordered to stop and the order has not been taken yet.
    pub(crate) fn is_stop_ordered(&self) -> bool {
        lock(&self.shared.events).contains(&Event::Stop)
    }

    /// Forgets what the machine that has just ended said; an order to stop stays.
    pub(crate) fn forget_guest_events(&self) {
        lock(&self.shared.events).retain(|event| *event == Event::Stop);
    }
}

impl RequestSink for Control {
    fn request(&self, request: GuestRequest) {
        self.push(Event::Guest(request));
    }
}
