//! Promise: Linux's own drivers find the machine's PCI and virtio devices sound, in ordinary use and in unusual one.

mod held_file;
mod network;
mod silent_disk;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use held_file::HeldFile;
use polder_tests::{Boot, Kernel, Scratch, can_open, inside_namespaces};

const MIB: u64 = 1 << 20;

/// Writes `len` bytes that no two sectors share into the file.
fn fill_with_numbers(path: &Path, len: u64) {
    let bytes: Vec<u8> =
        (0..len / 8).flat_map(|number| number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect();
    std::fs::write(path, bytes).expect("the scratch folder can be written");
}

fn start_of(path: &Path, len: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(len).read_to_end(&mut bytes)).expect("the disk is there");
    bytes
}

#[test]
fn four_vcpus_copy_a_disk_at_once_with_memory_on_both_sides_of_the_hole() {
    let scratch = Scratch::new();
    let source = scratch.sparse("source.raw", 8 * MIB);
    let target = scratch.sparse("target.raw", 8 * MIB);
    fill_with_numbers(&source, 8 * MIB);
    // Each vCPU copies a quarter, in its own piece size, past the page cache.
    let script = "for i in 0 1 2 3; do b=$((16384 << i)); n=$((2097152 / b)); \
        dd if=/dev/vda of=/dev/vdb bs=$b skip=$((i * n)) seek=$((i * n)) count=$n conv=notrunc iflag=direct oflag=direct & \
        done; wait; cmp /dev/vda /dev/vdb && echo SAME";
    let boot = Boot::linux(Kernel::Cloud, script).disk(&source).disk(&target).cpus(4).memory_mib(5 << 10);
    boot.timeout_s(300).run().expect_status(0).expect_console("SAME");
    assert!(start_of(&source, 8 * MIB) == start_of(&target, 8 * MIB), "the copy is the same on the host");
}

#[test]
fn drivers_are_unbound_and_bound_and_the_device_removed_and_found_again() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.raw", 8 * MIB);
    fill_with_numbers(&disk, 8 * MIB);
    // Linux moves the BAR into the high window when it finds the device again. The last removal comes while requests are
    // in flight.
    let script = "sum() { dd if=/dev/vda bs=1M count=1 iflag=direct 2>/dev/null | md5sum; }; first=$(sum); good=0; \
        check() { case $(sum) in $first) good=$((good + 1));; esac; }; driver=/sys/bus/virtio/drivers/virtio_blk; \
        device=/sys/bus/pci/devices/0000:00:01.0; rescan() { echo 1 > /sys/bus/pci/rescan; }; \
        for i in 1 2 3 4 5; do echo virtio0 > $driver/unbind; echo virtio0 > $driver/bind; check; done; \
        for i in 1 2 3; do echo 1 > $device/remove; rescan; check; done; \
        dd if=/dev/vda of=/dev/null bs=64k iflag=direct & echo 1 > $device/remove; wait; rescan; check; echo GOOD $good";
    let outcome = Boot::linux(Kernel::Cloud, script).disk(&disk).cpus(2).timeout_s(300).run();
    outcome.expect_status(0).expect_console("GOOD 9");
}

#[test]
fn without_message_interrupts_the_devices_share_four_wires() {
    let scratch = Scratch::new();
    let mut boot = Boot::linux(
        Kernel::Cloud,
        "for d in a b c d e; do dd if=/dev/vd$d of=/dev/null bs=64k iflag=direct || exit 1; done; \
         grep virtio /proc/interrupts; dd if=/dev/hwrng of=/dev/null bs=512 count=2 && echo ALL",
    )
    .append("pci=nomsi");
    // More disks than wires: some share one.
    for name in ["a.raw", "b.raw", "c.raw", "d.raw", "e.raw"] {
        boot = boot.disk(scratch.sparse(name, MIB));
    }
    let outcome = boot.cpus(2).timeout_s(300).run();
    outcome.expect_status(0).expect_console("ALL").expect_console("IO-APIC  17-fasteoi   virtio0, virtio4");
}

#[test]
fn the_last_sector_is_there_the_next_is_not_and_a_discard_is_taken() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.raw", MIB);
    let script = "dd if=/dev/vda of=/dev/null bs=512 count=1 skip=2047 iflag=direct && echo BEFORE; \
        dd if=/dev/zero of=/dev/vda bs=512 seek=2048 count=1 oflag=direct 2>/dev/null || echo BEYOND; \
        blkdiscard -o 0 -l 65536 /dev/vda && echo DISCARDED";
    let outcome = Boot::linux(Kernel::Cloud, script).disk(&disk).timeout_s(300).run();
    outcome.expect_status(0).expect_console("BEFORE").expect_console("BEYOND").expect_console("DISCARDED");
}

/// The slow disk's reads are answered only when the guest has written to the other one that all else went on.
#[test]
fn a_slow_disk_does_not_starve_the_others() {
    if !can_open("/dev/fuse") || !inside_namespaces("a_slow_disk_does_not_starve_the_others") {
        return;
    }
    let scratch = Scratch::new();
    let other = scratch.sparse("other.raw", 8 * MIB);
    fill_with_numbers(&other, 8 * MIB);
    let written = other.clone();
    // What is read at boot, to find partitions, is outside the held part.
    let slow = HeldFile { len: 8 * MIB, held: MIB..7 * MIB }.mount(&scratch.path().join("slow.raw"), move |_| {
        start_of(&written, 8 * MIB)[16383 * 512..].starts_with(b"all-else-went-on")
    });
    let script = "for i in 1 2 3 4 5 6; do dd if=/dev/vda of=/dev/null bs=64k skip=$((i * 16)) count=16 iflag=direct & slow=$slow' '$!; done; \
        dd if=/dev/vdb of=/dev/null bs=64k iflag=direct && dd if=/dev/hwrng of=/dev/null bs=512 count=4 && hwclock -r && \
        for p in $slow; do kill -0 $p && echo WAITING; done && \
        echo all-else-went-on | dd of=/dev/vdb bs=512 seek=16383 conv=notrunc,fsync; wait; echo ANSWERED";
    let boot = Boot::linux(Kernel::Cloud, script).read_only_disk(&slow).disk(&other);
    let outcome = boot.timeout_s(120).run();
    outcome.expect_status(0).expect_console("ANSWERED");
    assert_eq!(outcome.console.matches("WAITING").count(), 6, "all readers of the slow disk wait\n{outcome}");
}
