//! What the writer makes is what QEMU's tools find sound and equal.

use super::super::super::test_folder::TestFolder;
use super::super::super::{FormatError, RawSource, RawTarget, Source, Target, copy};
use super::super::{Compression, Qcow2Writer};
use super::{Random, open, qemu_img, read_all, sample_disk};
use std::num::NonZeroUsize;

const TWO: NonZeroUsize = NonZeroUsize::new(2).unwrap();

#[test]
fn written_images_are_equal_and_sound_for_qemu_img() {
    let mut random = Random::new();
    let folder = TestFolder::new("qcow2-write");
    for len in [0, 512, 65536, 1_000_000, (9 << 20) + 512] {
        let mut disk = sample_disk(len, &mut random);
        std::fs::write(folder.path("disk.raw"), &disk).unwrap();
        // QEMU knows whole sectors only.
        disk.resize(len.next_multiple_of(512), 0);
        for compression in [None, Some(Compression::Zlib), Some(Compression::Zstd)] {
            let _ = std::fs::remove_file(folder.path("image"));
            let source = RawSource::open(&folder.path("disk.raw")).unwrap();
            let mut writer = Qcow2Writer::create(&folder.path("image"), len as u64, compression, TWO).unwrap();
            copy(&source, &mut writer, TWO, &mut |_| ()).unwrap();
            writer.finish().unwrap();
            qemu_img(&folder, "check -q -f qcow2 image");
            let info = qemu_img(&folder, "info -f qcow2 image");
            assert!(info.contains("corrupt: false") && info.contains("lazy refcounts: false"), "{info}");
            if len > 0 {
                qemu_img(&folder, "compare -q -f raw -F qcow2 disk.raw image");
            }
            assert!(read_all(&open(&folder.path("image"))) == disk, "{len} {compression:?}");
            // QEMU goes on writing where we stopped.
            qemu_img(&folder, "resize -q -f qcow2 image 20M");
            super::qemu_io(&folder, "qcow2", "image", &["write -q -P 3 512k 3M", "write -q -P 4 19M 1M"]);
            qemu_img(&folder, "check -q -f qcow2 image");
        }
    }
}

#[test]
fn compression_makes_an_image_smaller_and_zeros_take_no_room() {
    let folder = TestFolder::new("qcow2-small");
    let mut disk = vec![0; 32 << 20];
    disk[20 << 20..24 << 20].iter_mut().enumerate().for_each(|(index, byte)| *byte = (index / 50) as u8);
    let source_path = folder.path("disk.raw");
    std::fs::write(&source_path, &disk).unwrap();
    let len_of = |compression, name: &str| {
        let source = RawSource::open(&source_path).unwrap();
        let mut writer = Qcow2Writer::create(&folder.path(name), source.len(), compression, TWO).unwrap();
        copy(&source, &mut writer, TWO, &mut |_| ()).unwrap();
        writer.finish().unwrap();
        std::fs::metadata(folder.path(name)).unwrap().len()
    };
    assert_eq!(len_of(None, "plain"), (4 << 20) + 5 * 65536);
    for (kind, name) in [(Compression::Zlib, "zlib"), (Compression::Zstd, "zstd")] {
        let len = len_of(Some(kind), name);
        assert!(len < 1 << 20, "{name}: {len}");
    }
}

#[test]
fn ranges_in_any_pieces_give_the_same_disk_and_going_back_is_refused() {
    let mut random = Random::new();
    let folder = TestFolder::new("qcow2-pieces");
    let disk = sample_disk(2 << 20, &mut random);
    for round in 0..20 {
        let path = folder.path(&format!("image{round}"));
        let mut writer = Qcow2Writer::create(&path, 2 << 20, None, TWO).unwrap();
        let mut at = 0;
        while at < disk.len() {
            let end = (at + 1 + random.below(150_000) as usize).min(disk.len());
            match super::super::super::is_zero(&disk[at..end]) {
                true => writer.zero(at as u64, (end - at) as u64).unwrap(),
                false => writer.write_at(at as u64, &disk[at..end]).unwrap(),
            }
            at = end;
        }
        let back = writer.write_at(0, &[1]);
        assert!(matches!(back, Err(FormatError::OutOfOrder { offset: 0, end: 2_097_152, .. })), "{back:?}");
        writer.finish().unwrap();
        assert!(read_all(&open(&path)) == disk);
    }
}

#[test]
fn an_unfinished_image_is_no_image() {
    let folder = TestFolder::new("qcow2-unfinished");
    let mut writer = Qcow2Writer::create(&folder.path("image"), 1 << 20, Some(Compression::Zlib), TWO).unwrap();
    writer.write_at(0, &[1; 200_000]).unwrap();
    drop(writer);
    let refused = super::super::Qcow2::open(&folder.path("image"), &Default::default()).unwrap_err();
    assert!(matches!(refused, FormatError::WrongFormat { .. }), "{refused}");
    assert!(Qcow2Writer::create(&folder.path("image"), 1 << 20, None, TWO).is_err());
    let too_large = Qcow2Writer::create(&folder.path("large"), (64 << 40) + 1, None, TWO);
    assert!(matches!(too_large, Err(FormatError::TooLarge { .. })));
}

#[test]
fn a_file_of_several_regions_of_refcounts_is_sound() {
    // More L2 tables than one block of refcounts counts, each with one entry.
    const TABLES: u64 = 40_000;
    let folder = TestFolder::new("qcow2-regions");
    let mut writer = Qcow2Writer::create(&folder.path("image"), TABLES << 29, Some(Compression::Zlib), TWO).unwrap();
    for index in 0..TABLES {
        writer.write_at((index << 29) + 512, &index.to_le_bytes()).unwrap();
    }
    writer.finish().unwrap();
    assert!(std::fs::metadata(folder.path("image")).unwrap().len() > 2 << 30);
    qemu_img(&folder, "check -q -f qcow2 image");
    let image = open(&folder.path("image"));
    let mut number = [0; 8];
    for index in (0..TABLES).step_by(500) {
        image.read_at((index << 29) + 512, &mut number).unwrap();
        assert_eq!(u64::from_le_bytes(number), index);
    }
}

#[test]
fn raw_to_qcow2_to_raw_leaves_holes_where_they_were() {
    use std::os::unix::fs::MetadataExt;
    let folder = TestFolder::new("qcow2-holes");
    let mut raw = RawTarget::create(&folder.path("disk.raw"), 1 << 30).unwrap();
    raw.write_at(700 << 20, &[6; 100_000]).unwrap();
    raw.finish().unwrap();
    let source = RawSource::open(&folder.path("disk.raw")).unwrap();
    let mut writer = Qcow2Writer::create(&folder.path("image"), 1 << 30, None, TWO).unwrap();
    copy(&source, &mut writer, TWO, &mut |_| ()).unwrap();
    writer.finish().unwrap();
    let mut back = RawTarget::create(&folder.path("back.raw"), 1 << 30).unwrap();
    copy(&open(&folder.path("image")), &mut back, TWO, &mut |_| ()).unwrap();
    back.finish().unwrap();
    qemu_img(&folder, "compare -q -f raw -F raw disk.raw back.raw");
    assert!(std::fs::metadata(folder.path("back.raw")).unwrap().blocks() * 512 < 200_000);
}
