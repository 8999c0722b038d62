//! Keys: 256-bit secrets.

mod secret;

pub use secret::{NoRandomness, SECRET_BYTES, Secret};
