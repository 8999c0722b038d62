//! Keeping a store well: which records are needed, room for others, and whether what is there is whole.

pub(crate) mod collect;
mod copier;
pub(crate) mod mark;
pub(crate) mod verify;
