//! virtio-block (5.2) over a raw file or block device of the host, or over a disk of the store.
//!
//! The bytes of the file are the disk, whatever they look like: no format is ever recognised, so a guest that writes some other
//! format's header into sector 0 has written a header into sector 0. Each queue has a worker thread that submits requests
//! to io_uring, or to a few threads where the host refuses io_uring; a vCPU only rings the worker.
//!
//! Modules: `request` (what the driver asks, checked), `worker` (a queue's thread), `file_backend` and `engine` (files, by io_uring or
//! threads), `store_backend` (disks of the store).

mod engine;
mod file_backend;
mod request;
mod store_backend;
mod worker;

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use polder_store::OpenDisk;
use polder_store::disk::{Access, Disk as _};
use rustix::fs::OFlags;

pub use self::engine::EngineChoice;
use self::file_backend::FileBackend;
use self::request::{Disk, Medium};
use self::store_backend::StoreBackend;
use self::worker::QueueWorker;
use super::{
    ActivateError, Activation, DeviceInterrupts, DeviceType, Queue, Signal, VirtioDevice, Worker, copy_config,
};
use crate::lock;

const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_BLOCK_SIZE: u64 = 1 << 6;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_MULTI_QUEUE: u64 = 1 << 12;
const FEATURE_DISCARD: u64 = 1 << 13;
const FEATURE_WRITE_ZEROES: u64 = 1 << 14;

/// Bytes in a sector, the unit of all addresses.
pub const SECTOR_LEN: u64 = 512;
/// Entries in each queue, and so the most requests in flight.
const QUEUE_SIZE: u16 = 256;
/// Data segments in one request: what fits in a queue beside header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Queues of one disk.
pub const BLOCK_QUEUES_MAX: u16 = 64;
/// Bytes of the serial number (5.2.6.1).
pub const SERIAL_LEN: usize = 20;
const CONFIG_LEN: usize = 60;

/// The file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// Its size cannot be found, or what it is open for.
    #[error("the disk's size cannot be read")]
    Size(#[source] std::io::Error),
    /// It does not hold a single sector.
    #[error("the disk has {len} bytes, less than one sector of {SECTOR_LEN}")]
    TooSmall { len: u64 },
    /// A writable disk needs a file open for writing.
    #[error("the disk is to be writable and its file is open for reading only")]
    NotWritable,
}

/// Whether the guest may write to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskAccess {
    ReadOnly,
    ReadWrite,
}

/// Where the bytes of a disk are.
pub enum DiskMedium {
    /// A raw file or a block device. Its size is the size now, in whole sectors.
    File(File),
    /// A disk of the store.
    Store(Arc<OpenDisk>),
}

/// What a disk is made of.
pub struct BlockOptions {
    pub medium: DiskMedium,
    pub access: DiskAccess,
    /// The serial number that the guest sees; cut after 20 bytes.
    pub serial: String,
    /// Number of queues, usually the number of vCPUs; from 1 to [`BLOCK_QUEUES_MAX`].
    pub queues: u16,
    /// How requests reach the host.
    pub engine: EngineChoice,
}

/// A virtio disk.
pub struct Block {
    disk: Arc<Disk>,
    engine: EngineChoice,
    queues: u16,
    workers: Mutex<Vec<Option<Worker>>>,
}

impl Block {
    /// A disk.
    pub fn new(options: BlockOptions) -> Result<Self, BlockError> {
        let BlockOptions { medium, access, serial, queues, engine } = options;
        let medium = match medium {
            DiskMedium::File(file) => open_file(file, access)?,
            DiskMedium::Store(disk) => {
                if access == DiskAccess::ReadWrite && disk.access() == Access::ReadOnly {
                    return Err(BlockError::NotWritable);
                }
                Medium::Store(disk)
            }
        };
        let mut serial_bytes = [0; SERIAL_LEN];
        for (target, byte) in serial_bytes.iter_mut().zip(serial.bytes()) {
            *target = byte;
        }
        let disk = Disk { medium, access, serial: serial_bytes };
        Ok(Block {
            disk: Arc::new(disk),
            engine,
            queues: queues.clamp(1, BLOCK_QUEUES_MAX),
            workers: Mutex::new(Vec::new()),
        })
    }

    /// The disk's size in sectors.
    pub fn sectors(&self) -> u64 {
        self.disk.sectors()
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        let mut put = |offset: usize, bytes: &[u8]| config[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &self.disk.sectors().to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &(SECTOR_LEN as u32).to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        put(36, &request::DISCARD_SECTORS_MAX.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &8u32.to_le_bytes());
        put(48, &request::WRITE_ZEROES_SECTORS_MAX.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        config
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let common = FEATURE_SEG_MAX | FEATURE_BLOCK_SIZE | FEATURE_FLUSH | FEATURE_MULTI_QUEUE;
        common
            | match self.disk.access {
                DiskAccess::ReadOnly => FEATURE_READ_ONLY,
                DiskAccess::ReadWrite => FEATURE_DISCARD | FEATURE_WRITE_ZEROES,
            }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queues as usize]
    }

    fn config_read(&self, offset: u64, target: &mut [u8]) {
        copy_config(&self.config(), offset, target);
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        let write_through = activation.features & FEATURE_FLUSH == 0;
        let mut workers = Vec::new();
        for queue in activation.queues {
            workers.push(match queue {
                Some(queue) => {
                    let (disk, interrupts) = (self.disk.clone(), activation.interrupts.clone());
                    let choice = self.engine;
                    Some(Worker::spawn("virtio-block", move |signal| {
                        work(&disk, queue, interrupts, &signal, choice, write_through);
                    })?)
                }
                None => None,
            });
        }
        *lock(&self.workers) = workers;
        Ok(())
    }

    fn notify(&self, queue: u16) {
        if let Some(Some(worker)) = lock(&self.workers).get(queue as usize) {
            worker.raise();
        }
    }

    fn reset(&self) {
        // Taken out first: ending a worker waits for its requests, and a doorbell must not wait for that.
        let workers = std::mem::take(&mut *lock(&self.workers));
        for worker in workers.iter().flatten() {
            worker.signal().stop();
        }
        drop(workers);
    }
}

fn open_file(mut file: File, access: DiskAccess) -> Result<Medium, BlockError> {
    let flags = rustix::fs::fcntl_getfl(file.as_fd()).map_err(|error| BlockError::Size(error.into()))?;
    if access == DiskAccess::ReadWrite && flags & OFlags::RWMODE == OFlags::RDONLY {
        return Err(BlockError::NotWritable);
    }
    // Seeking finds the size of block devices too, where the metadata says zero.
    let len = file.seek(SeekFrom::End(0)).map_err(BlockError::Size)?;
    if len < SECTOR_LEN {
        return Err(BlockError::TooSmall { len });
    }
    Ok(Medium::File(file, len / SECTOR_LEN))
}

/// The body of a queue's thread.
fn work(
    disk: &Arc<Disk>,
    queue: Queue,
    interrupts: Arc<dyn DeviceInterrupts>,
    signal: &Arc<Signal>,
    choice: EngineChoice,
    write_through: bool,
) {
    let depth = worker::depth(&queue);
    let worker = QueueWorker::new(disk.clone(), queue, interrupts.clone(), signal.clone());
    match &disk.medium {
        Medium::File(file, _) => match FileBackend::new(choice, file, signal, depth, write_through) {
            Ok(mut backend) => return worker.run(&mut backend),
            Err(error) => tracing::error!(%error, "a disk has neither io_uring nor threads"),
        },
        Medium::Store(store) => match StoreBackend::new(store, write_through) {
            Ok(mut backend) => return worker.run(&mut backend),
            Err(error) => tracing::error!(%error, "a disk of the store has no queue"),
        },
    }
    interrupts.needs_reset();
}

#[cfg(test)]
mod store_tests;
#[cfg(test)]
mod tests;
