//! What polder trusts, and how it shows that it can be trusted: keys and what is encrypted under them.
//!
//! Modules: `keys` (secrets of 256 bits and how they are stored), `seal` (encryption at rest of the store's chunks and logs), `tls` (certificates and connections).

pub mod keys;
pub mod seal;
pub mod tls;
