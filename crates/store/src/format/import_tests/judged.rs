//! Good archives and folders, and what e2fsck, debugfs and the kernel find on the disks.

use super::super::qcow2::Random;
use super::super::test_folder::TestFolder;
use super::super::{Packing, RawTarget, Target, folder_to_ext4, tar_to_ext4};
use super::archive::{Archive, Fields};
use super::{Mount, check, content, import, is_root, run, stat};
use crate::format::ext4::Ext4Options;
use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

#[test]
fn owners_modes_times_links_devices_and_attributes_are_exact_without_root() {
    let folder = TestFolder::new("tar-exact");
    let mut archive = Archive::default();
    archive.add(&Fields { path: "./", kind: b'5', mode: 0o711, user: 5, ..Fields::default() }, b"");
    archive.directory("etc");
    let owner =
        Fields { path: "etc/shadow", mode: 0o640, user: 70_000, group: 42, time: 1_234_567_890, ..Fields::default() };
    archive.add(&owner, b"root:*:\n");
    archive.add(&Fields { path: "etc/su", mode: 0o4755, ..Fields::default() }, &[7; 5000]);
    let long = format!("{}/{}/{}", "d".repeat(255), "e".repeat(200), "f".repeat(255));
    let pax: &[(&str, &[u8])] = &[
        ("path", long.as_bytes()),
        ("uid", b"4000000000"),
        ("mtime", b"5000000000.123456789"),
        ("atime", b"-1000.5"),
        ("SCHILY.xattr.user.note", b"with\nlines\0and zeros"),
        ("SCHILY.xattr.security.capability", b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
    ];
    archive.add(&Fields { path: "short", pax, ..Fields::default() }, b"long");
    archive.link("etc/hard", b'1', "etc/shadow");
    archive.link("fast", b'2', "etc/shadow");
    archive.link("slow", b'2', &"/x".repeat(49));
    archive.add(&Fields { path: "null", kind: b'3', device: (1, 3), mode: 0o666, ..Fields::default() }, b"");
    archive.add(&Fields { path: "disk", kind: b'4', device: (259, 70_000), ..Fields::default() }, b"");
    archive.add(&Fields { path: "pipe", kind: b'6', ..Fields::default() }, b"");
    let imported = import(&folder, "disk.raw", 64 << 20, &archive.end()).unwrap();
    check(&folder, "disk.raw");
    assert_eq!(imported.file_system.entries, 11);
    let has = |path: &str, texts: &[&str]| {
        let found = stat(&folder, "disk.raw", path);
        texts.iter().for_each(|text| assert!(found.contains(text), "\"{text}\" of {path} is not in {found}"));
    };
    has("/", &["Mode:  0711", "User:     5"]);
    has("/etc/shadow", &["Mode:  0640", "User: 70000", "Group:    42", "Links: 2", "0x499602d2:00000000"]);
    has("/etc/hard", &["User: 70000", "Links: 2"]);
    has("/etc/su", &["Mode:  04755"]);
    has("/fast", &["Fast link dest: \"etc/shadow\""]);
    has("/slow", &["Type: symlink"]);
    has("/null", &["Type: character special", "Device major/minor number: 01:03"]);
    has("/disk", &["Type: block special", "Device major/minor number: 259:70000"]);
    has("/pipe", &["Type: FIFO"]);
    has(&format!("/{long}"), &["User: -294967296", "user.note (20) = \"with", "security.capability (20)"]);
    // 5000000000 is 0x12a05f200: one in the epoch bits, and the nanoseconds above them.
    has(&format!("/{long}"), &["0x2a05f200:1d6f3455"]);
    assert_eq!(content(&folder, "disk.raw", "/etc/su"), [7; 5000]);
    assert_eq!(content(&folder, "disk.raw", &format!("/{long}")), b"long");
}

#[test]
fn the_same_archive_gives_the_same_disk() {
    let folder = TestFolder::new("tar-same");
    let mut archive = Archive::default();
    for index in 0..300 {
        let pax: &[(&str, &[u8])] = &[("SCHILY.xattr.user.a", &[index as u8 % 7])];
        archive.add(&Fields { path: &format!("d{}/f{index}", index % 10), pax, ..Fields::default() }, &[1; 100]);
    }
    let archive = archive.end();
    for disk in ["one", "other"] {
        import(&folder, disk, 32 << 20, &archive).unwrap();
    }
    assert!(std::fs::read(folder.path("one")).unwrap() == std::fs::read(folder.path("other")).unwrap());
}

#[test]
fn disks_of_every_size_are_sound_and_full_ones_are_refused() {
    let folder = TestFolder::new("tar-sizes");
    let mut archive = Archive::default();
    let archive = archive.directory("a").file("a/b", &[3; 100_000]).end();
    for len in [4 << 20, 31 << 20, 33 << 20, 127 << 20, (128 << 20) + 4096, 129 << 20, 1 << 30, 5 << 30, 3 << 40] {
        import(&folder, "disk", len, &archive).unwrap();
        check(&folder, "disk");
        assert_eq!(content(&folder, "disk", "/a/b"), [3; 100_000]);
        let taken = std::fs::metadata(folder.path("disk")).unwrap().blocks() * 512;
        assert!(taken < (4 << 20) + len / 10_000, "{taken} bytes are written for a disk of {len}");
    }
    let refused = import(&folder, "disk", (4 << 20) - 1, &archive).unwrap_err();
    assert!(refused.to_string().contains("4194304 are needed"), "{refused}");
    let mut big = Archive::default();
    let big = big.file("big", &vec![1; 5 << 20]).end();
    let refused = import(&folder, "disk", 5 << 20, &big).unwrap_err();
    assert!(refused.to_string().contains("no blocks left"), "{refused}");
    let mut many = Archive::default();
    (0..2000).for_each(|index| _ = many.file(&format!("f{index}"), b""));
    let refused = import(&folder, "disk", 16 << 20, &many.end()).unwrap_err();
    assert!(refused.to_string().contains("no inodes left"), "{refused}");
}

#[test]
fn many_files_long_directories_and_many_extents_are_sound() {
    let mut random = Random::new();
    let folder = TestFolder::new("tar-many");
    let mut archive = Archive::default();
    for index in 0..20_000 {
        archive.file(&format!("long/name-that-takes-some-room-{index}"), &index.to_string().into_bytes());
    }
    (0..500).for_each(|index| _ = archive.directory(&format!("wide/{index}")));
    // A file whose every second block is a hole, in the form of GNU tar 1.0.
    let parts = 5000_u64;
    let mut map = format!("{parts}\n");
    (0..parts).for_each(|part| map.push_str(&format!("{}\n4096\n", part * 8192)));
    let mut bytes = map.into_bytes();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let mut expected = vec![0; parts as usize * 8192];
    for part in 0..parts as usize {
        let value = random.below(255) as u8 + 1;
        expected[part * 8192..part * 8192 + 4096].fill(value);
        bytes.extend_from_slice(&[value; 4096]);
    }
    let len = expected.len().to_string();
    let pax: &[(&str, &[u8])] = &[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"holes"),
        ("GNU.sparse.realsize", len.as_bytes()),
    ];
    archive.add(&Fields { path: "GNUSparseFile.0/holes", pax, ..Fields::default() }, &bytes);
    let imported = import(&folder, "disk", 1 << 30, &archive.end()).unwrap();
    check(&folder, "disk");
    assert_eq!(imported.file_system.entries, 20_000 + 500 + 3);
    assert!(content(&folder, "disk", "/holes") == expected);
    assert_eq!(content(&folder, "disk", "/long/name-that-takes-some-room-19999"), b"19999");
}

#[test]
fn later_entries_take_the_place_of_earlier_ones() {
    let folder = TestFolder::new("tar-again");
    let mut archive = Archive::default();
    let pax: &[(&str, &[u8])] = &[("SCHILY.xattr.user.a", b"1")];
    for round in 0..50_u8 {
        archive.add(&Fields { path: "file", pax, ..Fields::default() }, &[round; 300_000]);
        archive.link("other", b'1', "file");
        archive.directory("folder").directory("empty");
    }
    archive.add(&Fields { path: "folder", kind: b'5', mode: 0o700, ..Fields::default() }, b"");
    archive.file("empty", b"now a file").directory("other").link("file", b'1', "file");
    let imported = import(&folder, "disk", 16 << 20, &archive.end()).unwrap();
    check(&folder, "disk");
    assert_eq!(imported.file_system.entries, 4);
    assert_eq!(content(&folder, "disk", "/file"), vec![49; 300_000]);
    assert_eq!(content(&folder, "disk", "/empty"), b"now a file");
    assert!(stat(&folder, "disk", "/folder").contains("Mode:  0700"));
    assert!(stat(&folder, "disk", "/other").contains("Type: directory"));
}

/// All that can be seen of a tree.
fn describe(root: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    while let Some(path) = left.pop() {
        let status = std::fs::symlink_metadata(&path).unwrap();
        let name = path.strip_prefix(root).unwrap().display().to_string();
        let kind = status.file_type();
        let mut text = format!(
            "{:o} {}:{} {}.{:09}",
            status.mode(),
            status.uid(),
            status.gid(),
            status.mtime(),
            status.mtime_nsec()
        );
        if !kind.is_dir() {
            text += &format!(" links {}", status.nlink());
        }
        if kind.is_char_device() || kind.is_block_device() {
            text += &format!(" device {:x}", status.rdev());
        }
        if kind.is_symlink() {
            text += &format!(" -> {}", std::fs::read_link(&path).unwrap().display());
        }
        if kind.is_file() {
            let bytes = std::fs::read(&path).unwrap();
            let hash = bytes.iter().fold(0_u64, |hash, byte| hash.rotate_left(5).wrapping_mul(31) ^ u64::from(*byte));
            text += &format!(" {} bytes {hash:x}", bytes.len());
        }
        let mut names = vec![0; 4096];
        let len = rustix::fs::llistxattr(&path, &mut names[..]).unwrap_or(0);
        let mut names: Vec<&[u8]> = names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
        names.sort();
        for name in names {
            let mut value = vec![0; 4096];
            let name = std::str::from_utf8(name).unwrap();
            let len = rustix::fs::lgetxattr(&path, name, &mut value[..]).unwrap();
            text += &format!("; {name}={:?}", &value[..len]);
        }
        // lost+found is the file system's own.
        if name != "lost+found" {
            found.insert(name, text);
        }
        if kind.is_dir() {
            left.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    found
}

/// A tree with something of everything; needs root.
fn make_tree(folder: &TestFolder) {
    run(
        folder,
        "sh",
        &[
            "-ec",
            "mkdir -p tree/usr/bin tree/dev tree/home/me/deep tree/tmp
            cp /bin/ls /bin/cat tree/usr/bin; chmod 4755 tree/usr/bin/ls; chmod 1777 tree/tmp
            cd tree; ln -s usr/bin bin; ln usr/bin/cat usr/bin/kitty; ln -s loop loop; ln -s $(printf '/long%.0s' $(seq 300)) slow
            mknod dev/null c 1 3; mknod dev/sda b 8 0; mknod dev/far c 300 70000; mkfifo dev/pipe
            chown 1000:1001 home/me; chown -h 70000:70001 loop; chown 4000000000:5 dev/pipe
            dd if=/dev/urandom of=home/me/holes bs=4k seek=100 count=3 status=none; truncate -s 10M home/me/holes
            dd if=/dev/urandom of=home/me/holes bs=1k seek=3001 count=3 status=none conv=notrunc
            for i in $(seq 500); do echo $i > home/me/deep/file-with-a-name-$i; done
            touch -d '2001-02-03 04:05:06.123456789' usr/bin/cat; touch -d 1930-01-01 home/me/deep; touch -d 2200-01-01 tmp
            touch \"home/me/$(printf 'n%.0s' $(seq 255))\"; printf x > 'home/me/ünï\n'",
        ],
    );
    let flags = rustix::fs::XattrFlags::empty();
    let set = |path: &str, name: &str, value: &[u8]| {
        rustix::fs::lsetxattr(folder.path("tree").join(path), name, value, flags).unwrap();
    };
    set("usr/bin/ls", "security.capability", b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    set("home/me", "trusted.overlay", b"\0\xff\0");
    set("home/me", "user.empty", b"");
    set("loop", "trusted.of-a-link", b"yes");
    // Owner, user 1000, owning group, mask, others.
    let list = b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\x02\0\x04\0\xe8\x03\0\0\
                 \x04\0\x05\0\xff\xff\xff\xff\x10\0\x05\0\xff\xff\xff\xff\x20\0\x05\0\xff\xff\xff\xff";
    set("tmp", "system.posix_acl_access", list);
    set("tmp", "system.posix_acl_default", list);
    for path in ["usr/bin/cat", "home/me/deep/file-with-a-name-1", "home/me/deep/file-with-a-name-2"] {
        set(path, "user.mime", b"text/plain");
    }
}

#[test]
fn a_mounted_disk_shows_the_tree_of_the_archive_and_of_the_folder() {
    if !is_root() {
        println!("left out: only root can make device nodes and mount");
        return;
    }
    let folder = TestFolder::new("tar-mounted");
    make_tree(&folder);
    let tree = describe(&folder.path("tree"));
    assert!(tree.len() > 500);
    let at = folder.path("mounted");
    let names = "--xattrs --xattrs-include=* -C tree -c .";
    for (packing, packer, format) in [
        (Packing::Plain, "", "--format=pax"),
        (Packing::Plain, "", "--format=pax -S --sparse-version=0.0"),
        (Packing::Plain, "", "--format=pax -S --sparse-version=0.1"),
        (Packing::Gzip, "-z", "--format=pax -S --sparse-version=1.0"),
        (Packing::Zstd, "--zstd", "--format=pax -S"),
        (Packing::Xz, "-J", "--format=pax -S"),
        (Packing::Plain, "", "--format=gnu -S"),
    ] {
        run(&folder, "sh", &["-ec", &format!("tar {packer} {format} {names} > archive")]);
        let mut target = RawTarget::create(&folder.path("disk"), 256 << 20).unwrap();
        tar_to_ext4(&folder.path("archive"), packing, &mut target, Ext4Options::default()).unwrap();
        target.finish().unwrap();
        check(&folder, "disk");
        let mounted = Mount::new(&folder, "disk", &at);
        let mut found = describe(&at);
        let mut expected = tree.clone();
        if format.contains("gnu") {
            // This form has neither parts of seconds nor attributes.
            for text in found.values_mut().chain(expected.values_mut()) {
                let without_attributes = text.split("; ").next().unwrap_or_default();
                *text = without_attributes.split(' ').map(|word| word.split('.').next().unwrap_or_default()).collect();
            }
        }
        compare(&expected, &found, format);
        drop(mounted);
        std::fs::remove_file(folder.path("disk")).unwrap();
    }
    let mut target = RawTarget::create(&folder.path("disk"), 256 << 20).unwrap();
    folder_to_ext4(&folder.path("tree"), &mut target, Ext4Options::default()).unwrap();
    target.finish().unwrap();
    check(&folder, "disk");
    let _mounted = Mount::new(&folder, "disk", &at);
    compare(&describe(&folder.path("tree")), &describe(&at), "a folder");
    let taken = |root: &Path| std::fs::metadata(root.join("home/me/holes")).unwrap().blocks();
    assert!(taken(&at) <= taken(&folder.path("tree")), "holes were filled");
}

fn compare(expected: &BTreeMap<String, String>, found: &BTreeMap<String, String>, what: &str) {
    for (name, text) in expected {
        assert_eq!(found.get(name), Some(text), "{what}: {name}");
    }
    assert_eq!(expected.len(), found.len(), "{what}");
}

#[test]
fn a_disk_can_grow_and_be_written_by_the_kernel() {
    if !is_root() {
        println!("left out: only root can mount");
        return;
    }
    let folder = TestFolder::new("tar-grown");
    let mut archive = Archive::default();
    (0..3000).for_each(|index| _ = archive.file(&format!("d/{index}"), &[index as u8; 2000]));
    import(&folder, "disk", 64 << 20, &archive.end()).unwrap();
    run(
        &folder,
        "sh",
        &[
            "-ec",
            "mkdir at; mount -o loop disk at; trap 'umount at' EXIT
            rm at/d/1*; for i in $(seq 1000); do echo $i > at/d/new-$i; done; dd if=/dev/zero of=at/big bs=1M count=20 status=none
            mv at/d/2 at/moved; sync",
        ],
    );
    check(&folder, "disk");
    run(&folder, "sh", &["-ec", "truncate -s 3G disk; resize2fs -f disk 2>&1"]);
    check(&folder, "disk");
    let grown = run(&folder, "dumpe2fs", &["-h", "disk"]);
    assert!(grown.contains("Block count:              786432"), "{grown}");
}
