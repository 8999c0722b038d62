//! Promise: Debian's stock cloud and generic kernels boot, with one and with several vCPUs.

use polder_tests::{Boot, Kernel, Scratch};

/// Boots a kernel with the small initramfs, has it do a little work and power off.
fn boots(kernel: Kernel, cpus: u32) {
    let outcome = Boot::linux(kernel, "echo sum $(seq 1 1000 | sha256sum)").cpus(cpus).timeout_s(300).run();
    outcome.expect_status(0).expect_console("POLDER-GUEST STATUS 0");
    // What sha256sum prints for the numbers 1 to 1000 on any machine.
    outcome.expect_console("sum 67d4ff71d43921d5739f387da09746f405e425b07d727e4c69d029461d1f051f");
    assert_eq!(outcome.ready("cpus"), cpus.to_string());
}

#[test]
fn the_cloud_kernel_boots_with_one_vcpu() {
    boots(Kernel::Cloud, 1);
}

#[test]
fn the_cloud_kernel_boots_with_four_vcpus() {
    boots(Kernel::Cloud, 4);
}

#[test]
fn the_generic_kernel_boots_with_one_vcpu() {
    boots(Kernel::Generic, 1);
}

#[test]
fn the_generic_kernel_boots_with_four_vcpus() {
    boots(Kernel::Generic, 4);
}

#[test]
fn a_disk_keeps_what_a_guest_wrote_and_a_read_only_disk_is_left_alone() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.raw", 16 << 20);
    let kept = scratch.sparse("kept.raw", 1 << 20);
    let script = "printf polder-wrote-this | dd of=/dev/vda bs=512 seek=2048 conv=notrunc,fsync && ! dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=fsync";
    let boot = Boot::linux(Kernel::Cloud, script).disk(&disk).read_only_disk(&kept).timeout_s(300);
    boot.run().expect_status(0).expect_console("POLDER-GUEST STATUS 0");
    let bytes = std::fs::read(&disk).expect("the disk is there");
    assert_eq!(&bytes[2048 * 512..][..17], b"polder-wrote-this");
}

#[test]
fn a_guest_that_reboots_or_panics_says_so_in_its_status() {
    Boot::linux(Kernel::Cloud, "true").append("polder_end=reboot").timeout_s(300).run().expect_status(10);
    Boot::linux(Kernel::Cloud, "true").append("polder_end=panic").timeout_s(300).run().expect_status(11);
}
