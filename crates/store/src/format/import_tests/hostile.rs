//! Archives that lie, loop or burst.

use super::super::FormatError;
use super::super::qcow2::Random;
use super::super::test_folder::TestFolder;
use super::super::testbench;
use super::archive::{Archive, Fields};
use super::{check, content, import};
use std::time::{Duration, Instant};

fn refused(archive: &[u8]) -> String {
    let folder = TestFolder::new("tar-hostile");
    match import(&folder, "disk", 16 << 20, archive) {
        Ok(_) => "nothing: it was accepted".to_owned(),
        Err(refused) => refused.to_string(),
    }
}

#[track_caller]
fn is_refused(archive: &mut Archive, text: &str) {
    let refused = refused(&archive.end());
    assert!(refused.contains(text), "\"{text}\" is not in: {refused}");
}

#[test]
fn paths_stay_in_the_tree_and_follow_nothing() {
    let new = Archive::default;
    is_refused(new().file("../outside", b"x"), "archive: entry ../outside: its path contains \"..\"");
    is_refused(new().file("a/../../outside", b"x"), "its path contains \"..\"");
    is_refused(new().link("away", b'2', "/etc").file("away/passwd", b"x"), "through the symbolic link away");
    is_refused(new().link("loop", b'2', "loop").file("loop/x", b"x"), "through the symbolic link loop");
    is_refused(new().link("to", b'2', "/etc/shadow").link("hard", b'1', "to/x"), "through the symbolic link to");
    is_refused(new().link("hard", b'1', "/etc/shadow"), "there is nothing named /etc/shadow yet");
    is_refused(new().link("hard", b'1', "../../etc/shadow"), "its target: its path contains \"..\"");
    is_refused(new().directory("d").link("hard", b'1', "d"), "hard link to a directory");
    is_refused(new().file("f", b"x").file("f/g", b"x"), "through f, which is no directory");
    is_refused(new().file("d/e", b"x").file("d", b"x"), "the place of a directory that is not empty");
    is_refused(new().file("./", b"x").link(".", b'2', "x"), "the place of the root directory");
    is_refused(new().file("lost+found", b"x"), "the place of lost+found");
    is_refused(new().link("empty", b'2', ""), "a symbolic link cannot have 0 bytes");
    let long = "x".repeat(256);
    is_refused(
        new().add(&Fields { pax: &[("path", long.as_bytes())], ..Fields::default() }, b""),
        "a name of 256 bytes",
    );
    let deep = "x/".repeat(2049);
    is_refused(
        new().add(&Fields { pax: &[("path", deep.as_bytes())], ..Fields::default() }, b""),
        "its path has 4098 bytes",
    );
    is_refused(new().add(&Fields { pax: &[("path", b"a\0b")], ..Fields::default() }, b""), "contains a zero byte");

    let folder = TestFolder::new("tar-absolute");
    let mut archive = Archive::default();
    archive.file("/etc//./passwd", b"ours").link("/abs", b'1', "/etc/passwd").link("out", b'2', "../../../etc/shadow");
    import(&folder, "disk", 16 << 20, &archive.end()).unwrap();
    check(&folder, "disk");
    assert_eq!(content(&folder, "disk", "/abs"), b"ours");
}

#[test]
fn numbers_that_cannot_be_are_refused() {
    let new = Archive::default;
    let pax = |key: &str, value: &[u8], text: &str| {
        is_refused(new().add(&Fields { path: "f", pax: &[(key, value)], ..Fields::default() }, b""), text);
    };
    pax("size", b"99999999999999999999999", "nothing sensible of size");
    pax("size", b"1099511627776", "the archive is cut off");
    pax("uid", b"4294967296", "its owner is 4294967296");
    pax("SCHILY.xattr.nowhere", b"x", "belongs to no namespace");
    pax("SCHILY.xattr.user.", b"x", "has a name that ext4 cannot hold");
    pax("SCHILY.xattr.user.big", &[b'x'; 5000], "its extended attributes need 5020 bytes");
    pax("SCHILY.xattr.system.posix_acl_access", b"what", "is no access control list");
    pax("GNU.sparse.realsize", b"18446744073709551615", "a file cannot have 18446744073709551615 bytes");
    pax("GNU.sparse.map", b"0,10,5,10", "nothing sensible of GNU.sparse.map");
    pax("GNU.sparse.map", b"18446744073709551615,2", "nothing sensible of GNU.sparse.map");
    pax("GNU.sparse.map", b"0,512", "its map of holes is for 512 bytes up to 512; it has 0 of");
    pax("GNU.sparse.major", b"1", "its map of holes is damaged");
    let device = Fields { path: "dev", kind: b'3', device: (4096, 0), ..Fields::default() };
    is_refused(new().add(&device, b""), "there is no device 4096:0");
    is_refused(new().add(&Fields { path: "odd", kind: b'D', ..Fields::default() }, b""), "entries of the type \"D\"");
    let bad_sum = &mut new();
    bad_sum.file("f", b"x").0[0] = b'g';
    is_refused(bad_sum, "entry 0: its checksum is wrong");
    is_refused(
        new().header(&Fields { kind: b'x', ..Fields::default() }, 2 << 20),
        "the length of extended headers in bytes is 2097152",
    );
    is_refused(
        new().header(&Fields { kind: b'L', ..Fields::default() }, 0o77777777777),
        "the length of extended headers",
    );
}

#[test]
fn extended_headers_cannot_pile_up() {
    let pile = |kind: u8, count: usize, key: &str| {
        let mut archive = Archive::default();
        for index in 0..count {
            let key = format!("SCHILY.xattr.user.{key}{index:05}");
            let record = format!("{} {key}={}\n", key.len() + 1007, "x".repeat(1000));
            let header = Fields { kind, ..Fields::default() };
            archive.header(&header, record.len() as u64).content(record.as_bytes());
        }
        archive.file("f", b"").end()
    };
    assert!(
        refused(&pile(b'x', 300, "a"))
            .contains("record 0 of its extended header says nothing sensible of SCHILY.xattr")
    );
    assert!(refused(&pile(b'g', 20, "a")).contains("the length of extended headers in bytes is"));
    let mut names = Archive::default();
    (0..1100).for_each(|_| _ = names.header(&Fields { kind: b'K', ..Fields::default() }, 1000).content(&[b'x'; 1000]));
    is_refused(&mut names, "the length of extended headers in bytes is 1049000");
}

#[test]
fn an_archive_that_is_cut_off_is_refused() {
    let mut archive = Archive::default();
    let whole = archive.file("a", &[1; 700]).file("b", b"x").end();
    for len in [0, 100, 512, 600, 1536, 2000, whole.len() - 1024] {
        assert!(refused(&whole[..len]).contains("the archive is cut off"), "{len}");
    }
}

#[test]
fn a_bomb_ends_when_the_disk_is_full() {
    let folder = TestFolder::new("tar-bomb");
    let start = Instant::now();
    let header = {
        let mut archive = Archive::default();
        archive.header(&Fields { path: "bomb", ..Fields::default() }, 0o77777777777);
        archive.0
    };
    // Some 8 GiB that never were anywhere.
    let endless = std::io::Read::chain(&header[..], std::io::repeat(b'x'));
    let mut target = super::super::RawTarget::create(&folder.path("disk"), 32 << 20).unwrap();
    let refused = super::super::tar_stream_to_ext4(endless, "bomb", &mut target, Default::default()).unwrap_err();
    assert!(matches!(refused, FormatError::TargetFull { what: "blocks", .. }), "{refused}");
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn flipped_bytes_and_cut_archives_never_panic_and_leave_sound_disks() {
    let mut random = Random::new();
    let folder = TestFolder::new("tar-flips");
    let mut archive = Archive::default();
    for index in 0..12 {
        let pax: &[(&str, &[u8])] = &[("SCHILY.xattr.user.a", b"b"), ("mtime", b"12.5"), ("uid", b"7")];
        archive
            .add(&Fields { path: &format!("d{}/f{index}", index % 3), pax, ..Fields::default() }, &vec![index; 3000]);
        archive.link(&format!("d{}/h{index}", index % 3), b'1', &format!("d{}/f{index}", index % 3));
    }
    let pax: &[(&str, &[u8])] = &[("GNU.sparse.map", b"0,512,8192,512"), ("GNU.sparse.size", b"20000")];
    archive.add(&Fields { path: "holes", pax, ..Fields::default() }, &[9; 1024]);
    let archive = archive.end();
    let mut sound = 0;
    for round in 0..2000 {
        let mut bytes = archive.clone();
        for _ in 0..1 + random.below(3) {
            let at = random.below(bytes.len() as u64 / 512) as usize * 512;
            let inside = random.below(512) as usize;
            bytes[at + inside] ^= 1 << random.below(8);
            if random.below(3) > 0 {
                repair_sum(&mut bytes[at..at + 512]);
            }
        }
        if random.below(8) == 0 {
            bytes.truncate(random.below(bytes.len() as u64) as usize);
        }
        let start = Instant::now();
        testbench::import_tar(&bytes);
        assert!(start.elapsed() < Duration::from_secs(20), "round {round}");
        if round % 20 == 0 && import(&folder, "disk", 16 << 20, &bytes).is_ok() {
            check(&folder, "disk");
            sound += 1;
        }
    }
    assert!(sound > 0);
}

/// So that more than the checksum is looked at.
fn repair_sum(record: &mut [u8]) {
    record[148..156].fill(b' ');
    let sum: u32 = record.iter().map(|byte| u32::from(*byte)).sum();
    record[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}
