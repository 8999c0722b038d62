//! Promise: stock kernels of Debian boot, with one and with several vCPUs.

use polder_tests::{Boot, Kernel, Monitor, Scratch};

/// What sha256sum prints for the numbers 1 to 1000 on any machine.
const SUM: &str = "sum 67d4ff71d43921d5739f387da09746f405e425b07d727e4c69d029461d1f051f";

/// Boots a kernel with the small initramfs, has it do a little work and power off.
fn boots(kernel: Kernel, cpus: u32) {
    let outcome = Boot::linux(kernel, "echo sum $(seq 1 1000 | sha256sum)").cpus(cpus).timeout_s(300).run();
    outcome.expect_status(0).expect_console("POLDER-GUEST STATUS 0");
    outcome.expect_console(SUM);
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
fn a_kernel_boots_with_a_code_cache_too_small_for_it() {
    let scratch = Scratch::new();
    let stats = scratch.path().join("stats.json");
    let boot = Boot::linux(Kernel::Cloud, "echo sum $(seq 1 1000 | sha256sum)").cpus(2).timeout_s(300);
    boot.option("--code-cache", "1M").stats(&stats).run().expect_status(0).expect_console(SUM);
    if Monitor::chosen() == Monitor::Qemu {
        return;
    }
    let facts: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&stats).expect("--stats writes its file")).expect("--stats writes JSON");
    let counter = |name: &str| facts["counters"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {facts}"));
    if counter("translated_units") == 0 {
        // The host lacks what translated code uses.
        return;
    }
    assert_eq!(counter("code_cache_bytes"), 2 << 20);
    assert!(counter("code_cache_evicted") > 1000, "{facts}");
    let pause_ns = counter("code_cache_pause_ns_max");
    // docs/performance.md has how long it takes; here it only is no stop of the whole guest.
    assert!((1..20_000_000).contains(&pause_ns), "{facts}");
}

#[test]
fn a_kernel_boots_with_all_code_translated_before_it_first_runs() {
    let script = "echo sum $(seq 1 1000 | sha256sum)";
    let boot = Boot::linux(Kernel::Cloud, script).cpus(4).timeout_s(300);
    boot.option("--translate", "always").run().expect_status(0).expect_console(SUM);
}

#[test]
fn a_booting_kernel_does_the_same_translated_and_interpreted() {
    if Monitor::chosen() == Monitor::Qemu {
        return;
    }
    let scratch = Scratch::new();
    let stats = scratch.path().join("stats.json");
    // At night long enough for a hundred million instructions.
    let (seconds, least) = match std::env::var_os("POLDER_TEST_NIGHTLY") {
        Some(_) => (280, 100_000_000),
        None => (20, 1_000_000),
    };
    // It is too slow to get to its end.
    Boot::linux(Kernel::Cloud, "true").option("--translate", "lockstep").timeout_s(seconds).stats(&stats).run();
    let facts: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&stats).expect("--stats writes its file")).expect("--stats writes JSON");
    let counter = |name: &str| facts["counters"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {facts}"));
    if counter("translated_units") == 0 {
        // The host lacks what translated code uses.
        return;
    }
    assert!(counter("lockstep_instructions") > least, "{facts}");
    assert_eq!(counter("lockstep_differences"), 0, "{facts}");
}

#[test]
fn the_generic_kernel_boots_with_one_vcpu() {
    boots(Kernel::Generic, 1);
}

#[test]
fn the_generic_kernel_boots_with_four_vcpus() {
    boots(Kernel::Generic, 4);
}

/// What a bzImage's payload is packed with: its first bytes (Documentation/arch/x86/boot.rst, payload_offset).
fn payload_magic(image: &[u8]) -> &[u8] {
    let setup_sectors = usize::from(image[0x1f1]);
    let offset = u32::from_le_bytes([image[0x248], image[0x249], image[0x24a], image[0x24b]]);
    &image[512 * (setup_sectors + 1) + offset as usize..][..4]
}

/// The cloud kernel of Debian 13 is Linux 6.12 and packed with zstd; those of Debian 12 are packed with lz4 and xz.
#[test]
fn the_kernels_between_them_are_packed_with_lz4_xz_and_zstd() {
    if !Kernel::TrixieCloud.is_there() {
        return;
    }
    let image = |kernel: Kernel| std::fs::read(kernel.image()).expect("the kernel is there");
    assert_eq!(payload_magic(&image(Kernel::Cloud)), [0x02, 0x21, 0x4c, 0x18]);
    assert_eq!(payload_magic(&image(Kernel::Generic)), [0xfd, b'7', b'z', b'X']);
    assert_eq!(payload_magic(&image(Kernel::TrixieCloud)), [0x28, 0xb5, 0x2f, 0xfd]);
}

/// Debian packs none of its kernels so: the set-up packs the generic one once more.
#[test]
fn a_kernel_packed_with_gzip_boots_to_its_prompt() {
    let image = std::fs::read(Kernel::GenericGzip.image()).expect("the kernel is there");
    assert_eq!(payload_magic(&image)[..3], [0x1f, 0x8b, 8]);
    let boot = Boot::linux(Kernel::GenericGzip, "").answer("/ # ", "seq 1 1000 | sha256sum | cut -c1-16\n");
    let outcome = boot.answer("67d4ff71d43921d5", "exit\n").timeout_s(300).run();
    outcome.expect_status(0).expect_console("67d4ff71d43921d5");
}

#[test]
fn the_cloud_kernel_of_debian_13_boots_with_one_vcpu() {
    if Kernel::TrixieCloud.is_there() {
        boots(Kernel::TrixieCloud, 1);
    }
}

#[test]
fn the_cloud_kernel_of_debian_13_boots_with_four_vcpus() {
    if Kernel::TrixieCloud.is_there() {
        boots(Kernel::TrixieCloud, 4);
    }
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
