//! Whole images and loads, there and back.

use crate::harness::{TestServer, image, run, text};
use std::fs;

const CAPACITY: u64 = 24 << 20;

#[test]
fn nbdcopy_brings_an_image_there_and_back_over_several_connections() {
    let server = TestServer::new(CAPACITY);
    let (there, back) = (server.folder.path("there.img"), server.folder.path("back.img"));
    let bytes = image(CAPACITY as usize);
    fs::write(&there, &bytes).unwrap();
    for (uri, back) in [(server.uri("disk"), &back), (server.tcp_uri("disk"), &back)] {
        run("nbdcopy", &["--connections=4", "--requests=32", text(&there), &uri]);
        run("nbdcopy", &["--connections=4", "--requests=32", &uri, text(back)]);
        assert!(fs::read(back).unwrap() == bytes, "what comes back is what went there");
        run("nbdcopy", &["--synchronous", &uri, text(back)]);
        assert!(fs::read(back).unwrap() == bytes, "what comes back is what went there");
    }
    // Between two exports of this server, by clients that use the whole protocol.
    run("nbdcopy", &["--flush", "--destination-is-zero", &server.uri("read-only"), "null:"]);
}

#[test]
fn qemu_img_converts_compares_and_checks() {
    let server = TestServer::new(CAPACITY);
    let (raw, qcow2, back) =
        (server.folder.path("there.img"), server.folder.path("there.qcow2"), server.folder.path("back.qcow2"));
    fs::write(&raw, image(CAPACITY as usize)).unwrap();
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&qcow2)]);
    for uri in [server.uri("disk"), server.tcp_uri("disk")] {
        run("qemu-img", &["convert", "-n", "-W", "-m", "8", "-f", "qcow2", "-O", "raw", text(&qcow2), &uri]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, text(&qcow2)]);
        run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, text(&back)]);
        run("qemu-img", &["check", text(&back)]);
        run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(&back), text(&raw)]);
    }
    run(
        "qemu-img",
        &["bench", "-f", "raw", "-c", "2000", "-d", "16", "-w", "--flush-interval=64", &server.uri("disk")],
    );
}

#[test]
fn qemu_io_reads_its_patterns_back() {
    let server = TestServer::new(CAPACITY);
    let script = [
        "aio_write -P 1 0 1M",
        "aio_write -P 2 1M 333k",
        "aio_flush",
        "write -P 3 512 512",
        "write -z 64k 128k",
        "discard 512k 64k",
        "write -P 4 -f 700001 3",
        "flush",
        "read -P 1 0 512",
        "read -P 3 512 512",
        "read -P 1 1k 63k",
        "read -P 0 64k 128k",
        "read -P 0 512k 64k",
        "read -P 4 700001 3",
        "read -P 1 700004 100",
        "read -P 2 1M 333k",
    ];
    let mut arguments = vec!["-f", "raw"];
    arguments.extend(script.iter().flat_map(|command| ["-c", *command]));
    let uri = server.uri("disk");
    arguments.push(&uri);
    let printed = run("qemu-io", &arguments);
    assert!(!printed.contains("verification failed"), "{printed}");
}

#[test]
fn fio_finds_what_it_has_written() {
    let server = TestServer::new(CAPACITY);
    for (index, uri) in [server.uri("disk"), server.tcp_uri("disk")].iter().enumerate() {
        let uri = format!("--uri={uri}");
        let common = ["--name=verify", "--ioengine=nbd", &uri, "--size=16m", "--verify=crc32c", "--verify_fatal=1"];
        let random_seed = format!("--randseed={}", index + 1);
        let mut write = common.to_vec();
        write.extend([
            "--rw=randwrite",
            "--bsrange=512-64k",
            "--bs_unaligned",
            "--iodepth=16",
            "--fsync=64",
            "--do_verify=1",
            &random_seed,
        ]);
        run("fio", &write);
        let mut mixed = common.to_vec();
        mixed.extend(["--rw=randrw", "--bs=4k", "--iodepth=32", "--number_ios=6000", &random_seed]);
        run("fio", &mixed);
    }
}

#[test]
fn nbdkit_stands_between_a_client_and_the_server() {
    let server = TestServer::new(CAPACITY);
    let (there, back) = (server.folder.path("there.img"), server.folder.path("back.img"));
    let bytes = image(CAPACITY as usize);
    fs::write(&there, &bytes).unwrap();
    let uri = format!("uri={}", server.uri("disk"));
    for filters in [
        &["--filter=fua", "fuamode=force"][..],
        &["--filter=noextents", "--filter=noparallel"],
        &["--filter=multi-conn", "--filter=blocksize", "maxdata=64K"],
        &["--filter=cow", "--filter=nozero"],
        &["--filter=delay", "rdelay=1ms", "wdelay=1ms"],
    ] {
        let script = format!("nbdcopy {} \"$uri\" && nbdcopy \"$uri\" {}", text(&there), text(&back));
        let (flags, parameters): (Vec<&str>, Vec<&str>) = filters.iter().partition(|word| word.starts_with('-'));
        let mut arguments = vec!["-U", "-"];
        arguments.extend(flags);
        arguments.extend(["nbd", &uri, "shared=true"]);
        arguments.extend(parameters);
        arguments.extend(["--run", &script]);
        run("nbdkit", &arguments);
        assert!(fs::read(&back).unwrap() == bytes, "{filters:?}");
    }
    // A filter that fails if zeros were written over data.
    run(
        "nbdkit",
        &["-U", "-", "--filter=checkwrite", "nbd", &uri, "--run", &format!("nbdcopy {} \"$uri\"", text(&there))],
    );
}
