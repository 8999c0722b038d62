//! Which engine runs a machine.

use std::sync::{Arc, Weak};

use polder_machine::{Engine, EngineServices, MsiMessage, MsiSink};
use polder_software::{CpuModel, EngineOptions, SoftwareEngine};

use crate::{EngineChoice, MachineConfig, VmmError};

/// Makes an engine; tests bring their own.
pub(crate) type EngineMaker<'a> = &'a dyn Fn(EngineServices, u32) -> Result<Arc<dyn Engine>, VmmError>;

/// Makes the engine of choice.
pub(crate) fn make(config: &MachineConfig, services: EngineServices, cpus: u32) -> Result<Arc<dyn Engine>, VmmError> {
    match config.engine {
        // Until the KVM engine is there, the software engine is the faster of those that work.
        EngineChoice::Auto | EngineChoice::Software => {
            let model = CpuModel::parse(&config.cpu_model)?;
            let options = EngineOptions {
                translation: config.translation,
                code_cache_bytes: config.code_cache_bytes,
                measurements: config.measurements,
                log_translation: config.log_translation,
                perf_map: config.perf_map,
            };
            Ok(SoftwareEngine::new(services, cpus, model, options)?)
        }
        EngineChoice::Kvm => Err(VmmError::NoKvmEngine),
    }
}

/// The way from devices to the engine. Weak, because the engine holds the buses that hold the devices.
pub(crate) struct MessagePath(pub(crate) Weak<dyn MsiSink>);

impl MsiSink for MessagePath {
    fn send(&self, message: MsiMessage) {
        if let Some(sink) = self.0.upgrade() {
            sink.send(message);
        }
    }
}
