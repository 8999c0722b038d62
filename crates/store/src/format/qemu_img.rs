//! Formats that are read and written with `qemu-img`: VMDK, VHDX, VDI and VPC.
//!
//! Their images may come from anywhere, so the program gets little: the format is named on both sides, files are named by whole
//! paths that cannot be read as options or protocols, no file below another is opened, the environment is empty, it works in
//! a folder of its own that is removed, and its time, memory and output are bounded.

use super::error::{FormatError, file_name, printable};
use super::vmdk::{Vmdk, look_at_vmdk};
use super::{Format, RawTarget, Source, Target, VIRTUAL_LEN_MAX, copy};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use std::fs::File;
use std::io::{self, Read};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Where Debian and others have the program.
const PROGRAM: &str = "/usr/bin/qemu-img";
/// Memory that the program may map, in bytes.
const MEMORY_LEN_MAX: u64 = 4 << 30;
/// Bytes of its complaints that are shown.
const MESSAGE_LEN_MAX: u64 = 2048;
/// How often it is looked whether the program has ended.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Numbers for folders.
static NEXT_FOLDER: AtomicU32 = AtomicU32::new(0);

/// The program and its bounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QemuImg {
    /// Where it is.
    pub program: PathBuf,
    /// How long one conversion may take.
    pub timeout: Duration,
}

impl Default for QemuImg {
    /// The installed program, and an hour.
    fn default() -> Self {
        QemuImg { program: PathBuf::from(PROGRAM), timeout: Duration::from_secs(3600) }
    }
}

impl QemuImg {
    /// Converts an image into a raw file that is not there yet.
    pub fn to_raw(&self, image: &Path, format: Format, raw: &Path) -> Result<(), FormatError> {
        self.refuse_own(image, format)?;
        if format == Format::Vmdk
            && let Vmdk::Flat(flat) = look_at_vmdk(image)?
        {
            let mut target = RawTarget::create(raw, flat.len())?;
            copy(&flat, &mut target, NonZeroUsize::MIN, &mut |_| ())?;
            return target.finish();
        }
        let input = absolute(image)?;
        // Whatever the image says, nothing is opened below it.
        let below = if format == Format::Vmdk { "\"backing\":null," } else { "" };
        let input = format!(
            "json:{{\"driver\":\"{format}\",{below}\"file\":{{\"driver\":\"file\",\"filename\":{}}}}}",
            json_string(&input)
        );
        let output = format!("file:{}", absolute(raw)?);
        self.convert(image, &["-O", "raw", "--", &input, &output], raw, VIRTUAL_LEN_MAX)
    }

    /// Converts a raw file into an image that is not there yet.
    pub fn from_raw(&self, raw: &Path, image: &Path, format: Format) -> Result<(), FormatError> {
        self.refuse_own(image, format)?;
        let input = format!("file:{}", absolute(raw)?);
        let output = format!("file:{}", absolute(image)?);
        let mut arguments = vec!["-f", "raw", "-O", format.name()];
        if format == Format::Vpc {
            // Otherwise the length is rounded to cylinders.
            arguments.extend(["-o", "force_size=on"]);
        }
        arguments.extend(["--", &input, &output]);
        self.convert(raw, &arguments, image, VIRTUAL_LEN_MAX)
    }

    fn refuse_own(&self, image: &Path, format: Format) -> Result<(), FormatError> {
        match format {
            Format::Raw | Format::Qcow2 => {
                let feature = format!("qemu-img for {format}, which polder reads and writes itself");
                Err(FormatError::unsupported(&file_name(image), feature))
            }
            _ if !self.program.is_file() => {
                Err(FormatError::NoQemuImg { program: file_name(&self.program), format: format.name() })
            }
            _ => Ok(()),
        }
    }

    /// Runs `qemu-img convert`; on failure nothing is left at `output`.
    fn convert(&self, input: &Path, arguments: &[&str], output: &Path, len_max: u64) -> Result<(), FormatError> {
        let name = file_name(input);
        if output.symlink_metadata().is_ok() {
            let there = io::Error::from(io::ErrorKind::AlreadyExists);
            return Err(FormatError::io(&file_name(output), "make it", there));
        }
        let folder = WorkFolder::new(output)?;
        let failed = |act: &str, error: io::Error| FormatError::io(&name, act.to_owned(), error);
        let message_path = folder.0.join("message");
        let message = File::create_new(&message_path).map_err(|error| failed("run qemu-img", error))?;
        let mut child = Command::new(&self.program)
            .args(["convert", "-q"])
            .args(arguments)
            .env_clear()
            .current_dir(&folder.0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(message)
            .spawn()
            .map_err(|error| failed("run qemu-img", error))?;
        let bounded = bound(&child, len_max);
        let status = match bounded {
            Ok(()) => wait(&mut child, self.timeout),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        };
        let problem = match status {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => {
                let mut text = Vec::new();
                let read = File::open(&message_path).and_then(|file| file.take(MESSAGE_LEN_MAX).read_to_end(&mut text));
                match read {
                    Ok(len) if len > 0 => printable(text.trim_ascii()),
                    _ => status.to_string(),
                }
            }
            Ok(None) => format!("it took longer than {} seconds and was stopped", self.timeout.as_secs()),
            Err(error) => {
                let _ = std::fs::remove_file(output);
                return Err(failed("run qemu-img", error));
            }
        };
        let _ = std::fs::remove_file(output);
        Err(FormatError::QemuImg { file: name, problem })
    }
}

/// Bounds the memory of a program and the length of its files.
fn bound(child: &Child, len_max: u64) -> io::Result<()> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    for (resource, limit) in [(Resource::As, MEMORY_LEN_MAX), (Resource::Fsize, len_max), (Resource::Core, 0)] {
        match prlimit(pid, resource, Rlimit { current: Some(limit), maximum: Some(limit) }) {
            // It has ended already.
            Ok(_) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Waits for a program; one that takes too long is killed, and nothing is given.
fn wait(child: &mut Child, timeout: Duration) -> io::Result<Option<ExitStatus>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() >= timeout {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// A folder that is removed with everything in it.
struct WorkFolder(PathBuf);

impl WorkFolder {
    /// Makes one beside the output.
    fn new(output: &Path) -> Result<Self, FormatError> {
        let number = NEXT_FOLDER.fetch_add(1, Ordering::Relaxed);
        let folder = output.with_file_name(format!(".polder-convert-{}-{number}", std::process::id()));
        std::fs::create_dir(&folder).map_err(|error| FormatError::io(&file_name(&folder), "make it", error))?;
        let folder = WorkFolder(folder);
        Ok(folder)
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A path that begins with a slash, as text.
fn absolute(path: &Path) -> Result<String, FormatError> {
    let name = file_name(path);
    let whole = std::path::absolute(path).map_err(|error| FormatError::io(&name, "find it", error))?;
    let text = whole.into_os_string().into_string();
    text.map_err(|_| FormatError::unsupported(&name, "a name that is no UTF-8"))
}

fn json_string(text: &str) -> String {
    let mut json = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => json.extend(['\\', character]),
            control if control < ' ' => json.push_str(&format!("\\u{:04x}", u32::from(control))),
            other => json.push(other),
        }
    }
    json.push('"');
    json
}
