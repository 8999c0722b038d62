//! The software engine as the machine sees it.

use std::sync::{Arc, Mutex};

use polder_machine::{Engine, EngineError, EngineServices, MsiSink, Vcpu, VcpuHandle};
use polder_memory::CodeWatcher;

use crate::apic::{Inbox, LocalApic, Router};
use crate::counters::Published;
use crate::cpu::Cpu;
use crate::cpu_model::CpuModel;
use crate::time;
use crate::translate::CpuBox;
use crate::vcpu::{SoftwareHandle, SoftwareVcpu};

/// vCPUs that a machine can have: APIC ids 0 to 254 without extensions.
const VCPUS_MAX: u32 = 255;

/// The software engine: needs nothing of the host but an x86-64 CPU with SSE2 and the features of the model.
pub struct SoftwareEngine {
    vcpus: Mutex<Vec<SoftwareVcpu>>,
    handles: Vec<Arc<SoftwareHandle>>,
    router: Arc<Router>,
}

/// Which code is translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Translation {
    /// What is hot, where the host's CPU has what translated code uses.
    #[default]
    Auto,
    /// Nothing: all code is interpreted.
    Never,
    /// All 64-bit code, before it runs for the first time. Slower than `Auto`; tests use it.
    Always,
    /// As `Always`, and each piece is run by the interpreter too and compared; differences are logged and counted. For one vCPU; tests use it.
    Lockstep,
}

/// Times that a block is interpreted before it is translated.
const HOT: u32 = 16;

/// Sizes that a vCPU's code cache may have.
pub const CODE_CACHE_BYTES_MIN: usize = 1 << 20;
pub const CODE_CACHE_BYTES_MAX: usize = 1 << 30;
/// The size that it has where nobody chose one.
pub const CODE_CACHE_BYTES_DEFAULT: usize = 128 << 20;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Measurements {
    /// What costs nothing.
    #[default]
    Free,
    /// Also where the time goes, and instructions in translated code.
    All,
}

/// Whether `perf` is told of translated code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PerfMap {
    #[default]
    Absent,
    /// In `/tmp/perf-PID.map`, where `perf report` looks for it.
    Written,
}

/// What can be chosen of the engine beside its CPU model.
#[derive(Debug, Clone, Copy)]
pub struct EngineOptions {
    pub translation: Translation,
    /// Memory for the translated code of each vCPU, between [`CODE_CACHE_BYTES_MIN`] and [`CODE_CACHE_BYTES_MAX`] and in whole pages.
    pub code_cache_bytes: usize,
    pub measurements: Measurements,
    /// Translations of code with this guest address are listed by an event of target `polder::translation`.
    pub log_translation: Option<u64>,
    pub perf_map: PerfMap,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            translation: Translation::default(),
            code_cache_bytes: CODE_CACHE_BYTES_DEFAULT,
            measurements: Measurements::default(),
            log_translation: None,
            perf_map: PerfMap::default(),
        }
    }
}

impl Translation {
    /// Times that a block is interpreted before it is translated; `None`: no translation.
    pub(crate) fn threshold(self) -> Option<u32> {
        match self {
            Translation::Auto => Some(HOT),
            Translation::Never => None,
            Translation::Always | Translation::Lockstep => Some(0),
        }
    }
}

/// Tells every vCPU of stale code; its inbox bounds what waits.
struct StaleCode(Vec<Arc<Inbox>>);

impl CodeWatcher for StaleCode {
    fn code_written(&self, page_number: u64, granules: u64) {
        for inbox in &self.0 {
            inbox.post_stale(page_number, granules);
        }
    }
}

impl SoftwareEngine {
    /// An engine with vCPUs in power-on state. One engine for each [`polder_memory::GuestMemory`].
    pub fn new(
        services: EngineServices,
        vcpu_count: u32,
        model: CpuModel,
        options: EngineOptions,
    ) -> Result<Arc<Self>, EngineError> {
        if !(1..=VCPUS_MAX).contains(&vcpu_count) {
            return Err(EngineError::VcpuCount { asked: vcpu_count, max: VCPUS_MAX });
        }
        crate::vector::stub::prepare()
            .map_err(|source| EngineError::Host { what: "executable memory for instruction stubs", source })?;
        let model = Arc::new(model);
        let inboxes: Vec<Arc<Inbox>> = (0..vcpu_count).map(|_| Arc::default()).collect();
        services.memory.set_code_watcher(Arc::new(StaleCode(inboxes.clone())));
        let router = Arc::new(Router::new(inboxes));
        let tsc_khz = time::tsc_khz();
        let epoch_tsc = time::host_tsc();
        let mut vcpus = Vec::new();
        let mut handles = Vec::new();
        for (index, inbox) in router.inboxes().iter().enumerate() {
            let apic = LocalApic::new(router.clone(), index, tsc_khz);
            let (services, model) = (services.clone(), model.clone());
            let cpu = CpuBox::new(|tables| Cpu::with_platform(tables, services, model, apic, epoch_tsc));
            let published = Arc::new(Published::default());
            handles.push(Arc::new(SoftwareHandle { inbox: inbox.clone(), published: published.clone() }));
            let vcpu = cpu
                .and_then(|cpu| SoftwareVcpu::new(cpu, published, options))
                .map_err(|source| EngineError::Host { what: "memory for translated code", source })?;
            vcpus.push(vcpu);
        }
        Ok(Arc::new(SoftwareEngine { vcpus: Mutex::new(vcpus), handles, router }))
    }
}

impl Engine for SoftwareEngine {
    fn name(&self) -> &'static str {
        "software"
    }

    fn take_vcpus(&self) -> Vec<Box<dyn Vcpu>> {
        let mut vcpus = self.vcpus.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        std::mem::take(&mut *vcpus).into_iter().map(|vcpu| Box::new(vcpu) as Box<dyn Vcpu>).collect()
    }

    fn handles(&self) -> Vec<Arc<dyn VcpuHandle>> {
        self.handles.iter().map(|handle| handle.clone() as Arc<dyn VcpuHandle>).collect()
    }

    fn msi_sink(&self) -> Arc<dyn MsiSink> {
        self.router.clone()
    }

    fn send_nmi(&self) {
        for inbox in self.router.inboxes() {
            inbox.post_nmi();
        }
    }
}
