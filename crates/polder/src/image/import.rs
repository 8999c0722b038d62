//! `polder image import`: a disk image of another program, an archive or a folder becomes an image.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, bail};
use clap::Args;
use polder_basics::ByteSize;
use polder_store::format::ext4::Ext4Options;
use polder_store::format::qcow2::{OpenOptions, OtherFiles, Qcow2};
use polder_store::format::{
    Format, Packing, QemuImg, RawSource, RawTarget, Source, Target, folder_to_ext4, looks_like, tar_to_ext4,
};
use polder_store::{Kind, Namer, Replace, Store, check_name};

use super::record::{ImageRecord, Parts};
use super::work_folder::WorkFolder;
use crate::state_folder::StateFolder;

/// Bring a disk image, an archive or a folder into the store
///
/// The format is what --format says: a guest can have written anything into a raw disk, so that its content decides nothing.
/// An archive or folder becomes an ext4 file system of --size bytes, with owners, permissions, times and links as they are.
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct ImportArguments {
    /// The disk image, archive or folder
    file: PathBuf,
    /// Name of the image
    name: String,
    /// What it is: raw, qcow2, vmdk, vhdx, vdi, vpc, tar, tar.gz, tar.zst, tar.xz or folder; only a folder goes without saying
    #[arg(long)]
    format: Option<ImportFormat>,
    /// Size of the file system that an archive or folder becomes
    #[arg(long)]
    size: Option<ByteSize>,
    /// Follow the names of backing files in a qcow2 image's folder; only for images that no guest could write
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
    #[arg(long, value_name = "TEXT", requires = "kernel", default_value = "root=/dev/vda rw console=ttyS0,115200")]
    append: String,
    /// Encrypt it in this domain (`polder store domain create`)
    #[arg(long)]
    domain: Option<String>,
    /// Replace an image of the same name
    #[arg(long)]
    force: bool,
}

/// What is imported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ImportFormat {
    Disk(Format),
    Tar(Packing),
    Folder,
}

impl FromStr for ImportFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "tar" => ImportFormat::Tar(Packing::Plain),
            "tar.gz" => ImportFormat::Tar(Packing::Gzip),
            "tar.zst" => ImportFormat::Tar(Packing::Zstd),
            "tar.xz" => ImportFormat::Tar(Packing::Xz),
            "folder" => ImportFormat::Folder,
            _ => ImportFormat::Disk(
                text.parse()
                    .map_err(|error| format!("{error}; tar, tar.gz, tar.zst, tar.xz and folder are there too"))?,
            ),
        })
    }
}

/// Carries out `polder image import`.
pub fn import(state: &StateFolder, store: &Arc<Store>, arguments: &ImportArguments) -> Result<()> {
    check_name("image", &arguments.name)?;
    // A folder is one whatever is in it.
    let format = arguments.format.or_else(|| arguments.file.is_dir().then_some(ImportFormat::Folder));
    let Some(format) = format else {
        let looks = looks_like(&arguments.file);
        let looks = looks.map(|format| format!(" (it looks like {format})")).unwrap_or_default();
        bail!("say with --format what {} is{looks}: its content decides nothing", arguments.file.display());
    };
    if let Some(domain) = &arguments.domain
        && !matches!(format, ImportFormat::Disk(Format::Raw | Format::Qcow2))
    {
        eprintln!(
            "polder: until it is in domain {domain}, the disk lies unencrypted in {}; raw and qcow2 are read where they are",
            state.images().display()
        );
    }
    let work = WorkFolder::make(state, &arguments.name)?;
    let disk = open(&work, format, arguments).with_context(|| format!("cannot import {}", arguments.file.display()))?;
    let parts = Parts {
        disk: &*disk,
        domain: arguments.domain.as_deref(),
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

/// The disk to import; what is no disk yet becomes one in the work folder.
fn open(work: &WorkFolder, format: ImportFormat, arguments: &ImportArguments) -> Result<Box<dyn Source>> {
    let file = &arguments.file;
    let raw = work.path().join("disk.raw");
    match format {
        ImportFormat::Disk(Format::Raw) => return Ok(Box::new(RawSource::open(file)?)),
        ImportFormat::Disk(Format::Qcow2) => {
            let other_files = if arguments.follow_backing_files { OtherFiles::InFolder } else { OtherFiles::default() };
            let options = OpenOptions { snapshot: arguments.snapshot.clone(), other_files, ..OpenOptions::default() };
            return Ok(Box::new(Qcow2::open(file, &options)?));
        }
        ImportFormat::Disk(foreign) => QemuImg::default().to_raw(file, foreign, &raw)?,
        ImportFormat::Tar(_) | ImportFormat::Folder => {
            let Some(size) = arguments.size else { bail!("say with --size how large the file system is to be") };
            let mut target = RawTarget::create(&raw, size.0)?;
            let options = ext4_options(file, &arguments.name)?;
            let imported = match format {
                ImportFormat::Tar(packing) => tar_to_ext4(file, packing, &mut target, options)?,
                _ => folder_to_ext4(file, &mut target, options)?,
            };
            target.finish()?;
            if imported.access_lists_left_out > 0 {
                eprintln!(
                    "polder: access control lists of {} entries were left out: the archive has them in words of another machine",
                    imported.access_lists_left_out
                );
            }
        }
    }
    Ok(Box::new(RawSource::open(&raw)?))
}

/// The same archive makes the same file system under the same name, and so is stored once.
fn ext4_options(file: &Path, name: &str) -> Result<Ext4Options> {
    let changed = File::open(file)?.metadata()?.modified()?;
    let time_s = changed.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs().min(u32::MAX.into()) as u32);
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&Namer::open().name(Kind::Data, name.as_bytes()).0[..16]);
    Ok(Ext4Options { uuid, time_s, ..Ext4Options::default() })
}
