//! TLS with client certificates, made with the commands of docs/nbd.md.

use crate::harness::{Folder, TestServer, fail, image, run, text};
use polder_store::nbd::{ServerOptions, Tls};
use polder_trust::tls::{ClientCertificates, IdentityFiles, server_config};
use std::fs;

const CAPACITY: u64 = 8 << 20;

/// Runs the commands of docs/nbd.md in `folder`: an authority, a server and a client.
fn make_certificates(folder: &Folder) {
    let docs = include_str!("../../../../docs/nbd.md");
    let commands: String = docs
        .lines()
        .filter_map(|line| line.strip_prefix("$ openssl "))
        .map(|rest| format!("openssl {rest}\n"))
        .collect();
    assert!(commands.lines().count() >= 3, "docs/nbd.md shows how certificates are made");
    run("sh", &["-ec", &format!("cd {}\n{commands}", text(&folder.path("")))]);
}

enum Mode {
    Allowed,
    Required,
}

fn server(mode: Mode, clients: ClientCertificates, folder: Folder) -> TestServer {
    let identity = IdentityFiles { certificate: folder.path("server-cert.pem"), key: folder.path("server-key.pem") };
    let config = server_config(&identity, &clients).unwrap();
    let tls = match mode {
        Mode::Allowed => Tls::Allowed(config),
        Mode::Required => Tls::Required(config),
    };
    TestServer::with_options(folder, CAPACITY, ServerOptions { tls, ..ServerOptions::default() })
}

/// A URI that makes libnbd use TLS, with the certificates in `folder`.
fn tls_uri(server: &TestServer, folder: &Folder) -> String {
    format!("nbds://localhost:{}/disk?tls-certificates={}", server.address.port(), text(&folder.path("")))
}

#[test]
fn only_clients_with_a_certificate_of_the_authority_are_served() {
    let folder = Folder::new();
    make_certificates(&folder);
    let required = ClientCertificates::RequiredFrom(folder.path("ca-cert.pem"));
    let server = server(Mode::Required, required, folder);
    let uri = tls_uri(&server, &server.folder);
    let (there, back) = (server.folder.path("there.img"), server.folder.path("back.img"));
    let bytes = image(CAPACITY as usize);
    fs::write(&there, &bytes).unwrap();

    let info = run("nbdinfo", &[&uri]);
    assert!(info.contains("with TLS") && info.contains("structured"), "{info}");
    run("nbdcopy", &["--connections=4", text(&there), &uri]);
    run("nbdcopy", &["--connections=4", &uri, text(&back)]);
    assert!(fs::read(&back).unwrap() == bytes, "what comes back is what went there");
    let credentials = format!("tls-creds-x509,id=tls,endpoint=client,dir={}", text(&server.folder.path("")));
    let options = format!(
        "driver=nbd,host=localhost,port={},export=disk,tls-creds=tls,tls-hostname=localhost",
        server.address.port()
    );
    run(
        "qemu-img",
        &[
            "compare",
            "--object",
            &credentials,
            "--image-opts",
            &options,
            &format!("driver=raw,file.driver=file,file.filename={}", text(&there)),
        ],
    );

    let plain = fail("nbdinfo", &[&server.tcp_uri("disk")]);
    assert!(plain.contains("not supported"), "{plain}");
    // A client of another authority, which knows ours: it trusts the server, and the server does not trust it.
    let stranger = Folder::new();
    make_certificates(&stranger);
    fs::copy(server.folder.path("ca-cert.pem"), stranger.path("ca-cert.pem")).unwrap();
    fail("nbdinfo", &[&tls_uri(&server, &stranger)]);
    // One without a certificate.
    for name in ["client-cert.pem", "client-key.pem"] {
        fs::remove_file(stranger.path(name)).unwrap();
    }
    fail("nbdinfo", &[&tls_uri(&server, &stranger)]);
    run("nbdinfo", &[&uri]);
}

#[test]
fn where_tls_is_allowed_clients_choose() {
    let folder = Folder::new();
    make_certificates(&folder);
    let server = server(Mode::Allowed, ClientCertificates::NotAsked, folder);
    assert!(run("nbdinfo", &[&server.tcp_uri("disk")]).contains("without TLS"));
    assert!(run("nbdinfo", &[&server.uri("disk")]).contains("without TLS"));
    for name in ["client-cert.pem", "client-key.pem"] {
        fs::remove_file(server.folder.path(name)).unwrap();
    }
    assert!(run("nbdinfo", &[&tls_uri(&server, &server.folder)]).contains("with TLS"));
    // A client that trusts another authority does not talk to this server.
    let stranger = Folder::new();
    make_certificates(&stranger);
    fail("nbdinfo", &[&tls_uri(&server, &stranger)]);
}

#[test]
fn a_server_without_tls_says_so() {
    let folder = Folder::new();
    make_certificates(&folder);
    let server = TestServer::with_options(folder, CAPACITY, ServerOptions::default());
    fail("nbdinfo", &[&tls_uri(&server, &server.folder)]);
    run("nbdinfo", &[&server.tcp_uri("disk")]);
}
