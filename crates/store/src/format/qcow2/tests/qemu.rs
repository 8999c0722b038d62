//! What QEMU's tools write is read as they read it.

use super::super::super::test_folder::TestFolder;
use super::super::super::{Content, Source};
use super::super::{Compression, OpenOptions, OtherFiles, Qcow2};
use super::{Random, open, qemu_img, qemu_io, read_all, sample_disk};

fn in_folder() -> OpenOptions {
    OpenOptions { other_files: OtherFiles::InFolder, ..OpenOptions::default() }
}

#[test]
fn every_kind_of_image_that_qemu_img_writes_is_read_as_it_reads_it() {
    let mut random = Random::new();
    let folder = TestFolder::new("qcow2-kinds");
    let disk = sample_disk(3_000_320, &mut random);
    std::fs::write(folder.path("disk.raw"), &disk).unwrap();
    for options in [
        "compat=0.10",
        "compat=v3",
        "compat=v3,cluster_size=512",
        "compat=v3,cluster_size=4k,refcount_bits=1",
        "compat=v3,cluster_size=2M,refcount_bits=64",
        "extended_l2=on,cluster_size=128k",
        "lazy_refcounts=on",
        "preallocation=metadata",
        "preallocation=full,extended_l2=on",
    ] {
        qemu_img(&folder, &format!("convert -f raw -O qcow2 -o {options} disk.raw image"));
        assert!(read_all(&open(&folder.path("image"))) == disk, "{options}");
    }
    for options in [
        "compat=0.10",
        "compression_type=zlib,cluster_size=512",
        "compression_type=zlib,cluster_size=2M",
        "compression_type=zstd",
        "compression_type=zstd,cluster_size=512",
        "compression_type=zstd,cluster_size=2M",
        "compression_type=zstd,extended_l2=on",
        "compression_type=zlib,extended_l2=on,cluster_size=16k",
    ] {
        qemu_img(&folder, &format!("convert -c -f raw -O qcow2 -o {options} disk.raw image"));
        let image = open(&folder.path("image"));
        assert!(read_all(&image) == disk, "{options}");
        let zstd = image.header().compression == Compression::Zstd;
        assert_eq!(zstd, options.contains("zstd"), "{options}");
    }
}

#[test]
fn chains_of_1_10_and_100_images_are_read_through() {
    let mut random = Random::new();
    let folder = TestFolder::new("qcow2-chain");
    let mut disk = sample_disk(1 << 20, &mut random);
    std::fs::write(folder.path("base"), &disk).unwrap();
    let mut below = ("base".to_owned(), "raw");
    for index in 1..=100 {
        let name = format!("image{index}");
        // Longer from time to time: what the lower ones lack is zeros.
        disk.resize(disk.len() + if index % 25 == 0 { 100 << 10 } else { 0 }, 0);
        let options = if index % 2 == 0 { "extended_l2=on,cluster_size=16k" } else { "cluster_size=4k" };
        let len = disk.len();
        qemu_img(&folder, &format!("create -q -f qcow2 -o {options} -F {} -b {} {name} {len}", below.1, below.0));
        let at = random.below(disk.len() as u64 / 512 - 64) as usize * 512;
        let write_len = 512 * (1 + random.below(60)) as usize;
        let value = 1 + random.below(254) as u8;
        disk[at..at + write_len].fill(value);
        let zero_at = random.below(disk.len() as u64 / 4096 - 2) as usize * 4096;
        disk[zero_at..zero_at + 8192].fill(0);
        let commands = [format!("write -q -P {value} {at} {write_len}"), format!("write -q -z {zero_at} 8192")];
        qemu_io(&folder, "qcow2", &name, &[&commands[0], &commands[1]]);
        if [1, 10, 100].contains(&index) {
            let image = Qcow2::open(&folder.path(&name), &in_folder()).unwrap();
            assert!(read_all(&image) == disk, "a chain of {index}");
        }
        below = (name, "qcow2");
    }
}

#[test]
fn snapshots_are_listed_and_read_after_writes_and_a_resize() {
    let mut random = Random::new();
    let folder = TestFolder::new("qcow2-snapshots");
    let first = sample_disk(1 << 20, &mut random);
    std::fs::write(folder.path("disk.raw"), &first).unwrap();
    qemu_img(&folder, "convert -f raw -O qcow2 disk.raw image");
    qemu_img(&folder, "snapshot -c before image");
    qemu_io(&folder, "qcow2", "image", &["write -q -P 7 100k 200k", "discard -q 512k 64k"]);
    qemu_img(&folder, "snapshot -c between image");
    qemu_img(&folder, "resize -q image 2M");
    qemu_io(&folder, "qcow2", "image", &["write -q -P 8 1500k 64k"]);
    let mut second = first.clone();
    second[100 << 10..300 << 10].fill(7);
    second[512 << 10..576 << 10].fill(0);
    let mut third = second.clone();
    third.resize(2 << 20, 0);
    third[1500 << 10..1564 << 10].fill(8);
    let image = open(&folder.path("image"));
    let listed: Vec<(&str, u64)> = image.snapshots().iter().map(|one| (&one.name[..], one.virtual_len)).collect();
    assert_eq!(listed, [("before", 1 << 20), ("between", 1 << 20)]);
    assert!(read_all(&image) == third);
    for (name, disk) in [("before", &first), ("between", &second), ("1", &first)] {
        let options = OpenOptions { snapshot: Some(name.to_owned()), ..OpenOptions::default() };
        assert!(read_all(&Qcow2::open(&folder.path("image"), &options).unwrap()) == *disk, "{name}");
    }
    let options = OpenOptions { snapshot: Some("never".to_owned()), ..OpenOptions::default() };
    let refused = Qcow2::open(&folder.path("image"), &options).unwrap_err();
    assert!(refused.to_string().ends_with("has no snapshot never"), "{refused}");
}

#[test]
fn extents_are_those_of_qemu_img_map() {
    let folder = TestFolder::new("qcow2-map");
    qemu_img(&folder, "create -q -f qcow2 image 1G");
    qemu_io(&folder, "qcow2", "image", &["write -q 64k 128k", "write -q -z 256k 64k", "write -q 700M 64k"]);
    let image = open(&folder.path("image"));
    let mut found = Vec::new();
    let mut at = 0;
    while at < image.len() {
        let extent = image.extent_at(at, u64::MAX).unwrap();
        if extent.content == Content::Data {
            found.push((at, extent.len));
        }
        at += extent.len;
    }
    assert_eq!(found, [(64 << 10, 128 << 10), (700 << 20, 64 << 10)]);
    let map = qemu_img(&folder, "map --output=json image");
    let data: Vec<&str> = map.lines().filter(|line| line.contains("\"data\": true")).collect();
    assert_eq!(data.len(), found.len(), "{map}");
}

#[test]
fn an_external_data_file_is_read_where_the_caller_allows_it() {
    let mut random = Random::new();
    let folder = TestFolder::new("qcow2-data-file");
    let disk = sample_disk(1 << 20, &mut random);
    std::fs::write(folder.path("disk.raw"), &disk).unwrap();
    for raw in ["off", "on"] {
        let options = format!("data_file=image.data,data_file_raw={raw}");
        qemu_img(&folder, &format!("convert -f raw -O qcow2 -o {options} disk.raw image"));
        let refused = Qcow2::open(&folder.path("image"), &OpenOptions::default()).unwrap_err();
        assert!(refused.to_string().contains("names another file as its data file (image.data)"), "{refused}");
        assert!(read_all(&Qcow2::open(&folder.path("image"), &in_folder()).unwrap()) == disk, "{raw}");
    }
}
