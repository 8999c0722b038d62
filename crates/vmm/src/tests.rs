//! Machines run by an engine that plays a script: what a guest would do, without a guest.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use polder_basics::{MIB, SystemClock};
use polder_machine::{
    AccessSize, Engine, EngineServices, MsiMessage, MsiSink, Vcpu, VcpuExit, VcpuHandle, VcpuState, layout,
};

use crate::run::run_with;
use crate::*;

/// What vCPU 0 does in its n-th boot.
type Script = Arc<dyn Fn(&EngineServices, u64) -> Option<VcpuExit> + Send + Sync>;

#[derive(Default)]
struct Flag(Mutex<bool>, Condvar);

impl VcpuHandle for Flag {
    fn stop(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("instructions", 1)]
    }
}

struct ScriptedVcpu {
    services: EngineServices,
    script: Option<Script>,
    boot: u64,
    flag: Arc<Flag>,
}

impl Vcpu for ScriptedVcpu {
    fn run(&mut self) -> VcpuExit {
        if let Some(script) = self.script.take()
            && let Some(exit) = script(&self.services, self.boot)
        {
            return exit;
        }
        let mut stop = self.flag.0.lock().unwrap();
        while !*stop {
            stop = self.flag.1.wait(stop).unwrap();
        }
        *stop = false;
        VcpuExit::Stopped
    }

    fn state(&self) -> VcpuState {
        VcpuState::power_on(true)
    }

    fn set_state(&mut self, _state: &VcpuState) {}

    fn reset(&mut self) {}
}

struct ScriptedEngine {
    vcpus: Mutex<Vec<Box<dyn Vcpu>>>,
    flags: Vec<Arc<Flag>>,
    alive: Arc<AtomicU64>,
}

struct NoSink;

impl MsiSink for NoSink {
    fn send(&self, _message: MsiMessage) {}
}

impl Engine for ScriptedEngine {
    fn name(&self) -> &'static str {
        "scripted"
    }

    fn take_vcpus(&self) -> Vec<Box<dyn Vcpu>> {
        std::mem::take(&mut self.vcpus.lock().unwrap())
    }

    fn handles(&self) -> Vec<Arc<dyn VcpuHandle>> {
        self.flags.iter().map(|flag| flag.clone() as Arc<dyn VcpuHandle>).collect()
    }

    fn msi_sink(&self) -> Arc<dyn MsiSink> {
        Arc::new(NoSink)
    }

    fn send_nmi(&self) {}
}

impl Drop for ScriptedEngine {
    fn drop(&mut self) {
        self.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A folder with a kernel that is loaded and never looked at.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("polder-vmm-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::SeqCst));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join("kernel"), flat_kernel()).unwrap();
        Folder(path)
    }

    fn config(&self) -> MachineConfig {
        MachineConfig { cpus: 2, ram_bytes: 64 * MIB, ..MachineConfig::new(self.0.join("kernel")) }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn flat_kernel() -> Vec<u8> {
    let (magic, flags, load) = (0x1bad_b002u32, 1u32 << 16, 0x10_0000u32);
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    [magic, flags, checksum, load, load, 0, 0, load].iter().flat_map(|word| word.to_le_bytes()).collect()
}

struct Run {
    result: Result<Report, VmmError>,
    console: String,
}

/// Runs a machine and checks that no engine is left over.
fn play(config: &MachineConfig, control: &Control, script: Script) -> Run {
    let output = rustix::fs::memfd_create("console", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut output = File::from(output);
    let alive = Arc::new(AtomicU64::new(0));
    let boots = AtomicU64::new(0);
    let make = |services: EngineServices, cpus: u32| {
        alive.fetch_add(1, Ordering::SeqCst);
        let boot = boots.fetch_add(1, Ordering::SeqCst);
        let flags: Vec<Arc<Flag>> = (0..cpus).map(|_| Arc::default()).collect();
        let vcpu = |index: usize| -> Box<dyn Vcpu> {
            Box::new(ScriptedVcpu {
                services: services.clone(),
                script: (index == 0).then(|| script.clone()),
                boot,
                flag: flags[index].clone(),
            })
        };
        let vcpus = (0..flags.len()).map(vcpu).collect();
        Ok(Arc::new(ScriptedEngine { vcpus: Mutex::new(vcpus), flags, alive: alive.clone() }) as Arc<dyn Engine>)
    };
    let console = Console { output: output.try_clone().unwrap() };
    let result = run_with(config, console, control, Arc::new(SystemClock), 0, &make);
    assert_eq!(alive.load(Ordering::SeqCst), 0, "an engine outlived its machine");
    let mut console = String::new();
    output.seek(SeekFrom::Start(0)).unwrap();
    output.read_to_string(&mut console).unwrap();
    Run { result, console }
}

fn outcome(run: &Run) -> Outcome {
    run.result.as_ref().unwrap().outcome
}

fn say(services: &EngineServices, text: &str) {
    for byte in text.bytes() {
        services.ports.write(layout::COM1_PORT, AccessSize::Byte, byte.into());
    }
}

#[test]
fn a_guest_that_switches_itself_off_ends_the_run_with_its_output_written() {
    let folder = Folder::new();
    let run = play(
        &folder.config(),
        &Control::new(),
        Arc::new(|services, _| {
            say(services, "good night");
            let control = layout::ACPI_REGISTERS_START + polder_machine::acpi_registers::SLEEP_CONTROL;
            services.mmio.write(control, AccessSize::Byte, 0x34);
            None
        }),
    );
    assert_eq!(outcome(&run), Outcome::PoweredOff);
    assert_eq!(run.console, "good night");
    let stats = run.result.unwrap().stats;
    assert_eq!((stats.boots, stats.counters["instructions"]), (1, 2));
    assert!(stats.times.first_vcpu_entry_ns.is_some());
}

#[test]
fn a_reset_boots_a_new_machine_unless_it_is_to_end() {
    let folder = Folder::new();
    let script: Script = Arc::new(|services, boot| {
        say(services, if boot == 0 { "first " } else { "second" });
        match boot {
            0 => services.ports.write(layout::RESET_PORT, AccessSize::Byte, 6),
            _ => services.ports.write(layout::PVPANIC_PORT, AccessSize::Byte, 1),
        }
        None
    });
    let run = play(&folder.config(), &Control::new(), script.clone());
    assert_eq!((outcome(&run), run.console.as_str()), (Outcome::Panicked, "first second"));
    assert_eq!(run.result.unwrap().stats.boots, 2);
    let config = MachineConfig { reset: ResetPolicy::End, ..folder.config() };
    assert_eq!(outcome(&play(&config, &Control::new(), script)), Outcome::Reset);
}

#[test]
fn what_a_guest_was_asked_to_have_is_asked_again_after_a_reset() {
    let folder = Folder::new();
    let control = Control::new();
    assert_eq!(control.guest_share(), None);
    let from_guest = control.clone();
    let script: Script = Arc::new(move |services, boot| {
        // The first guest may run before the machine is announced to the others.
        while boot == 0 && !from_guest.set_guest_share(40 * MIB) {
            std::thread::yield_now();
        }
        let share = from_guest.guest_share().unwrap();
        assert_eq!((share.ram_bytes, share.target_bytes, share.actual_bytes), (64 * MIB, 40 * MIB, 64 * MIB));
        assert!(!share.is_heard);
        let port = if boot == 0 { layout::RESET_PORT } else { layout::PVPANIC_PORT };
        services.ports.write(port, AccessSize::Byte, if boot == 0 { 6 } else { 1 });
        None
    });
    let run = play(&folder.config(), &control, script);
    assert_eq!((outcome(&run), run.result.unwrap().stats.boots), (Outcome::Panicked, 2));
    assert_eq!(control.guest_share(), None);
}

#[test]
fn a_triple_fault_ends_the_run() {
    let folder = Folder::new();
    let run = play(&folder.config(), &Control::new(), Arc::new(|_, _| Some(VcpuExit::TripleFault)));
    assert_eq!(outcome(&run), Outcome::TripleFault);
}

#[test]
fn the_debug_exit_port_is_there_only_with_the_test_devices() {
    let folder = Folder::new();
    let script: Script = Arc::new(|services, _| {
        services.ports.write(layout::DEBUG_EXIT_PORT, AccessSize::Dword, 0x21);
        services.ports.write(layout::RESET_PORT, AccessSize::Byte, 6);
        None
    });
    let config = MachineConfig { reset: ResetPolicy::End, ..folder.config() };
    assert_eq!(outcome(&play(&config, &Control::new(), script.clone())), Outcome::Reset);
    let config = MachineConfig { test_devices: TestDevices::Present, ..config };
    assert_eq!(outcome(&play(&config, &Control::new(), script)), Outcome::DebugExit(0x21));
}

#[test]
fn a_guest_that_never_ends_times_out_or_is_stopped() {
    let folder = Folder::new();
    let config = MachineConfig { timeout: Some(Duration::from_millis(50)), ..folder.config() };
    assert_eq!(outcome(&play(&config, &Control::new(), Arc::new(|_, _| None))), Outcome::TimedOut);
    let control = Control::new();
    let from_guest = control.clone();
    let script: Script = Arc::new(move |_, _| {
        from_guest.stop();
        None
    });
    assert_eq!(outcome(&play(&folder.config(), &control, script)), Outcome::Stopped);
}

#[test]
fn a_paused_machine_runs_no_guest_code_until_it_resumes() {
    let folder = Folder::new();
    let control = Control::new();
    let (from_guest, paused) = (control.clone(), Arc::new(AtomicBool::new(false)));
    let script: Script = Arc::new(move |services, _| {
        let (control, paused, ports) = (from_guest.clone(), paused.clone(), services.ports.clone());
        std::thread::spawn(move || {
            // Returns only when both vCPUs have left guest code.
            assert!(control.pause());
            paused.store(true, Ordering::SeqCst);
            assert!(control.resume());
            ports.write(layout::PVPANIC_PORT, AccessSize::Byte, 1);
        });
        None
    });
    assert_eq!(outcome(&play(&folder.config(), &control, script)), Outcome::Panicked);
    assert!(!control.pause(), "the machine is gone");
}

#[test]
fn a_vcpu_thread_that_dies_is_reported_and_the_rest_is_stopped() {
    let folder = Folder::new();
    let run = play(&folder.config(), &Control::new(), Arc::new(|_, _| panic!("a bug, made for this test")));
    assert!(matches!(run.result, Err(VmmError::VcpuDied { index: 0 })));
}

#[test]
fn typed_text_reaches_the_serial_port() {
    let folder = Folder::new();
    let control = Control::new();
    let typist = control.clone();
    let script: Script = Arc::new(move |services, _| {
        assert_eq!(typist.type_in(b"hi"), 2);
        let read = || services.ports.read(layout::COM1_PORT, AccessSize::Byte) as u8;
        let echo = [read(), read()];
        say(services, std::str::from_utf8(&echo).unwrap());
        services.ports.write(layout::PVPANIC_PORT, AccessSize::Byte, 1);
        None
    });
    let run = play(&folder.config(), &control, script);
    assert_eq!(run.console, "hi");
    assert_eq!(control.type_in(b"late"), 0);
}

#[test]
fn machines_that_cannot_be_are_refused_before_anything_is_opened() {
    let nowhere = MachineConfig::new(PathBuf::from("/nowhere/kernel"));
    let refused =
        |config: MachineConfig| play(&config, &Control::new(), Arc::new(|_, _| None)).result.unwrap_err().to_string();
    assert!(refused(MachineConfig { cpus: 0, ..nowhere.clone() }).contains("vCPUs"));
    assert!(refused(MachineConfig { cpus: 9, ..nowhere.clone() }).contains("vCPUs"));
    assert!(refused(MachineConfig { ram_bytes: MIB, ..nowhere.clone() }).contains("memory"));
    assert!(refused(nowhere).contains("/nowhere/kernel"));
    let folder = Folder::new();
    let config = MachineConfig { initrd: Some(folder.0.clone()), ..folder.config() };
    assert!(refused(config).contains("folder"));
}
