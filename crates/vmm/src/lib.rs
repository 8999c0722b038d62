//! polder-vmm
