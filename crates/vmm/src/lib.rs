//! One machine put together: memory, engine, devices and a booted kernel, and the threads that run them.
//!
//! [`run`] takes a [`MachineConfig`] from power-on to its end. A guest's reset builds everything anew from the same open files: a
//! reset machine is a new machine, and nothing of the old one can be left over. [`Control`] reaches the running machine from
//! other threads.
//!
//! Threads: one for each vCPU; devices have their own; the caller of [`run`] is the control thread and only waits for events.
//! vCPUs stop first and resume last: when a device is asked to stop, no vCPU gives it new work.
//!
//! Invariant: what a machine needs from the host is opened before the first guest instruction, and everything is closed and every
//! vCPU thread has ended when [`run`] returns; only what waits for a host that does not answer is left to its own threads.
//!
//! Modules: `config` (what a machine is), `files` (its open files), `file_system` (which of the host's may not answer), `build` (putting it together), `engine` (which one), `calibration` (how fast one is), `gate` (vCPU
//! threads run, pause and stop), `control` (events and the handle), `run` (from power-on to the end), `stats` (what it measured),
//! `virtio` (its virtio devices), `listening_socket` (Unix sockets that the machine listens on), `gdb` (a debugger's way to the vCPUs), `agent_client` (the host's end of a session with the agent in the guest).

pub mod agent_client;
mod build;
mod calibration;
mod config;
mod control;
mod engine;
mod error;
mod file_system;
mod files;
mod gate;
mod gdb;
mod listening_socket;
mod run;
mod stats;
#[cfg(test)]
mod tests;
mod virtio;

pub use build::Drained;
pub use calibration::{CalibrationGuest, SoftwareCalibration};
pub use config::{
    CODE_CACHE_BYTES_DEFAULT, CODE_CACHE_BYTES_MAX, CODE_CACHE_BYTES_MIN, CPU_MODEL_NEWEST, CPUS_MAX, ConsolePort,
    DiskAccess, DiskConfig, DiskSource, EngineChoice, Identity, MachineConfig, Measurements, NetConfig, PerfMap,
    Profile, ProfileAct, RAM_BYTES_MAX, RAM_BYTES_MIN, ResetPolicy, TestDevices, Translation, VolumeEnding,
};
pub use config::{GdbConfig, GdbPlace, GdbStart};
pub use control::{Control, GuestShare};
pub use error::VmmError;
pub use file_system::may_not_answer;
pub use run::{Console, Outcome, Report, run};
pub use stats::{MemoryStats, Stats, Times};
