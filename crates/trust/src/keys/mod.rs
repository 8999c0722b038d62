//! Keys: 256-bit secrets, and how they are stored.
//!
//! A domain or a volume has one secret, made from the host's random numbers. It is stored only *wrapped*: encrypted under a key-encryption key, which is in a file
//! of its own ([`KeyFile`]) or comes from a passphrase ([`Passphrase`]). Another protection costs a new record ([`WrappedKey::rewrap`]), not new encryption of what the secret protects. When every wrapped copy of a secret, or
//! every key-encryption key that opens one, is destroyed ([`erase`]), nobody reads again what was encrypted with it.

mod key_file;
mod passphrase;
mod secret;
mod wrapped;

pub use key_file::{CreateKeyFileError, EraseError, Erased, KeyFile, KeyFileError, erase};
pub use passphrase::{
    Cost, CostOutOfBounds, EmptyPassphrase, LANES_MAX, MEMORY_KIB_MAX, NoMemory, PASSES_MAX, Passphrase,
};
pub use secret::{NoRandomness, SECRET_BYTES, Secret};
pub use wrapped::{
    Opener, Protection, Purpose, ReadWrappedKeyError, RewrapError, Subject, UnwrapError, WRAPPED_KEY_BYTES, WrapError,
    WrappedKey,
};
