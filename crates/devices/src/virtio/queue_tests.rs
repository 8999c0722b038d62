//! Queues as hostile drivers write them.

use polder_memory::{GuestAddress, GuestMemory};
use proptest::prelude::*;

use super::testing::{INDIRECT, NEXT, WRITE};
use super::{CHAIN_LEN_MAX, FEATURE_EVENT_INDEX, FEATURE_INDIRECT, Queue, QueueError, QueuePlace};

const RAM: u64 = 1 << 20;
const HIGH: u64 = 1 << 32;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const SIZE: u16 = 16;

fn memory() -> GuestMemory {
    GuestMemory::new(&[(GuestAddress(0), RAM), (GuestAddress(HIGH), RAM)]).unwrap()
}

fn place() -> QueuePlace {
    QueuePlace {
        size: SIZE,
        descriptors: GuestAddress(DESCRIPTORS),
        available: GuestAddress(AVAILABLE),
        used: GuestAddress(USED),
    }
}

fn queue(memory: &GuestMemory, features: u64) -> Queue {
    Queue::new(memory.clone(), 0, place(), SIZE, features).unwrap()
}

fn put(memory: &GuestMemory, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
    let bytes = [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
    memory.write(GuestAddress(table + 16 * u64::from(index)), &bytes).unwrap();
}

fn offer(memory: &GuestMemory, heads: &[u16]) {
    let mut index = memory.load_u16(GuestAddress(AVAILABLE + 2)).unwrap();
    for &head in heads {
        memory.store_u16(GuestAddress(AVAILABLE + 4 + 2 * u64::from(index % SIZE)), head).unwrap();
        index = index.wrapping_add(1);
    }
    memory.store_u16(GuestAddress(AVAILABLE + 2), index).unwrap();
}

/// What popping one chain with these descriptors gives.
fn pop_one(features: u64, descriptors: &[(u64, u32, u16, u16)]) -> Result<(u64, u64), QueueError> {
    let memory = memory();
    for (index, &(address, len, flags, next)) in (0..).zip(descriptors) {
        put(&memory, DESCRIPTORS, index, address, len, flags, next);
    }
    offer(&memory, &[0]);
    let chain = queue(&memory, features).pop()?.expect("a chain waits");
    Ok((chain.readable.len(), chain.writable.len()))
}

#[test]
fn a_chain_is_split_into_what_is_read_and_what_is_written() {
    let chain = [(0x8000, 16, NEXT, 1), (HIGH, 512, NEXT | WRITE, 2), (0x9000, 1, WRITE, 0)];
    assert_eq!(pop_one(0, &chain), Ok((16, 513)));
}

#[test]
fn chains_that_loop_end_with_an_error() {
    assert_eq!(pop_one(0, &[(0x8000, 0, NEXT, 0)]), Err(QueueError::ChainLength));
    assert_eq!(pop_one(0, &[(0x8000, 1, NEXT, 1), (0x8000, 1, NEXT, 0)]), Err(QueueError::ChainLength));
}

#[test]
fn descriptors_outside_the_table_are_refused() {
    let error = QueueError::DescriptorIndex { index: SIZE, len: SIZE.into() };
    assert_eq!(pop_one(0, &[(0x8000, 1, NEXT, SIZE)]), Err(error));
    let memory = memory();
    offer(&memory, &[0xffff]);
    let error = QueueError::DescriptorIndex { index: 0xffff, len: SIZE.into() };
    assert_eq!(queue(&memory, 0).pop().unwrap_err(), error);
}

#[test]
fn buffers_outside_memory_or_across_its_end_are_refused() {
    for (address, len) in [(RAM, 1), (RAM - 1, 2), (u64::MAX, 1), (u64::MAX, u32::MAX), (HIGH - 1, 2), (0, u32::MAX)] {
        let error = QueueError::Buffer { address: GuestAddress(address), len };
        assert_eq!(pop_one(0, &[(address, len, 0, 0)]), Err(error));
    }
    // An empty buffer lies nowhere.
    assert_eq!(pop_one(0, &[(u64::MAX, 0, 0, 0)]), Ok((0, 0)));
}

#[test]
fn a_buffer_to_read_after_one_to_write_is_refused() {
    assert_eq!(pop_one(0, &[(0x8000, 1, NEXT | WRITE, 1), (0x8000, 1, 0, 0)]), Err(QueueError::Order));
}

#[test]
fn chains_of_4_gib_are_refused() {
    let memory = GuestMemory::new(&[(GuestAddress(0), RAM), (GuestAddress(HIGH), 1 << 31)]).unwrap();
    for index in 0..3 {
        put(&memory, DESCRIPTORS, index, HIGH, 1 << 31, if index < 2 { NEXT } else { 0 }, index + 1);
    }
    offer(&memory, &[0]);
    assert_eq!(queue(&memory, 0).pop().unwrap_err(), QueueError::TooMuch);
}

#[test]
fn indirect_tables_are_followed_once_and_checked() {
    let memory = memory();
    let table = 0x5000;
    let pop = |len: u32, flags: u16, features: u64| {
        let memory = memory.clone();
        memory.store_u16(GuestAddress(AVAILABLE + 2), 0).unwrap();
        put(&memory, DESCRIPTORS, 0, table, len, flags, 0);
        offer(&memory, &[0]);
        queue(&memory, features).pop().map(|chain| chain.map(|chain| chain.writable.len()))
    };
    put(&memory, table, 0, 0x8000, 100, WRITE | NEXT, 2);
    put(&memory, table, 2, 0x8000, 28, WRITE, 0);
    assert_eq!(pop(48, INDIRECT, FEATURE_INDIRECT), Ok(Some(128)));
    // Not negotiated, empty, uneven, continued.
    assert_eq!(pop(48, INDIRECT, 0), Err(QueueError::Indirect { len: 48 }));
    assert_eq!(pop(0, INDIRECT, FEATURE_INDIRECT), Err(QueueError::Indirect { len: 0 }));
    assert_eq!(pop(47, INDIRECT, FEATURE_INDIRECT), Err(QueueError::Indirect { len: 47 }));
    assert_eq!(pop(48, INDIRECT | NEXT, FEATURE_INDIRECT), Err(QueueError::Indirect { len: 48 }));
    // Too short for the index that it uses, and larger than memory.
    assert_eq!(pop(32, INDIRECT, FEATURE_INDIRECT), Err(QueueError::DescriptorIndex { index: 2, len: 2 }));
    let error = QueueError::Buffer { address: GuestAddress(table), len: 0xffff_fff0 };
    assert_eq!(pop(0xffff_fff0, INDIRECT, FEATURE_INDIRECT), Err(error));
    // A table inside a table.
    put(&memory, table, 2, table, 48, INDIRECT, 0);
    assert_eq!(pop(48, INDIRECT, FEATURE_INDIRECT), Err(QueueError::Indirect { len: 48 }));
    // A table that loops.
    put(&memory, table, 2, 0x8000, 1, WRITE | NEXT, 0);
    assert_eq!(pop(48, INDIRECT, FEATURE_INDIRECT), Err(QueueError::ChainLength));
}

#[test]
fn an_indirect_chain_has_a_bounded_length() {
    let memory = memory();
    let table = 0x1_0000;
    for index in 0..CHAIN_LEN_MAX as u16 + 8 {
        put(&memory, table, index, 0x8000, 1, NEXT, index + 1);
    }
    put(&memory, DESCRIPTORS, 0, table, (CHAIN_LEN_MAX + 9) * 16, INDIRECT, 0);
    offer(&memory, &[0]);
    assert_eq!(queue(&memory, FEATURE_INDIRECT).pop().unwrap_err(), QueueError::ChainLength);
}

#[test]
fn an_available_index_that_runs_away_is_refused() {
    let memory = memory();
    let mut queue = queue(&memory, 0);
    memory.store_u16(GuestAddress(AVAILABLE + 2), SIZE).unwrap();
    assert_eq!(queue.has_waiting(), Ok(true));
    memory.store_u16(GuestAddress(AVAILABLE + 2), SIZE + 1).unwrap();
    let mut queue = self::queue(&memory, 0);
    assert_eq!(queue.pop().unwrap_err(), QueueError::Runaway { ahead: SIZE + 1, size: SIZE });
    assert!(queue.enable_notifications().is_err());
}

#[test]
fn impossible_queues_are_refused() {
    let memory = memory();
    let make = |change: fn(&mut QueuePlace)| {
        let mut place = place();
        change(&mut place);
        Queue::new(memory.clone(), 0, place, SIZE, 0).map(|_| ())
    };
    assert_eq!(make(|_| {}), Ok(()));
    for size in [0, 3, 32, 0xffff] {
        let place = QueuePlace { size, ..place() };
        assert_eq!(Queue::new(memory.clone(), 0, place, SIZE, 0).map(|_| ()), Err(QueueError::Size { size }));
    }
    assert!(make(|place| place.descriptors = GuestAddress(8)).is_err());
    assert!(make(|place| place.available = GuestAddress(1)).is_err());
    assert!(make(|place| place.used = GuestAddress(2)).is_err());
    assert!(make(|place| place.descriptors = GuestAddress(RAM - 0x10)).is_err());
    assert!(make(|place| place.used = GuestAddress(u64::MAX - 3)).is_err());
    assert!(make(|place| place.available = GuestAddress(RAM - 8)).is_err());
}

#[test]
fn interrupts_and_notifications_follow_the_indices_around_their_wrap() {
    let memory = memory();
    put(&memory, DESCRIPTORS, 0, 0x8000, 1, 0, 0);
    let mut queue = queue(&memory, FEATURE_EVENT_INDEX);
    let used_event = GuestAddress(AVAILABLE + 4 + 2 * u64::from(SIZE));
    let available_event = GuestAddress(USED + 4 + 8 * u64::from(SIZE));
    for round in 0..70_000u32 {
        let index = round as u16;
        assert_eq!(queue.enable_notifications(), Ok(false));
        assert_eq!(memory.load_u16(available_event).unwrap(), index);
        offer(&memory, &[0]);
        queue.pop().unwrap().unwrap();
        // Every third entry is the one that the driver waits for.
        let wanted = index.is_multiple_of(3);
        memory.store_u16(used_event, if wanted { index } else { index.wrapping_add(5) }).unwrap();
        queue.add_used(0, 0);
        assert_eq!(queue.interrupt_wanted(), wanted, "round {round}");
        assert!(!queue.interrupt_wanted());
    }
}

#[test]
fn without_event_indices_the_flags_decide() {
    let memory = memory();
    put(&memory, DESCRIPTORS, 0, 0x8000, 1, 0, 0);
    let mut queue = queue(&memory, 0);
    queue.disable_notifications();
    assert_eq!(memory.load_u16(GuestAddress(USED)).unwrap(), 1);
    assert_eq!(queue.enable_notifications(), Ok(false));
    assert_eq!(memory.load_u16(GuestAddress(USED)).unwrap(), 0);
    for (flags, wanted) in [(0, true), (1, false), (0, true)] {
        memory.store_u16(GuestAddress(AVAILABLE), flags).unwrap();
        offer(&memory, &[0]);
        queue.pop().unwrap().unwrap();
        queue.add_used(0, 0);
        assert_eq!(queue.interrupt_wanted(), wanted);
    }
}

#[test]
fn chains_put_back_come_again_and_more_are_heard_of() {
    let memory = memory();
    for index in 0..4 {
        put(&memory, DESCRIPTORS, index, 0x8000, 1, 0, 0);
    }
    let mut queue = queue(&memory, FEATURE_EVENT_INDEX);
    offer(&memory, &[0, 1]);
    let popped = |queue: &mut Queue| queue.pop().unwrap().map(|chain| chain.head);
    assert_eq!((popped(&mut queue), popped(&mut queue), popped(&mut queue)), (Some(0), Some(1), None));
    queue.unpop(2);
    assert_eq!(queue.enable_notifications_of_more(), Ok(false));
    // The driver is to ring for the third chain, not for those that wait.
    assert_eq!(memory.load_u16(GuestAddress(USED + 4 + 8 * u64::from(SIZE))).unwrap(), 2);
    offer(&memory, &[2]);
    assert_eq!(queue.enable_notifications_of_more(), Ok(true));
    assert_eq!((popped(&mut queue), popped(&mut queue), popped(&mut queue)), (Some(0), Some(1), Some(2)));
}

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![0..RAM, HIGH..HIGH + RAM, any::<u64>(), Just(DESCRIPTORS), Just(0x5000)];
    let len = prop_oneof![0..4096u32, any::<u32>(), (0..20u32).prop_map(|count| count * 16)];
    (address, len, prop_oneof![0..8u16, any::<u16>()], prop_oneof![0..SIZE + 1, any::<u16>()])
}

proptest! {
    #[test]
    fn whatever_the_rings_hold_a_chain_names_only_memory(
        table in prop::collection::vec(descriptor(), 16),
        indirect in prop::collection::vec(descriptor(), 16),
        heads in prop::collection::vec(0..SIZE + 1, 1..16),
        features in prop::sample::select(vec![0, FEATURE_INDIRECT, FEATURE_INDIRECT | FEATURE_EVENT_INDEX]),
    ) {
        let memory = memory();
        for index in 0..16u16 {
            let (address, len, flags, next) = table[index as usize];
            put(&memory, DESCRIPTORS, index, address, len, flags, next);
            let (address, len, flags, next) = indirect[index as usize];
            put(&memory, 0x5000, index, address, len, flags, next);
        }
        offer(&memory, &heads);
        let mut queue = queue(&memory, features);
        while let Ok(Some(chain)) = queue.pop() {
            let mut bytes = vec![0; chain.readable.len().min(1 << 16) as usize];
            chain.readable.read(0, &mut bytes).unwrap();
            chain.writable.write(0, &bytes[..bytes.len().min(chain.writable.len() as usize)]).unwrap();
            prop_assert!(chain.writable.write(chain.writable.len(), &[0]).is_err());
            for (address, len) in chain.readable.guest_ranges().chain(chain.writable.guest_ranges()) {
                prop_assert!(memory.host_range(address, len).is_ok());
            }
            queue.add_used(chain.head, 1);
            queue.interrupt_wanted();
        }
    }
}
