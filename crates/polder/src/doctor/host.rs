//! What the host offers beside its CPU.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use polder_basics::{ByteSize, MIB};
use polder_vmm::RAM_BYTES_MIN;
use rustix::fs::Access;
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::state_folder::StateFolder;

/// One line of the report.
pub struct Finding {
    pub name: &'static str,
    pub good: bool,
    pub text: String,
    pub hint: Option<String>,
}

impl Finding {
    pub fn good(name: &'static str, text: impl Into<String>) -> Self {
        Finding { name, good: true, text: text.into(), hint: None }
    }

    pub fn missing(name: &'static str, text: impl Into<String>, hint: impl Into<String>) -> Self {
        Finding { name, good: false, text: text.into(), hint: Some(hint.into()) }
    }
}

/// Programs that `polder image build` runs, and the Debian packages that have them.
const TOOLS: [(&str, &str); 3] = [("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs"), ("zstd", "zstd")];

/// Memory that a guest could have now.
pub(super) fn memory() -> Finding {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
    };
    let size = |bytes: u64| ByteSize(bytes / MIB * MIB);
    match (field("MemAvailable:"), field("MemTotal:")) {
        (Some(available), Some(total)) if available >= RAM_BYTES_MIN => {
            Finding::good("memory", format!("{} available of {}", size(available), size(total)))
        }
        (Some(available), Some(total)) => Finding::missing(
            "memory",
            format!("{} available of {}", size(available), size(total)),
            format!("the smallest machine has {}", ByteSize(RAM_BYTES_MIN)),
        ),
        _ => Finding::missing("memory", "/proc/meminfo does not say", "mount /proc"),
    }
}

/// TAP interfaces.
pub(super) fn tun() -> Finding {
    let name = "tun";
    match std::fs::File::options().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Finding::good(name, "/dev/net/tun opens: --net tap=NAME can work"),
        Err(error) => Finding::missing(
            name,
            format!("/dev/net/tun does not open: {error}"),
            "only --net tap=NAME needs it: modprobe tun",
        ),
    }
}

/// User namespaces, tried in a child.
pub(super) fn user_namespaces() -> Finding {
    let name = "user namespaces";
    let mut command = Command::new("/bin/true");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: the closure makes one system call and touches no memory, as the time between fork and exec demands.
    unsafe {
        command.pre_exec(|| {
            // SAFETY: the child has one thread and is about to run another program.
            Ok(unshare_unsafe(UnshareFlags::NEWUSER)?)
        });
    }
    match command.status() {
        Ok(_) => Finding::good(name, "can be made: images can be built without root"),
        Err(error) => Finding::missing(
            name,
            format!("cannot be made: {error}"),
            "build images as root, or allow them: sysctl kernel.unprivileged_userns_clone=1",
        ),
    }
}

/// Where images and instances are kept. Looked at and not made.
pub(super) fn state_folder() -> Finding {
    let name = "state folder";
    let hint = "set POLDER_HOME to a folder that you can write";
    let folder = match StateFolder::locate() {
        Ok(folder) => folder,
        Err(error) => return Finding::missing(name, format!("{error:#}"), hint),
    };
    let Some(there) = folder.ancestors().find(|path| path.exists()) else {
        return Finding::missing(name, format!("{} cannot be made", folder.display()), hint);
    };
    match rustix::fs::access(there, Access::WRITE_OK) {
        Ok(()) if there == folder => Finding::good(name, folder.display().to_string()),
        Ok(()) => Finding::good(name, format!("{} (not made yet)", folder.display())),
        Err(error) => Finding::missing(name, format!("{} cannot be written: {error}", there.display()), hint),
    }
}

/// The programs.
pub(super) fn tools() -> Vec<Finding> {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<_> = std::env::split_paths(&folders).collect();
    // Where Debian keeps mke2fs, which is not in every user's path.
    folders.extend(["/usr/sbin".into(), "/sbin".into()]);
    TOOLS
        .iter()
        .map(|&(tool, package)| match folders.iter().map(|folder| folder.join(tool)).find(|path| path.is_file()) {
            Some(path) => Finding::good(tool, path.display().to_string()),
            None => {
                Finding::missing(tool, "not installed; polder image build needs it", format!("apt install {package}"))
            }
        })
        .collect()
}
