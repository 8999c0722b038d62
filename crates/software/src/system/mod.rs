//! System instructions and what the processor does on its own: segments and descriptors, exceptions and interrupts, far
//! transfers, tasks, control registers, ports, debugging.
//!
//! Handlers are methods `op_…` of [`Cpu`](crate::cpu::Cpu) that give a [`Flow`](crate::op::Flow) or a fault; `lower::system` chooses them. A method that
//! changes the mode works out the next instruction's address first.

mod control_registers;
mod debug;
mod debug_registers;
mod descriptor;
pub(crate) mod descriptor_tables;
mod exception_delivery;
mod far_transfer;
mod interrupt_return;
pub(crate) mod operand;
pub(crate) mod port_io;
mod processor;
mod segment_load;
mod software_interrupt;
mod stack;
mod system_call;
mod task_switch;
mod tlb_instructions;

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod test_guest;
#[cfg(test)]
mod tests;

pub use exception_delivery::Delivery;
