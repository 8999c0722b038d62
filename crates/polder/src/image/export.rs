//! `polder image export`: an image's disk, or a volume's, as a file for other programs.

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use polder_store::format::qcow2::{Compression, Qcow2Writer};
use polder_store::format::{Format, QemuImg, RawTarget, Target, copy};
use polder_store::{Step, Store, Tree, TreeSource};

use super::record::ImageRecord;
use super::work_folder::WorkFolder;
use crate::state_folder::StateFolder;
use crate::store::Progress;
use crate::volume::DiskName;

/// Write an image, or a volume, as a file
#[derive(Args)]
pub struct ExportArguments {
    /// Name of the image; with --volume, VOLUME or VOLUME@SNAPSHOT
    name: DiskName,
    /// The file, which must not exist
    file: PathBuf,
    /// What it becomes: raw, qcow2, vmdk, vhdx, vdi or vpc
    #[arg(long, default_value = "raw")]
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
pub fn export(state: &StateFolder, store: &Arc<Store>, arguments: &ExportArguments) -> Result<()> {
    let tree = tree(store, arguments)?;
    let compression = arguments.compress.map(|name| match name {
        CompressionName::Zlib => Compression::Zlib,
        CompressionName::Zstd => Compression::Zstd,
    });
    if compression.is_some() && arguments.format != Format::Qcow2 {
        bail!("{} files are not compressed here: --format qcow2 can be", arguments.format);
    }
    let write = || match arguments.format {
        Format::Raw | Format::Qcow2 => write(store, &tree, &arguments.file, arguments.format, compression),
        foreign => {
            let work = WorkFolder::make(state, "export")?;
            let raw = work.path().join("disk.raw");
            write(store, &tree, &raw, Format::Raw, None)?;
            Ok(QemuImg::default().from_raw(&raw, &arguments.file, foreign)?)
        }
    };
    write().with_context(|| format!("cannot export to {}", arguments.file.display()))
}

fn write(store: &Arc<Store>, tree: &Tree, file: &Path, format: Format, compression: Option<Compression>) -> Result<()> {
    let threads = std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN);
    let mut target: Box<dyn Target> = match format {
        Format::Qcow2 => Box::new(Qcow2Writer::create(file, tree.len_bytes, compression, threads)?),
        _ => Box::new(RawTarget::create(file, tree.len_bytes)?),
    };
    let mut progress = Progress::new();
    let mut show = |done| {
        // A bar that cannot be drawn is no reason to stop.
        let _ = progress.show(Step { what: "exporting", done, total: tree.len_bytes });
    };
    let copied = copy(&TreeSource::new(store, tree), &mut *target, threads, &mut show).and_then(|()| target.finish());
    if copied.is_err() {
        // Half an image is none; the error that is reported is the one that matters.
        let _ = std::fs::remove_file(file);
    }
    Ok(copied?)
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
