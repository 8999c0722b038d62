//! A machine's virtio devices, in the order of their PCI slots.

use std::sync::Arc;

use polder_devices::virtio::VirtioDevice;
use polder_devices::virtio::balloon::Balloon;
use polder_devices::virtio::block::{self, Block, BlockOptions, DiskMedium, EngineChoice};
use polder_devices::virtio::console::Console;
use polder_devices::virtio::net::{Net, NetOptions};
use polder_devices::virtio::rng::Rng;
use polder_devices::virtio::vsock::{GUEST_CID_MIN, Vsock};

use crate::build::Surroundings;
use crate::file_system::file_may_not_answer;
use crate::files::OpenMedium;
use crate::{DiskAccess, DiskSource, VmmError};

/// Makes the devices that the configuration asks for: disks first, so that their slots do not depend on anything else.
pub(crate) fn devices(
    around: &Surroundings<'_>,
    console: Option<Arc<Console>>,
    balloon: Arc<Balloon>,
) -> Result<Vec<Arc<dyn VirtioDevice>>, VmmError> {
    let mut devices: Vec<Arc<dyn VirtioDevice>> = Vec::new();
    for index in 0..around.files.disks.len() {
        devices.push(disk(around, index)?);
    }
    if let Some(tap) = &around.files.tap {
        let options = NetOptions { mac: around.config.identity.mac, mtu: None };
        devices.push(Arc::new(Net::new(tap.clone(), options)));
    }
    devices.push(Arc::new(Rng::new(around.clock.clone())));
    devices.push(balloon);
    if let Some(console) = console {
        devices.push(console);
    }
    if let Some(socket) = &around.files.vsock {
        let device = socket
            .listener()
            .and_then(|listener| Vsock::new(GUEST_CID_MIN, listener, socket.path().to_owned(), around.clock.clone()));
        devices.push(Arc::new(device.map_err(|source| VmmError::Host { what: "descriptor for vsock", source })?));
    }
    Ok(devices)
}

fn disk(around: &Surroundings<'_>, index: usize) -> Result<Arc<dyn VirtioDevice>, VmmError> {
    let config = around.config;
    let disk = &around.files.disks[index];
    // The kernel may wait inside the call that hands requests to io_uring, and what is in flight there holds the process' end.
    let (medium, engine) = match &disk.medium {
        OpenMedium::File(file) => {
            let engine = if file_may_not_answer(file) { EngineChoice::Threads } else { EngineChoice::Auto };
            let file = file.try_clone().map_err(|source| VmmError::Host { what: "descriptor for a disk", source })?;
            (DiskMedium::File(file), engine)
        }
        OpenMedium::Volume(disk, _) => (DiskMedium::Store(disk.clone()), EngineChoice::Auto),
    };
    let access = match disk.access {
        DiskAccess::ReadOnly => block::DiskAccess::ReadOnly,
        DiskAccess::ReadWrite => block::DiskAccess::ReadWrite,
    };
    let options =
        BlockOptions { medium, access, serial: format!("polder-{index}"), queues: config.cpus as u16, engine };
    let name = match &config.disks[index].source {
        DiskSource::File(path) => path.display().to_string(),
        DiskSource::Volume { name, .. } => name.clone(),
    };
    let block = Block::new(options).map_err(|source| VmmError::Disk { name, source })?;
    Ok(Arc::new(block))
}
