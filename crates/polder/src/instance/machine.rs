//! The process of one instance: its machine, its console and its orders, from power-on to the end.
//!
//! Started by `polder run`, not by people. It has a session of its own, so that no terminal's end reaches it. Once the machine
//! runs it says so on standard output; until then, what it writes there is why it does not.

use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use polder_basics::SystemClock;
use polder_vmm::{
    Console, Control, DiskAccess, DiskConfig, DiskSource, GdbConfig, MachineConfig, Outcome, Profile, ProfileAct,
    VolumeEnding,
};
use rustix::pipe::{PipeFlags, pipe_with};

use super::console_server::ConsoleServer;
use super::control_socket;
use super::disk;
use super::folder::InstanceFolder;
use super::process::{READY, tell_starter};
use super::record::{InstanceRecord, InstanceTable, Lifetime};
use crate::boot::{EngineName, StopSignals, parse_gdb, random_identity};
use crate::image::{ImageRecord, open_store};
use crate::state_folder::StateFolder;
use crate::store::attached_options;
use crate::watched::{Orders, say_what_is_left};

/// How soon it is noticed that the machine runs.
const LOOK: Duration = Duration::from_millis(5);

#[derive(Args)]
pub struct MachineArguments {
    /// Name of the instance
    name: String,
    /// gdb's way in
    #[arg(long, value_parser = parse_gdb)]
    gdb: Option<GdbConfig>,
    /// Keep what the machine reads first of an attached image
    #[arg(long)]
    record_profile: bool,
}

/// Whoever started this process, who hears once how that went.
struct Starter {
    told: AtomicBool,
}

impl Starter {
    fn tell(&self, text: &str) {
        if !self.told.swap(true, Ordering::SeqCst) {
            tell_starter(text);
        }
    }
}

/// Gives the process a session of its own, before anything waits for the terminal's signals.
pub fn leave_session() {
    // Fails only for a process that leads a session already.
    let _ = rustix::process::setsid();
}

/// Runs the machine of an instance; its exit status.
pub fn machine(arguments: &MachineArguments, orders: Orders, process_start_ns: u64) -> Result<u8> {
    let starter = Arc::new(Starter { told: AtomicBool::new(false) });
    let result = run_instance(arguments, orders, process_start_ns, &starter);
    if let Err(error) = &result {
        let hint = crate::hint::hint(error).map_or(String::new(), |hint| format!(" ({hint})"));
        starter.tell(&format!("{error:#}{hint}"));
    }
    result
}

fn run_instance(
    arguments: &MachineArguments,
    orders: Orders,
    process_start_ns: u64,
    starter: &Arc<Starter>,
) -> Result<u8> {
    let name = &arguments.name;
    let signals = StopSignals::block().context("the signals that stop the machine cannot be caught")?;
    let state = StateFolder::open()?;
    let table = InstanceTable::open(&state)?;
    let record = table.get(name)?;
    let folder = InstanceFolder::open(&state, name)?;
    let mut config = config(&state, &folder, &record)?;
    config.gdb.clone_from(&arguments.gdb);
    let act = if arguments.record_profile { ProfileAct::Record } else { ProfileAct::Fetch };
    config.profile = Some(Profile { image: record.image.clone(), act });

    let control = Control::new();
    let caught = signals.stop_on_arrival(control.clone())?;
    if let Some(orders) = orders {
        caught.listen(orders, control.clone())?;
    }
    if record.lifetime == Lifetime::Command {
        end_with_starter(control.clone())?;
    }
    let (output, guest_output) = pipe_with(PipeFlags::CLOEXEC).context("the host gave no pipe")?;
    let console_listener = UnixListener::bind(folder.console_socket()).context("cannot make the console's socket")?;
    let server = ConsoleServer::start(console_listener, output, control.clone())?;
    let control_listener = UnixListener::bind(folder.control_socket()).context("cannot make the control socket")?;
    control_socket::serve(control_listener, control.clone())?;
    table.set_active(name)?;
    tell_when_running(control.clone(), starter.clone())?;

    let console = Console { output: File::from(guest_output) };
    let result = polder_vmm::run(&config, console, &control, Arc::new(SystemClock), process_start_ns);
    if result.is_ok() {
        starter.tell(READY);
    }
    let last_output = server.finish();
    let ending = match &result {
        Ok(report) => ending(report.outcome).0,
        Err(error) => format!("failed: {:#}", anyhow!(error.to_string())),
    };
    match record.lifetime {
        Lifetime::Kept => {
            // What a crashed guest said last is worth keeping; that there is no room for it is not worth failing.
            let _ = std::fs::write(folder.console_log(), last_output);
            for socket in [folder.console_socket(), folder.control_socket()] {
                let _ = std::fs::remove_file(socket);
            }
            table.set_inactive(name, &ending)?;
        }
        Lifetime::Command => {
            disk::remove(&state, name)?;
            InstanceFolder::remove(&state, name)?;
            table.remove(name)?;
        }
    }
    let report = result?;
    say_what_is_left(&report);
    Ok(ending_status(report.outcome))
}

fn config(state: &StateFolder, folder: &InstanceFolder, record: &InstanceRecord) -> Result<MachineConfig> {
    let store = open_store(state)?;
    let image = ImageRecord::load(&store, &record.image)?;
    let (kernel, initrd) = image.boot_files(state, &store)?;
    let engine = EngineName::from_word(&record.engine).with_context(|| {
        format!("the instance wants the engine {}, which this release does not have", record.engine)
    })?;
    let mut config = MachineConfig::new(kernel);
    config.initrd = initrd;
    config.append = format!("{} systemd.hostname={}", image.command_line, record.name);
    let ending = match record.lifetime {
        Lifetime::Kept => VolumeEnding::Settle,
        Lifetime::Command => VolumeEnding::Leave,
    };
    let source = DiskSource::Volume { store: state.store(), name: disk::volume_name(&record.name), ending };
    config.disks = vec![DiskConfig { source, access: DiskAccess::ReadWrite }];
    config.remotes = attached_options(&state.store())?;
    config.cpus = record.cpus;
    config.ram_bytes = record.ram_bytes;
    config.engine = engine.choice();
    config.vsock = Some(folder.vsock_socket());
    config.identity = random_identity()?;
    Ok(config)
}

/// How a machine ended, for people, and the exit status.
fn ending(outcome: Outcome) -> (String, u8) {
    let (word, status) = match outcome {
        Outcome::PoweredOff => ("powered off", 0),
        Outcome::Reset => ("reset", 10),
        Outcome::Panicked => ("its kernel panicked", 11),
        Outcome::TripleFault => ("triple fault", 11),
        Outcome::TimedOut => ("timed out", 124),
        Outcome::DebugExit(_) => ("debug exit", 1),
        Outcome::Stopped => ("stopped", 1),
    };
    (word.to_owned(), status)
}

fn ending_status(outcome: Outcome) -> u8 {
    ending(outcome).1
}

/// Stops the machine when whoever started it goes away: the other end of standard input is then closed.
fn end_with_starter(control: Control) -> Result<()> {
    let body = move || {
        let mut byte = [0];
        while matches!(std::io::stdin().lock().read(&mut byte), Ok(1..)) {}
        control.stop();
    };
    std::thread::Builder::new().name("lifeline".to_owned()).spawn(body).context("the host gave no thread")?;
    Ok(())
}

fn tell_when_running(control: Control, starter: Arc<Starter>) -> Result<()> {
    let body = move || {
        while !control.is_running() {
            std::thread::sleep(LOOK);
        }
        starter.tell(READY);
    };
    std::thread::Builder::new().name("starter".to_owned()).spawn(body).context("the host gave no thread")?;
    Ok(())
}
