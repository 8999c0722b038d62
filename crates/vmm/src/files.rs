//! A machine's open files. Opened once, before anything runs, and kept over resets.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use polder_machine::boot::KERNEL_LEN_MAX;

use polder_devices::virtio::net::Tap;
use polder_store::remote::{Attached, Remote, RemoteOptions};
use polder_store::{FixedDisk, OpenDisk, Store, StoreOptions, Volume, VolumeOptions};

use crate::build::Drained;
use crate::listening_socket::ListeningSocket;
use crate::{DiskAccess, DiskConfig, DiskSource, MachineConfig, NetConfig, ProfileAct, VmmError, VolumeEnding};

/// How long what a guest wrote last may take to get out of its volume's log; the rest is done when the volume is opened again.
const SETTLE_PATIENCE: Duration = Duration::from_secs(60);

/// Where the bytes of an open disk are.
pub(crate) enum OpenMedium {
    File(File),
    Volume(Arc<OpenDisk>, VolumeEnding),
}

/// An open disk.
pub(crate) struct Disk {
    pub(crate) medium: OpenMedium,
    pub(crate) access: DiskAccess,
}

impl Disk {
    fn open(config: &DiskConfig, remotes: &[RemoteOptions], attached: &mut Vec<Attached>) -> Result<Self, VmmError> {
        let medium = match &config.source {
            DiskSource::File(path) => OpenMedium::File(open("disk", path, config.access)?),
            DiskSource::Volume { store, name, ending } => {
                let error = |source| VmmError::Volume { name: name.clone(), source };
                let store = Store::open_existing(store, StoreOptions::default()).map_err(error)?;
                for options in remotes {
                    match Remote::open(options) {
                        Ok(remote) => attached.push(remote.resume(&store)),
                        // The volume may need nothing from there.
                        Err(error) => tracing::warn!(%error, "an attached store is passed over"),
                    }
                }
                let disk = match config.access {
                    DiskAccess::ReadWrite => Volume::open(&store, name, VolumeOptions::default()).map(OpenDisk::Volume),
                    DiskAccess::ReadOnly => {
                        store.settled_disk(name, None).map(|tree| OpenDisk::Fixed(FixedDisk::new(&store, &tree)))
                    }
                };
                OpenMedium::Volume(Arc::new(disk.map_err(error)?), *ending)
            }
        };
        Ok(Disk { medium, access: config.access })
    }
}

/// All files of a machine.
pub(crate) struct Files {
    kernel: File,
    initrd: Option<File>,
    pub(crate) disks: Vec<Disk>,
    pub(crate) tap: Option<Arc<Tap>>,
    pub(crate) vsock: Option<ListeningSocket>,
    /// The remote stores whose profile of the image is to be made anew.
    recording: Vec<Attached>,
}

impl Files {
    pub(crate) fn open(config: &MachineConfig) -> Result<Self, VmmError> {
        let mut attached = Vec::new();
        Ok(Files {
            kernel: open("kernel", &config.kernel, DiskAccess::ReadOnly)?,
            initrd: config.initrd.as_deref().map(|path| open("initrd", path, DiskAccess::ReadOnly)).transpose()?,
            disks: config
                .disks
                .iter()
                .map(|disk| Disk::open(disk, &config.remotes, &mut attached))
                .collect::<Result<_, _>>()?,
            tap: match &config.net {
                NetConfig::None => None,
                NetConfig::Tap(name) => Some(Arc::new(Tap::open(name)?)),
            },
            vsock: config.vsock.as_deref().map(bind_vsock).transpose()?,
            recording: begin_profile(config, attached)?,
        })
    }

    /// Ends the disks: what guests wrote to volumes is where it is to be. A host's disk that does not answer within `patience` is left to
    /// a thread of its own; the volume's log holds what was promised.
    pub(crate) fn close_disks(&mut self, config: &MachineConfig, patience: Duration) -> Result<Drained, VmmError> {
        let mut drained = Drained::All;
        for (disk, config) in std::mem::take(&mut self.disks).into_iter().zip(&config.disks) {
            let (OpenMedium::Volume(disk, VolumeEnding::Settle), DiskSource::Volume { name, .. }) =
                (disk.medium, &config.source)
            else {
                continue;
            };
            // The devices are gone, and their queues with them.
            let Ok(OpenDisk::Volume(volume)) = Arc::try_unwrap(disk) else { continue };
            let (send, receive) = std::sync::mpsc::channel();
            let body = move || {
                let flushed = volume.flush();
                let going_on = flushed.is_ok();
                // Nobody listens any more where this took too long.
                let _ = send.send(flushed);
                if going_on {
                    let _ = send.send(volume.close());
                }
            };
            let spawned = std::thread::Builder::new().name("volume-end".to_owned()).spawn(body);
            spawned.map_err(|source| VmmError::Host { what: "thread", source })?;
            for patience in [patience, SETTLE_PATIENCE] {
                match receive.recv_timeout(patience) {
                    Ok(ended) => ended.map_err(|source| VmmError::Volume { name: name.clone(), source })?,
                    Err(_) => {
                        drained = Drained::Left;
                        break;
                    }
                }
            }
        }
        Ok(drained)
    }

    /// Keeps what the machine read first, where that is wanted.
    pub(crate) fn save_profile(&self, config: &MachineConfig) -> Result<(), VmmError> {
        let Some(profile) = &config.profile else { return Ok(()) };
        let error = |source| VmmError::Profile { image: profile.image.clone(), source };
        self.recording.iter().try_for_each(|attached| attached.save_profile(&profile.image).map_err(error))
    }

    /// The kernel file's bytes: one more than any kernel has at most, if it is that long.
    pub(crate) fn read_kernel(&self) -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut file = &self.kernel;
        file.seek(SeekFrom::Start(0))?;
        file.take(KERNEL_LEN_MAX + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// The initrd from its start, and its length.
    pub(crate) fn initrd(&self) -> std::io::Result<Option<(&File, u64)>> {
        let Some(mut file) = self.initrd.as_ref() else { return Ok(None) };
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(0))?;
        Ok(Some((file, len)))
    }
}

/// Begins what is to be done about the image's profile. Gives the remote stores that are to hear of it in the end.
fn begin_profile(config: &MachineConfig, mut attached: Vec<Attached>) -> Result<Vec<Attached>, VmmError> {
    let Some(profile) = &config.profile else { return Ok(Vec::new()) };
    // An image that was removed meanwhile has no profile.
    attached.retain(|attached| attached.has(&profile.image).unwrap_or(false));
    if profile.act == ProfileAct::Record {
        return Ok(attached);
    }
    for attached in attached {
        let image = profile.image.clone();
        let body = move || {
            if let Err(error) = attached.prefetch_profile(&image) {
                // What it would have brought comes when it is read.
                tracing::info!(image, %error, "the profile was not fetched");
            }
        };
        let spawned = std::thread::Builder::new().name("prefetch".to_owned()).spawn(body);
        spawned.map_err(|source| VmmError::Host { what: "thread", source })?;
    }
    Ok(Vec::new())
}

fn bind_vsock(path: &Path) -> Result<ListeningSocket, VmmError> {
    ListeningSocket::bind(path).map_err(|source| VmmError::Vsock { path: path.to_owned(), source })
}

fn open(what: &'static str, path: &Path, access: DiskAccess) -> Result<File, VmmError> {
    let error = |source| VmmError::Open { what, path: path.to_owned(), source };
    // Looked at before it is opened: opening a pipe would wait for its other end.
    let kind = std::fs::metadata(path).map_err(error)?.file_type();
    let refused = |kind| Err(VmmError::NotAFile { what, path: path.to_owned(), kind });
    if kind.is_dir() {
        return refused("a folder");
    }
    let usable = kind.is_file() || what == "disk" && kind.is_block_device();
    if !usable {
        return refused("a device, a pipe or a socket");
    }
    File::options().read(true).write(access == DiskAccess::ReadWrite).open(path).map_err(error)
}
