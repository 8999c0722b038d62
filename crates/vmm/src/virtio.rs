//! A machine's virtio devices, in the order of their PCI slots.

use std::sync::Arc;

use polder_devices::virtio::VirtioDevice;
use polder_devices::virtio::block::{self, Block, BlockOptions, EngineChoice};

use crate::build::Surroundings;
use crate::{DiskAccess, VmmError};

/// Makes the devices that the configuration asks for: disks first, so that their slots do not depend on anything else.
pub(crate) fn devices(around: &Surroundings<'_>) -> Result<Vec<Arc<dyn VirtioDevice>>, VmmError> {
    let mut devices: Vec<Arc<dyn VirtioDevice>> = Vec::new();
    for index in 0..around.files.disks.len() {
        devices.push(disk(around, index)?);
    }
    Ok(devices)
}

fn disk(around: &Surroundings<'_>, index: usize) -> Result<Arc<dyn VirtioDevice>, VmmError> {
    let config = around.config;
    let disk = &around.files.disks[index];
    let file = disk.file.try_clone().map_err(|source| VmmError::Host { what: "descriptor for a disk", source })?;
    let access = match disk.access {
        DiskAccess::ReadOnly => block::DiskAccess::ReadOnly,
        DiskAccess::ReadWrite => block::DiskAccess::ReadWrite,
    };
    let options = BlockOptions {
        file,
        access,
        serial: format!("polder-{index}"),
        queues: config.cpus as u16,
        engine: EngineChoice::default(),
    };
    let block =
        Block::new(options).map_err(|source| VmmError::Disk { path: config.disks[index].path.clone(), source })?;
    Ok(Arc::new(block))
}
