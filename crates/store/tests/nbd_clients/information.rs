//! What clients are told about exports.

use crate::harness::{TestServer, fail, run};
use polder_store::disk::Disk;
use polder_store::disk::memory::CHUNK_LEN;
use serde_json::Value;

const CAPACITY: u64 = 8 << 20;

fn json(program: &str, arguments: &[&str]) -> Value {
    serde_json::from_str(&run(program, arguments)).expect("the client prints JSON")
}

#[test]
fn nbdinfo_tells_what_the_server_can() {
    let server = TestServer::new(CAPACITY);
    for uri in [server.uri("disk"), server.uri(""), server.tcp_uri("disk")] {
        let info = json("nbdinfo", &["--json", &uri]);
        assert_eq!(info["protocol"], "newstyle-fixed");
        assert_eq!(info["TLS"], false);
        assert_eq!(info["structured"], true);
        let export = &info["exports"][0];
        assert_eq!(export["export-size"], CAPACITY);
        assert_eq!(export["description"], "A disk for tests.");
        assert_eq!(export["block_size_minimum"], 1);
        assert_eq!(export["block_size_preferred"], 4096);
        assert_eq!(export["block_size_maximum"], 64 << 20);
        assert_eq!(export["is_read_only"], false);
        for can in ["cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"] {
            assert_eq!(export[format!("can_{can}")], true, "{can}");
        }
    }
    assert_eq!(run("nbdinfo", &["--size", &server.uri("disk")]).trim(), CAPACITY.to_string());
    run("nbdinfo", &["--can", "multi-conn", &server.uri("disk")]);
    run("nbdinfo", &["--is", "read-only", &server.uri("read-only")]);
    fail("nbdinfo", &["--can", "write", &server.uri("read-only")]);
    fail("nbdinfo", &["--is", "read-only", &server.uri("disk")]);
    let error = fail("nbdinfo", &[&server.uri("missing")]);
    assert!(error.contains("missing") || error.contains("export"), "{error}");
}

#[test]
fn exports_are_listed_by_every_client() {
    let server = TestServer::new(CAPACITY);
    let listed = json("nbdinfo", &["--list", "--json", &server.uri("")]);
    let names: Vec<&str> =
        listed["exports"].as_array().unwrap().iter().map(|export| export["export-name"].as_str().unwrap()).collect();
    assert_eq!(names, ["disk", "read-only"]);
    let listed = run("qemu-nbd", &["--list", "--socket", server.folder.path("socket").to_str().unwrap()]);
    assert!(listed.contains("exports available: 2") && listed.contains("A disk for tests."), "{listed}");
    let port = server.address.port().to_string();
    let listed = run("nbd-client", &["-l", "127.0.0.1", &port]);
    assert!(listed.contains("disk") && listed.contains("read-only"), "{listed}");
}

#[test]
fn maps_show_what_is_allocated_and_what_has_changed() {
    let server = TestServer::new(CAPACITY);
    let (uri, chunk) = (server.uri("disk"), CHUNK_LEN as u64);
    server.nbdsh("disk", &format!("h.pwrite(b'1' * {chunk}, {chunk})"));
    server.disk.snapshot("before");
    server.nbdsh("disk", &format!("h.pwrite(b'2' * 512, {})", 5 * chunk));

    let allocated = |offset: u64| offset == chunk || offset == 5 * chunk;
    let map = json("nbdinfo", &["--map", "--json", &uri]);
    let mut end = 0;
    for extent in map.as_array().unwrap() {
        let offset = extent["offset"].as_u64().unwrap();
        assert_eq!(offset, end);
        assert_eq!(extent["type"], if allocated(offset) { 0 } else { 3 }, "{extent}");
        end += extent["length"].as_u64().unwrap();
    }
    assert_eq!(end, CAPACITY);

    let map = json("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
    let data: Vec<u64> = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|extent| extent["data"] == true)
        .map(|extent| extent["start"].as_u64().unwrap())
        .collect();
    assert_eq!(data, [chunk, 5 * chunk]);

    let map = json("nbdinfo", &["--map=polder:changed:before", "--json", &uri]);
    let changed: Vec<u64> = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|extent| extent["type"] == 1)
        .map(|extent| extent["offset"].as_u64().unwrap())
        .collect();
    assert_eq!(changed, [5 * chunk]);
    // QEMU shows what is dirty as what has no data.
    let options = format!(
        "driver=nbd,export=disk,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:before",
        server.folder.path("socket").display()
    );
    let map = json("qemu-img", &["map", "--output=json", "--image-opts", &options]);
    let dirty: Vec<(u64, u64)> = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|extent| extent["data"] == false)
        .map(|extent| (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap()))
        .collect();
    assert_eq!(dirty, [(5 * chunk, chunk)]);
    let listed = run("nbdinfo", &["--list", &uri]);
    for context in ["base:allocation", "polder:changed:before", "qemu:dirty-bitmap:before"] {
        assert!(listed.contains(context), "{listed}");
    }
}

#[test]
fn qemu_asks_about_more_than_32_bits_can_say_and_hears_of_it() {
    let capacity = 14u64 << 30;
    let server = TestServer::new(capacity);
    let chunk = CHUNK_LEN as u64;
    server.nbdsh("disk", &format!("h.pwrite(b'1' * {chunk}, {})", 6u64 << 30));
    // What QEMU sends is said on standard error.
    let traced = "exec 2>&1; qemu-img -T nbd_send_request map --output=json -f raw \"$0\"";
    let said = run("sh", &["-c", traced, &server.uri("disk")]);
    let asked = said.split(".len = ").skip(1).filter_map(|rest| rest.split([',', ' ']).next()?.parse::<u64>().ok());
    // QEMU knows of extended headers from 8.2 on; an older one asks for less at a time, and is to see the same.
    let version = run("qemu-img", &["--version"]);
    let mut numbers =
        version.split_whitespace().nth(2).unwrap_or_default().split('.').map_while(|part| part.parse().ok());
    let knows: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    match knows >= (8, 2) {
        true => assert_eq!(asked.max(), Some(capacity), "{said}"),
        false => assert!(asked.max().is_some_and(|most| most <= u32::MAX.into()), "{said}"),
    }
    let map = json("qemu-img", &["map", "--output=json", "-f", "raw", &server.uri("disk")]);
    let parts: Vec<(u64, u64, bool)> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|extent| (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap(), extent["data"] == true))
        .collect();
    let data = 6 << 30;
    let behind = data + chunk;
    assert_eq!(parts, [(0, data, false), (data, chunk, true), (behind, capacity - behind, false)]);
}

#[test]
fn a_client_that_comes_again_sees_a_resized_disk() {
    let server = TestServer::new(CAPACITY);
    server.disk.resize(2 * CAPACITY).unwrap();
    assert_eq!(run("nbdinfo", &["--size", &server.uri("disk")]).trim(), (2 * CAPACITY).to_string());
    let info = json("qemu-img", &["info", "--output=json", "-f", "raw", &server.uri("disk")]);
    assert_eq!(info["virtual-size"], 2 * CAPACITY);
}
