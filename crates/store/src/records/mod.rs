//! Records on disk, and from their names to where they lie.

mod aligned;
pub(crate) mod behind;
pub(crate) mod cache;
pub(crate) mod index;
mod lz4;
pub(crate) mod record;
pub(crate) mod run;
pub(crate) mod segment;
pub(crate) mod segment_writer;
pub(crate) mod tight;
