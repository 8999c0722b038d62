//! gdb's way to the guest: the remote serial protocol on a TCP port of the loopback interface or on a Unix socket.
//!
//! One thread serves one gdb at a time; the protocol is the `gdbstub` crate's. Attaching stops all vCPUs; each is a thread to gdb.
//! While gdb looks at the machine the vCPU threads wait at the gate; a vCPU that meets a breakpoint holds itself there and reports it. Whatever
//! way gdb goes, its breakpoints go with it and the guest runs on, unless gdb asked for its end.
//!
//! A guest's reset builds a new machine. The debugger goes over to it with its breakpoints.
//!
//! Map: `listener` (where gdb connects), `debugger` (what the machine, its vCPU threads and the server share), `server` (the thread and its
//! sessions), `target` (the machine as `gdbstub` wants it), `registers` (their names and their order).

mod debugger;
mod listener;
mod registers;
mod server;
mod target;

pub(crate) use debugger::{Debuggee, Debugger, Finding, SharedVcpu, lock_vcpu};
pub(crate) use server::Server;
