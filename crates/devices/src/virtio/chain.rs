//! A descriptor chain after checking: the buffers that the driver lent to the device.

use polder_memory::{GuestAddress, GuestMemory, HostRange};
use zerocopy::{FromBytes, IntoBytes};

/// An access to a chain went past the end of its buffers: the driver lent less than the request needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a request needs {needed} bytes of buffer and has {available}")]
pub struct BufferError {
    pub needed: u64,
    pub available: u64,
}

#[derive(Debug, Clone, Copy)]
struct Part {
    address: GuestAddress,
    len: u32,
}

/// A sequence of guest buffers, seen as one range of bytes. Every part is RAM. At most 4 GiB - 1 bytes in all.
#[derive(Debug, Clone)]
pub struct Buffers {
    memory: GuestMemory,
    parts: Vec<Part>,
    len: u64,
}

impl Buffers {
    pub(super) fn new(memory: GuestMemory) -> Self {
        Buffers { memory, parts: Vec::new(), len: 0 }
    }

    /// Adds a range that the caller has checked to be RAM; whether the total still fits.
    pub(super) fn push(&mut self, address: GuestAddress, len: u32) -> bool {
        self.len += u64::from(len);
        if len > 0 {
            self.parts.push(Part { address, len });
        }
        self.len <= u64::from(u32::MAX)
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), BufferError> {
        let needed = offset.saturating_add(len);
        if needed <= self.len { Ok(()) } else { Err(BufferError { needed, available: self.len }) }
    }

    /// The guest ranges behind `len` bytes from `offset`.
    fn ranges(&self, offset: u64, len: u64) -> impl Iterator<Item = (GuestAddress, u64)> + '_ {
        let mut skip = offset;
        let mut left = len;
        self.parts.iter().filter_map(move |part| {
            let part_len = u64::from(part.len);
            if left == 0 || skip >= part_len {
                skip = skip.saturating_sub(part_len);
                return None;
            }
            let step = (part_len - skip).min(left);
            let start = GuestAddress(part.address.0 + skip);
            skip = 0;
            left -= step;
            Some((start, step))
        })
    }

    /// Copies bytes out of the guest. Read each byte once and keep the copy: the guest may change it meanwhile.
    pub fn read(&self, offset: u64, target: &mut [u8]) -> Result<(), BufferError> {
        self.check(offset, target.len() as u64)?;
        let mut done = 0;
        for (address, len) in self.ranges(offset, target.len() as u64) {
            let end = done + len as usize;
            // Parts are RAM, so this cannot fail.
            let _ = self.memory.read(address, &mut target[done..end]);
            done = end;
        }
        Ok(())
    }

    /// Copies bytes into the guest.
    pub fn write(&self, offset: u64, source: &[u8]) -> Result<(), BufferError> {
        self.check(offset, source.len() as u64)?;
        let mut done = 0;
        for (address, len) in self.ranges(offset, source.len() as u64) {
            let end = done + len as usize;
            let _ = self.memory.write(address, &source[done..end]);
            done = end;
        }
        Ok(())
    }

    /// Copies a plain structure out of the guest.
    pub fn read_value<T: FromBytes + IntoBytes>(&self, offset: u64) -> Result<T, BufferError> {
        let mut value = T::new_zeroed();
        self.read(offset, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Copies a plain structure into the guest.
    pub fn write_value<T: IntoBytes + zerocopy::Immutable>(&self, offset: u64, value: &T) -> Result<(), BufferError> {
        self.write(offset, value.as_bytes())
    }

    /// The buffers from `offset` on, `len` bytes of them.
    pub fn slice(&self, offset: u64, len: u64) -> Result<Buffers, BufferError> {
        self.check(offset, len)?;
        let parts = self.ranges(offset, len).map(|(address, len)| Part { address, len: len as u32 }).collect();
        Ok(Buffers { memory: self.memory.clone(), parts, len })
    }

    /// The guest ranges, in order.
    pub fn guest_ranges(&self) -> impl Iterator<Item = (GuestAddress, u64)> + '_ {
        self.parts.iter().map(|part| (part.address, u64::from(part.len)))
    }

    /// The host bytes, for I/O straight to or from guest memory; valid while the guest memory lives. After writing through
    /// them, call [`Buffers::mark_written`].
    pub fn host_ranges(&self) -> impl Iterator<Item = HostRange> + '_ {
        self.parts.iter().filter_map(|part| self.memory.host_range(part.address, part.len.into()).ok())
    }

    /// Reports that the first `len` bytes were written through [`Buffers::host_ranges`].
    pub fn mark_written(&self, len: u64) {
        for (address, len) in self.ranges(0, len) {
            self.memory.mark_written(address, len);
        }
    }
}

/// One request of the driver: buffers for the device to read, and buffers for it to write.
#[derive(Debug)]
pub struct Chain {
    /// Index of the first descriptor; the name under which the chain is given back.
    pub head: u16,
    pub readable: Buffers,
    pub writable: Buffers,
}
