//! Peers that ask for what is not offered, send something else, speak another version, or have no certificate.

use super::*;

#[test]
fn what_is_not_exported_is_refused_by_name() {
    let (here, there) = (TestStore::new(), TestStore::new());
    image_of(&there, "secret", &noise(13, CHUNK));
    image_of(&there, "open", &noise(14, CHUNK));
    image_of(&here, "ours", &noise(15, CHUNK));
    let listed = |names: &[&str]| Names::Listed(names.iter().map(|&name| name.to_owned()).collect());
    let options =
        ServeOptions { pull_images: listed(&["open"]), push_images: listed(&["upload"]), ..ServeOptions::default() };
    let with_server = |act: &dyn Fn(UnixStream) -> Result<(), TransferError>| {
        let [ours, theirs] = sockets();
        std::thread::scope(|scope| {
            let server = scope.spawn(|| serve(&there, theirs, &options, &mut quiet));
            let outcome = act(ours);
            server.join().unwrap().unwrap();
            outcome
        })
    };
    let pulled = |what: NodeRef| {
        with_server(&|stream| pull(&here, &what, stream, &TransferOptions::new("got"), &mut quiet).map(drop))
    };
    let pushed = |name: &str| {
        with_server(&|stream| push(&here, &image("ours"), stream, &TransferOptions::new(name), &mut quiet).map(drop))
    };
    for refused in
        [pulled(image("secret")), pulled(image("none")), pulled(NodeRef::Volume("disk".to_owned())), pushed("open")]
    {
        assert!(matches!(&refused, Err(TransferError::Refused(_))), "{refused:?}");
    }
    pulled(image("open")).unwrap();
    pushed("upload").unwrap();
    let again = pushed("upload").unwrap_err();
    assert!(again.to_string().contains("already"), "{again}");
    // A limit of what a push may bring.
    let options = ServeOptions { push_bytes_max: Some(1000), ..everything() };
    let [ours, theirs] = sockets();
    std::thread::scope(|scope| {
        scope.spawn(|| serve(&there, theirs, &options, &mut quiet));
        let pushed = push(&here, &image("ours"), ours, &TransferOptions::new("big"), &mut quiet);
        assert!(matches!(pushed, Ok(_) | Err(TransferError::Refused(_) | TransferError::Cut(_))), "{pushed:?}");
    });
}

#[test]
fn names_are_no_way_to_records_that_were_not_offered() {
    let there = TestStore::new();
    image_of(&there, "open", &noise(16, 2 * CHUNK));
    let attempts: [&[(u32, bool, &[u8])]; 5] = [
        // A node that was never opened, a child that is not there, a chunk opened, a second node of the offer, a node closed before.
        &[(7, false, &[1])],
        &[(0, false, &[1]), (1, false, &[2])],
        &[(0, false, &[1]), (1, false, &[1]), (2, true, &[1])],
        &[(0, false, &[2])],
        &[(0, false, &[1]), (1, false, &[1]), (2, false, &[0, 0, 1])],
    ];
    for attempt in attempts {
        let [ours, theirs] = sockets();
        std::thread::scope(|scope| {
            let server = scope.spawn(|| serve(&there, theirs, &everything(), &mut quiet));
            let mut link = Link::new(ours, Pace::limited(None));
            link.greet(&there).unwrap();
            link.send(&Message::Pull(image("open"))).unwrap();
            for &(handle, open_only, bits) in attempt {
                link.send(&Message::Want(wire::Want { handle, open_only, last: false, bits })).unwrap();
            }
            link.flush().unwrap();
            let mut refused = false;
            while let Ok(incoming) = link.receive() {
                refused |= matches!(incoming, wire::Incoming::Refused(_));
            }
            let served = server.join().unwrap();
            assert!(refused && matches!(served, Err(TransferError::Protocol(_))), "{attempt:?}: {served:?}");
        });
    }
}

/// A stream that changes one byte of what is received.
struct Lying {
    stream: UnixStream,
    at: usize,
    seen: usize,
}

impl Read for Lying {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.stream.read(bytes)?;
        if (self.seen..self.seen + read).contains(&self.at) {
            bytes[self.at - self.seen] ^= 0x10;
        }
        self.seen += read;
        Ok(read)
    }
}

impl Write for Lying {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_byte_that_changed_on_the_way_never_gets_into_the_store() {
    let here = TestStore::new();
    let mut bytes = noise(17, 2 * CHUNK);
    bytes[CHUNK / 2..CHUNK].fill(7);
    image_of(&here, "disk", &bytes);
    let there = TestStore::new();
    let total = push_to(&here, &TestStore::new(), "disk").sent_bytes as usize;
    for at in (0..total).step_by(97) {
        let [ours, theirs] = sockets();
        let lying = Lying { stream: theirs, at, seen: 0 };
        let outcome = std::thread::scope(|scope| {
            let server = scope.spawn(|| serve(&there, lying, &everything(), &mut quiet));
            let _ = push(&here, &image("disk"), ours, &TransferOptions::new("disk"), &mut quiet);
            server.join().unwrap()
        });
        // A changed byte of the name of the image or of the id of the store is none of the content's business.
        if outcome.is_ok() {
            for (row, _) in there.images().unwrap() {
                assert_eq!(image_content(&there, &row.name).unwrap(), bytes, "at {at}");
                there.remove_image(&row.name).unwrap();
            }
        }
    }
    verify(&there);
}

#[test]
fn a_peer_that_packs_other_content_under_a_name_is_found_out() {
    let (here, there) = (TestStore::new(), TestStore::new());
    let bytes = noise(18, 3 * CHUNK);
    image_of(&here, "disk", &bytes);
    let (row, node) = here.image("disk").unwrap();
    let leaf = node.disks[0].root.name;
    let other = noise(19, CHUNK);
    // Right checksum, right length, right name, other bytes.
    let forged = |header: crate::records::record::Header| crate::records::record::Header {
        packing: crate::records::record::Packing::Raw,
        packed_len: other.len() as u32,
        checksum: crc32c::crc32c(&other),
        ..header
    };
    let [ours, theirs] = sockets();
    let served = std::thread::scope(|scope| {
        let server = scope.spawn(|| serve(&there, theirs, &everything(), &mut quiet));
        let mut link = Link::new(ours, Pace::limited(None));
        link.greet(&here).unwrap();
        link.send(&Message::Push { image: "disk", replace: false }).unwrap();
        link.send(&Message::Offer(row.node)).unwrap();
        for name in [row.node, leaf] {
            let (header, packed) = here.read_packed(&name).unwrap();
            link.send(&Message::Record(&header.to_bytes(), &packed)).unwrap();
        }
        let chunk = here.node(&leaf).unwrap().children[0];
        let (header, _) = here.read_packed(&chunk).unwrap();
        link.send(&Message::Record(&forged(header).to_bytes(), &other)).unwrap();
        link.flush().unwrap();
        server.join().unwrap()
    });
    assert!(matches!(&served, Err(TransferError::Protocol(what)) if what.contains("something else")), "{served:?}");
    assert!(there.image("disk").is_err());
    verify(&there);
}

#[test]
fn stores_of_other_versions_and_domains_are_named() {
    let here = TestStore::new();
    let mut right = Vec::new();
    {
        let [ours, mut theirs] = sockets();
        drop(std::thread::scope(|scope| {
            let greeter = scope.spawn(|| Link::new(ours, Pace::limited(None)).greet(&here));
            right.resize(56, 0);
            theirs.read_exact(&mut right).unwrap();
            drop(theirs);
            greeter.join().unwrap()
        }));
    }
    let answer_to = |hello: &[u8]| {
        let [ours, mut theirs] = sockets();
        theirs.write_all(hello).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        serve(&here, ours, &everything(), &mut quiet).unwrap_err()
    };
    let changed = |at: usize, value: u8| {
        let mut hello = right.clone();
        hello[at] = value;
        hello
    };
    assert!(matches!(answer_to(&changed(16, 9)), TransferError::Version { first: 9, last: 1 }));
    let mut later = changed(16, 3);
    later[18] = 4;
    let error = answer_to(&later);
    assert!(error.to_string().contains("versions 3 to 4"), "{error}");
    assert!(matches!(answer_to(&changed(45, 0xEE)), TransferError::OtherDomain));
    assert!(matches!(answer_to(&changed(0, b'P')), TransferError::Protocol(_)));
    assert!(matches!(answer_to(&right[..30]), TransferError::Cut(_)));
}

/// A folder with an authority and certificates of its.
fn certificates() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let openssl = |arguments: &str| {
        let output = std::process::Command::new("openssl")
            .args(arguments.split(' '))
            .current_dir(folder.path())
            .output()
            .expect("this test needs openssl: `cargo xtask setup` installs it");
        assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let key = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2";
    for authority in ["ca", "other"] {
        openssl(&format!(
            "{key} -subj /CN={authority} -addext keyUsage=keyCertSign -keyout {authority}.key -out {authority}.pem"
        ));
    }
    for (name, authority) in [("server", "ca"), ("client", "ca"), ("stranger", "other")] {
        openssl(&format!(
            "{key} -subj /CN={name} -CA {authority}.pem -CAkey {authority}.key -addext subjectAltName=DNS:{name} \
             -addext basicConstraints=critical,CA:FALSE -keyout {name}.key -out {name}.pem"
        ));
    }
    folder
}

#[test]
fn transfers_over_tls_need_a_certificate_of_the_right_authority() {
    use polder_trust::tls::{
        ClientCertificates, ClientConnection, IdentityFiles, ServerConnection, ServerName, StreamOwned, client_config,
        server_config,
    };
    let (here, there) = (TestStore::new(), TestStore::new());
    let bytes = noise(21, 100 * CHUNK);
    image_of(&here, "disk", &bytes);
    let folder = certificates();
    let file = |name: &str| folder.path().join(name);
    let identity =
        |name: &str| IdentityFiles { certificate: file(&format!("{name}.pem")), key: file(&format!("{name}.key")) };
    let clients = ClientCertificates::RequiredFrom(file("ca.pem"));
    let server = server_config(&identity("server"), &clients).unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let attempt = |who: Option<&str>| {
        let client = client_config(&file("ca.pem"), who.map(identity).as_ref()).unwrap();
        std::thread::scope(|scope| {
            let served = scope.spawn(|| {
                let (socket, _) = listener.accept().unwrap();
                let tls = ServerConnection::new(server.clone()).unwrap();
                serve(&there, StreamOwned::new(tls, socket), &everything(), &mut quiet)
            });
            let socket = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let tls = ClientConnection::new(client, ServerName::try_from("server").unwrap()).unwrap();
            let stream = StreamOwned::new(tls, socket);
            let pushed = push(&here, &image("disk"), stream, &TransferOptions::new("disk"), &mut quiet);
            (pushed, served.join().unwrap())
        })
    };
    for who in [None, Some("stranger")] {
        let (pushed, served) = attempt(who);
        assert!(pushed.is_err() && matches!(served, Err(TransferError::Cut(_))), "{who:?}: {pushed:?} {served:?}");
    }
    assert!(there.images().unwrap().is_empty());
    let (pushed, served) = attempt(Some("client"));
    served.unwrap();
    pushed.unwrap();
    assert_eq!(image_content(&there, "disk").unwrap(), bytes);
}
