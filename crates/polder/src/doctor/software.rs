//! What the software engine is worth here.

use polder_vmm::SoftwareCalibration;

use super::{Probe, calibration};

/// Makes a machine and measures.
pub fn probe() -> Probe {
    let measured = SoftwareCalibration::new().and_then(|mut guest| calibration::measure(|turns| guest.run(turns)));
    match measured {
        Ok(instructions_per_second) => Probe::Works { instructions_per_second },
        Err(error) => Probe::Unusable { why: format!("{:#}", anyhow::Error::new(error)) },
    }
}
