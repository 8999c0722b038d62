//! What the whole-product tests share: the test guests, the binary, and one boot from start to end.
//!
//! `cargo xtask test` makes the guests and the binary and says where they are in the environment; a test that is run without
//! finds them in `target/` and names the command that makes them if they are not there. With `POLDER_TEST_MONITOR=qemu` the
//! same boots run in QEMU's TCG, which tells a wrong guest from a wrong polder.

mod boot;
mod files;
mod namespaces;

pub use boot::{Boot, Monitor, Outcome};
pub use files::{Kernel, Scratch, busybox, image_home, nightly, polder, tiny};
pub use namespaces::{can_open, inside_namespaces};
