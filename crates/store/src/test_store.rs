//! What tests of several modules start from: a store in a folder of its own, bytes to put there, and ways to read all of a disk.

use std::ops::Deref;
use std::sync::Arc;

use crate::transfer::NodeRef;
use crate::tree::reader::TreeReader;
use crate::{CollectOptions, Result, Step, Store, StoreOptions, Volume};

/// A store in a folder that goes with it.
pub(crate) struct TestStore {
    store: Arc<Store>,
    pub folder: tempfile::TempDir,
}

impl TestStore {
    pub fn new() -> Self {
        TestStore::with(StoreOptions::default())
    }

    pub fn with(options: StoreOptions) -> Self {
        let folder = tempfile::tempdir().unwrap();
        TestStore { store: Store::open(folder.path(), options).unwrap(), folder }
    }
}

impl Deref for TestStore {
    type Target = Arc<Store>;

    fn deref(&self) -> &Arc<Store> {
        &self.store
    }
}

/// Bytes that do not repeat and do not pack, from a seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

pub(crate) fn image(name: &str) -> NodeRef {
    NodeRef::Image(name.to_owned())
}

/// Watches progress and says nothing.
pub(crate) fn quiet(_: Step) -> Result<()> {
    Ok(())
}

/// A collection that leaves nobody else any time.
pub(crate) fn at_once() -> CollectOptions {
    CollectOptions { bytes_per_second: u64::MAX, ..CollectOptions::default() }
}

/// All bytes of a volume.
pub(crate) fn volume_content(volume: &Volume) -> Vec<u8> {
    let mut bytes = vec![0; volume.capacity_bytes() as usize];
    volume.read_at(0, &mut bytes).unwrap();
    bytes
}

/// All bytes of an image's disk.
pub(crate) fn image_content(store: &Arc<Store>, image: &str) -> Result<Vec<u8>> {
    let (_, node) = store.image(image)?;
    let disk = &node.disks[0];
    let chunk_len = disk.chunk_len as usize;
    let mut bytes = vec![0; disk.len_bytes as usize];
    let mut reader = TreeReader::new(store, disk.root, chunk_len, disk.domain);
    for (index, part) in bytes.chunks_mut(chunk_len).enumerate() {
        reader.read(index as u64, 0, part)?;
    }
    Ok(bytes)
}
