//! `polder image`: what instances start from.
//!
//! An image is a node of the store: a root disk, a kernel, an initrd and a few facts ([`ImageRecord`]). It is there whole or not at
//! all, and nothing changes it afterwards.

mod build;
mod customize;
mod export;
mod import;
mod record;
mod tools;
mod work_folder;

use std::sync::Arc;

pub use record::{ImageRecord, remove_boot_files_of, utc};

use crate::state_folder::StateFolder;
use crate::store::{elsewhere, rough};
use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use polder_store::remote::{Elsewhere, Locality};
use polder_store::{Store, StoreError};
use serde_json::json;

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
    Import(import::ImportArguments),
    Export(export::ExportArguments),
    /// List the images
    Ls {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what is known of an image, as JSON
    Inspect {
        name: String,
    },
    /// Remove images; instances and volumes made from them stay
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

/// Opens the store, with the images that an earlier release left in folders.
pub fn open_store(state: &StateFolder) -> Result<Arc<Store>> {
    let store = crate::store::open(state)?;
    record::take_in_folders(state, &store)?;
    Ok(store)
}

/// Carries out `polder image ...`.
pub fn image(arguments: ImageArguments) -> Result<()> {
    let state = StateFolder::open()?;
    let store = open_store(&state)?;
    match arguments.command {
        ImageCommand::Build { system: System::Debian(arguments) } => build::build(&state, &store, &arguments),
        ImageCommand::Import(arguments) => import::import(&state, &store, &arguments),
        ImageCommand::Export(arguments) => export::export(&state, &store, &arguments),
        ImageCommand::Ls { json } => list(&store, json),
        ImageCommand::Inspect { name } => inspect(&store, &name),
        ImageCommand::Rm { names } => names.iter().try_for_each(|name| remove(&state, &store, name)),
    }
}

/// How much of an image is here.
fn locality(store: &Store, elsewhere: Option<&Elsewhere>, image: &ImageRecord) -> Result<Locality> {
    let trees = [&image.disk].into_iter().chain(&image.kernel).chain(&image.initrd);
    Ok(elsewhere.map_or(Ok(Locality::Whole), |elsewhere| elsewhere.locality(store, &image.node, trees))?)
}

fn described(image: &ImageRecord, locality: Locality) -> serde_json::Value {
    let local_bytes = match locality {
        Locality::Whole => None,
        Locality::Part { local_bytes } => Some(local_bytes),
    };
    json!({
        "name": image.name, "created_utc": image.created_utc, "node": image.node.to_string(),
        "disk_bytes": image.disk.len_bytes, "kernel_package": image.kernel_package,
        "command_line": image.command_line, "has_kernel": image.kernel.is_some(), "has_initrd": image.initrd.is_some(),
        "is_local": locality == Locality::Whole, "local_bytes": local_bytes,
    })
}

fn list(store: &Arc<Store>, as_json: bool) -> Result<()> {
    let elsewhere = elsewhere(store)?;
    let images = ImageRecord::all(store)?.into_iter().map(|image| {
        let locality = locality(store, elsewhere.as_ref(), &image)?;
        Ok((image, locality))
    });
    let images = images.collect::<Result<Vec<_>>>()?;
    if as_json {
        let values = images.iter().map(|(image, locality)| described(image, *locality));
        println!("{:#}", values.collect::<serde_json::Value>());
        return Ok(());
    }
    println!("{:<20} {:<21} {:>10} {:>10}  KERNEL", "NAME", "CREATED", "DISK", "LOCAL");
    for (image, locality) in images {
        let local = match locality {
            Locality::Whole => "all".to_owned(),
            Locality::Part { local_bytes } => rough(local_bytes),
        };
        let kernel = match (&image.kernel, image.kernel_package.as_str()) {
            (None, _) => "none",
            (Some(_), "") => "given with it",
            (Some(_), package) => package,
        };
        let disk = rough(image.disk.len_bytes);
        println!("{:<20} {:<21} {disk:>10} {local:>10}  {kernel}", image.name, image.created_utc);
    }
    Ok(())
}

fn inspect(store: &Arc<Store>, name: &str) -> Result<()> {
    let image = ImageRecord::load(store, name)?;
    let locality = locality(store, elsewhere(store)?.as_ref(), &image)?;
    println!("{:#}", described(&image, locality));
    Ok(())
}

fn remove(state: &StateFolder, store: &Arc<Store>, name: &str) -> Result<()> {
    match store.remove_image(name) {
        Err(StoreError::NotFound { .. }) => bail!("there is no image {name} (`polder image ls` lists them)"),
        result => result?,
    }
    record::sweep_boot_files(state, store)
}
