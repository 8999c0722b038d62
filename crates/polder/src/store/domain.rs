//! `polder store domain`: sets of volumes and images that are encrypted, and their keys.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use polder_store::{DomainErased, DomainRow, Key, KeyKind, Store};
use polder_trust::keys::{Erased, KeyFile, erase};
use serde_json::json;

use crate::image::{remove_boot_files_of, utc};
use crate::state_folder::StateFolder;

#[derive(Args)]
pub struct DomainArguments {
    #[command(subcommand)]
    command: DomainCommand,
}

#[derive(Subcommand)]
enum DomainCommand {
    /// Make an encrypted domain, for `--domain` of `polder volume create`, `polder image import` and `polder image build`
    Create {
        name: String,
        #[command(flatten)]
        key: KeyArguments,
    },
    /// List the domains, and whether their keys are to be had
    Ls {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Put a domain under another key; what is stored stays as it is
    Rewrap {
        name: String,
        #[command(flatten)]
        key: KeyArguments,
    },
    /// Destroy a domain's secret and key file: what is in the domain is never read again
    Erase {
        name: String,
        /// Do it
        #[arg(long, required = true)]
        yes: bool,
    },
}

/// Where a domain's key is; without any of them polder makes a key file in its state folder.
#[derive(Args, Default)]
struct KeyArguments {
    /// The file with the key: 32 bytes or 64 hexadecimal digits, which only its owner may read; made if it is not there
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// The file with the passphrase, which only its owner may read
    #[arg(long, value_name = "FILE", conflicts_with = "key_file")]
    passphrase_file: Option<PathBuf>,
}

/// Carries out `polder store domain ...`.
pub fn domain(state: &StateFolder, store: &Arc<Store>, arguments: &DomainArguments) -> Result<ExitCode> {
    match &arguments.command {
        DomainCommand::Create { name, key } => create(state, store, name, key)?,
        DomainCommand::Ls { json } => list(store, *json)?,
        DomainCommand::Rewrap { name, key } => rewrap(state, store, name, key)?,
        DomainCommand::Erase { name, .. } => erase_domain(state, store, name)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes a domain, and its key file if there is none yet.
fn create(state: &StateFolder, store: &Arc<Store>, name: &str, arguments: &KeyArguments) -> Result<()> {
    polder_store::check_name("domain", name)?;
    if store.domain(name).is_ok() {
        bail!("there is a domain {name} already");
    }
    let (key, path) = key(arguments, &state.keys().join(format!("{name}.key")))?;
    store.create_domain(name, &key, Some(&path))?;
    Ok(())
}

/// Makes a domain for something that is put into it by `make`. If that fails the domain goes again, with its key.
pub fn create_for<T>(
    state: &StateFolder,
    store: &Arc<Store>,
    name: &str,
    make: impl FnOnce() -> Result<T>,
) -> Result<T> {
    create(state, store, name, &KeyArguments::default())?;
    make().inspect_err(|_| {
        let undone = store.domain(name).map_err(anyhow::Error::from).and_then(|row| destroy(store, &row));
        if let Err(error) = undone {
            eprintln!("polder: domain {name} stays, with nothing in it: {error:#}");
        }
    })
}

/// The key that arguments name, and where it lies.
fn key(arguments: &KeyArguments, default: &Path) -> Result<(Key, PathBuf)> {
    let (kind, path) = match (&arguments.key_file, &arguments.passphrase_file) {
        (_, Some(path)) => (KeyKind::Passphrase, path.as_path()),
        (Some(path), None) => (KeyKind::File, path.as_path()),
        (None, None) => (KeyKind::File, default),
    };
    let path = std::path::absolute(path)?;
    if kind == KeyKind::File && !path.exists() {
        if let Some(folder) = path.parent().filter(|_| arguments.key_file.is_none()) {
            make_private_folder(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        }
        return Ok((Key::File(KeyFile::create(&path)?), path));
    }
    let key = Key::read(kind, &path).map_err(anyhow::Error::msg)?;
    Ok((key, path))
}

fn make_private_folder(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

fn list(store: &Arc<Store>, as_json: bool) -> Result<()> {
    let volumes = store.volumes()?;
    let rows = store.domains()?;
    let rows: Vec<_> = rows
        .into_iter()
        .map(|row| {
            let uses = volumes.iter().filter(|volume| volume.row.domain == row.id).count();
            let locked = match row.is_erased {
                true => Some("erased".to_owned()),
                false => store.why_locked(&row),
            };
            (row, uses, locked)
        })
        .collect();
    if as_json {
        let values = rows.iter().map(|(row, uses, locked)| {
            json!({
                "name": row.name, "created_utc": utc(row.created_ns / 1_000_000_000), "volumes": uses,
                "key_file": row.key_file, "erased": row.is_erased, "locked": locked,
            })
        });
        println!("{:#}", values.collect::<serde_json::Value>());
        return Ok(());
    }
    println!("{:<30} {:>7}  {:<20} KEY", "NAME", "VOLUMES", "CREATED");
    for (row, uses, locked) in rows {
        let key = match (locked, row.key_file) {
            (Some(why), _) => why,
            (None, Some(path)) => path,
            (None, None) => "-".to_owned(),
        };
        println!("{:<30} {uses:>7}  {:<20} {key}", row.name, utc(row.created_ns / 1_000_000_000));
    }
    Ok(())
}

fn rewrap(state: &StateFolder, store: &Arc<Store>, name: &str, arguments: &KeyArguments) -> Result<()> {
    store.domain(name)?;
    let (new, path) = key(arguments, &state.keys().join(format!("{name}.key")))?;
    let erased = store.rewrap_domain(name, &new, Some(&path))?;
    println!("Domain {name} is under {}", path.display());
    if let Some(Erased::OldBytesMayRemain) = erased {
        println!(
            "The record under the old key may remain on the disk until its place is used again: keep the old key secret, or destroy it"
        );
    }
    Ok(())
}

/// What became of a domain, and of the file that its key was in.
struct Destroyed {
    outcomes: Vec<Option<Erased>>,
    kind: Option<KeyKind>,
    is_shared: bool,
    is_forgotten: bool,
}

/// Destroys a domain's secret, and its key file unless something else needs that.
fn destroy(store: &Arc<Store>, row: &DomainRow) -> Result<Destroyed> {
    let kind = store.key_kind(row).ok();
    let is_shared =
        store.domains()?.iter().any(|other| other.id != row.id && !other.is_erased && other.key_file == row.key_file);
    let DomainErased { wrapped, is_forgotten } = store.erase_domain(&row.name)?;
    let mut outcomes = vec![wrapped];
    if let (Some(path), Some(KeyKind::File), false) = (&row.key_file, kind, is_shared)
        && Path::new(path).exists()
    {
        outcomes.push(Some(erase(Path::new(path))?));
    }
    Ok(Destroyed { outcomes, kind, is_shared, is_forgotten })
}

fn erase_domain(state: &StateFolder, store: &Arc<Store>, name: &str) -> Result<()> {
    let row = store.domain(name)?;
    let Destroyed { outcomes, kind, is_shared, is_forgotten } = destroy(store, &row)?;
    // Kernels of the host that came out of the domain; they are made anew from what is left of it, which is nothing.
    remove_boot_files_of(state, store, row.id)?;
    match &row.key_file {
        Some(path) if is_shared => println!("Key file {path} stays: another domain is under it"),
        Some(path) if Path::new(path).exists() => match kind {
            Some(KeyKind::Passphrase) => {
                println!("The passphrase in {path} stays: destroy it if nothing else needs it")
            }
            Some(KeyKind::File) => {}
            None => println!(
                "{path} stays: the domain was erased before, and what the file is to it cannot be told any more"
            ),
        },
        _ => {}
    }
    match outcomes.contains(&Some(Erased::OldBytesMayRemain)) {
        false => println!("The secret and the key file were overwritten where they lay"),
        true => println!(
            "The secret and the key file were removed, but this file system may keep the old bytes until their place is used again"
        ),
    }
    if is_forgotten {
        println!("Nothing was in domain {name}: it is gone, and its name is free");
    }
    println!(
        "Copies of the store hold the wrapped secret as well: what they hold can be read as long as the key is somewhere, or the passphrase is known"
    );
    Ok(())
}
