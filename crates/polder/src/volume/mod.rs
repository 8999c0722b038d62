//! `polder volume`: virtual disks in the store.

mod disk_name;
mod serve;

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use polder_basics::ByteSize;
use polder_store::{CHUNK_LEN_DEFAULT, Content, Id, OPEN_DOMAIN, Store};
use serde_json::json;
use std::sync::Arc;

pub use disk_name::DiskName;

use crate::image::utc;
use crate::state_folder::StateFolder;
use crate::store::{Progress, create_domain_for, open, rough};

#[derive(Args)]
pub struct VolumeArguments {
    #[command(subcommand)]
    command: VolumeCommand,
}

#[derive(Subcommand)]
enum VolumeCommand {
    /// Make a volume: empty, or as an image's disk
    Create {
        name: String,
        /// Size of an empty volume; takes no room until it is written
        #[arg(long, required_unless_present = "image", conflicts_with = "image")]
        size: Option<ByteSize>,
        /// Begin as the disk of this image
        #[arg(long)]
        image: Option<String>,
        /// What is stored and shared at a time: 4K, 16K or 64K
        #[arg(long, value_name = "SIZE", default_value_t = ByteSize(CHUNK_LEN_DEFAULT.into()), conflicts_with = "image")]
        chunk: ByteSize,
        /// Encrypt it, in a domain of its own of the same name; its key goes into the state folder
        #[arg(long, conflicts_with = "domain")]
        encrypt: bool,
        /// Encrypt it in this domain, where what is equal is stored once; an image of another is copied
        #[arg(long)]
        domain: Option<String>,
    },
    /// List the volumes
    Ls {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove volumes with their snapshots; clones of them stay
    Rm {
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Give a volume another size, also while it is in use
    Resize {
        name: String,
        size: ByteSize,
        /// Let it become smaller: what lies beyond is gone
        #[arg(long)]
        shrink: bool,
    },
    /// Take, list and remove snapshots
    Snapshot {
        #[command(subcommand)]
        command: SnapshotCommand,
    },
    /// Make a volume that begins as another one, or as a snapshot of it, and shares everything with it
    Clone {
        /// VOLUME or VOLUME@SNAPSHOT
        source: DiskName,
        name: String,
        /// Encrypt it, in a domain of its own of the same name: a copy, which shares nothing
        #[arg(long, conflicts_with = "domain")]
        encrypt: bool,
        /// Put it into this domain; if the other is not in it, as a copy, which shares nothing
        #[arg(long)]
        domain: Option<String>,
    },
    /// Make a volume what it was at a snapshot; what was written since is gone
    Rollback {
        volume: String,
        snapshot: String,
    },
    /// List the parts in which two disks differ
    Diff {
        /// VOLUME or VOLUME@SNAPSHOT
        from: DiskName,
        /// VOLUME or VOLUME@SNAPSHOT
        to: DiskName,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    Serve(serve::ServeArguments),
}

#[derive(Subcommand)]
enum SnapshotCommand {
    /// Take a snapshot, also while the volume is in use
    Create { volume: String, name: String },
    /// List the snapshots of a volume, oldest first
    Ls {
        volume: String,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove snapshots
    Rm {
        volume: String,
        #[arg(required = true)]
        names: Vec<String>,
    },
}

/// Carries out `polder volume ...`.
pub fn volume(arguments: VolumeArguments) -> Result<ExitCode> {
    let state = StateFolder::open()?;
    let store = open(&state)?;
    match arguments.command {
        VolumeCommand::Create { name, size, image, chunk, encrypt, domain } => {
            let make = |domain: Option<&str>| create(&store, &name, size, image.as_deref(), chunk, domain);
            in_domain(&state, &store, &name, encrypt, domain.as_deref(), make)?;
        }
        VolumeCommand::Ls { json } => list(&store, json)?,
        VolumeCommand::Rm { names } => names.iter().try_for_each(|name| remove(&store, name))?,
        VolumeCommand::Resize { name, size, shrink } => resize(&store, &name, size, shrink)?,
        VolumeCommand::Snapshot { command: SnapshotCommand::Create { volume, name } } => {
            store.take_snapshot(&volume, &name)?;
        }
        VolumeCommand::Snapshot { command: SnapshotCommand::Ls { volume, json } } => {
            list_snapshots(&store, &volume, json)?;
        }
        VolumeCommand::Snapshot { command: SnapshotCommand::Rm { volume, names } } => {
            names.iter().try_for_each(|name| store.remove_snapshot(&volume, name))?;
        }
        VolumeCommand::Clone { source, name, encrypt, domain } => {
            let make = |domain: Option<&str>| clone(&store, &source, &name, domain);
            in_domain(&state, &store, &name, encrypt, domain.as_deref(), make)?;
        }
        VolumeCommand::Rollback { volume, snapshot } => store.roll_back(&volume, &snapshot)?,
        VolumeCommand::Diff { from, to, json } => diff(&store, &from, &to, json)?,
        VolumeCommand::Serve(arguments) => return serve::serve(&store, &arguments),
    }
    Ok(ExitCode::SUCCESS)
}

fn create(
    store: &Arc<Store>,
    name: &str,
    size: Option<ByteSize>,
    image: Option<&str>,
    chunk: ByteSize,
    domain: Option<&str>,
) -> Result<()> {
    match (size, image) {
        (Some(size), _) => {
            let chunk_len = u32::try_from(chunk.0).unwrap_or(u32::MAX);
            store.create_volume_in(name, &Content::Zeros { capacity_bytes: size.0, chunk_len }, domain)?;
        }
        (None, Some(image)) => begin_as(store, name, &Content::Image(image), image_domain(store, image)?, domain)?,
        (None, None) => unreachable!("the parser asks for one of the two"),
    }
    Ok(())
}

/// Makes a volume in a domain, which is made first if it is to be one of its own.
fn in_domain(
    state: &StateFolder,
    store: &Arc<Store>,
    name: &str,
    encrypt: bool,
    domain: Option<&str>,
    make: impl FnOnce(Option<&str>) -> Result<()>,
) -> Result<()> {
    if !encrypt {
        return make(domain);
    }
    if store.volume(name).is_ok() {
        bail!("there is a volume {name} already");
    }
    create_domain_for(state, store, name, || make(Some(name)))
}

/// Makes a volume that shares what it begins as, or is a copy of that if it is to be in another domain.
fn begin_as(store: &Arc<Store>, name: &str, content: &Content<'_>, origin: u32, domain: Option<&str>) -> Result<()> {
    let Some(wanted) = domain.map(|domain| store.domain(domain)).transpose()?.filter(|row| row.id != origin) else {
        store.create_volume(name, content)?;
        return Ok(());
    };
    let mut progress = Progress::new();
    store.copy_volume(name, content, Some(&wanted.name), &mut |step| progress.show(step))?;
    progress.finish();
    Ok(())
}

/// The domain that the disk of an image is in.
fn image_domain(store: &Arc<Store>, image: &str) -> Result<u32> {
    Ok(store.image(image)?.1.disks.first().map_or(OPEN_DOMAIN, |disk| disk.domain))
}

fn clone(store: &Arc<Store>, source: &DiskName, name: &str, domain: Option<&str>) -> Result<()> {
    if domain.is_none() {
        store.clone_volume(&source.volume, source.snapshot.as_deref(), name)?;
        return Ok(());
    }
    let (volume, taken) = (&source.volume, format!("for-{name}-{}", Id::random()));
    let snapshot = match &source.snapshot {
        Some(snapshot) => store.snapshot(volume, snapshot)?,
        None => store.take_snapshot(volume, &taken)?,
    };
    let made = begin_as(store, name, &Content::Snapshot(&snapshot), snapshot.domain, domain);
    if source.snapshot.is_none() {
        // The volume has what it needs.
        store.remove_snapshot(volume, &taken)?;
    }
    made
}

/// Removes a volume; says so if its domain has nothing in it any more.
fn remove(store: &Arc<Store>, name: &str) -> Result<()> {
    let row = store.volume(name)?;
    store.remove_volume(name)?;
    let domain = store.domains()?.into_iter().find(|domain| domain.id == row.domain);
    if let Some(domain) = domain
        && !store.is_domain_in_use(domain.id)?
    {
        println!(
            "Nothing is in domain {0} any more: `polder store domain erase {0} --yes` removes it and its key",
            domain.name
        );
    }
    Ok(())
}

fn list(store: &Arc<Store>, as_json: bool) -> Result<()> {
    let volumes = store.volumes()?;
    let domains: BTreeMap<u32, String> = store.domains()?.into_iter().map(|row| (row.id, row.name)).collect();
    if as_json {
        let values: Vec<_> = volumes
            .iter()
            .map(|volume| {
                json!({
                    "name": volume.row.name, "id": volume.row.id.to_string(), "capacity_bytes": volume.capacity_bytes,
                    "chunk_bytes": volume.row.chunk_len, "created_utc": utc(volume.row.created_ns / 1_000_000_000),
                    "snapshots": volume.snapshots, "process": volume.user,
                    "domain": domains.get(&volume.row.domain),
                })
            })
            .collect();
        println!("{:#}", serde_json::Value::from(values));
        return Ok(());
    }
    println!("{:<30} {:>10} {:>9}  {:<20} {:<15} USED BY", "NAME", "SIZE", "SNAPSHOTS", "CREATED", "DOMAIN");
    for volume in volumes {
        println!(
            "{:<30} {:>10} {:>9}  {:<20} {:<15} {}",
            volume.row.name,
            rough(volume.capacity_bytes),
            volume.snapshots,
            utc(volume.row.created_ns / 1_000_000_000),
            domains.get(&volume.row.domain).map_or("-", String::as_str),
            volume.user.map_or("-".to_owned(), |process| format!("process {process}"))
        );
    }
    Ok(())
}

fn resize(store: &Arc<Store>, name: &str, size: ByteSize, shrink: bool) -> Result<()> {
    let volumes = store.volumes()?;
    let now = volumes.iter().find(|volume| volume.row.name == name).map_or(0, |volume| volume.capacity_bytes);
    if size.0 < now && !shrink {
        bail!(
            "volume {name} has {} and would lose what lies beyond {size}: add --shrink if that is wanted",
            rough(now)
        );
    }
    Ok(store.resize_volume(name, size.0)?)
}

fn list_snapshots(store: &Arc<Store>, volume: &str, as_json: bool) -> Result<()> {
    let snapshots = store.snapshots(volume)?;
    if as_json {
        let values: Vec<_> = snapshots
            .iter()
            .map(|snapshot| {
                json!({
                    "name": snapshot.name, "id": snapshot.id.to_string(), "capacity_bytes": snapshot.capacity_bytes,
                    "created_utc": utc(snapshot.created_ns / 1_000_000_000),
                    "node": snapshot.node.map(|node| node.to_string()),
                })
            })
            .collect();
        println!("{:#}", serde_json::Value::from(values));
        return Ok(());
    }
    println!("{:<30} {:>10}  {:<20} NODE", "NAME", "SIZE", "CREATED");
    for snapshot in snapshots {
        println!(
            "{:<30} {:>10}  {:<20} {}",
            snapshot.name,
            rough(snapshot.capacity_bytes),
            utc(snapshot.created_ns / 1_000_000_000),
            // Its content is still on its way from the log.
            snapshot.node.map_or("(in the log)".to_owned(), |node| node.to_string()[..16].to_owned())
        );
    }
    Ok(())
}

fn diff(store: &Arc<Store>, from: &DiskName, to: &DiskName, as_json: bool) -> Result<()> {
    let (from, to) = (
        store.settled_disk(&from.volume, from.snapshot.as_deref())?,
        store.settled_disk(&to.volume, to.snapshot.as_deref())?,
    );
    if from.chunk_len != to.chunk_len {
        bail!("the disks have chunks of {} and {} bytes and cannot be compared", from.chunk_len, to.chunk_len);
    }
    let (mut parts, mut bytes) = (Vec::new(), 0);
    let end = from.len_bytes.max(to.len_bytes);
    store.differences([from.root, to.root], to.chunk_len, 0..end, &mut |range| {
        bytes += range.end - range.start;
        match as_json {
            true => parts.push(json!({ "offset": range.start, "length": range.end - range.start })),
            false => println!("{:>16} {:>12}", range.start, range.end - range.start),
        }
        Ok(())
    })?;
    match as_json {
        true => println!("{:#}", json!({ "bytes": bytes, "parts": parts })),
        false => println!("{} differ, in whole chunks of {} bytes", rough(bytes), to.chunk_len),
    }
    Ok(())
}
