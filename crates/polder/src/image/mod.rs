//! `polder image`: what instances start from.
//!
//! An image is a folder `images/NAME` in the state folder with `image.json` ([`ImageRecord`]), `disk.raw` (an ext4 root file
//! system), `kernel` and `initrd`. It is made beside its place and renamed into it, so an image is there whole or not at all;
//! nothing changes it afterwards.

mod build;
mod customize;
mod record;
mod tools;

pub use record::{ImageRecord, utc};

use crate::state_folder::StateFolder;
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

#[derive(Args)]
pub struct ImageArguments {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Subcommand)]
enum ImageCommand {
    /// Make an image from packages
    Build {
        #[command(subcommand)]
        system: System,
    },
    /// List the images
    Ls,
    /// Remove images; instances made from them keep their own disks
    Rm {
        /// Names of the images
        #[arg(required = true)]
        names: Vec<String>,
    },
}

#[derive(Subcommand)]
enum System {
    /// Debian 12 (bookworm) from its packages, with the guest agent and a root login on the serial console
    Debian(build::BuildArguments),
}

/// Carries out `polder image ...`.
pub fn image(arguments: ImageArguments) -> Result<()> {
    match arguments.command {
        ImageCommand::Build { system: System::Debian(arguments) } => build::build(&arguments),
        ImageCommand::Ls => list(),
        ImageCommand::Rm { names } => names.iter().try_for_each(|name| remove(name)),
    }
}

fn list() -> Result<()> {
    let images = ImageRecord::all(&StateFolder::open()?)?;
    println!("{:<20} {:<21} {:>8}  KERNEL", "NAME", "CREATED", "DISK");
    for image in images {
        let size = polder_basics::ByteSize(image.root_disk_bytes).to_string();
        println!("{:<20} {:<21} {:>8}  {}", image.name, image.created_utc, size, image.kernel_package);
    }
    Ok(())
}

fn remove(name: &str) -> Result<()> {
    let state = StateFolder::open()?;
    let folder = record::folder(&state, name)?;
    if !folder.exists() {
        bail!("there is no image {name} (`polder image ls` lists them)");
    }
    // Renamed first: a removal that is interrupted leaves no half image under the name.
    let doomed = state.images().join(format!(".{name}.removing-{}", std::process::id()));
    std::fs::rename(&folder, &doomed).with_context(|| format!("cannot remove {}", folder.display()))?;
    std::fs::remove_dir_all(&doomed).with_context(|| format!("cannot remove {}", doomed.display()))
}
