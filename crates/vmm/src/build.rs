//! Puts a machine together: memory, tables, engine, devices, kernel; then its vCPU threads.

use std::fs::File;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use polder_basics::Clock;
use polder_devices::pci::{ConfigPorts, Ecam, PciBus};
use polder_devices::test_devices::{
    DEBUG_EXIT_PORTS, DebugExit, TEST_INTERRUPTS_START, TEST_MEMORY_LEN, TEST_MEMORY_START, TEST_PORTS_LEN,
    TEST_PORTS_START, TestInterrupts, TestMemory, TestPorts,
};
use polder_devices::virtio::balloon::Balloon;
use polder_devices::virtio::console::Console as VirtioConsole;
use polder_devices::virtio::{VirtioDevice, VirtioPciFunction};
use polder_devices::{
    AcpiRegisters, CMOS_PORTS, FW_CFG_PORTS, FwCfg, GenerationId, KEYBOARD_PORT, KEYBOARD_PORTS, KeyboardController,
    Pvpanic, QueuedWriter, QueuedWriterHandle, ResetControl, Rtc, SERIAL_PORTS, SYSTEM_CONTROL_A_PORT, Serial,
    SystemControlA,
};
use polder_machine::acpi::AcpiConfig;
use polder_machine::boot::{Boot, Initrd};
use polder_machine::smbios::SmbiosConfig;
use polder_machine::{
    Bus, Engine, EngineServices, InterruptLine, IoApic, MsiSink, RequestSink, VcpuExit, VcpuHandle, acpi, boot, layout,
    reset_code, smbios,
};
use polder_memory::{GuestAddress, GuestMemory};

use crate::control::{Control, Event, Keyboard, Running};
use crate::engine::{EngineMaker, MessagePath};
use crate::files::Files;
use crate::gate::Gate;
use crate::gdb::{Debuggee, Debugger, Finding, SharedVcpu, lock_vcpu};
use crate::{ConsolePort, MachineConfig, TestDevices, VmmError, virtio};

/// Serial output that waits for a slow reader at most; beyond it the port holds the guest's transmitter.
const CONSOLE_WAITING_LEN_MAX: usize = 64 << 10;
/// How long the end of a machine waits for a reader of its console.
const CONSOLE_DRAIN: Duration = Duration::from_secs(5);
/// The first PCI slot after the host bridge.
const FIRST_SLOT: u8 = 1;

/// What all machines of one run share.
pub(crate) struct Surroundings<'a> {
    pub(crate) config: &'a MachineConfig,
    pub(crate) files: &'a Files,
    pub(crate) console: &'a File,
    pub(crate) control: &'a Control,
    pub(crate) clock: Arc<dyn Clock>,
    /// When the first vCPU of the first machine entered guest code.
    pub(crate) first_entry_ns: Arc<OnceLock<u64>>,
    pub(crate) make_engine: EngineMaker<'a>,
    pub(crate) debugger: Option<&'a Arc<Debugger>>,
}

/// How often somebody is asked whether to wait on for a device.
const DRAIN_LOOK: Duration = Duration::from_millis(50);

/// What became of the devices' work in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    All,
    /// A device waits for the host, on threads that nobody waits for.
    Left,
}

/// A machine whose vCPU threads wait at the gate. Dropping it without [`Machine::shut_down`] stops it as well.
pub(crate) struct Machine {
    pub(crate) memory: GuestMemory,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) vcpus: Vec<Arc<dyn VcpuHandle>>,
    threads: Vec<JoinHandle<()>>,
    console: Vec<QueuedWriterHandle>,
    virtio: Vec<Arc<dyn VirtioDevice>>,
    _message_sink: Arc<dyn MsiSink>,
    _generation_id: GenerationId,
    _devices: Devices,
}

/// The devices that something outside the buses reaches.
struct Devices {
    serial: Arc<Serial>,
    acpi: Arc<AcpiRegisters>,
    _rtc: Arc<Rtc>,
}

impl Machine {
    pub(crate) fn build(around: &Surroundings<'_>) -> Result<Machine, VmmError> {
        let config = around.config;
        let memory = GuestMemory::new(&layout::ram_regions(config.ram_bytes))?;
        let (ports, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let io_apic = IoApic::new();
        let services = EngineServices {
            memory: memory.clone(),
            ports: ports.clone(),
            mmio: mmio.clone(),
            eoi: io_apic.clone(),
            clock: around.clock.clone(),
        };
        let engine = (around.make_engine)(services, config.cpus)?;
        let message_sink = engine.msi_sink();
        let messages: Arc<dyn MsiSink> = Arc::new(MessagePath(Arc::downgrade(&message_sink)));
        io_apic.connect(messages.clone());
        mmio.insert(layout::IO_APIC_START, layout::IO_APIC_LEN, io_apic.clone())?;

        let requests: Arc<dyn RequestSink> = Arc::new(around.control.clone());
        let (devices, console) = add_platform(around, &ports, &mmio, &io_apic, &requests)?;
        let mut console = vec![console];
        let virtio_console = match config.console {
            ConsolePort::Serial => None,
            ConsolePort::Virtio => {
                let (device, output) = virtio_console(around)?;
                console.push(output);
                Some(device)
            }
        };
        let balloon = Arc::new(Balloon::new());
        let virtio = virtio::devices(around, virtio_console.clone(), balloon.clone())?;
        add_pci(&memory, &ports, &mmio, &io_apic, &messages, &requests, &virtio)?;
        if config.test_devices == TestDevices::Present {
            add_test_devices(config, &ports, &mmio, &io_apic, &messages, &requests)?;
        }

        let rsdp = acpi::write_tables(&memory, &AcpiConfig { cpus: config.cpus, ram_bytes: config.ram_bytes })?;
        let uuid = config.identity.uuid;
        reset_code::write(&memory)?;
        smbios::write_tables(&memory, &SmbiosConfig { cpus: config.cpus, ram_bytes: config.ram_bytes, uuid })?;
        let generation_id = GenerationId::new(
            memory.clone(),
            GuestAddress(layout::GENERATION_ID_START),
            config.identity.generation_id,
            devices.acpi.clone(),
        )?;
        let state = load_kernel(around, &memory, rsdp)?;

        let mut vcpus = engine.take_vcpus();
        if let Some(first) = vcpus.first_mut() {
            first.set_state(&state);
        }
        let handles = engine.handles();
        let mut machine = Machine {
            memory: memory.clone(),
            engine,
            gate: Arc::new(Gate::new(handles.clone())),
            vcpus: handles,
            threads: Vec::new(),
            console,
            virtio,
            _message_sink: message_sink,
            _generation_id: generation_id,
            _devices: devices,
        };
        let vcpus: Vec<SharedVcpu> = vcpus.into_iter().map(|vcpu| Arc::new(Mutex::new(vcpu))).collect();
        for (index, vcpu) in vcpus.iter().enumerate() {
            let thread = spawn_vcpu(around, index, vcpu.clone(), machine.gate.clone())?;
            machine.threads.push(thread);
        }
        if let Some(debugger) = around.debugger {
            let gate = machine.gate.clone();
            debugger.adopt(Debuggee { gate, vcpus, memory }, machine.engine.name())?;
        }
        around.control.set_running(Running {
            gate: Arc::downgrade(&machine.gate),
            keyboard: match &virtio_console {
                Some(console) => Keyboard::Virtio(Arc::downgrade(console)),
                None => Keyboard::Serial(Arc::downgrade(&machine._devices.serial)),
            },
            acpi: Arc::downgrade(&machine._devices.acpi),
            balloon: Arc::downgrade(&balloon),
            ram_bytes: config.ram_bytes,
        });
        Ok(machine)
    }

    /// Stops the machine: vCPUs first, then the devices' work in flight, then the rest of the console's output. Where the host does not
    /// answer a device, `is_patient` is asked every [`DRAIN_LOOK`]; once it is not, the device is left to its threads, which
    /// keep the guest's memory for as long as they wait. Whether every device has ended.
    pub(crate) fn shut_down(&mut self, mut is_patient: impl FnMut() -> bool) -> Drained {
        self.gate.stop();
        for thread in self.threads.drain(..) {
            // A panic was reported as an event by the thread's guard.
            let _ = thread.join();
        }
        let (ended, ends) = mpsc::channel::<()>();
        for device in self.virtio.drain(..) {
            // One that waits keeps no other from its end.
            let (ended, for_thread) = (ended.clone(), device.clone());
            let reset = move || {
                for_thread.reset();
                drop(ended);
            };
            if std::thread::Builder::new().name("device end".to_owned()).spawn(reset).is_err() {
                device.reset();
            }
        }
        drop(ended);
        let drained = loop {
            match ends.recv_timeout(DRAIN_LOOK) {
                Err(RecvTimeoutError::Timeout) if is_patient() => {}
                Err(RecvTimeoutError::Timeout) => break Drained::Left,
                _ => break Drained::All,
            }
        };
        for output in &self.console {
            output.drain(CONSOLE_DRAIN);
        }
        drained
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.shut_down(|| false);
    }
}

/// Says that a vCPU thread ended though the machine was not stopped.
struct DeathNotice<'a> {
    control: &'a Control,
    index: usize,
    expected: bool,
}

impl Drop for DeathNotice<'_> {
    fn drop(&mut self) {
        if !self.expected {
            self.control.push(Event::VcpuDied { index: self.index });
        }
    }
}

fn spawn_vcpu(
    around: &Surroundings<'_>,
    index: usize,
    vcpu: SharedVcpu,
    gate: Arc<Gate>,
) -> Result<JoinHandle<()>, VmmError> {
    let control = around.control.clone();
    let clock = around.clock.clone();
    let first_entry_ns = around.first_entry_ns.clone();
    let debugger = around.debugger.cloned();
    let body = move || {
        let pass = gate.pass(index);
        let mut notice = DeathNotice { control: &control, index, expected: false };
        while pass.enter() {
            first_entry_ns.get_or_init(|| clock.monotonic_ns());
            let exit = lock_vcpu(&vcpu).run();
            let finding = match exit {
                VcpuExit::Stopped => continue,
                VcpuExit::TripleFault => Finding::TripleFault,
                VcpuExit::Debug(event) => Finding::Event(event),
            };
            if let Some(debugger) = debugger.as_ref().filter(|debugger| debugger.is_attached()) {
                gate.hold(index);
                debugger.report(index, finding);
            }
            // A debugger looks at the vCPU first.
            if finding == Finding::TripleFault && pass.enter() {
                control.push(Event::TripleFault);
                pass.wait_for_end();
            }
        }
        notice.expected = true;
    };
    std::thread::Builder::new()
        .name(format!("vcpu {index}"))
        .spawn(body)
        .map_err(|source| VmmError::Host { what: "thread for a vCPU", source })
}

fn load_kernel(
    around: &Surroundings<'_>,
    memory: &GuestMemory,
    rsdp: u64,
) -> Result<polder_machine::VcpuState, VmmError> {
    let config = around.config;
    let kernel = around.files.read_kernel().map_err(|source| VmmError::Read {
        what: "kernel",
        path: config.kernel.clone(),
        source,
    })?;
    let initrd = around.files.initrd().map_err(|source| VmmError::Read {
        what: "initrd",
        path: config.initrd.clone().unwrap_or_default(),
        source,
    })?;
    let mut reader;
    let initrd = match initrd {
        Some((file, len)) => {
            reader = file;
            Some(Initrd { len, reader: &mut reader })
        }
        None => None,
    };
    let kernel_name = config.kernel.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    boot::load(memory, Boot { kernel: &kernel, kernel_name: &kernel_name, initrd, command_line: &config.append, rsdp })
        .map_err(|source| VmmError::Boot { path: config.kernel.clone(), source })
}

/// A wire to a pin of the I/O APIC; the pins come from `layout`, so they exist.
fn wire(io_apic: &Arc<IoApic>, pin: u8) -> Arc<dyn InterruptLine> {
    io_apic.line(pin).unwrap_or_else(|| Arc::new(()))
}

/// A way to the console's output that never blocks.
fn console_output(around: &Surroundings<'_>) -> Result<(QueuedWriter, QueuedWriterHandle), VmmError> {
    let host = |what| move |source| VmmError::Host { what, source };
    let target = around.console.try_clone().map_err(host("descriptor for the console"))?;
    let output =
        QueuedWriter::spawn("console", target, CONSOLE_WAITING_LEN_MAX).map_err(host("thread for the console"))?;
    let handle = output.handle();
    Ok((output, handle))
}

fn virtio_console(around: &Surroundings<'_>) -> Result<(Arc<VirtioConsole>, QueuedWriterHandle), VmmError> {
    let (output, handle) = console_output(around)?;
    let console = Arc::new(VirtioConsole::new(Box::new(output)));
    let for_room = Arc::downgrade(&console);
    handle.set_on_room(move || {
        if let Some(console) = for_room.upgrade() {
            console.output_ready();
        }
    });
    Ok((console, handle))
}

/// What every PC has beside PCI.
fn add_platform(
    around: &Surroundings<'_>,
    ports: &Bus,
    mmio: &Bus,
    io_apic: &Arc<IoApic>,
    requests: &Arc<dyn RequestSink>,
) -> Result<(Devices, QueuedWriterHandle), VmmError> {
    let host = |what| move |source| VmmError::Host { what, source };
    let (output, console) = console_output(around)?;
    let serial = Arc::new(Serial::new(Box::new(output), wire(io_apic, layout::COM1_GSI)));
    // Weak: the writer's thread holds the closure, and the port holds the writer.
    let for_room = Arc::downgrade(&serial);
    console.set_on_room(move || {
        if let Some(serial) = for_room.upgrade() {
            serial.output_ready();
        }
    });
    ports.insert(layout::COM1_PORT, SERIAL_PORTS, serial.clone())?;

    let rtc = Arc::new(Rtc::new(around.clock.clone(), wire(io_apic, layout::RTC_GSI), around.config.ram_bytes));
    rtc.start_timer().map_err(host("thread for the clock"))?;
    ports.insert(layout::CMOS_PORT, CMOS_PORTS, rtc.clone())?;

    let acpi = Arc::new(AcpiRegisters::new(wire(io_apic, layout::ACPI_EVENT_GSI), requests.clone()));
    mmio.insert(layout::ACPI_REGISTERS_START, layout::ACPI_REGISTERS_LEN, acpi.clone())?;
    ports.insert(layout::PVPANIC_PORT, 1, Arc::new(Pvpanic::new(requests.clone())))?;
    ports.insert(KEYBOARD_PORT, KEYBOARD_PORTS, Arc::new(KeyboardController::new(requests.clone())))?;
    ports.insert(SYSTEM_CONTROL_A_PORT, 1, Arc::new(SystemControlA::new(requests.clone())))?;
    Ok((Devices { serial, acpi, _rtc: rtc }, console))
}

/// The root bus with its ways to configuration space and the virtio devices, one a slot.
fn add_pci(
    memory: &GuestMemory,
    ports: &Bus,
    mmio: &Arc<Bus>,
    io_apic: &Arc<IoApic>,
    messages: &Arc<dyn MsiSink>,
    requests: &Arc<dyn RequestSink>,
    virtio: &[Arc<dyn VirtioDevice>],
) -> Result<(), VmmError> {
    let lines = std::array::from_fn(|pin| wire(io_apic, layout::PCI_INTX_GSI + pin as u8));
    let pci = PciBus::new(mmio, lines);
    mmio.insert(layout::ECAM_START, layout::ECAM_LEN, Arc::new(Ecam(pci.clone())))?;
    let reset = Arc::new(ResetControl::new(requests.clone()));
    ports.insert(layout::PCI_CONFIG_PORT, 8, Arc::new(ConfigPorts::new(pci.clone(), reset)))?;
    for (slot, device) in (FIRST_SLOT..).zip(virtio) {
        let line = pci.interrupt_line(slot);
        pci.add(slot, VirtioPciFunction::new(device.clone(), memory.clone(), messages.clone(), line))?;
    }
    Ok(())
}

/// What test guests expect.
fn add_test_devices(
    config: &MachineConfig,
    ports: &Bus,
    mmio: &Bus,
    io_apic: &Arc<IoApic>,
    messages: &Arc<dyn MsiSink>,
    requests: &Arc<dyn RequestSink>,
) -> Result<(), VmmError> {
    let lines: Vec<_> = (0..layout::IO_APIC_PINS).map(|pin| wire(io_apic, pin)).collect();
    let line_count = lines.len() as u64;
    ports.insert(layout::DEBUG_EXIT_PORT, DEBUG_EXIT_PORTS, Arc::new(DebugExit::new(requests.clone())))?;
    ports.insert(TEST_PORTS_START, TEST_PORTS_LEN, Arc::new(TestPorts::default()))?;
    ports.insert(TEST_INTERRUPTS_START, line_count, Arc::new(TestInterrupts::new(lines, messages.clone())))?;
    let fw_cfg = FwCfg::new(config.cpus as u16, config.ram_bytes);
    ports.insert(layout::FW_CFG_PORT, FW_CFG_PORTS, Arc::new(fw_cfg))?;
    mmio.insert(TEST_MEMORY_START, TEST_MEMORY_LEN, Arc::new(TestMemory::default()))?;
    Ok(())
}
