//! What a machine is: plain data, checked once.

use std::path::PathBuf;
use std::time::Duration;

use polder_basics::{ByteSize, GIB, MIB};
use polder_memory::PAGE_SIZE;
use polder_store::remote::RemoteOptions;

use crate::VmmError;

/// vCPUs that a machine has at most.
pub const CPUS_MAX: u32 = 8;
/// Memory that a machine has at least and at most.
pub const RAM_BYTES_MIN: u64 = 64 * MIB;
pub const RAM_BYTES_MAX: u64 = 16 * GIB;
/// Disks that a machine has at most: the slots of the root bus that are left.
pub const DISKS_MAX: usize = 16;

/// Which engine runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineChoice {
    /// The faster one that works here.
    #[default]
    Auto,
    Software,
    Kvm,
}

/// Whether the guest may write to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskAccess {
    ReadOnly,
    ReadWrite,
}

/// Where the bytes of a disk are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskSource {
    /// A raw file or a block device.
    File(PathBuf),
    /// A volume of the store in a folder.
    Volume { store: PathBuf, name: String, ending: VolumeEnding },
}

/// What becomes of what a guest wrote to a volume last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VolumeEnding {
    /// It is moved out of the volume's log when the machine ends.
    Settle,
    /// It stays there: the volume is used again soon, or never.
    Leave,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    pub source: DiskSource,
    pub access: DiskAccess,
}

/// The profile of an image in a remote store: what machines read of it first, in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    pub image: String,
    pub act: ProfileAct,
}

/// What is done about a profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProfileAct {
    /// What it names is fetched while the machine starts.
    Fetch,
    /// It is made anew of what this machine reads.
    Record,
}

/// The network card.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum NetConfig {
    #[default]
    None,
    /// A TAP interface of the host, by name.
    Tap(String),
}

/// What a guest's reset does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ResetPolicy {
    #[default]
    Reboot,
    End,
}

/// Which console is typed at. Both write to the same output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ConsolePort {
    /// The first serial port, `ttyS0`.
    #[default]
    Serial,
    /// A virtio console, `hvc0`, which is there only then.
    Virtio,
}

/// Whether the devices that test guests expect are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TestDevices {
    #[default]
    Absent,
    Present,
}

/// Where gdb finds the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GdbPlace {
    /// A TCP port of 127.0.0.1.
    Port(u16),
    /// A Unix socket.
    Socket(PathBuf),
}

impl std::fmt::Display for GdbPlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            GdbPlace::Port(port) => write!(f, "port {port} of 127.0.0.1"),
            GdbPlace::Socket(path) => write!(f, "the socket {}", path.display()),
        }
    }
}

/// When a machine that gdb may attach to starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GdbStart {
    AtOnce,
    /// No instruction runs before a gdb says so.
    WithGdb,
}

/// A way in for gdb.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GdbConfig {
    pub place: GdbPlace,
    pub start: GdbStart,
}

/// Who the machine is. Random, and chosen by the caller: nothing here draws random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Identity {
    pub uuid: [u8; 16],
    pub generation_id: [u8; 16],
    pub mac: [u8; 6],
}

pub use polder_software::{
    CODE_CACHE_BYTES_DEFAULT, CODE_CACHE_BYTES_MAX, CODE_CACHE_BYTES_MIN, Measurements, PerfMap, Translation,
};

/// The CPU model of machines that ask for no other.
pub const CPU_MODEL_NEWEST: &str = polder_software::CpuModel::NEWEST;

/// A machine.
#[derive(Debug, Clone)]
pub struct MachineConfig {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub append: String,
    pub disks: Vec<DiskConfig>,
    /// Remote stores that have what the stores of the volumes do not hold.
    pub remotes: Vec<RemoteOptions>,
    /// What is done about the profile of the image that the volumes began as.
    pub profile: Option<Profile>,
    pub cpus: u32,
    pub ram_bytes: u64,
    pub engine: EngineChoice,
    /// Which code the software engine translates.
    pub translation: Translation,
    /// Memory for the translated code of each vCPU, in whole pages.
    pub code_cache_bytes: usize,
    pub measurements: Measurements,
    /// A dirty log runs, in rounds of that length; for measurements of what it costs.
    pub dirty_log_period: Option<Duration>,
    /// Translations of code with this guest address are logged.
    pub log_translation: Option<u64>,
    pub perf_map: PerfMap,
    /// Name of a CPU model, with features to add and to take away: `polder-v3,+pku,-avx2`.
    pub cpu_model: String,
    pub net: NetConfig,
    /// Where the guest's vsock ports appear as Unix sockets; no vsock device without.
    pub vsock: Option<PathBuf>,
    pub console: ConsolePort,
    /// The machine ends when it has run that long.
    pub timeout: Option<Duration>,
    pub reset: ResetPolicy,
    pub test_devices: TestDevices,
    /// gdb's way in; none without.
    pub gdb: Option<GdbConfig>,
    pub identity: Identity,
}

impl MachineConfig {
    /// A machine with one vCPU and 512 MiB that boots `kernel`.
    pub fn new(kernel: PathBuf) -> Self {
        MachineConfig {
            kernel,
            initrd: None,
            append: String::new(),
            disks: Vec::new(),
            remotes: Vec::new(),
            profile: None,
            cpus: 1,
            ram_bytes: 512 * MIB,
            engine: EngineChoice::default(),
            translation: Translation::default(),
            code_cache_bytes: CODE_CACHE_BYTES_DEFAULT,
            measurements: Measurements::default(),
            dirty_log_period: None,
            log_translation: None,
            perf_map: PerfMap::default(),
            cpu_model: CPU_MODEL_NEWEST.to_owned(),
            net: NetConfig::default(),
            vsock: None,
            console: ConsolePort::default(),
            timeout: None,
            reset: ResetPolicy::default(),
            test_devices: TestDevices::default(),
            gdb: None,
            identity: Identity::default(),
        }
    }

    /// Whether such a machine can be.
    pub(crate) fn check(&self) -> Result<(), VmmError> {
        if self.cpus == 0 || self.cpus > CPUS_MAX {
            return Err(VmmError::Cpus { asked: self.cpus, max: CPUS_MAX });
        }
        let whole_pages = self.ram_bytes.is_multiple_of(PAGE_SIZE);
        if !(RAM_BYTES_MIN..=RAM_BYTES_MAX).contains(&self.ram_bytes) || !whole_pages {
            return Err(VmmError::Ram {
                asked: ByteSize(self.ram_bytes),
                min: ByteSize(RAM_BYTES_MIN),
                max: ByteSize(RAM_BYTES_MAX),
            });
        }
        let whole_pages = self.code_cache_bytes.is_multiple_of(PAGE_SIZE as usize);
        if !(CODE_CACHE_BYTES_MIN..=CODE_CACHE_BYTES_MAX).contains(&self.code_cache_bytes) || !whole_pages {
            return Err(VmmError::CodeCache {
                asked: ByteSize(self.code_cache_bytes as u64),
                min: ByteSize(CODE_CACHE_BYTES_MIN as u64),
                max: ByteSize(CODE_CACHE_BYTES_MAX as u64),
            });
        }
        if self.disks.len() > DISKS_MAX {
            return Err(VmmError::Disks { asked: self.disks.len(), max: DISKS_MAX });
        }
        Ok(())
    }
}
