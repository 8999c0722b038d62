//! What machines cost that wait at a prompt.

use std::fs;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use polder_tests::{Kernel, polder};

/// Processor time of one vCPU's thread, as a share of the time that went by.
const SHARE_MAX: f64 = 0.005;
/// After the prompt a kernel still has things to do.
const SETTLES: Duration = Duration::from_secs(5);
const LOOKS_FOR: Duration = Duration::from_secs(20);

/// A machine that is ended when dropped.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A machine whose shell shows its prompt.
fn at_prompt(cpus: u32) -> Machine {
    let kernel = Kernel::Cloud;
    let mut command = Command::new(polder());
    command.args(["boot", "--engine", "software", "--timeout", "300", "--append", "console=ttyS0 quiet"]);
    command.args(["--cpus", &cpus.to_string()]);
    command.arg("--kernel").arg(kernel.image()).arg("--initrd").arg(kernel.initramfs());
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut machine = Machine(command.spawn().expect("polder starts"));
    let mut output = machine.0.stdout.take().expect("a pipe");
    let mut shown = Vec::new();
    let mut bytes = [0; 512];
    // The machine's own time limit ends this.
    while !shown.windows(4).any(|bytes| bytes == b"/ # ") {
        let len = output.read(&mut bytes).expect("the console can be read");
        assert!(len > 0, "no prompt: {}", String::from_utf8_lossy(&shown));
        shown.extend(&bytes[..len]);
    }
    machine.0.stdout = Some(output);
    machine
}

/// Nanoseconds that the vCPUs' threads have run, and how many they are.
fn vcpu_time(machine: &Machine) -> (u64, u32) {
    let tasks = format!("/proc/{}/task", machine.0.id());
    let (mut ns, mut count) = (0, 0);
    for task in fs::read_dir(tasks).expect("the process is there") {
        let task = task.expect("a thread").path();
        if fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("vcpu ")) {
            let schedule = fs::read_to_string(task.join("schedstat")).expect("the scheduler's counts");
            ns += schedule.split(' ').next().and_then(|word| word.parse::<u64>().ok()).expect("a time");
            count += 1;
        }
    }
    (ns, count)
}

#[test]
fn idle_vcpus_cost_less_than_half_a_percent_of_a_core_each() {
    for cpus in [1, 4] {
        let machine = at_prompt(cpus);
        thread::sleep(SETTLES);
        let start = Instant::now();
        let (before, count) = vcpu_time(&machine);
        assert_eq!(count, cpus);
        thread::sleep(LOOKS_FOR);
        let (after, _) = vcpu_time(&machine);
        let share = (after - before) as f64 / start.elapsed().as_nanos() as f64 / f64::from(cpus);
        println!("{cpus} idle vCPUs: {:.3} % of a core each", share * 100.0);
        assert!(share > 0.0, "an idle guest still has a tick now and then");
        assert!(share < SHARE_MAX, "{cpus} idle vCPUs cost {share} of a core each");
    }
}
