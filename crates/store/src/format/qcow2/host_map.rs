//! What in an image's file belongs to whom: found once, when it is opened.
//!
//! Two bits a cluster of the file, in pages that exist only where something lies.

use std::collections::HashMap;

/// The memory of the map, in bytes, at most: enough for 64 TiB in clusters of 64 KiB.
pub const HOST_MAP_LEN_MAX: usize = 256 << 20;
/// Bytes of a page of the map.
const PAGE_LEN: usize = 4096;
/// Clusters that a page says something about.
const PAGE_CLUSTERS: u64 = PAGE_LEN as u64 * 4;

/// Who owns a cluster of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// Nobody yet.
    Nobody = 0,
    /// The header or a table.
    Table = 1,
    /// A cluster of the disk.
    Data = 2,
    /// Compressed clusters, several of which may share it.
    Compressed = 3,
}

/// The map is full: the clusters in use lie too far apart.
#[derive(Debug)]
pub(super) struct MapFull;

/// The owners of an image's clusters.
pub(super) struct HostMap {
    cluster_bits: u32,
    pages: HashMap<u64, Box<[u8; PAGE_LEN]>>,
}

impl HostMap {
    pub(super) fn new(cluster_bits: u32) -> Self {
        HostMap { cluster_bits, pages: HashMap::new() }
    }

    /// Gives the cluster at `offset` to `owner` if nobody has it, or shares it among compressed clusters; otherwise says whose
    /// it is.
    pub(super) fn claim(&mut self, offset: u64, owner: Owner) -> Result<Result<(), Owner>, MapFull> {
        let cluster = offset >> self.cluster_bits;
        let page_count = self.pages.len();
        let page = match self.pages.entry(cluster / PAGE_CLUSTERS) {
            std::collections::hash_map::Entry::Occupied(page) => page.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => {
                if page_count >= HOST_MAP_LEN_MAX / PAGE_LEN {
                    return Err(MapFull);
                }
                place.insert(Box::new([0; PAGE_LEN]))
            }
        };
        let (byte, shift) = ((cluster % PAGE_CLUSTERS / 4) as usize, cluster % 4 * 2);
        let present = match page[byte] >> shift & 3 {
            0 => Owner::Nobody,
            1 => Owner::Table,
            2 => Owner::Data,
            _ => Owner::Compressed,
        };
        if present == Owner::Nobody {
            page[byte] |= (owner as u8) << shift;
            return Ok(Ok(()));
        }
        Ok(if present == Owner::Compressed && owner == Owner::Compressed { Ok(()) } else { Err(present) })
    }
}
