//! Tests of the formats that qemu-img converts, and of what does not get that far.

use super::qcow2::{OpenOptions, OtherFiles, Qcow2, Qcow2Writer, Random};
use super::test_folder::TestFolder;
use super::{Format, FormatError, QemuImg, RawSource, Source, Target, copy, look_at_vmdk, looks_like, testbench};
use std::num::NonZeroUsize;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

const TWO: NonZeroUsize = NonZeroUsize::new(2).unwrap();

fn sample(random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; 6 << 20];
    for chunk in bytes.chunks_mut(40_000).step_by(3) {
        chunk.iter_mut().for_each(|byte| *byte = random.next() as u8);
    }
    bytes
}

fn qemu_img(folder: &TestFolder, arguments: &str) {
    let status = Command::new("qemu-img").args(arguments.split(' ')).current_dir(folder.root()).status().unwrap();
    assert!(status.success(), "qemu-img {arguments}");
}

#[test]
fn a_round_through_all_formats_ends_with_the_bytes_it_began_with() {
    let mut random = Random::new();
    let folder = TestFolder::new("foreign-round");
    let bytes = sample(&mut random);
    std::fs::write(folder.path("start"), &bytes).unwrap();
    let source = RawSource::open(&folder.path("start")).unwrap();
    let mut writer = Qcow2Writer::create(&folder.path("q"), source.len(), None, TWO).unwrap();
    copy(&source, &mut writer, TWO, &mut |_| ()).unwrap();
    writer.finish().unwrap();
    let options = OpenOptions { other_files: OtherFiles::Refused, ..OpenOptions::default() };
    let opened = Qcow2::open(&folder.path("q"), &options).unwrap();
    let mut raw = super::RawTarget::create(&folder.path("raw"), opened.len()).unwrap();
    copy(&opened, &mut raw, TWO, &mut |_| ()).unwrap();
    raw.finish().unwrap();
    let tool = QemuImg::default();
    for (index, format) in [Format::Vmdk, Format::Vhdx, Format::Vdi, Format::Vpc].into_iter().enumerate() {
        // Names that could be taken for options, protocols or JSON.
        let image = folder.path(&format!("-o json:{{\"{index}\\, nbd:é"));
        tool.from_raw(&folder.path("raw"), &image, format).unwrap();
        assert_eq!(looks_like(&image).unwrap(), format);
        let next = folder.path(&format!("raw {index}"));
        tool.to_raw(&image, format, &next).unwrap();
        std::fs::rename(next, folder.path("raw")).unwrap();
    }
    assert!(std::fs::read(folder.path("raw")).unwrap() == bytes);
    let left: Vec<_> = std::fs::read_dir(folder.root()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3 + 4, "{left:?}");
}

#[test]
fn a_flat_vmdk_is_read_without_qemu_img() {
    let mut random = Random::new();
    let folder = TestFolder::new("foreign-flat");
    let bytes = sample(&mut random);
    std::fs::write(folder.path("raw"), &bytes).unwrap();
    qemu_img(&folder, "convert -f raw -O vmdk -o subformat=monolithicFlat raw disk.vmdk");
    QemuImg::default().to_raw(&folder.path("disk.vmdk"), Format::Vmdk, &folder.path("back")).unwrap();
    assert!(std::fs::read(folder.path("back")).unwrap() == bytes);
    qemu_img(&folder, "convert -f raw -O vmdk -o subformat=streamOptimized raw stream.vmdk");
    QemuImg::default().to_raw(&folder.path("stream.vmdk"), Format::Vmdk, &folder.path("again")).unwrap();
    assert!(std::fs::read(folder.path("again")).unwrap() == bytes);
}

#[test]
fn a_vmdk_that_names_other_files_is_refused_before_qemu_img_sees_it() {
    let folder = TestFolder::new("foreign-hostile");
    let refused = |bytes: &[u8]| {
        std::fs::write(folder.path("disk.vmdk"), bytes).unwrap();
        match look_at_vmdk(&folder.path("disk.vmdk")) {
            Ok(_) => "nothing: it was accepted".to_owned(),
            Err(refused) => refused.to_string(),
        }
    };
    let descriptor = |kind: &str, lines: &str| {
        format!("# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"{kind}\"\n{lines}\n")
    };
    let flat = |line: &str| refused(descriptor("monolithicFlat", line).as_bytes());
    std::fs::write(folder.path("disk-flat.vmdk"), [0; 1024]).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", folder.path("link-flat.vmdk")).unwrap();
    assert_eq!(flat("RW 2 FLAT \"disk-flat.vmdk\" 0"), "nothing: it was accepted");
    // What QEMU leaves where the new text is two bytes shorter: once in 256 times, as its CID has no leading zeros.
    assert_eq!(flat("RW 2 FLAT \"disk-flat.vmdk\" 0\n\0"), "nothing: it was accepted");
    for (line, text) in [
        ("RW 2 FLAT \"/etc/shadow\" 0", "names /etc/shadow as its extent, and only a file beside it"),
        ("RW 2 FLAT \"../disk-flat.vmdk\" 0", "only a file beside it"),
        ("RW 2 FLAT \"nbd:unix:/x\" 0", "only a file beside it"),
        ("RW 2 FLAT \"missing-flat.vmdk\" 0", "it cannot be opened"),
        ("RW 2 FLAT \"link-flat.vmdk\" 0", "it cannot be opened without following links"),
        ("RW 3 FLAT \"disk-flat.vmdk\" 0", "it has 1024 bytes where the descriptor says 1536"),
        ("RW 1 FLAT \"disk-flat.vmdk\" 1", "the disk does not begin where the file does"),
        ("RW 99999999999999999999 FLAT \"disk-flat.vmdk\" 0", "line 6: its length is no sensible number"),
        ("RW 2 SPARSE \"disk-flat.vmdk\" 0", "is no flat extent"),
        ("RW 2 FLAT disk-flat.vmdk 0", "it names no file"),
        ("RW 2 FLAT \"disk-flat.vmdk\" 0\nRW 2 FLAT \"disk-flat.vmdk\" 0", "it has 2 extents"),
        ("", "it has 0 extents"),
        ("parentFileNameHint=\"/etc/shadow\"", "names another file as its parent disk (/etc/shadow)"),
        ("parentCID=12345678", "uses a parent disk"),
    ] {
        assert!(flat(line).contains(text), "{line}: {}", flat(line));
    }
    let many = descriptor("twoGbMaxExtentSparse", "");
    assert!(refused(many.as_bytes()).contains("the type \"twoGbMaxExtentSparse\" of VMDK"));
    assert!(refused(b"COWD and more").contains("a sparse file of ESX"));
    assert!(refused(b"RW 2 FLAT \"/etc/shadow\" 0").contains("is not a vmdk image"));

    std::fs::write(folder.path("raw"), [1; 65536]).unwrap();
    qemu_img(&folder, "convert -f raw -O vmdk raw good.vmdk");
    let good = std::fs::read(folder.path("good.vmdk")).unwrap();
    assert_eq!(refused(&good), "nothing: it was accepted");
    let mut only_descriptor = good.clone();
    only_descriptor[12..20].fill(0);
    assert!(refused(&only_descriptor).contains("only a descriptor of other files"));
    let hint = b"parentFileNameHint=\"/etc/shadow\"\n";
    for at in [512, 5000, 10_000] {
        let mut parent = good.clone();
        parent[at..at + hint.len()].copy_from_slice(hint);
        assert!(refused(&parent).contains("as its parent disk (\\\"/etc/shadow\\\")"), "{at}: {}", refused(&parent));
    }
}

#[test]
fn a_missing_a_failing_and_an_endless_program_are_reported_and_leave_nothing() {
    let folder = TestFolder::new("foreign-program");
    std::fs::write(folder.path("raw"), [1; 65536]).unwrap();
    let run = |script: &str| {
        let program = folder.path("program");
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let tool = QemuImg { program, timeout: Duration::from_millis(300) };
        let refused = tool.from_raw(&folder.path("raw"), &folder.path("image"), Format::Vhdx).unwrap_err();
        assert!(!folder.path("image").exists());
        refused.to_string()
    };
    let failing = run("#!/bin/sh\necho \"it is \x1b[31mbroken $HOME\" >&2; pwd >&2; exit 1\n");
    assert!(failing.contains("it is \\u{1b}[31mbroken \\n") && failing.contains(".polder-convert-"), "{failing}");
    let start = Instant::now();
    assert!(run("#!/bin/sh\nexec sleep 60\n").contains("and was stopped"));
    assert!(start.elapsed() < Duration::from_secs(20));
    let missing = QemuImg { program: folder.path("none"), ..QemuImg::default() };
    let refused = missing.to_raw(&folder.path("raw"), Format::Vdi, &folder.path("out")).unwrap_err();
    assert!(matches!(refused, FormatError::NoQemuImg { format: "vdi", .. }), "{refused}");
    let rubbish = QemuImg::default().to_raw(&folder.path("raw"), Format::Vhdx, &folder.path("out")).unwrap_err();
    assert!(matches!(rubbish, FormatError::QemuImg { .. }), "{rubbish}");
    let there = QemuImg::default().from_raw(&folder.path("raw"), &folder.path("raw"), Format::Vhdx).unwrap_err();
    assert!(matches!(there, FormatError::Io { .. }), "{there}");
    assert_eq!(std::fs::read(folder.path("raw")).unwrap(), [1; 65536]);
    assert!(QemuImg::default().from_raw(&folder.path("raw"), &folder.path("q"), Format::Qcow2).is_err());
}

#[test]
fn flipped_descriptors_never_name_other_files() {
    let mut random = Random::new();
    let text = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\n\
                RW 2 FLAT \"disk-flat.vmdk\" 0\nparentFileNameHint=\"/etc/shadow\"\nddb.adapterType = \"ide\"\n";
    for _ in 0..20_000 {
        let mut bytes = text.as_bytes().to_vec();
        for _ in 0..1 + random.below(6) {
            let at = random.below(bytes.len() as u64) as usize;
            match random.below(3) {
                0 => bytes[at] ^= 1 << random.below(8),
                1 => _ = bytes.remove(at),
                _ => bytes.insert(at, b"/\"\n\0 =."[random.below(7) as usize]),
            }
        }
        testbench::look_at_vmdk(&bytes);
    }
}

#[test]
fn a_file_says_what_it_looks_like_only_for_hints() {
    let folder = TestFolder::new("foreign-looks");
    qemu_img(&folder, "create -q -f qcow2 q 1M");
    assert_eq!(looks_like(&folder.path("q")).unwrap(), Format::Qcow2);
    std::fs::write(folder.path("raw"), [0; 4096]).unwrap();
    assert_eq!(looks_like(&folder.path("raw")).unwrap(), Format::Raw);
    assert_eq!("vhdx".parse(), Ok(Format::Vhdx));
    assert!("qcow".parse::<Format>().unwrap_err().contains("raw, qcow2, vmdk, vhdx, vdi, vpc"));
}
