//! `polder image export`: an image's disk, or a volume's, as a file for other programs.

use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use polder_store::format::qcow2::{Compression, Qcow2Writer};
use polder_store::format::{self, Format, RawTarget, Target};
use polder_store::{Step, Store, Tree, TreeSource};

use super::import::parse_format;
use super::record::ImageRecord;
use crate::store::Progress;
use crate::volume::DiskName;

/// Write an image, or a volume, as a file
#[derive(Args)]
pub struct ExportArguments {
    /// Name of the image; with --volume, VOLUME or VOLUME@SNAPSHOT
    name: DiskName,
    /// The file, which must not exist
    file: PathBuf,
    /// What it becomes: raw, qcow2
    #[arg(long, default_value = "raw", value_parser = parse_format)]
    format: Format,
    /// Compress the clusters of a qcow2
    #[arg(long, value_enum)]
    compress: Option<CompressionName>,
    /// Which part of the image
    #[arg(long, value_enum, default_value = "disk", conflicts_with = "volume")]
    part: Part,
    /// NAME is a volume
    #[arg(long)]
    volume: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum CompressionName {
    Zlib,
    Zstd,
}

#[derive(Clone, Copy, ValueEnum)]
enum Part {
    Disk,
    Kernel,
    Initrd,
}

/// Carries out `polder image export`.
pub fn export(store: &Arc<Store>, arguments: &ExportArguments) -> Result<()> {
    let tree = tree(store, arguments)?;
    let threads = std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN);
    let compression = arguments.compress.map(|name| match name {
        CompressionName::Zlib => Compression::Zlib,
        CompressionName::Zstd => Compression::Zstd,
    });
    let mut target: Box<dyn Target> = match arguments.format {
        Format::Raw if compression.is_some() => bail!("a raw file cannot be compressed: --format qcow2 can"),
        Format::Raw => Box::new(RawTarget::create(&arguments.file, tree.len_bytes)?),
        Format::Qcow2 => Box::new(Qcow2Writer::create(&arguments.file, tree.len_bytes, compression, threads)?),
        other => bail!("{other} images cannot be written yet: `qemu-img convert` makes them of qcow2"),
    };
    let mut progress = Progress::new();
    let mut show = |done| {
        // A bar that cannot be drawn is no reason to stop.
        let _ = progress.show(Step { what: "exporting", done, total: tree.len_bytes });
    };
    let copied =
        format::copy(&TreeSource::new(store, &tree), &mut *target, threads, &mut show).and_then(|()| target.finish());
    if copied.is_err() {
        // Half an image is none; the error that is reported is the one that matters.
        let _ = std::fs::remove_file(&arguments.file);
    }
    copied.with_context(|| format!("cannot export to {}", arguments.file.display()))
}

fn tree(store: &Arc<Store>, arguments: &ExportArguments) -> Result<Tree> {
    let DiskName { volume, snapshot } = &arguments.name;
    if arguments.volume {
        return Ok(store.settled_disk(volume, snapshot.as_deref())?);
    }
    let image = ImageRecord::load(store, &arguments.name.to_string())?;
    let missing = |what| format!("image {} has no {what}", image.name);
    match arguments.part {
        Part::Disk => Ok(image.disk),
        Part::Kernel => image.kernel.with_context(|| missing("kernel")),
        Part::Initrd => image.initrd.with_context(|| missing("initrd")),
    }
}
