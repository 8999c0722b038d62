//! What polder trusts, and how it shows that it can be trusted: keys and what is encrypted under them.
//!
//! Modules: `keys` (secrets of 256 bits), `tls` (certificates and connections).

pub mod keys;
pub mod tls;
