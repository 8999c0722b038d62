//! Reading: a record by its name or its place, from the segment that this process writes, from the others, or from an origin.
//!
//! Whoever reads says what the record has to be; one that is something else is as good as damaged. A copy that is damaged is
//! passed over as long as there is another.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard, PoisonError};

use crate::domain::{OPEN_DOMAIN, is_sealed};
use crate::error::{Result, StoreError};
use crate::name::{Kind, Name};
use crate::records::record::{self, HEADER_LEN, Header, Packing};
use crate::records::segment::{self, Location, SegmentNumber};
use crate::store::{NODE_WEIGHT, Origin, Store};
use crate::tree::{NodeSource, TreeNode, not_a_node};

/// Files of segments that are kept open for reading.
const OPEN_FILES_MAX: usize = 200;

/// What a record has to be beside what its header and checksums say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expected {
    /// Data of this domain. Of an encrypted one nobody makes it without the secret.
    Data { domain: u32 },
    /// A node of a tree or of a life. What says that it is in an encrypted domain is compared with its name.
    Node,
    /// Anything: for what goes on without keys, and shows nobody what it reads.
    Anything,
}

/// Whether nodes of encrypted domains were compared with their names.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Checked {
    Yes,
    No,
}

/// A record that was read.
pub(crate) struct Read {
    pub content: Arc<[u8]>,
    pub domain: u32,
    pub location: Location,
}

/// A store's own nodes, without those that would have to come from elsewhere. Those of encrypted domains are taken as they are.
pub(crate) struct Local<'a>(pub &'a Store);

impl NodeSource for Local<'_> {
    fn node(&self, name: &Name) -> Result<Arc<TreeNode>> {
        self.0.node_by(name, || self.0.read_local(name), Checked::No)
    }
}

/// The nodes of trees of one domain. A node that says that it is in another has been put into the place of one of this domain.
pub(crate) struct InDomain<'a>(pub &'a Store, pub u32);

impl NodeSource for InDomain<'_> {
    fn node(&self, name: &Name) -> Result<Arc<TreeNode>> {
        let node = self.0.node(name)?;
        check_domain(name, &node, self.1)?;
        Ok(node)
    }
}

fn check_domain(name: &Name, node: &TreeNode, domain: u32) -> Result<()> {
    match node.domain == domain {
        true => Ok(()),
        false => Err(StoreError::Refused(format!(
            "node {name} of a tree of domain number {domain} is in domain number {}",
            node.domain
        ))),
    }
}

/// What is wrong with a record where another is looked for.
fn check_expected(header: &Header, name: &Name, expected: Expected) -> Result<(), String> {
    if header.name != *name {
        return Err(format!("chunk {} lies here instead of {name}", header.name));
    }
    match expected {
        Expected::Data { domain } if header.kind != Kind::Data || header.domain != domain => {
            Err(format!("chunk {name} of domain number {domain} lies here as one of domain number {}", header.domain))
        }
        _ => Ok(()),
    }
}

impl Store {
    /// A chunk of a domain that was read not long ago.
    pub(crate) fn cached_chunk(&self, name: &Name, domain: u32) -> Option<Arc<[u8]>> {
        self.chunks.get(name).filter(|(of, _)| *of == domain).map(|(_, content)| content)
    }

    pub(crate) fn cache_chunk(&self, name: &Name, domain: u32, content: &Arc<[u8]>) {
        self.chunks.insert(*name, (domain, content.clone()), content.len() + 64);
    }

    /// Whether a chunk was read not long ago, though it was not kept; the next time it was.
    pub(crate) fn was_read_before(&self, name: &Name) -> bool {
        self.chunks_read.note(name)
    }

    /// A chunk of a leaf, which remembers where it lies.
    pub(crate) fn chunk_of(&self, leaf: &TreeNode, place: usize) -> Result<Arc<[u8]>> {
        let (name, domain) = (&leaf.children[place], leaf.domain);
        if let Some(content) = self.cached_chunk(name, domain) {
            return Ok(content);
        }
        let expected = Expected::Data { domain };
        if let Some(location) = leaf.location(place) {
            if let Ok(read) = self.read_at(name, location, expected) {
                self.cache_chunk(name, domain, &read.content);
                return Ok(read.content);
            }
            leaf.forget_location(place);
        }
        let Read { content, location, .. } = self.read(name, expected)?;
        leaf.set_location(place, location);
        self.cache_chunk(name, domain, &content);
        Ok(content)
    }

    /// Records that are not here are looked for there as well from now on.
    pub(crate) fn add_origin(&self, origin: Arc<dyn Origin>) {
        self.origins.write().unwrap_or_else(PoisonError::into_inner).push(origin);
    }

    /// Reads a record by its name, wherever it comes from.
    pub(crate) fn read(&self, name: &Name, expected: Expected) -> Result<Read> {
        let local = self.read_here(name, expected);
        let Err(StoreError::Missing { .. } | StoreError::Damaged { .. }) = &local else { return local };
        let origins = self.origins.read().unwrap_or_else(PoisonError::into_inner).clone();
        let mut failure = None;
        for origin in origins {
            match origin.bring(self, name) {
                Ok(true) => return self.read_here(name, expected),
                Ok(false) => {}
                // Another may have it.
                Err(error) => drop(failure.get_or_insert(error)),
            }
        }
        failure.map_or(local, Err)
    }

    /// Reads a record by its name, whatever it is, from whichever copy here is whole.
    pub(crate) fn read_local(&self, name: &Name) -> Result<Read> {
        self.read_here(name, Expected::Anything)
    }

    fn read_here(&self, name: &Name, expected: Expected) -> Result<Read> {
        let mut damage = None;
        for look in 0..3 {
            let locations = match look {
                0 => self.index.find(name)?,
                1 => self.index.find_all(name)?,
                _ => {
                    // Others may have written, sealed or moved it.
                    self.index.refresh(&self.catalog)?;
                    self.index.find_all(name)?
                }
            };
            for location in locations {
                match self.read_at(name, location, expected) {
                    Ok(read) => return Ok(read),
                    Err(error) => damage = Some(error),
                }
            }
        }
        Err(damage.unwrap_or(StoreError::Missing { name: *name }))
    }

    /// Reads a record as it lies in a segment, from whichever copy is whole.
    pub(crate) fn read_packed(&self, name: &Name) -> Result<(Header, Vec<u8>)> {
        for location in self.index.find(name)? {
            let Ok(file) = self.file_of(location) else { continue };
            if let Ok(Ok((header, packed))) = segment::read_record(&file, location)
                && header.name == *name
            {
                return Ok((header, packed));
            }
        }
        // The long way says what is wrong, or where else it is.
        let location = self.read(name, Expected::Anything)?.location;
        let path = self.segment_path(location);
        let read = segment::read_record(&*self.file_of(location)?, location);
        let damaged = |what| StoreError::Damaged { path: path.clone(), offset: location.offset(), what };
        read.map_err(StoreError::file("read", &path))?.map_err(damaged)
    }

    /// Reads the record at a place, and checks that it is the one.
    pub(crate) fn read_at(&self, name: &Name, location: Location, expected: Expected) -> Result<Read> {
        let mut bytes = vec![0; location.read_len()];
        let len = self.read_bytes(location, &mut bytes)?;
        self.content(name, location, expected, &mut bytes[..len])
    }

    /// Reads from where a record begins; what is not in a file yet is still in memory, so that a full disk fails no read.
    pub(super) fn read_bytes(&self, location: Location, bytes: &mut [u8]) -> Result<usize> {
        let file = match self.kept_file(location.segment()) {
            Some(file) => file,
            None => {
                if let Some(segment) = &*self.writer()
                    && segment.number() == location.segment()
                    && !segment.is_readable(location)
                {
                    return segment.read_at(location, bytes);
                }
                self.file_of(location)?
            }
        };
        segment::read_up_to(&file, bytes, location.offset())
            .map_err(StoreError::file("read", &self.segment_path(location)))
    }

    /// The header of the record that was read from a place, if it is the one and of the kind that is expected. Whoever asks opens
    /// what is sealed next: that finds every bit that a checksum finds.
    fn header_of(&self, name: &Name, expected: Expected, bytes: &[u8]) -> Result<Header, String> {
        let (header, _) = record::split_unless(bytes, is_sealed)?;
        check_expected(&header, name, expected)?;
        Ok(header)
    }

    /// Whether a chunk that is not packed and was read to its place is the one, by what was read before it: header and seal. What is sealed is
    /// opened there.
    pub(crate) fn is_chunk(&self, name: &Name, domain: u32, front: &[u8], content: &mut [u8]) -> bool {
        let Ok(header) = Header::from_bytes(front) else { return false };
        let seal = &front[HEADER_LEN..];
        let is_whole = check_expected(&header, name, Expected::Data { domain }).is_ok()
            && header.packing == Packing::Raw
            && header.packed_len as usize == seal.len() + content.len()
            && header.content_len as usize == content.len();
        is_whole
            && match is_sealed(&header) {
                false => seal.is_empty() && crc32c::crc32c(content) == header.checksum,
                true => match self.unlocked(domain) {
                    Ok(Some(domain)) => domain.open_apart(&header, seal, content).is_ok(),
                    _ => false,
                },
            }
    }

    /// The record that was read from a place. Afterwards `bytes` are of no account: what is sealed is opened where it lies.
    pub(crate) fn content(
        &self,
        name: &Name,
        location: Location,
        expected: Expected,
        bytes: &mut [u8],
    ) -> Result<Read> {
        let damaged = |what| StoreError::Damaged { path: self.segment_path(location), offset: location.offset(), what };
        let header = self.header_of(name, expected, bytes).map_err(damaged)?;
        let packed = &mut bytes[HEADER_LEN..HEADER_LEN + header.packed_len as usize];
        let content = self.unpack_in_place(&header, packed)?.map_err(damaged)?;
        if expected == Expected::Node
            && let Some(domain) = self.unlocked(header.domain)?
            && domain.namer.name(header.kind, &content) != *name
        {
            return Err(damaged(format!("node {name} holds something else")));
        }
        Ok(Read { content, domain: header.domain, location })
    }

    /// Brings the chunk that was read from a place straight to where it is wanted. Whether that went well; the long way says what is wrong.
    pub(crate) fn content_into(&self, name: &Name, domain: u32, bytes: &mut [u8], content: &mut [u8]) -> bool {
        let Ok(header) = self.header_of(name, Expected::Data { domain }, bytes) else { return false };
        let packed = &mut bytes[HEADER_LEN..HEADER_LEN + header.packed_len as usize];
        let unpacked = match is_sealed(&header) {
            false => record::unpack_into(&header, packed, content),
            true => match self.unlocked(header.domain) {
                Ok(Some(domain)) => {
                    domain.open(&header, packed).and_then(|packed| record::unpack_into(&header, packed, content))
                }
                _ => return false,
            },
        };
        unpacked.is_ok()
    }

    /// A part of the chunk that was read from a place; no more is unpacked than that takes, in `scratch`. None if something is wrong with it:
    /// the long way says what.
    pub(crate) fn part_of<'a>(
        &self,
        name: &Name,
        domain: u32,
        bytes: &'a mut [u8],
        part: Range<usize>,
        scratch: &'a mut Vec<u8>,
    ) -> Option<&'a [u8]> {
        let header = self.header_of(name, Expected::Data { domain }, bytes).ok()?;
        let packed = &mut bytes[HEADER_LEN..HEADER_LEN + header.packed_len as usize];
        let packed = match is_sealed(&header) {
            false => packed,
            true => self.unlocked(header.domain).ok()??.open(&header, packed).ok()?,
        };
        record::unpack_part(&header, packed, part, scratch)
    }

    /// Opens and unpacks packed bytes; the inner error is what is wrong with them.
    pub(crate) fn unpack(&self, header: &Header, packed: &[u8]) -> Result<Result<Arc<[u8]>, String>> {
        match is_sealed(header) {
            true => self.unpack_in_place(header, &mut packed.to_vec()),
            false => Ok(record::unpack(header, packed)),
        }
    }

    fn unpack_in_place(&self, header: &Header, packed: &mut [u8]) -> Result<Result<Arc<[u8]>, String>> {
        let domain = if is_sealed(header) { self.unlocked(header.domain)? } else { None };
        let Some(domain) = domain else { return Ok(record::unpack(header, packed)) };
        Ok(domain.open(header, packed).and_then(|packed| record::unpack(header, packed)))
    }

    pub(crate) fn segment_path(&self, location: Location) -> PathBuf {
        self.segments.sealed(location.segment())
    }

    /// The file that a place is in.
    pub(crate) fn file_of(&self, location: Location) -> Result<Arc<File>> {
        let number = location.segment();
        if let Some(file) = self.kept_file(number) {
            return Ok(file);
        }
        if let Some(segment) = &mut *self.writer()
            && segment.number() == number
        {
            if !segment.is_readable(location) {
                segment.flush()?;
            }
            return Ok(segment.file().clone());
        }
        let sealed = self.segments.sealed(number);
        let file = match File::open(&sealed) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let open = File::open(self.segments.open(number));
                // It may have been sealed between the two.
                open.or_else(|_| File::open(&sealed)).map_err(StoreError::file("open", &sealed))?
            }
            Err(error) => return Err(StoreError::file("open", &sealed)(error)),
        };
        let file = Arc::new(file);
        self.keep_file(number, file.clone());
        Ok(file)
    }

    pub(super) fn files(&self) -> MutexGuard<'_, VecDeque<(SegmentNumber, Arc<File>)>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file of a sealed segment that was read before.
    fn kept_file(&self, number: SegmentNumber) -> Option<Arc<File>> {
        let mut files = self.files();
        let at = files.iter().position(|(held, _)| *held == number)?;
        let file = files[at].1.clone();
        // Those in use stay in the front half.
        if at > OPEN_FILES_MAX / 2 {
            files.swap(at, at / 2);
        }
        Some(file)
    }

    pub(super) fn keep_file(&self, number: SegmentNumber, file: Arc<File>) {
        let mut files = self.files();
        files.push_front((number, file));
        files.truncate(OPEN_FILES_MAX);
    }

    /// Closes the files of segments that are gone.
    pub(crate) fn forget_segments(&self, segments: &[SegmentNumber]) {
        let mut files = self.files();
        files.retain(|(number, _)| !segments.contains(number));
    }

    fn node_by(&self, name: &Name, read: impl FnOnce() -> Result<Read>, checked: Checked) -> Result<Arc<TreeNode>> {
        if let Some(node) = self.nodes.get(name) {
            return Ok(node);
        }
        let Read { content, domain, .. } = read()?;
        let node = Arc::new(TreeNode::from_bytes(&content, domain).ok_or_else(|| not_a_node(name))?);
        // What nobody has compared with its name is not kept for those who count on it.
        if domain == OPEN_DOMAIN || checked == Checked::Yes {
            self.nodes.insert(*name, node.clone(), NODE_WEIGHT);
        }
        Ok(node)
    }

    /// A node, if it was read not long ago.
    pub(crate) fn cached_node(&self, name: &Name) -> Option<Arc<TreeNode>> {
        self.nodes.get(name)
    }
}

impl NodeSource for Store {
    fn node(&self, name: &Name) -> Result<Arc<TreeNode>> {
        self.node_by(name, || self.read(name, Expected::Node), Checked::Yes)
    }
}
