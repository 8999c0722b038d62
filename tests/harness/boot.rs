//! One machine from start to end: what it is given, what it wrote, how it ended.

use crate::files::polder;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Which program runs the guests of the tests.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Monitor {
    Polder,
    Qemu,
}

impl Monitor {
    /// `$POLDER_TEST_MONITOR`, polder without.
    pub fn chosen() -> Self {
        match std::env::var("POLDER_TEST_MONITOR").as_deref() {
            Ok("qemu") => Self::Qemu,
            _ => Self::Polder,
        }
    }
}

/// A machine to boot. Times are bounds, never waits.
pub struct Boot {
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    append: String,
    disks: Vec<(PathBuf, bool)>,
    tap: Option<String>,
    cpus: u32,
    memory_mib: u64,
    timeout: Duration,
    debug_exit: bool,
    no_reboot: bool,
    /// Typed, in order, each when its prompt has been shown.
    typed: Vec<(String, String)>,
    stats: Option<PathBuf>,
    /// Further options; polder only.
    options: Vec<String>,
}

/// How a machine ended.
pub struct Outcome {
    /// Exit status; -1 if a signal ended it.
    pub status: i32,
    /// Everything the guest wrote to its serial port.
    pub console: String,
    /// What the monitor wrote to its standard error.
    pub errors: String,
    pub elapsed: Duration,
}

/// Beyond its own time limit a monitor has this long to end before the test ends it and fails.
const GRACE: Duration = Duration::from_secs(20);

impl Boot {
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            kernel: kernel.into(),
            initrd: None,
            append: String::new(),
            disks: Vec::new(),
            tap: None,
            cpus: 1,
            memory_mib: 256,
            timeout: Duration::from_secs(120),
            debug_exit: false,
            no_reboot: true,
            typed: Vec::new(),
            stats: None,
            options: Vec::new(),
        }
    }

    /// A stock kernel with the small initramfs that runs `script`; `""` gives a shell.
    pub fn linux(kernel: crate::Kernel, script: &str) -> Self {
        let mut boot = Self::new(kernel.image()).initrd(kernel.initramfs());
        boot.append = "console=ttyS0 quiet panic=-1".to_string();
        if !script.is_empty() {
            boot.append.push_str(&format!(" polder_run=\"{script}\""));
        }
        boot
    }

    /// A guest of `guests/`.
    pub fn tiny(name: &str) -> Self {
        let mut boot = Self::new(crate::tiny(name)).memory_mib(64);
        boot.debug_exit = true;
        boot
    }

    pub fn initrd(mut self, initrd: impl Into<PathBuf>) -> Self {
        self.initrd = Some(initrd.into());
        self
    }

    /// Adds words to the command line.
    pub fn append(mut self, words: &str) -> Self {
        if !self.append.is_empty() {
            self.append.push(' ');
        }
        self.append.push_str(words);
        self
    }

    pub fn disk(mut self, disk: impl Into<PathBuf>) -> Self {
        self.disks.push((disk.into(), false));
        self
    }

    pub fn read_only_disk(mut self, disk: impl Into<PathBuf>) -> Self {
        self.disks.push((disk.into(), true));
        self
    }

    /// A network card on a TAP interface that is there.
    pub fn tap(mut self, name: &str) -> Self {
        self.tap = Some(name.to_string());
        self
    }

    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    pub fn memory_mib(mut self, memory_mib: u64) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    pub fn timeout_s(mut self, seconds: u64) -> Self {
        self.timeout = Duration::from_secs(seconds);
        self
    }

    /// Types `text` when the console has shown `prompt` (again, if it was waited for before).
    pub fn answer(mut self, prompt: &str, text: &str) -> Self {
        self.typed.push((prompt.to_string(), text.to_string()));
        self
    }

    pub fn stats(mut self, file: &Path) -> Self {
        self.stats = Some(file.to_path_buf());
        self
    }

    /// An option of `polder boot` with its value; QEMU is not given it.
    pub fn option(mut self, name: &str, value: &str) -> Self {
        self.options.extend([name.to_string(), value.to_string()]);
        self
    }

    /// A guest's reset is followed by another boot.
    pub fn reboot(mut self) -> Self {
        self.no_reboot = false;
        self
    }

    /// Runs the machine to its end.
    pub fn run(&self) -> Outcome {
        let mut command = match Monitor::chosen() {
            Monitor::Polder => self.polder(),
            Monitor::Qemu => self.qemu(),
        };
        finish(&mut command, &self.typed, self.timeout + GRACE)
    }

    fn polder(&self) -> Command {
        let mut command = Command::new(polder());
        command.arg("boot").arg("--kernel").arg(&self.kernel).args(["--engine", "software"]);
        if let Some(initrd) = &self.initrd {
            command.arg("--initrd").arg(initrd);
        }
        if !self.append.is_empty() {
            command.arg("--append").arg(&self.append);
        }
        for (disk, read_only) in &self.disks {
            command.arg("--disk").arg(format!("{}{}", disk.display(), if *read_only { ",ro" } else { "" }));
        }
        if let Some(tap) = &self.tap {
            command.arg("--net").arg(format!("tap={tap}"));
        }
        command.args(["--cpus", &self.cpus.to_string(), "--memory", &format!("{}M", self.memory_mib)]);
        command.args(["--timeout", &self.timeout.as_secs().to_string()]);
        if self.debug_exit {
            command.arg("--test-devices");
        }
        if self.no_reboot {
            command.arg("--no-reboot");
        }
        if let Some(stats) = &self.stats {
            command.arg("--stats").arg(stats);
        }
        command.args(&self.options);
        command
    }

    fn qemu(&self) -> Command {
        let mut command = Command::new("timeout");
        command.arg(self.timeout.as_secs().to_string()).arg("qemu-system-x86_64");
        command.args(["-accel", "tcg", "-machine", "q35", "-cpu", "max", "-nodefaults", "-nographic"]);
        command.args(["-no-reboot", "-serial", "stdio", "-device", "pvpanic"]);
        command.args(["-smp", &self.cpus.to_string(), "-m", &self.memory_mib.to_string()]);
        command.arg("-kernel").arg(&self.kernel);
        if let Some(initrd) = &self.initrd {
            command.arg("-initrd").arg(initrd);
        }
        if !self.append.is_empty() {
            command.arg("-append").arg(&self.append);
        }
        for (index, (disk, read_only)) in self.disks.iter().enumerate() {
            let switch = if *read_only { "on" } else { "off" };
            command.arg("-drive");
            command.arg(format!("file={},if=none,id=d{index},format=raw,readonly={switch}", disk.display()));
            command.arg("-device").arg(format!("virtio-blk-pci,drive=d{index}"));
        }
        if let Some(tap) = &self.tap {
            command.arg("-netdev").arg(format!("tap,id=n,ifname={tap},script=no,downscript=no"));
            command.args(["-device", "virtio-net-pci,netdev=n"]);
        }
        if self.debug_exit {
            command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
        }
        command
    }
}

impl Outcome {
    /// Runs a command of the binary that is no boot, with the same care for its end.
    pub fn of(command: &mut Command, limit: Duration) -> Self {
        finish(command, &[], limit)
    }

    /// The same, with text on its standard input, which stays open.
    pub fn of_typing(command: &mut Command, input: &str, limit: Duration) -> Self {
        finish(command, &[(String::new(), input.to_string())], limit)
    }

    /// Fails with everything there is to know unless the machine ended with `status`.
    #[track_caller]
    pub fn expect_status(&self, status: i32) -> &Self {
        if Monitor::chosen() == Monitor::Qemu && matches!(status, 10 | 11) {
            return self;
        }
        assert_eq!(self.status, status, "exit status\n{self}");
        self
    }

    /// Fails unless the guest wrote `text`.
    #[track_caller]
    pub fn expect_console(&self, text: &str) -> &Self {
        assert!(self.console.contains(text), "the console does not show {text:?}\n{self}");
        self
    }

    /// The value of `name=value` in the guest's READY line.
    #[track_caller]
    pub fn ready(&self, name: &str) -> String {
        let line = self.console.lines().find(|line| line.contains("POLDER-GUEST READY"));
        let line = line.unwrap_or_else(|| panic!("the guest did not get ready\n{self}"));
        let key = format!("{name}=");
        let word = line.split_whitespace().find_map(|word| word.strip_prefix(&key));
        word.unwrap_or_else(|| panic!("no {name} in {line:?}")).to_string()
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tail: Vec<&str> = self.console.lines().rev().take(40).collect();
        writeln!(to, "status {} after {:?}; the last lines of the console:", self.status, self.elapsed)?;
        for line in tail.iter().rev() {
            writeln!(to, "  | {line}")?;
        }
        write!(to, "standard error:\n{}", self.errors)
    }
}

fn finish(command: &mut Command, typed: &[(String, String)], limit: Duration) -> Outcome {
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let console = drain(child.stdout.take(), child.stdin.take(), typed.to_vec());
    let errors = drain(child.stderr.take(), None, Vec::new());
    let status = wait(&mut child, limit);
    let collect = |from: mpsc::Receiver<Vec<u8>>| {
        let bytes = from.recv_timeout(Duration::from_secs(10)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let (console, errors) = (collect(console), collect(errors));
    let outcome = Outcome { status: status.unwrap_or(-1), console, errors, elapsed: start.elapsed() };
    assert!(status.is_some(), "{command:?} did not end in time and was killed\n{outcome}");
    outcome
}

/// Reads a pipe to its end on a thread of its own, so that neither pipe can fill up, and answers prompts. Input stays open
/// until then: its end would be the end of the console.
fn drain(
    from: Option<impl Read + Send + 'static>,
    mut answers: Option<ChildStdin>,
    typed: Vec<(String, String)>,
) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let (mut bytes, mut seen, mut part) = (Vec::new(), 0, [0; 4096]);
        let mut typed = typed.into_iter().peekable();
        let Some(mut from) = from else { return };
        let mut answer = |text: &str| {
            // A monitor that ended meanwhile closed the pipe; its status says so.
            let _ = answers.as_mut().map(|answers| answers.write_all(text.as_bytes()));
        };
        while let Some((_, text)) = typed.next_if(|(prompt, _)| prompt.is_empty()) {
            answer(&text);
        }
        while let Ok(length @ 1..) = from.read(&mut part) {
            bytes.extend_from_slice(&part[..length]);
            while let Some((prompt, text)) = typed.peek()
                && let Some(at) = bytes[seen..].windows(prompt.len()).position(|window| window == prompt.as_bytes())
            {
                seen += at + prompt.len();
                answer(text);
                typed.next();
            }
        }
        let _ = sender.send(bytes);
    });
    receiver
}

/// The exit status, or nothing if it had to be killed at the limit.
fn wait(child: &mut Child, limit: Duration) -> Option<i32> {
    let end = Instant::now() + limit;
    loop {
        match child.try_wait().expect("a child can be waited for") {
            Some(status) => return Some(status.code().unwrap_or(-1)),
            None if Instant::now() >= end => {
                let _ = child.kill();
                let _ = child.wait();
                return None;
            }
            // The standard library has no bounded wait; the poll is short beside any boot and nothing hangs on its length.
            None => std::thread::park_timeout(Duration::from_millis(20)),
        }
    }
}
