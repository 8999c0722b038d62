//! polder-devices
