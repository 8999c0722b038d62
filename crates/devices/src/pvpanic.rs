//! pvpanic: one port through which a guest kernel says that it panicked.
//!
//! Reading gives the events that the machine understands; writing reports one (docs/specs/pvpanic of QEMU; Linux
//! include/uapi/misc/pvpanic.h).

use std::sync::Arc;

use polder_machine::{AccessSize, BusDevice, GuestRequest, RequestSink};

/// The guest kernel panicked and will not go on.
const EVENT_PANICKED: u8 = 1 << 0;
/// The guest kernel panicked and a crash kernel takes over.
const EVENT_CRASH_LOADED: u8 = 1 << 1;

/// The pvpanic port, one byte.
pub struct Pvpanic {
    requests: Arc<dyn RequestSink>,
}

impl Pvpanic {
    /// A port that reports to `requests`.
    pub fn new(requests: Arc<dyn RequestSink>) -> Self {
        Pvpanic { requests }
    }
}

impl BusDevice for Pvpanic {
    fn read(&self, _offset: u64, _size: AccessSize) -> u64 {
        u64::from(EVENT_PANICKED | EVENT_CRASH_LOADED)
    }

    fn write(&self, _offset: u64, _size: AccessSize, value: u64) {
        let events = value as u8;
        if events & EVENT_PANICKED != 0 {
            self.requests.request(GuestRequest::Panicked);
        }
        if events & EVENT_CRASH_LOADED != 0 {
            self.requests.request(GuestRequest::CrashLoaded);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::RecordingRequests;

    #[test]
    fn each_event_becomes_its_request() {
        let requests = Arc::new(RecordingRequests::default());
        let device = Pvpanic::new(requests.clone());
        assert_eq!(device.read(0, AccessSize::Byte), 3);
        device.write(0, AccessSize::Byte, 1);
        device.write(0, AccessSize::Byte, 2);
        assert_eq!(requests.taken(), [GuestRequest::Panicked, GuestRequest::CrashLoaded]);
    }

    #[test]
    fn unknown_events_are_ignored() {
        let requests = Arc::new(RecordingRequests::default());
        Pvpanic::new(requests.clone()).write(0, AccessSize::Dword, 0xffff_fffc);
        assert!(requests.taken().is_empty());
    }
}
