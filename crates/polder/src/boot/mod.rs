//! `polder boot`: a bare machine straight from files, with nothing kept.
//!
//! The serial console is standard input and output. Whatever happens, the terminal is as before when the command ends, and the
//! only file that it can leave is the one of `--stats`.

mod input;
mod options;
mod signals;
mod stats_file;
mod terminal;

use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, ValueHint};
use polder_basics::{ByteSize, SystemClock};
use polder_vmm::{
    CPU_MODEL_NEWEST, CPUS_MAX, Console, ConsolePort, Control, DiskAccess, DiskConfig, DiskSource, EngineChoice,
    GdbConfig, Identity, MachineConfig, Measurements, NetConfig, Outcome, PerfMap, ResetPolicy, TestDevices,
    Translation, VolumeEnding, may_not_answer,
};

use crate::state_folder::StateFolder;
use crate::store::attached_options;
use crate::watched::{Hold, Orders, say_what_is_left};
use options::{CODE_CACHE_DEFAULT, parse_address, parse_code_cache, parse_disk, parse_net, parse_volume};
use stats_file::StatsFile;

pub use input::{Escapes, Keys, Typed};
pub use options::{parse_gdb, parse_memory};
pub use signals::StopSignals;
pub use terminal::RawTerminal;

const EXIT_STATUS: &str = "\
Exit status:
    0  the guest powered off
   10  the guest asked for a reset, with --no-reboot
   11  the guest panicked or triple-faulted
  124  the time of --timeout was up
    2  wrong usage
    1  anything else
  With --test-devices, a write of V to port 0xf4 ends with status (V << 1) | 1.";

const STATUS_RESET: u8 = 10;
const STATUS_PANICKED: u8 = 11;
const STATUS_TIMED_OUT: u8 = 124;

/// Boot a machine straight from files; nothing is kept
///
/// The serial console is on standard input and output; on a terminal, Ctrl-A x leaves and Ctrl-A Ctrl-A types Ctrl-A.
#[derive(Args)]
#[command(after_long_help = EXIT_STATUS)]
pub struct BootArguments {
    /// Kernel: a bzImage, an ELF file (PVH or 64-bit Linux) or a multiboot image
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    kernel: PathBuf,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    initrd: Option<PathBuf>,
    /// Kernel command line, for example "console=ttyS0 root=/dev/vda"
    #[arg(long, value_name = "STRING", default_value = "", hide_default_value = true, allow_hyphen_values = true)]
    append: String,
    /// Raw disk image or block device; ",ro" makes it read-only; may be repeated
    #[arg(long = "disk", value_name = "FILE[,ro]", value_parser = parse_disk)]
    disks: Vec<DiskConfig>,
    /// Volume of the store; ",ro" makes it read-only; may be repeated, and comes after the disks
    #[arg(long = "volume", value_name = "NAME[,ro]", value_parser = parse_volume)]
    volumes: Vec<(String, DiskAccess)>,
    /// Number of vCPUs, 1 to 8
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=CPUS_MAX as i64))]
    cpus: u32,
    /// Memory, 64M to 16G
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_memory)]
    memory: ByteSize,
    /// What runs the guest: auto takes the faster engine that works here
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    engine: EngineName,
    /// Which code the software engine translates: auto (what is hot), never (interpret all), always (before it first runs), lockstep (as always, and compared with the interpreter)
    #[arg(long, value_name = "WHAT", default_value = "auto")]
    translate: TranslateName,
    /// Memory for the translated code of each vCPU, 1M to 1G; when it is full the oldest code goes
    #[arg(long, value_name = "SIZE", default_value = CODE_CACHE_DEFAULT, value_parser = parse_code_cache)]
    code_cache: ByteSize,
    /// List on standard error what code with this guest address (hexadecimal) is translated to
    #[arg(long, value_name = "ADDRESS", value_parser = parse_address, hide_short_help = true)]
    log_translation: Option<u64>,
    /// Run a dirty log in rounds of that many milliseconds, to measure what it costs
    #[arg(long, value_name = "MILLISECONDS", hide = true, value_parser = clap::value_parser!(u64).range(1..))]
    test_dirty_log: Option<u64>,
    /// Write /tmp/perf-PID.map, so that `perf report` names translated code by its guest address
    #[arg(long, hide_short_help = true)]
    perf_map: bool,
    /// What processor the guest sees: polder-v2 or polder-v3, then features to add or to take away, as in polder-v3,+pku,-avx2
    #[arg(long, value_name = "MODEL[,+FEATURE|,-FEATURE]...", default_value = CPU_MODEL_NEWEST)]
    cpu: String,
    /// Network: none, or tap=NAME for a TAP interface of the host
    #[arg(long, value_name = "none|tap=NAME", default_value = "none", value_parser = parse_net)]
    net: NetConfig,
    /// Unix socket for connections to the guest's vsock ports
    #[arg(long, value_name = "SOCKET", value_hint = ValueHint::FilePath)]
    vsock: Option<PathBuf>,
    /// Which console the keys go to: serial is ttyS0, virtio adds hvc0
    #[arg(long, value_name = "PORT", default_value = "serial")]
    console: ConsoleName,
    /// Stop the machine after that many seconds
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: Option<u64>,
    /// Write what was measured to FILE, as JSON
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    stats: Option<PathBuf>,
    /// End when the guest asks for a reset
    #[arg(long)]
    no_reboot: bool,
    /// Add the devices that test guests expect
    #[arg(long)]
    test_devices: bool,
    /// Let gdb attach: at a port of 127.0.0.1 or at a Unix socket; with ",wait" nothing runs until gdb says so
    #[arg(long, value_name = "PORT|SOCKET[,wait]", value_parser = parse_gdb)]
    gdb: Option<GdbConfig>,
}

impl BootArguments {
    /// Whether the host's kernel may hold the machine's process: any disk may stay silent, and so may the file system that the kernel
    /// is read from.
    pub fn hold(&self) -> Hold {
        let mut read_once = [self.kernel.as_path()].into_iter().chain(self.initrd.as_deref());
        if !self.disks.is_empty() || !self.volumes.is_empty() || read_once.any(may_not_answer) {
            Hold::Possible
        } else {
            Hold::Never
        }
    }

    /// What is logged to standard error for these arguments even if nobody asks for a log.
    pub fn log_filter(&self) -> Option<&'static str> {
        self.log_translation.map(|_| "polder::translation=info")
    }
}

/// Names of engines.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum EngineName {
    Auto,
    Software,
    Kvm,
}

/// Which code is translated.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum TranslateName {
    Auto,
    Never,
    Always,
    Lockstep,
}

impl TranslateName {
    fn choice(self) -> Translation {
        match self {
            TranslateName::Auto => Translation::Auto,
            TranslateName::Never => Translation::Never,
            TranslateName::Always => Translation::Always,
            TranslateName::Lockstep => Translation::Lockstep,
        }
    }
}

/// Names of consoles.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum ConsoleName {
    Serial,
    Virtio,
}

impl EngineName {
    /// The name as it is written on the command line and in the table of instances.
    pub fn word(self) -> &'static str {
        match self {
            EngineName::Auto => "auto",
            EngineName::Software => "software",
            EngineName::Kvm => "kvm",
        }
    }

    /// The engine of that name.
    pub fn from_word(word: &str) -> Option<Self> {
        [EngineName::Auto, EngineName::Software, EngineName::Kvm].into_iter().find(|name| name.word() == word)
    }

    /// The engine itself.
    pub fn choice(self) -> EngineChoice {
        match self {
            EngineName::Auto => EngineChoice::Auto,
            EngineName::Software => EngineChoice::Software,
            EngineName::Kvm => EngineChoice::Kvm,
        }
    }
}

impl BootArguments {
    fn config(&self) -> Result<MachineConfig> {
        let mut disks = self.disks.clone();
        let mut remotes = Vec::new();
        if !self.volumes.is_empty() {
            let store = StateFolder::open()?.store();
            remotes = attached_options(&store)?;
            disks.extend(self.volumes.iter().map(|(name, access)| {
                let source =
                    DiskSource::Volume { store: store.clone(), name: name.clone(), ending: VolumeEnding::Settle };
                DiskConfig { source, access: *access }
            }));
        }
        Ok(MachineConfig {
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            append: self.append.clone(),
            disks,
            remotes,
            profile: None,
            cpus: self.cpus,
            ram_bytes: self.memory.0,
            engine: self.engine.choice(),
            translation: self.translate.choice(),
            code_cache_bytes: self.code_cache.0 as usize,
            measurements: if self.stats.is_some() { Measurements::All } else { Measurements::Free },
            log_translation: self.log_translation,
            perf_map: if self.perf_map { PerfMap::Written } else { PerfMap::Absent },
            dirty_log_period: self.test_dirty_log.map(Duration::from_millis),
            cpu_model: self.cpu.clone(),
            net: self.net.clone(),
            vsock: self.vsock.clone(),
            console: match self.console {
                ConsoleName::Serial => ConsolePort::Serial,
                ConsoleName::Virtio => ConsolePort::Virtio,
            },
            timeout: self.timeout.map(Duration::from_secs),
            reset: if self.no_reboot { ResetPolicy::End } else { ResetPolicy::Reboot },
            test_devices: if self.test_devices { TestDevices::Present } else { TestDevices::Absent },
            gdb: self.gdb.clone(),
            identity: random_identity()?,
        })
    }
}

/// Draws who the machine is.
pub fn random_identity() -> Result<Identity> {
    use std::io::Read;
    let mut random = [0; 37];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut random))
        .context("the host's random numbers cannot be read from /dev/urandom")?;
    let mut identity = Identity::default();
    identity.uuid.copy_from_slice(&random[..16]);
    // Version 4, variant 1 (RFC 4122, 4.4).
    identity.uuid[6] = identity.uuid[6] & 0x0f | 0x40;
    identity.uuid[8] = identity.uuid[8] & 0x3f | 0x80;
    identity.generation_id.copy_from_slice(&random[16..32]);
    // Locally administered, unicast.
    identity.mac = [0x02, random[32], random[33], random[34], random[35], random[36]];
    Ok(identity)
}

/// Boots and waits for the end; the exit status. `process_start_ns` is the process' first moment on the monotonic clock.
pub fn boot(arguments: &BootArguments, orders: Orders, process_start_ns: u64) -> Result<u8> {
    let config = arguments.config()?;
    // Before any other thread exists, so that all threads inherit the mask and only the one that waits gets the signals.
    let signals = StopSignals::block().context("the signals that stop polder cannot be caught")?;
    let stats_file = arguments.stats.as_deref().map(StatsFile::create).transpose()?;
    let control = Control::new();
    let caught = signals.stop_on_arrival(control.clone())?;
    if let Some(orders) = orders {
        caught.listen(orders, control.clone())?;
    }

    let output =
        std::io::stdout().as_fd().try_clone_to_owned().context("standard output cannot be used as the console")?;
    let on_terminal = std::io::stdin().is_terminal();
    let terminal = on_terminal.then(RawTerminal::enter).transpose().context("the terminal cannot be set up")?;
    let keys = if on_terminal { input::Keys::Terminal } else { input::Keys::Plain };
    let left = input::start(control.clone(), keys)?;

    let console = Console { output: output.into() };
    let report = polder_vmm::run(&config, console, &control, Arc::new(SystemClock), process_start_ns);
    drop(terminal);
    let report = report?;
    say_what_is_left(&report);
    if let Some(file) = stats_file {
        file.write(&report.stats)?;
    }
    Ok(match report.outcome {
        Outcome::PoweredOff => 0,
        Outcome::Reset => STATUS_RESET,
        Outcome::Panicked | Outcome::TripleFault => {
            let what = if report.outcome == Outcome::Panicked { "the guest panicked" } else { "a triple fault" };
            eprintln!("polder: the machine ended: {what}");
            STATUS_PANICKED
        }
        Outcome::TimedOut => {
            eprintln!("polder: the machine was stopped: its time of {} s was up", arguments.timeout.unwrap_or(0));
            STATUS_TIMED_OUT
        }
        Outcome::DebugExit(value) => (value << 1 | 1) as u8,
        Outcome::Stopped => match caught.name() {
            Some(name) => bail!("the machine was stopped by {name}"),
            None if left.is_set() => bail!("the machine was stopped by Ctrl-A x"),
            None => return Err(anyhow!("the machine was stopped")),
        },
    })
}
