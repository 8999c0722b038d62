//! A volume as a file: a FUSE file system with nothing else in it, so that the host can have a loop device on it.

use std::sync::Arc;

use polder_store::Volume;

use super::fuse::{self, Attributes, Fields, FileSystem, OPENED, ROOT};

/// Name of the file.
pub const NAME: &str = "disk";
const FILE: u64 = 2;

pub struct VolumeFile(pub Arc<Volume>);

impl VolumeFile {
    fn attributes(&self, node: u64) -> Attributes {
        let len = self.0.capacity_bytes();
        match node {
            FILE => Attributes { node, mode: libc::S_IFREG | 0o600, len, used_bytes: len },
            _ => Attributes { node, mode: libc::S_IFDIR | 0o700, len: 0, used_bytes: 0 },
        }
    }
}

impl FileSystem for VolumeFile {
    fn answer(&self, opcode: u32, node: u64, mut fields: Fields<'_>) -> Result<Vec<u8>, i32> {
        let failed = |_| libc::EIO;
        match opcode {
            fuse::LOOKUP if node == ROOT && fields.name() == NAME => Ok(self.attributes(FILE).entry()),
            fuse::LOOKUP => Err(libc::ENOENT),
            fuse::GETATTR | fuse::SETATTR => Ok(self.attributes(node).answer()),
            fuse::OPEN | fuse::OPENDIR => Ok(OPENED.to_vec()),
            fuse::READ => {
                let _ = fields.u64();
                let (offset, len) = (fields.u64(), u64::from(fields.u32()));
                let mut bytes = vec![0; len.min(self.0.capacity_bytes().saturating_sub(offset)) as usize];
                self.0.read_at(offset, &mut bytes).map_err(failed)?;
                Ok(bytes)
            }
            fuse::WRITE => {
                let _ = fields.u64();
                let (offset, len) = (fields.u64(), fields.u32() as usize);
                self.0.write_at(offset, fields.last(len)).map_err(failed)?;
                Ok(fuse::written(len))
            }
            fuse::FSYNC => self.0.flush().map(|()| Vec::new()).map_err(failed),
            fuse::FALLOCATE => {
                let _ = fields.u64();
                let (offset, len, mode) = (fields.u64(), fields.u64(), fields.u32());
                // Nothing is set aside, and what is punched out or is to be zeros reads as zeros.
                if mode as i32 & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) == 0 {
                    return Err(libc::EOPNOTSUPP);
                }
                self.0.zero(offset, len).map_err(failed)?;
                Ok(Vec::new())
            }
            fuse::STATFS => Ok(fuse::space(None)),
            fuse::RELEASE | fuse::FLUSH | fuse::RELEASEDIR | fuse::ACCESS | fuse::DESTROY => Ok(Vec::new()),
            _ => Err(libc::ENOSYS),
        }
    }
}
