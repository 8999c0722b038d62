//! `polder image import`: a disk image of another program becomes an image.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Args;
use polder_store::format::qcow2::{OpenOptions, OtherFiles, Qcow2};
use polder_store::format::{Format, RawSource, Source};
use polder_store::{Replace, Store};

use super::record::{ImageRecord, Parts};

/// Bring a disk image into the store
///
/// The format is what --format says: a guest can have written anything into a raw disk, so that its content decides nothing.
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct ImportArguments {
    /// The disk image
    file: PathBuf,
    /// Name of the image
    name: String,
    /// What the file is: raw, qcow2
    #[arg(long, required = true, value_parser = parse_format)]
    format: Option<Format>,
    /// Follow the names of backing files in the image's folder; only for images that no guest could write
    #[arg(long)]
    follow_backing_files: bool,
    /// The snapshot inside a qcow2 image to take, by name or id
    #[arg(long)]
    snapshot: Option<String>,
    /// Kernel that instances boot
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Its initrd
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Its command line
    #[arg(long, value_name = "TEXT", requires = "kernel", default_value = "console=ttyS0 root=/dev/vda")]
    append: String,
    /// Replace an image of the same name
    #[arg(long)]
    force: bool,
}

pub fn parse_format(text: &str) -> Result<Format, String> {
    text.parse()
}

/// Carries out `polder image import`.
pub fn import(store: &Arc<Store>, arguments: &ImportArguments) -> Result<()> {
    let Some(format) = arguments.format else { bail!("say what the file is with --format") };
    let disk = open(&arguments.file, format, arguments)
        .with_context(|| format!("cannot import {}", arguments.file.display()))?;
    let parts = Parts {
        disk: &*disk,
        kernel: arguments.kernel.as_deref(),
        initrd: arguments.initrd.as_deref(),
        kernel_package: "",
        command_line: if arguments.kernel.is_some() { &arguments.append } else { "" },
    };
    let replace = if arguments.force { Replace::Yes } else { Replace::No };
    ImageRecord::save(store, &arguments.name, &parts, replace)?;
    println!("Image {} is ready", arguments.name);
    Ok(())
}

fn open(file: &Path, format: Format, arguments: &ImportArguments) -> Result<Box<dyn Source>> {
    Ok(match format {
        Format::Raw => Box::new(RawSource::open(file)?),
        Format::Qcow2 => {
            let other_files = if arguments.follow_backing_files { OtherFiles::InFolder } else { OtherFiles::default() };
            let options = OpenOptions { snapshot: arguments.snapshot.clone(), other_files, ..OpenOptions::default() };
            Box::new(Qcow2::open(file, &options)?)
        }
        other => bail!("{other} images cannot be read yet: `qemu-img convert` makes qcow2 of them"),
    })
}
