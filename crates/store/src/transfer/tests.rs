//! Transfers between two stores over sockets, over links that are slow or break, and with peers that lie.

mod peers;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::testbench::{Bytes, image_of};
use super::*;
use crate::test_store::{TestStore, image, image_content, noise, quiet};
use crate::tree::{self, NodeSource};
use crate::{CollectOptions, Content, Volume, VolumeOptions};

const CHUNK: usize = 16 << 10;

fn everything() -> ServeOptions {
    ServeOptions {
        pull_images: Names::All,
        pull_volumes: Names::All,
        push_images: Names::All,
        replace: true,
        ..ServeOptions::default()
    }
}

/// Pushes over a socket; what each side says of it.
fn push_over(
    from: &Arc<Store>,
    to: &Arc<Store>,
    name: &str,
    [ours, theirs]: [impl Read + Write + Send; 2],
) -> [Result<Transferred, TransferError>; 2] {
    std::thread::scope(|scope| {
        let server = scope.spawn(move || serve(to, theirs, &everything(), &mut quiet));
        let pushed = push(from, &image(name), ours, &TransferOptions::new(name), &mut quiet);
        [pushed, server.join().unwrap()]
    })
}

fn sockets() -> [UnixStream; 2] {
    <[_; 2]>::from(UnixStream::pair().unwrap())
}

fn push_to(from: &Arc<Store>, to: &Arc<Store>, name: &str) -> Transferred {
    let [pushed, served] = push_over(from, to, name, sockets());
    served.unwrap();
    pushed.unwrap()
}

fn verify(store: &Arc<Store>) {
    let verified = store.verify(&mut quiet).unwrap();
    assert!(verified.damages.is_empty() && verified.lost.is_empty(), "{verified:?}");
}

#[test]
fn a_second_image_that_shares_most_of_it_sends_the_rest_only() {
    let (here, there) = (TestStore::new(), TestStore::new());
    let mut bytes = noise(1, 400 * CHUNK);
    image_of(&here, "first", &bytes);
    let first = push_to(&here, &there, "first");
    assert!(first.record_bytes > bytes.len() as u64 && first.sent_bytes < bytes.len() as u64 * 103 / 100, "{first:?}");
    assert_eq!(image_content(&there, "first").unwrap(), bytes);
    // Twenty chunks of 400, in one place.
    bytes[200 * CHUNK..220 * CHUNK].copy_from_slice(&noise(2, 20 * CHUNK));
    image_of(&here, "second", &bytes);
    let second = push_to(&here, &there, "second");
    assert!(second.sent_bytes < first.sent_bytes * 6 / 100, "{second:?} after {first:?}");
    // The node, the root, one or two leaves and the chunks.
    assert!((22..=25).contains(&second.records), "{second:?}");
    assert_eq!(image_content(&there, "second").unwrap(), bytes);
    verify(&there);
}

#[test]
fn equal_stores_send_nothing_but_the_name_of_the_node() {
    let (here, there) = (TestStore::new(), TestStore::new());
    image_of(&here, "disk", &noise(3, 300 * CHUNK));
    push_to(&here, &there, "disk");
    there.remove_image("disk").unwrap();
    let again = push_to(&here, &there, "disk");
    assert_eq!((again.records, again.record_bytes), (0, 0));
    assert!(again.sent_bytes + again.received_bytes < 300, "{again:?}");
    // A repetition of the same chunk travels once.
    image_of(&here, "same", &noise(4, CHUNK).repeat(200));
    assert!(push_to(&here, &there, "same").records < 6);
    assert_eq!(image_content(&there, "same").unwrap(), noise(4, CHUNK).repeat(200));
}

#[test]
fn images_and_snapshots_are_pulled_as_images() {
    let (here, there) = (TestStore::new(), TestStore::new());
    let bytes = noise(5, 150 * CHUNK);
    image_of(&there, "disk", &bytes);
    let zeros = Content::Zeros { capacity_bytes: 4 << 20, chunk_len: 4096 };
    there.create_volume("volume", &zeros).unwrap();
    let volume = Volume::open(&there, "volume", VolumeOptions::default()).unwrap();
    let pull_of = |what: NodeRef, name: &str| {
        let [ours, theirs] = sockets();
        std::thread::scope(|scope| {
            let server = scope.spawn(|| serve(&there, theirs, &everything(), &mut quiet));
            let pulled = pull(&here, &what, ours, &TransferOptions::new(name), &mut quiet);
            server.join().unwrap().unwrap();
            pulled
        })
    };
    let (row, transferred) = pull_of(image("disk"), "copy").unwrap();
    assert_eq!(row.node, there.image("disk").unwrap().0.node);
    assert!(transferred.received_bytes > bytes.len() as u64 && transferred.sent_bytes < 2000, "{transferred:?}");
    assert_eq!(image_content(&here, "copy").unwrap(), bytes);

    volume.write_at(8192, &noise(6, 8192)).unwrap();
    // One without a snapshot gets one for the moment.
    pull_of(NodeRef::Volume("volume".to_owned()), "now").unwrap();
    assert_eq!(there.snapshots("volume").unwrap(), []);
    assert_eq!(image_content(&here, "now").unwrap()[8192..16384], noise(6, 8192));
    volume.snapshot("early").unwrap();
    volume.write_at(8192, &noise(7, 4096)).unwrap();
    let early = NodeRef::Snapshot { volume: "volume".to_owned(), snapshot: "early".to_owned() };
    pull_of(early, "early").unwrap();
    assert_eq!(image_content(&here, "early").unwrap()[8192..16384], noise(6, 8192));
    volume.snapshot("late").unwrap();
    pull_of(NodeRef::Volume("volume".to_owned()), "late").unwrap();
    assert_eq!(
        image_content(&here, "late").unwrap()[8192..16384],
        [noise(7, 4096), noise(6, 8192)[4096..].to_vec()].concat()
    );
    verify(&here);
}

/// A stream that breaks after so many bytes were received from it.
struct Breaking {
    stream: UnixStream,
    left: usize,
}

impl Read for Breaking {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            let _ = self.stream.shutdown(std::net::Shutdown::Both);
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let len = bytes.len().min(self.left);
        let read = self.stream.read(&mut bytes[..len])?;
        self.left -= read;
        Ok(read)
    }
}

impl Write for Breaking {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_transfer_cut_anywhere_goes_on_with_what_is_missing() {
    const STEP: usize = 1000;
    let here = TestStore::new();
    let bytes = noise(8, 16 * 4096);
    // Several leaves, so that cuts fall between nodes and chunks.
    let volume_of = |name: &str, chunks: &[u64]| {
        let zeros = Content::Zeros { capacity_bytes: 4 << 20, chunk_len: 4096 };
        here.create_volume(name, &zeros).unwrap();
        let volume = Volume::open(&here, name, VolumeOptions::default()).unwrap();
        for (index, chunk) in chunks.iter().enumerate() {
            volume.write_at(chunk * 4096, &bytes[index * 4096..][..4096]).unwrap();
        }
        volume.snapshot("now").unwrap();
        volume.close().unwrap();
    };
    volume_of("volume", &[0, 1, 2, 3, 130, 131, 200, 201, 400, 401, 402, 700, 701, 800, 801, 1000]);
    let what = NodeRef::Volume("volume".to_owned());
    let options = TransferOptions::new("image");
    let attempt = |there: &Arc<Store>, left: usize| {
        let [ours, theirs] = sockets();
        std::thread::scope(|scope| {
            let server = scope.spawn(|| {
                let stream = Breaking { stream: theirs, left };
                serve(there, stream, &everything(), &mut quiet)
            });
            let pushed = push(&here, &what, ours, &options, &mut quiet);
            (pushed, server.join().unwrap())
        })
    };
    let whole = attempt(&TestStore::new(), usize::MAX).0.unwrap();
    let mut cuts = 0;
    for left in (0..whole.sent_bytes as usize).step_by(STEP) {
        let there = TestStore::new();
        let (pushed, served) = attempt(&there, left);
        assert!(pushed.is_err() && matches!(served, Err(TransferError::Cut(_))), "{left}: {pushed:?}, {served:?}");
        assert!(there.image("image").is_err());
        let again = attempt(&there, usize::MAX).0.unwrap();
        let sum = again.sent_bytes + left as u64;
        // What had come is not sent again, but for the record that was cut and the greetings.
        assert!(sum < whole.sent_bytes + 4096 + 400, "cut at {left}: {again:?} after {whole:?}");
        assert_eq!(image_content(&there, "image").unwrap()[1000 * 4096..][..4096], bytes[15 * 4096..]);
        verify(&there);
        cuts += 1;
    }
    assert!(cuts > 40, "{cuts}");
}

#[test]
fn a_tree_whose_parts_a_collection_removed_is_completed() {
    let (here, there) = (TestStore::new(), TestStore::new());
    let bytes = noise(9, 300 * CHUNK);
    image_of(&here, "disk", &bytes);
    // A transfer that brought the nodes of the tree and few chunks.
    let (_, node) = here.image("disk").unwrap();
    let root = node.disks[0].root;
    {
        let mut batch = there.batch().unwrap();
        tree::walk(&**here, root, &mut |visit| {
            if let tree::Visit::Node(name) = visit {
                let (header, packed) = here.read_packed(&name)?;
                batch.put_packed(&header, &packed)?;
            }
            Ok(true)
        })
        .unwrap();
        batch.sync().unwrap();
    }
    let pushed = push_to(&here, &there, "disk");
    assert_eq!(pushed.records, 301, "300 chunks and the node: {pushed:?}");
    assert_eq!(image_content(&there, "disk").unwrap(), bytes);
    verify(&there);
}

#[test]
fn a_collection_waits_with_what_a_transfer_found() {
    let (here, there) = (TestStore::new(), TestStore::new());
    let bytes = noise(10, 64 * CHUNK);
    image_of(&here, "disk", &bytes);
    push_to(&here, &there, "disk");
    there.remove_image("disk").unwrap();
    there.seal().unwrap();
    let collected = std::thread::scope(|scope| {
        let [ours, theirs] = sockets();
        let (found, begins) = mpsc::channel();
        let server = scope.spawn(|| serve(&there, theirs, &everything(), &mut quiet));
        let there = &there;
        let collector = scope.spawn(move || {
            begins.recv().unwrap();
            there.collect(CollectOptions::default(), &mut quiet).unwrap()
        });
        let pushed = push(
            &here,
            &image("disk"),
            // Its first word comes when the other side holds its batch.
            Tapped { stream: ours, tap: Some(found) },
            &TransferOptions::new("disk"),
            &mut quiet,
        );
        assert_eq!(pushed.unwrap().records, 0);
        server.join().unwrap().unwrap();
        collector.join().unwrap()
    });
    assert!(collected.before.lost.is_empty());
    assert_eq!(image_content(&there, "disk").unwrap(), bytes);
    verify(&there);
}

/// A stream that tells when the other side has read far into the conversation.
struct Tapped {
    stream: UnixStream,
    tap: Option<mpsc::Sender<()>>,
}

impl Read for Tapped {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.stream.read(bytes)?;
        // The first request for records: the other side compares.
        if bytes[..read].windows(5).any(|part| part == [6, 0, 0, 0, 6])
            && let Some(tap) = self.tap.take()
        {
            tap.send(()).unwrap();
        }
        Ok(read)
    }
}

impl Write for Tapped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One end of a link on which every byte takes a while.
struct Slow {
    outgoing: mpsc::Sender<(Instant, Vec<u8>)>,
    incoming: mpsc::Receiver<(Instant, Vec<u8>)>,
    rest: Vec<u8>,
}

const LATENCY: Duration = Duration::from_millis(50);

fn slow_link() -> [Slow; 2] {
    let (left, from_left) = mpsc::channel();
    let (right, from_right) = mpsc::channel();
    [
        Slow { outgoing: left, incoming: from_right, rest: Vec::new() },
        Slow { outgoing: right, incoming: from_left, rest: Vec::new() },
    ]
}

impl Read for Slow {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.rest.is_empty() {
            let Ok((due, more)) = self.incoming.recv() else { return Ok(0) };
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            self.rest = more;
        }
        let len = bytes.len().min(self.rest.len());
        bytes[..len].copy_from_slice(&self.rest[..len]);
        self.rest.drain(..len);
        Ok(len)
    }
}

impl Write for Slow {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.outgoing.send((Instant::now() + LATENCY, bytes.to_vec()));
        sent.map(|()| bytes.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_link_of_fifty_milliseconds_is_filled() {
    let (here, there) = (TestStore::new(), TestStore::new());
    let bytes = noise(11, 4096 * CHUNK);
    image_of(&here, "disk", &bytes);
    let begin = Instant::now();
    let [pushed, served] = push_over(&here, &there, "disk", slow_link());
    let took = begin.elapsed();
    served.unwrap();
    let pushed = pushed.unwrap();
    assert!(pushed.records > 4096);
    // One record a round trip would take seven minutes; a few megabytes a round trip, ten seconds.
    assert!(took < Duration::from_secs(8), "{took:?}");
    assert!(image_content(&there, "disk").unwrap() == bytes);
}

#[test]
fn a_limit_of_bytes_a_second_is_kept() {
    let (here, there) = (TestStore::new(), TestStore::new());
    image_of(&here, "disk", &noise(12, 64 * CHUNK));
    let [ours, theirs] = sockets();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| serve(&there, theirs, &everything(), &mut quiet));
        let options = TransferOptions { bytes_per_second: Some(2 << 20), ..TransferOptions::new("disk") };
        push(&here, &image("disk"), ours, &options, &mut quiet).unwrap();
        server.join().unwrap().unwrap();
    });
    assert!(begin.elapsed() > Duration::from_millis(450), "{:?}", begin.elapsed());
}

#[test]
fn a_watcher_can_end_a_transfer_and_sees_how_far_it_is() {
    let (here, there) = (TestStore::new(), TestStore::new());
    image_of(&here, "disk", &noise(20, 600 * CHUNK));
    let steps = Mutex::new(Vec::new());
    let [ours, theirs] = sockets();
    std::thread::scope(|scope| {
        scope.spawn(|| drop(serve(&there, theirs, &everything(), &mut quiet)));
        let pushed = push(&here, &image("disk"), ours, &TransferOptions::new("disk"), &mut |step| {
            steps.lock().unwrap().push(step);
            match steps.lock().unwrap().len() {
                3 => Err(StoreError::Refused("stop".to_owned())),
                _ => Ok(()),
            }
        });
        assert!(matches!(pushed, Err(TransferError::Store(_))));
    });
    assert_eq!(steps.lock().unwrap().len(), 3);
    let mut last = None;
    let [ours, theirs] = sockets();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            serve(&there, theirs, &everything(), &mut |step| {
                assert!(last.is_none_or(|last: crate::Step| last.done <= step.done));
                last = Some(step);
                Ok(())
            })
        });
        push(&here, &image("disk"), ours, &TransferOptions::new("disk"), &mut quiet).unwrap();
    });
    let last = last.unwrap();
    assert_eq!((last.done, last.total), (600 * CHUNK as u64, 600 * CHUNK as u64));
}

#[test]
fn a_node_with_several_trees_and_facts_comes_whole() {
    let (here, there) = (TestStore::new(), TestStore::new());
    let facts: BTreeMap<String, String> = [("command line".to_owned(), "quiet".to_owned())].into();
    let mut node = here.new_node(facts).unwrap();
    for disk in 0..20u64 {
        let bytes = Bytes(noise(100 + disk, (disk as usize + 1) * 40_000 / 512 * 512));
        node.add_disk(&format!("disk{disk}"), &bytes, &mut quiet).unwrap();
    }
    node.add_disk("empty", &Bytes(vec![0; 1 << 20]), &mut quiet).unwrap();
    node.add_file("kernel", &Bytes(noise(200, 300_000)), &mut quiet).unwrap();
    node.save_as_image("many", Replace::No).unwrap();
    push_to(&here, &there, "many");
    let (_, node) = there.image("many").unwrap();
    assert_eq!(node, here.image("many").unwrap().1);
    assert_eq!(there.read_file(node.file("kernel").unwrap()).unwrap(), noise(200, 300_000));
    verify(&there);
}
