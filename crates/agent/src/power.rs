//! Switching the guest off.

use std::process::{Command, Stdio};

/// Switches off in the way that the guest's service manager wants, or at once where there is none.
pub fn power_off() {
    let asked = Command::new("systemctl")
        .arg("poweroff")
        .env("PATH", crate::program::DEFAULT_PATH)
        .stdin(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !asked {
        rustix::fs::sync();
        // Without the right to do so nothing happens, and the host presses the power button instead.
        let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    }
}
