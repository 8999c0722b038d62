//! `polder stop`: switches instances off.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use polder_basics::agent_protocol::Message;
use polder_vmm::agent_client;

use super::control_socket::{self, Order};
use super::folder::InstanceFolder;
use super::record::{InstanceRecord, InstanceTable, Phase};
use crate::state_folder::StateFolder;

/// How long a guest may take to switch itself off.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(120);
/// How long an agent may take to take the order.
const AGENT_PATIENCE: Duration = Duration::from_secs(5);
/// How long a machine's process may take to end once it was told to.
const END_PATIENCE: Duration = Duration::from_secs(15);
/// How long a process that has said its machine's end may take to be gone.
const GONE_PATIENCE: Duration = Duration::from_millis(500);
const LOOK: Duration = Duration::from_millis(50);

/// Switch instances off
///
/// The guest is asked to switch itself off, through its agent or the power button. When its time is over, the machine is stopped.
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct StopArguments {
    /// Names of the instances
    #[arg(required = true)]
    names: Vec<String>,
    /// Seconds that the guest may take; 0 stops the machine at once
    #[arg(long, value_name = "SECONDS", default_value_t = STOP_TIMEOUT.as_secs())]
    timeout: u64,
}

/// Carries out `polder stop`.
pub fn stop(arguments: &StopArguments) -> Result<ExitCode> {
    let state = StateFolder::open()?;
    for name in &arguments.names {
        stop_instance(&state, name, Duration::from_secs(arguments.timeout))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Switches one instance off; one that is off stays so.
pub fn stop_instance(state: &StateFolder, name: &str, timeout: Duration) -> Result<()> {
    let table = InstanceTable::open(state)?;
    let record = table.get(name)?;
    if !record.is_active() {
        return Ok(());
    }
    if !timeout.is_zero() {
        let folder = InstanceFolder::open(state, name)?;
        let start = Instant::now();
        if !ask_agent(&folder, timeout.min(AGENT_PATIENCE)) {
            // Without an agent the guest's kernel may still listen to the button.
            let _ = control_socket::send(&folder.control_socket(), Order::PowerButton);
        }
        if wait_for_end(&table, &record, timeout.saturating_sub(start.elapsed())) {
            return Ok(());
        }
        eprintln!("polder: {name} did not switch itself off within {} s; its machine is stopped", timeout.as_secs());
    }
    end(state, &table, &record)
}

/// Stops the machine of an instance without asking its guest.
pub fn end(state: &StateFolder, table: &InstanceTable, record: &InstanceRecord) -> Result<()> {
    let told = InstanceFolder::open(state, &record.name)
        .and_then(|folder| control_socket::send(&folder.control_socket(), Order::Stop));
    if told.is_ok() && wait_for_end(table, record, END_PATIENCE) {
        return Ok(());
    }
    record.process.kill();
    wait_for_end(table, record, END_PATIENCE);
    table.set_inactive(&record.name, "killed")
}

fn ask_agent(folder: &InstanceFolder, patience: Duration) -> bool {
    let Ok((mut sender, mut receiver)) = agent_client::connect(&folder.vsock_socket(), patience) else {
        return false;
    };
    sender.send(&Message::PowerOff).is_ok() && matches!(receiver.receive(), Ok(Message::PoweringOff))
}

/// Waits for the end of an instance's machine; whether it has ended. Its process says so in the table, and soon after it is gone,
/// unless the host does not answer it: what is left of it then is no longer waited for.
fn wait_for_end(table: &InstanceTable, record: &InstanceRecord, timeout: Duration) -> bool {
    let start = Instant::now();
    let mut said = None;
    while record.process.is_alive() {
        let runs = |now: &InstanceRecord| now.phase == Phase::Active && now.process == record.process;
        if said.is_none() && !table.get(&record.name).as_ref().is_ok_and(runs) {
            said = Some(Instant::now());
        }
        if said.is_some_and(|said| said.elapsed() >= GONE_PATIENCE) {
            return true;
        }
        if start.elapsed() >= timeout {
            return said.is_some();
        }
        std::thread::sleep(LOOK);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::record::{Lifetime, NewInstance};

    /// This test's own process stands for one that the host's kernel does not let end.
    #[test]
    fn a_process_that_said_its_machines_end_is_not_waited_for() {
        let path = std::env::temp_dir().join(format!("polder-stop-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        let table = InstanceTable::open(&StateFolder::at(path.clone())).unwrap();
        let instance = NewInstance {
            name: "web".to_owned(),
            image: "debian".to_owned(),
            cpus: 1,
            ram: polder_basics::ByteSize(1 << 30),
            engine: "auto".to_owned(),
            lifetime: Lifetime::Kept,
        };
        table.claim(&instance).unwrap();
        table.set_active("web").unwrap();
        let record = table.get("web").unwrap();
        assert!(!wait_for_end(&table, &record, Duration::from_millis(700)));
        table.set_inactive("web", "stopped").unwrap();
        let start = Instant::now();
        assert!(wait_for_end(&table, &record, Duration::from_secs(60)));
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        std::fs::remove_dir_all(path).unwrap();
    }
}
