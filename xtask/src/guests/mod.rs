//! Test guests under `target/guests`, made from Debian packages and from the sources in `guests/`.
//!
//! What lies there:
//! - `tiny/NAME.elf`: the assembly guests;
//! - `cloud/`, `generic/` and `trixie-cloud/`: Debian's stock kernels (`vmlinuz`, the package's `tree` and `version`), and an
//!   `initramfs.cpio` with busybox, the modules a machine's devices need and our `/init`;
//! - `generic-gzip/`: the generic kernel packed with gzip;
//! - `trixie-lists/`: what apt knows of Debian 13;
//! - `home/`: a state folder with the Debian images of the whole-product tests and of the store bench;
//! - `bench/`: the root file system and disk of the engine bench;
//! - `programs/`: the disk with packages that the guest of the programs bench installs;
//! - `busybox`: the static busybox of the initramfs.
//!
//! The folder is a cache: what is there is not made again; deleting any part of it is always safe.

mod cpio;
pub mod image;
mod initramfs;
mod kernel;
mod package;
mod repack;
mod tiny;

use anyhow::Result;
use clap::Args;

pub use kernel::Flavour;
use package::Source;

#[derive(Args)]
pub struct GuestsArguments {
    /// Only the assembly guests, which need no network
    #[arg(long)]
    tiny: bool,
}

/// Makes every test guest that is missing.
pub fn guests(arguments: &GuestsArguments) -> Result<()> {
    crate::setup::install()?;
    tiny::build()?;
    if arguments.tiny {
        return Ok(());
    }
    all()
}

/// Makes the tiny guests, the kernels and their initramfs images.
pub fn all() -> Result<()> {
    tiny::build()?;
    make(Flavour::Cloud, Source::Host)?;
    repack::gzip(&make(Flavour::Generic, Source::Host)?)?;
    // Packed with zstd, where Debian 12 packs its cloud kernel with lz4 and the generic one with xz. It comes from Debian's own
    // server, which this machine need not reach for anything else.
    if let Err(error) = make(Flavour::Cloud, Source::Trixie) {
        println!("{error:#}\nThe kernel of Debian 13 cannot be had: its tests are left out.");
    }
    Ok(())
}

fn make(flavour: Flavour, source: Source) -> Result<kernel::Kernel> {
    let kernel = kernel::fetch(flavour, source)?;
    initramfs::build(&kernel)?;
    Ok(kernel)
}
