//! The body of a fuzz target: a server, and a side that gets, fed with arbitrary bytes and with a right conversation in which some are wrong.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use super::{Names, NodeRef, ServeOptions, TransferOptions, push, serve};
use crate::catalog::Replace;
use crate::format::{self, Extent, FormatError, Source};
use crate::store::{Store, StoreOptions};

const IMAGE_BYTES: usize = 100 << 10;

/// A disk in memory.
pub(super) struct Bytes(pub Vec<u8>);

impl Source for Bytes {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), FormatError> {
        bytes.copy_from_slice(&self.0[offset as usize..][..bytes.len()]);
        Ok(())
    }

    fn extent_at(&self, offset: u64, limit: u64) -> Result<Extent, FormatError> {
        Ok(Extent { len: limit.min(self.len() - offset), content: format::Content::Data })
    }
}

/// Makes an image of one disk.
pub(crate) fn image_of(store: &Arc<Store>, name: &str, bytes: &[u8]) {
    let mut node = store.new_node([].into()).expect("a node begins");
    node.add_disk("disk", &Bytes(bytes.to_vec()), &mut |_| Ok(())).expect("a disk is brought in");
    node.save_as_image(name, Replace::No).expect("an image is made");
}

/// A store in a folder that vanishes with it.
struct Passing {
    store: Option<Arc<Store>>,
    folder: PathBuf,
}

impl Passing {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("polder-transfer-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        let store = Store::open(&folder, StoreOptions::default()).expect("a store opens");
        Passing { store: Some(store), folder }
    }

    fn store(&self) -> &Arc<Store> {
        self.store.as_ref().expect("it is there until it is dropped")
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        drop(self.store.take());
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// A peer that says what it has to say, whatever it hears.
struct Scripted<'a> {
    said: &'a [u8],
    cut: usize,
}

impl Read for Scripted<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let len = bytes.len().min(self.cut).min(self.said.len());
        bytes[..len].copy_from_slice(&self.said[..len]);
        self.said = &self.said[len..];
        Ok(len)
    }
}

impl Write for Scripted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A stream that keeps what was read from it.
struct Recording {
    stream: UnixStream,
    read: Vec<u8>,
}

impl Read for &mut Recording {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let len = self.stream.read(bytes)?;
        self.read.extend_from_slice(&bytes[..len]);
        Ok(len)
    }
}

impl Write for &mut Recording {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Setting {
    source: Passing,
    /// All that a client says that pushes the image into an empty store.
    push: Vec<u8>,
}

fn everything() -> ServeOptions {
    ServeOptions {
        pull_images: Names::All,
        push_images: Names::All,
        push_bytes_max: Some(1 << 20),
        ..Default::default()
    }
}

fn setting() -> &'static Setting {
    static SETTING: OnceLock<Setting> = OnceLock::new();
    SETTING.get_or_init(|| {
        let source = Passing::new("source");
        let mut bytes = vec![0; IMAGE_BYTES];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes[..IMAGE_BYTES / 2]);
        bytes[IMAGE_BYTES / 2..].fill(7);
        image_of(source.store(), "image", &bytes);
        let there = Passing::new("first");
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let mut recording = Recording { stream: theirs, read: Vec::new() };
        std::thread::scope(|scope| {
            scope.spawn(|| serve(there.store(), &mut recording, &everything(), &mut |_| Ok(())));
            let what = NodeRef::Image("image".to_owned());
            push(source.store(), &what, ours, &TransferOptions::new("image"), &mut |_| Ok(()))
                .expect("a right push succeeds");
        });
        Setting { source, push: recording.read }
    })
}

/// Lets a client say `input` to a server. The first byte chooses: a store with an image hears the right greeting and then the
/// rest; or an empty store hears a right push, in which each three further bytes change one (where, 16 bits, and how).
///
/// Holds: no panic, no hang; what gets a name is whole.
pub fn converse(input: &[u8]) {
    let Some((&control, said)) = input.split_first() else { return };
    let setting = setting();
    let cut = if control & 2 != 0 { 7 } else { usize::MAX };
    if control & 1 == 0 {
        let said = [&setting.push[..56], said].concat();
        let _ = serve(setting.source.store(), Scripted { said: &said, cut }, &everything(), &mut |_| Ok(()));
        // The image that is there cannot be replaced; what else was made is gone for the next input.
        for (row, _) in setting.source.store().images().expect("the catalog is whole") {
            if row.name != "image" {
                setting.source.store().remove_image(&row.name).expect("it was there");
            }
        }
        return;
    }
    let mut changed = setting.push.clone();
    let len = changed.len();
    for edit in said.chunks_exact(3) {
        changed[usize::from(u16::from_le_bytes([edit[0], edit[1]])) % len] ^= edit[2];
    }
    let there = Passing::new("there");
    let _ = serve(there.store(), Scripted { said: &changed, cut }, &everything(), &mut |_| Ok(()));
    let verified = there.store().verify(&mut |_| Ok(())).expect("the store can be read");
    assert!(verified.damages.is_empty() && verified.lost.is_empty(), "{verified:?}");
}

#[cfg(test)]
mod tests {
    #[test]
    fn arbitrary_bytes_and_changed_conversations_leave_a_transfer_server_whole() {
        let mut seed = 1u64;
        let mut random = || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) as u8
        };
        for round in 0..200u32 {
            let len = 1 + usize::from(random()) % 24;
            let mut input: Vec<u8> = (0..len).map(|_| random()).collect();
            input[0] = (round % 4) as u8;
            if round % 4 == 0 {
                // A frame that is well formed, with random content.
                let kind = 1 + random() % 8;
                let payload = input.split_off(1);
                input.extend_from_slice(&(payload.len() as u32).to_le_bytes());
                input.push(kind);
                input.extend_from_slice(&payload);
            }
            super::converse(&input);
        }
        // Nothing changed: the image is there and whole.
        super::converse(&[1]);
    }
}
