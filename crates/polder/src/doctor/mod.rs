//! `polder doctor`: what this host offers, and which engine `auto` would take, with the measured reason.

mod calibration;
mod cpu;
mod host;
mod kvm;
mod software;

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use host::Finding;

/// Say what this host offers, and which engine --engine auto takes here and why
#[derive(Args)]
pub struct DoctorArguments {}

/// What an engine was found to be worth.
enum Probe {
    Absent,
    Unusable { why: String },
    Works { instructions_per_second: f64 },
}

/// Prints the findings. Status 0 if a machine can run here, else 1.
pub fn doctor(_arguments: &DoctorArguments) -> Result<ExitCode> {
    let (software, kvm) = (software::probe(), kvm::probe());
    let mut findings = vec![cpu::level(), cpu::count(), software_finding(&software), kvm_finding(&kvm), host::memory()];
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
    println!("{}", verdict(&software, &kvm));
    Ok(if matches!(software, Probe::Works { .. }) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn software_finding(probe: &Probe) -> Finding {
    match probe {
        Probe::Works { instructions_per_second } => Finding::good("software engine", speed(*instructions_per_second)),
        Probe::Unusable { why } => Finding::missing("software engine", why, "guests cannot run here"),
        Probe::Absent => Finding::missing("software engine", "not part of this build", "guests cannot run here"),
    }
}

fn kvm_finding(probe: &Probe) -> Finding {
    match probe {
        Probe::Absent => {
            Finding::missing("kvm", "there is no /dev/kvm", "none needed: the software engine runs real machines")
        }
        Probe::Unusable { why } => {
            Finding::missing("kvm", format!("/dev/kvm is there, but {why}"), "check who may open it: ls -l /dev/kvm")
        }
        Probe::Works { instructions_per_second } => {
            Finding::good("kvm", format!("/dev/kvm works: {}", speed(*instructions_per_second)))
        }
    }
}

/// Which engine `auto` takes and why.
fn verdict(software: &Probe, kvm: &Probe) -> String {
    let reason = match (software, kvm) {
        (_, Probe::Absent) => "there is no /dev/kvm".to_owned(),
        (_, Probe::Unusable { why }) => format!("/dev/kvm cannot be used: {why}"),
        (Probe::Works { instructions_per_second: software }, Probe::Works { instructions_per_second: kvm })
            if software >= kvm =>
        {
            format!("it runs kernel-mode code {:.0} times as fast as KVM does here", software / kvm)
        }
        (_, Probe::Works { .. }) => "KVM is faster here, but its engine is not built yet".to_owned(),
    };
    format!("--engine auto takes software: {reason}")
}

fn speed(instructions_per_second: f64) -> String {
    format!("kernel-mode code runs at {:.1} million instructions a second", instructions_per_second / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_names_the_measured_reason() {
        let works = |instructions_per_second| Probe::Works { instructions_per_second };
        assert!(verdict(&works(1e8), &Probe::Absent).contains("no /dev/kvm"));
        assert!(verdict(&works(1e8), &works(1e6)).contains("100 times as fast"));
        assert!(verdict(&works(1e8), &works(4e9)).contains("not built yet"));
        assert!(verdict(&works(1e8), &Probe::Unusable { why: "it is broken".to_owned() }).contains("broken"));
    }
}
