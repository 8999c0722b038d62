//! polder-software
