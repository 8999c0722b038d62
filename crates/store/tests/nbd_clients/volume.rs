//! A volume of a store in the place of the disk in memory.

use crate::harness::{Folder, TestServer, image, run, text};
use polder_store::nbd::ServerOptions;
use polder_store::{CHUNK_LEN_DEFAULT, Content, OpenDisk, Store, StoreOptions, Volume, VolumeOptions};
use std::fs;
use std::sync::Arc;

const CAPACITY: u64 = 24 << 20;

/// Serves the volume of the store in `folder`, which is made if there is none.
fn serve(folder: Folder) -> TestServer<OpenDisk> {
    let store = Store::open(&folder.path("store"), StoreOptions::default()).unwrap();
    if store.volume("disk").is_err() {
        let content = Content::Zeros { capacity_bytes: CAPACITY, chunk_len: CHUNK_LEN_DEFAULT };
        store.create_volume("disk", &content).unwrap();
    }
    let volume = Volume::open(&store, "disk", VolumeOptions::default()).unwrap();
    TestServer::with_disk(folder, Arc::new(OpenDisk::Volume(volume)), ServerOptions::default())
}

/// Ends the server and closes the volume.
fn end(server: TestServer<OpenDisk>) -> Folder {
    let TestServer { server, disk, folder, .. } = server;
    drop(server);
    Arc::into_inner(disk).expect("the server has let go of the disk").close().unwrap();
    folder
}

#[test]
fn a_volume_brings_an_image_back_after_it_was_closed() {
    let server = serve(Folder::new());
    let (there, back) = (server.folder.path("there.img"), server.folder.path("back.img"));
    let bytes = image(CAPACITY as usize);
    fs::write(&there, &bytes).unwrap();
    run("nbdcopy", &["--connections=4", "--flush", text(&there), &server.uri("disk")]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &server.uri("disk"), text(&there)]);
    let server = serve(end(server));
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &server.tcp_uri("disk"), text(&there)]);
    run("nbdcopy", &["--connections=4", &server.uri("disk"), text(&back)]);
    assert!(fs::read(&back).unwrap() == bytes, "what comes back is what went there");
    end(server);
}

#[test]
fn fio_finds_what_it_has_written_to_a_volume() {
    let server = serve(Folder::new());
    let uri = format!("--uri={}", server.uri("disk"));
    run(
        "fio",
        &[
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--size=16m",
            "--rw=randwrite",
            "--bsrange=512-64k",
            "--bs_unaligned",
            "--iodepth=16",
            "--fsync=64",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
        ],
    );
    end(server);
}

#[test]
fn clients_see_what_has_changed_since_a_snapshot_of_a_volume() {
    let server = serve(Folder::new());
    let OpenDisk::Volume(volume) = &*server.disk else { unreachable!("a volume is served") };
    server.nbdsh("disk", "h.pwrite(b'1' * 65536, 0)");
    volume.snapshot("monday").unwrap();
    server.nbdsh("disk", "h.pwrite(b'2' * 16384, 1 << 20); h.zero(16384, 16384); h.flush()");
    let map = run("nbdinfo", &["--map=polder:changed:monday", &server.uri("disk")]);
    let changed: Vec<Vec<&str>> = map
        .lines()
        .map(|line| line.split_whitespace().collect())
        .filter(|words: &Vec<&str>| words.get(2) == Some(&"1"))
        .collect();
    let ranges: Vec<(&str, &str)> = changed.iter().map(|words| (words[0], words[1])).collect();
    assert_eq!(ranges, [("16384", "16384"), ("1048576", "16384")], "{map}");
    end(server);
}
