//! `polder doctor`: what this host offers, and which engine `auto` would take, with the measured reason.

mod calibration;
mod cpu;
mod host;
mod kvm;

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use host::Finding;
use kvm::KvmProbe;

/// Say what this host offers, and which engine --engine auto takes here and why
#[derive(Args)]
pub struct DoctorArguments {}

/// Prints the findings. Status 0 if a machine can run here.
pub fn doctor(_arguments: &DoctorArguments) -> Result<ExitCode> {
    let kvm = kvm::probe();
    let mut findings = vec![cpu::level(), cpu::count(), kvm_finding(&kvm), host::memory()];
    findings.extend([host::tun(), host::user_namespaces(), host::state_folder()]);
    findings.extend(host::tools());
    let width = findings.iter().map(|finding| finding.name.len()).max().unwrap_or(0);
    for finding in &findings {
        let mark = if finding.good { "ok  " } else { "miss" };
        println!("{mark}  {:width$}  {}", finding.name, finding.text);
        if let Some(hint) = &finding.hint {
            println!("      {:width$}  hint: {hint}", "");
        }
    }
    println!();
    println!("--engine auto takes: software ({})", reason(&kvm));
    Ok(ExitCode::SUCCESS)
}

fn kvm_finding(probe: &KvmProbe) -> Finding {
    match probe {
        KvmProbe::Absent => {
            Finding::missing("kvm", "there is no /dev/kvm", "none needed: the software engine runs real machines")
        }
        KvmProbe::Unusable { why } => {
            Finding::missing("kvm", format!("/dev/kvm is there, but {why}"), "check who may open it: ls -l /dev/kvm")
        }
        KvmProbe::Works { instructions_per_second } => {
            Finding::good("kvm", format!("works; kernel-mode code runs at {}", speed(*instructions_per_second)))
        }
    }
}

fn reason(probe: &KvmProbe) -> String {
    match probe {
        KvmProbe::Absent => "there is no /dev/kvm".to_owned(),
        KvmProbe::Unusable { why } => format!("/dev/kvm cannot be used: {why}"),
        KvmProbe::Works { instructions_per_second } => {
            format!(
                "the KVM engine is not built yet; KVM's kernel mode was measured at {}",
                speed(*instructions_per_second)
            )
        }
    }
}

fn speed(instructions_per_second: f64) -> String {
    format!("{:.1} million instructions a second", instructions_per_second / 1e6)
}
