//! The card as a guest driver sees it, over a socket pair in place of a TAP interface.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use polder_machine::AccessSize;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use super::*;
use crate::virtio::FEATURE_EVENT_INDEX;
use crate::virtio::testing::{CONFIG, DATA, Driver};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

struct Socket {
    file: OwnedFd,
    guest: AtomicU64,
}

impl NetBackend for Socket {
    fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tcp4: true, tcp6: false, ecn: false }
    }

    fn set_offloads(&self, guest: Offloads) -> io::Result<()> {
        self.guest.store(u64::from(guest.checksum) | u64::from(guest.tcp4) << 1, Ordering::SeqCst);
        Ok(())
    }
}

/// A card and the other end of its cable. Reads of that end give up after a while.
fn card() -> (Arc<Net>, Arc<Socket>, OwnedFd) {
    let flags = SocketFlags::CLOEXEC;
    let (near, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    rustix::io::ioctl_fionbio(&near, true).unwrap();
    let patience = std::time::Duration::from_secs(20);
    rustix::net::sockopt::set_socket_timeout(&far, rustix::net::sockopt::Timeout::Recv, Some(patience)).unwrap();
    let socket = Arc::new(Socket { file: near, guest: AtomicU64::new(0) });
    (Arc::new(Net::new(socket.clone(), NetOptions { mac: MAC, mtu: Some(1500) })), socket, far)
}

fn frame(byte: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![byte; HEADER_LEN + len];
    bytes[..HEADER_LEN].fill(0);
    bytes
}

fn receive(far: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 17];
    let (len, _) = recv(far, &mut bytes[..], RecvFlags::empty()).unwrap();
    bytes.truncate(len);
    bytes
}

#[test]
fn frames_cross_in_both_directions() {
    for features in [FEATURE_MERGEABLE, FEATURE_MERGEABLE | FEATURE_EVENT_INDEX, 0] {
        let (net, _, far) = card();
        let mut driver = Driver::ready(net, features);
        driver.put(DATA, &frame(7, 1000));
        let head = driver.send(SEND, &[(DATA, 12, false), (DATA + 12, 1000, false)]);
        assert_eq!(receive(&far), frame(7, 1000));
        assert_eq!(driver.wait_used(SEND), (head, 0));
        let head = driver.send(RECEIVE, &[(DATA + 0x1000, 2048, true)]);
        send(&far, &frame(9, 1500), SendFlags::empty()).unwrap();
        assert_eq!(driver.wait_used(RECEIVE), (head, 1512));
        assert_eq!(driver.bytes(DATA + 0x1000 + 10, 2), [1, 0]);
        assert_eq!(driver.bytes(DATA + 0x1000 + 12, 1500), vec![9; 1500]);
    }
}

/// The order to end may come in any moment of the worker's start; in one of them it was lost.
#[test]
fn a_card_that_is_reset_as_soon_as_it_works_ends_its_work() {
    const ROUNDS: usize = 20_000;
    let (done, is_done) = std::sync::mpsc::channel();
    // Left alone if it hangs: the test fails then.
    std::thread::spawn(move || {
        let (net, _, _far) = card();
        let mut driver = Driver::ready(net.clone(), 0);
        for round in 0..ROUNDS {
            (0..round % 1000).for_each(|_| std::hint::spin_loop());
            net.reset();
            driver.set_status(0);
            driver.initialise(0);
        }
        let _ = done.send(());
    });
    is_done.recv_timeout(std::time::Duration::from_secs(60)).unwrap();
}

#[test]
fn a_large_frame_is_spread_over_merged_buffers() {
    for event_index in [0, FEATURE_EVENT_INDEX] {
        let (net, _, far) = card();
        let mut driver = Driver::ready(net, FEATURE_MERGEABLE | event_index);
        send(&far, &frame(3, 60_000), SendFlags::empty()).unwrap();
        // One by one: the card waits for more buffers again and again.
        for index in 0..59 {
            driver.send(RECEIVE, &[(DATA + 0x400 * index, 0x400, true)]);
            std::thread::yield_now();
        }
        let mut total = 0;
        for _ in 0..59 {
            total += driver.wait_used(RECEIVE).1;
        }
        assert_eq!(total, 60_012);
        assert_eq!(driver.bytes(DATA + 10, 2), [59, 0]);
        assert_eq!(driver.bytes(DATA + 12, 60_000), vec![3; 60_000]);
    }
}

#[test]
fn a_frame_that_no_buffer_can_hold_is_dropped_and_the_next_one_arrives() {
    let (net, _, far) = card();
    let mut driver = Driver::ready(net, 0);
    driver.send(RECEIVE, &[(DATA, 100, true)]);
    send(&far, &frame(1, 1000), SendFlags::empty()).unwrap();
    send(&far, &frame(2, 64), SendFlags::empty()).unwrap();
    assert_eq!(driver.wait_used(RECEIVE).1, 76);
    assert_eq!(driver.bytes(DATA + 12, 64), vec![2; 64]);
}

#[test]
fn a_ring_full_of_tiny_buffers_does_not_freeze_the_card() {
    let (net, _, far) = card();
    let mut driver = Driver::ready(net, FEATURE_MERGEABLE);
    for index in 0..QUEUE_SIZE {
        driver.put_descriptor(driver.queues[0].descriptors, index, DATA + u64::from(index), 1, 2, 0);
        driver.offer(RECEIVE, index);
    }
    driver.ring(RECEIVE);
    send(&far, &frame(1, 1000), SendFlags::empty()).unwrap();
    send(&far, &frame(2, 14), SendFlags::empty()).unwrap();
    for _ in 0..26 {
        assert_eq!(driver.wait_used(RECEIVE).1, 1);
    }
    assert_eq!(driver.bytes(DATA + 10, 4), [26, 0, 2, 2]);
}

#[test]
fn receiving_goes_on_after_both_rings_were_full() {
    let (net, _, far) = card();
    let mut driver = Driver::ready(net, FEATURE_MERGEABLE);
    // The wire is full in both directions: nobody reads the far end, and there are no receive buffers.
    let mut waiting = 0;
    while send(&far, &frame(5, 1500), SendFlags::DONTWAIT).is_ok() {
        waiting += 1;
    }
    driver.put(DATA, &frame(6, 1500));
    for _ in 0..QUEUE_SIZE {
        driver.put_descriptor(driver.queues[1].descriptors, 0, DATA, 1512, 0, 0);
        driver.offer(SEND, 0);
    }
    driver.ring(SEND);
    driver.wait_used(SEND);
    // Buffers one by one: each gets its frame although sending is stuck.
    for _ in 0..waiting {
        driver.send(RECEIVE, &[(DATA + 0x1000, 2048, true)]);
        assert_eq!(driver.wait_used(RECEIVE).1, 1512);
    }
    for _ in 0..QUEUE_SIZE {
        assert_eq!(receive(&far), frame(6, 1500));
    }
}

#[test]
fn frames_of_wrong_length_are_lost_and_nothing_else() {
    let (net, _, far) = card();
    let mut driver = Driver::ready(net, 0);
    driver.put(DATA, &frame(4, 100));
    for len in [0, 5, 12, 25, (HEADER_LEN + FRAME_LEN_MAX) as u32 + 1, 112] {
        driver.send(SEND, &[(DATA, len, false)]);
        driver.wait_used(SEND);
    }
    assert_eq!(receive(&far), frame(4, 100));
}

#[test]
fn a_cable_that_is_gone_costs_no_time_and_a_reset_ends_the_thread() {
    let (net, _, far) = card();
    let mut driver = Driver::ready(net.clone(), 0);
    drop(far);
    driver.put(DATA, &frame(4, 100));
    driver.send(SEND, &[(DATA, 112, false)]);
    driver.wait_used(SEND);
    driver.set_status(0);
    driver.msi.wait_until("the reset", || driver.status() == 0);
    assert!(lock(&net.state).worker.is_none());
}

#[test]
fn the_card_says_its_address_link_and_mtu_and_the_backend_hears_what_the_guest_takes() {
    let (net, socket, _far) = card();
    let driver = Driver::ready(net.clone(), FEATURE_MAC | FEATURE_STATUS | FEATURE_GUEST_CHECKSUM | FEATURE_GUEST_TSO4);
    assert_eq!(socket.guest.load(Ordering::SeqCst), 3);
    assert_eq!(driver.offered() & FEATURE_GUEST_TSO6, 0);
    let mut mac = [0; 6];
    for (offset, byte) in (0..).zip(&mut mac) {
        *byte = driver.read(CONFIG + offset, AccessSize::Byte) as u8;
    }
    assert_eq!(mac, MAC);
    assert_eq!(driver.read(CONFIG + 6, AccessSize::Word), 1);
    assert_eq!(driver.read(CONFIG + 10, AccessSize::Word), 1500);
    assert_eq!(driver.read(CONFIG + 12, AccessSize::Qword), 0);
    net.set_link(false);
    driver.msi.wait_until("the interrupt", || driver.msi.count(0) == 1);
    assert_eq!(driver.read(CONFIG + 6, AccessSize::Word), 0);
}
